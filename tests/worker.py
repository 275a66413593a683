"""Run in real processes by test_distributed: trains ten steps in several settings, and writes what rank zero saw."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor

from tests.settings import SETTINGS
from vae_dist import shared_memory, step
from vae_dist.charts import Closeup
from vae_dist.config import Config, ModelConfig
from vae_dist.data import glyphs
from vae_dist.data.images import Resident
from vae_dist.distributed import run_entry_point
from vae_dist.evaluate import evaluate
from vae_dist.model import build_model
from vae_dist.run import RunFolder
from vae_dist.shared_memory import share_memory
from vae_dist.starting import start
from vae_dist.tracking import Row, Tracker
from vae_dist.trainer import Trainer


class Recorder(Tracker):
    """Keeps the rows."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def log(self, *rows: Row, closeup: Callable[[], Closeup] | None = None) -> None:
        self.rows += rows


def observe(config: Config, images: Tensor, accelerator: Accelerator, folder: Path) -> dict[str, object]:
    """The gradient of the first step, the loss and gradient norm of each step, then the final weights and the test loss."""
    model = build_model(config.model, images.shape[1:], seed=0)
    trainer = Trainer(config, accelerator, model, Resident(images), Resident(images[:37]), RunFolder(folder))
    trainer.step._replay = None  # there is no CUDA here that could record
    trainer.tracker = recorder = Recorder()
    gradients: list[list[float]] = []

    def keep(*_: object) -> None:
        if not gradients:
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).tolist())

    trainer.step.optimizer.register_step_pre_hook(keep)
    is_last = accelerator.process_index == accelerator.num_processes - 1
    agreed = [trainer.step._all_have(not is_last), trainer.step._all_have(True)]
    assert trainer.fit()
    train = [row for row in recorder.rows if row["split"] == "train"]
    return {
        "recorded": agreed,
        "gradient": gradients[0],
        "losses": [row["loss"] for row in train],
        "objectives": [row["objective"] for row in train],
        "counts": [row["n"] for row in train],
        "norms": [row["grad_norm"] for row in train],
        "result": hashlib.sha256(save(trainer.result.state_dict())).hexdigest(),
        "test": recorder.rows[-1]["loss"] if recorder.rows else None,
    }


def sums_in_shared_memory(accelerator: Accelerator) -> list[float]:
    """The largest errors of sums over ranks of vectors short and long: the longest is taken in three parts."""
    memory, ranks = share_memory(accelerator, timeout=30), accelerator.num_processes
    assert memory is not None
    errors = []
    for numel in (1, ranks - 1 or 1, 1000, 2_500_001):
        steps = torch.arange(numel) % 1000
        vector = (steps + accelerator.process_index).float()
        memory.sum_(vector)
        errors.append((vector - (ranks * steps + ranks * (ranks - 1) / 2)).abs().max().item())
    return errors


def memory_that_one_rank_cannot_have(accelerator: Accelerator) -> bool:
    """Whether all ranks then do without: a rank that waited for the others would never come back."""
    mapped = shared_memory._mapped
    if accelerator.process_index == accelerator.num_processes - 1:
        shared_memory.__dict__["_mapped"] = lambda *_: Path("/nowhere").read_bytes()
    memory = share_memory(accelerator, timeout=30)
    shared_memory.__dict__["_mapped"] = mapped
    return memory is None


def evaluation(accelerator: Accelerator) -> dict[str, object]:
    """What `evaluate` finds in 1,700 images, which are several passes of each rank. Each has a twin.

    The decoder knows nothing, so that an image's loss does not depend on its noise: of an image and its twin it is the same.
    """
    model = build_model(ModelConfig(hidden=(30,), latent_dim=4), (1, 28, 28), seed=0)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
    images, _ = glyphs.draw(0, 850)
    return evaluate(model, Resident(torch.cat([images, images.flip(0)])), 0, accelerator)._asdict()


def main(out: Path) -> int:
    accelerator = start()
    torch.set_num_threads(1)
    images, _ = glyphs.draw(0, 200)
    seen: dict[str, object] = {
        "shared memory": sums_in_shared_memory(accelerator),
        "memory that one rank cannot have": memory_that_one_rank_cannot_have(accelerator),
        "evaluation": evaluation(accelerator),
    }
    for name, setting in SETTINGS.items():
        config = replace(setting.config, output=str(out / name))
        step.__dict__["may_be_recorded"] = lambda *_, answer=setting.as_recorded: answer
        seen[name] = observe(config, images[: setting.images], accelerator, out / name)
    if accelerator.is_main_process:
        (out / f"{accelerator.num_processes}.json").write_text(json.dumps(seen))
    return 0


if __name__ == "__main__":
    run_entry_point(lambda: main(Path(sys.argv[1])))
