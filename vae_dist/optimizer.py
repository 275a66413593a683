"""The optimizer, its schedule as a function of the step, and its state as named tensors."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vae_dist.config import InputError, OptimizerConfig

_ADAM_STATE = {"step": False, "exp_avg": True, "exp_avg_sq": True}  # whether it has the parameter's shape
_IWAE_LAST_STAGE = 7


def build_optimizer(config: OptimizerConfig, model: nn.Module, is_recorded: bool = False) -> torch.optim.Optimizer:
    """Adam, AdamW or plain SGD, in fused kernels over many parameters; fit to be recorded as a CUDA graph, if it is to be."""
    parameters = trained_parameters(model)
    rate = torch.tensor(config.lr, device=parameters[0].device) if is_recorded else config.lr
    if config.kind == "sgd":
        return torch.optim.SGD(parameters, lr=rate, fused=True)
    betas, eps = config.betas, config.eps
    if config.kind == "adamw":
        groups = _by_decay(parameters, config.weight_decay)
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True, capturable=is_recorded)
    return torch.optim.Adam(parameters, lr=rate, betas=betas, eps=eps, fused=True, capturable=is_recorded)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All but those that a program has frozen, by requires_grad_(False)."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _by_decay(parameters: list[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels decay; biases and norms' scales would only be kept off their place."""
    weights, others = ([p for p in parameters if (p.ndim >= 2) == is_weight] for is_weight in (True, False))
    return [{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # a CUDA graph goes on reading it where it lies
        else:
            group["lr"] = rate


def learning_rate(config: OptimizerConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of a run of `epochs` epochs."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "iwae":
        return config.lr * 10 ** (-_iwae_stage(step // steps_per_epoch) / _IWAE_LAST_STAGE)
    total_steps = steps_per_epoch * epochs
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * ((1 - progress) if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def _iwae_stage(epoch: int) -> int:
    """Of epoch `epoch` (from 0): stage i takes 3^i epochs, 3,280 in all; the last has no end. Burda et al. 2016, section 5."""
    ends = [(3 ** (stage + 1) - 1) // 2 for stage in range(_IWAE_LAST_STAGE)]
    return sum(epoch >= end for end in ends)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as `optimizer.<parameter>.<moment>`, so that it goes by name, never by order."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restores what `optimizer_tensors` gave. Raises InputError where a tensor is missing, or of another shape or type."""
    keys = _ADAM_STATE if isinstance(optimizer, torch.optim.Adam) else {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    numbered = [parameter for group in optimizer.param_groups for parameter in group["params"]]  # as its `state_dict` has them
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(numbered):
        name, state[index] = names[parameter], {}
        for key, has_shape in keys.items():
            value = tensors.get(f"optimizer.{name}.{key}")
            shape = parameter.shape if has_shape else torch.Size()
            if value is None or value.shape != shape or value.dtype != torch.float32:
                raise InputError(f"the optimizer's {key} of {name} is missing, or not float32 of shape {tuple(shape)}")
            state[index][key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
