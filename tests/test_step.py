"""One optimizer step: no host has a say in it, every step is the same operators, and a recording of it computes the same."""

import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.settings import SETTINGS
from tests.worker import Recorder
from vae_dist import step as step_module
from vae_dist.config import Config
from vae_dist.data import glyphs
from vae_dist.data.images import Resident
from vae_dist.model import build_model
from vae_dist.replay import WARM_UPS, Recording, Replay, record_cuda_graph
from vae_dist.run import RunFolder
from vae_dist.trainer import Trainer

IMAGES = 390  # 20 steps of 20 images, the last of 10


class Tape(TorchDispatchMode):
    """The operators that ran, with the memory that they read and wrote: what a CUDA graph holds, on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def names(self) -> list[str]:
        return [str(func) for func, *_ in self.calls]

    def play(self) -> None:
        """Runs them again, each on the memory that it had."""
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def trainer_of(config: Config, folder: Path, images: int = IMAGES) -> Trainer:
    pixels, _ = glyphs.draw(0, images)
    trainer = Trainer(
        config,
        Accelerator(cpu=True),
        build_model(config.model, (1, 28, 28), 0),
        Resident(pixels),
        Resident(pixels[:20]),
        RunFolder(folder),
    )
    trainer.tracker = Recorder()
    return trainer


def state_of(trainer: Trainer) -> list[Tensor]:
    """All that a step changes in place."""
    moments = [tensor for of_one in trainer.step.optimizer.state.values() for tensor in of_one.values()]
    return [*trainer.model.parameters(), *moments, *trainer.result.parameters()]


@pytest.mark.parametrize(
    "setting", ["adam", "sgd, clipped", "doubly reparameterised, accumulated, binarised", "adamw, averaged"]
)
def test_every_step_is_the_same_operators_and_none_asks_the_device(setting: str, tmp_path: Path) -> None:
    """The short last step too: else no graph could hold them, and the device would be waited for."""
    trainer = trainer_of(SETTINGS[setting].config, tmp_path)
    seen = []
    for number, batch in enumerate(trainer._batches(epoch=1, first=0)):
        with Tape() as tape:
            trainer.step(*batch, number, 1e-3)
        seen.append(tape.names())
    assert len(seen) > 10
    assert all(names == seen[1] for names in seen[2:])  # the first one makes the optimizer's state
    asking = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item")
    assert not [name for name in seen[1] if any(word in name for word in asking)]


@pytest.mark.parametrize(
    "setting",
    [
        "adam",
        "adam, clipped",
        "accumulated",
        "doubly reparameterised, accumulated, binarised",
        "learned sigma, annealed, free bits",
        "adamw, averaged",
    ],
)
def test_a_recorded_step_computes_the_same(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the recording is a tape of operators. It fails where anything is baked into it: a learning rate, an address."""
    config = replace(SETTINGS[setting].config, optimizer=replace(SETTINGS[setting].config.optimizer, warmup_steps=15))
    eager = trainer_of(config, tmp_path / "eager")
    assert eager.fit()
    monkeypatch.setattr(step_module, "may_be_recorded", lambda *_: True)
    recorded = trainer_of(config, tmp_path / "recorded")
    tapes: list[Tape] = []

    def record(action: Callable[[], Tensor]) -> Recording:
        """Records without running: what the action changes is put back."""
        before = [tensor.clone() for tensor in state_of(recorded)]
        with Tape() as tape:
            result = action()
        with torch.no_grad():
            for tensor, old in zip(state_of(recorded), before, strict=True):
                tensor.copy_(old)
        tapes.append(tape)
        return result, tape.play

    replay = Replay(recorded.step._compute, bool, record)
    recorded.step._replay = replay
    assert recorded.fit()
    assert len(tapes) == 1
    assert eager.progress.step > WARM_UPS + 5
    for one, other in zip(state_of(eager), state_of(recorded), strict=True):
        assert (other - one).norm() <= 1e-5 * one.norm()  # the rate is float32 there, and Adam blows up small gradients
    losses = [[row["loss"] for row in trainer.tracker.rows] for trainer in (eager, recorded)]  # type: ignore[attr-defined]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    norms = [[row.get("grad_norm") for row in trainer.tracker.rows][:-1] for trainer in (eager, recorded)]  # type: ignore[attr-defined]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("where", ["here", "on another rank"])
def test_a_step_that_cannot_be_recorded_goes_on_as_it_is(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    def record(action: Callable[[], Tensor]) -> Recording:
        if where == "here":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return torch.zeros(()), lambda: calls.append(-1.0)

    def all_have(recorded: bool) -> bool:
        told.append(recorded)
        return False

    calls: list[float] = []
    told: list[bool] = []

    def action(x: Tensor) -> Tensor:
        calls.append(float(x))
        return x * 2

    replay = Replay(action, all_have, record)
    results = [float(replay(torch.tensor(float(i)))) for i in range(WARM_UPS + 3)]
    assert results == [2.0 * i for i in range(WARM_UPS + 3)]
    assert calls == [float(i) for i in range(WARM_UPS + 3)], "each once"
    assert told == [where != "here"]
    assert ("operation not permitted when stream is capturing" in capsys.readouterr().out) == (where == "here")


def test_a_closed_step_keeps_no_recording(tmp_path: Path) -> None:
    """NCCL waits until every graph with one of its sums in it is gone."""
    trainer = trainer_of(SETTINGS["adam"].config, tmp_path)
    results = [torch.zeros(3, dtype=torch.float64)]
    held = weakref.ref(results[0])
    trainer.step._replay = Replay(trainer.step._compute, bool, lambda _: (results.pop(), lambda: None))
    assert trainer.fit()
    assert held() is not None
    trainer.step.close()
    assert held() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_computes_the_same() -> None:
    weight = torch.randn(20, 20, device="cuda")

    def action(x: Tensor) -> Tensor:
        weight.mul_(0.99)
        return (x @ weight).sum()

    replay, start = Replay(action, bool, record_cuda_graph), weight.clone()
    inputs = torch.randn(30, 5, 20, device="cuda")
    found = torch.stack([replay(x).clone() for x in inputs])
    assert replay._recording is not None
    expected = torch.stack([(x @ (start * 0.99 ** (i + 1))).sum() for i, x in enumerate(inputs)])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_step_computes_the_same(precision: Any, tmp_path: Path) -> None:
    base = SETTINGS["adam"].config
    losses = []
    for compiled in (False, True):
        config = replace(base, trainer=replace(base.trainer, compile=compiled, precision=precision))
        trainer = trainer_of(config, tmp_path / str(compiled))
        assert trainer.fit()
        losses.append([row["loss"] for row in trainer.tracker.rows])  # type: ignore[attr-defined]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
