"""The optimizer, its schedule as a function of the step, and its state as named tensors."""

import math

import torch
from torch import Tensor, nn

from vae_dist.config import InputError, OptimizerConfig


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Adam or plain SGD, in one fused kernel for all parameters."""
    if config.kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=config.lr, fused=True)
    return torch.optim.Adam(model.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * ((1 - progress) if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as `optimizer.<parameter>.<moment>`, so that it goes by name, never by order."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restores what `optimizer_tensors` gave. Raises InputError where a parameter's state is missing or of another shape."""
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        prefix = f"optimizer.{name}."
        found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if any(value.ndim and value.shape != parameter.shape for value in found.values()):
            raise InputError(f"the checkpoint's optimizer state of {name} has another shape than the parameter")
        if found:
            state[index] = found
    adam = isinstance(optimizer, torch.optim.Adam)
    if adam and tensors and len(state) != len(optimizer.param_groups[0]["params"]):
        raise InputError("the checkpoint's optimizer state lacks parameters of this model")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
