"""The average of the weights: its recurrence, what has it, exact through interruptions, and refused where forged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vae_dist
from tests.helpers import Outcome, records, refused
from vae_dist import checkpoint
from vae_dist.averaging import averages_in, decay_of_step
from vae_dist.checkpoint import Checkpoint
from vae_dist.config import InputError
from vae_dist.model import build_model
from vae_dist.run import RunFolder
from vae_dist.trainer import Trainer

Command = Callable[..., Outcome]
AVERAGED: list[object] = ["--optimizer.ema", 0.9]
OFTEN: list[object] = ["--checkpoint.every_steps", 1, "--checkpoint.keep", 99, "--tracking.log_every", 2]
STEPS = 16


@pytest.fixture
def averaged(quick: list[object], command: Command, tmp_path: Path) -> Path:
    """The folder of a finished run with an average of the weights and a checkpoint of each step."""
    assert command("train", *quick, *AVERAGED, *OFTEN, "--output", tmp_path / "run").status == 0
    return tmp_path / "run"


def saved_at(run: Path, step: int) -> Checkpoint:
    return checkpoint.read(checkpoint.folder_of_step(run / "checkpoints", step))


def weights_of(path: Path) -> dict[str, Tensor]:
    return vae_dist.load(path).state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_decay_warms_up() -> None:
    assert [decay_of_step(0.9, step) for step in (0, 1, 8, 79, 80, 81, 10**9)] == [0.1, 2 / 11, 0.5, 80 / 89, 0.9, 0.9, 0.9]


def test_the_average_is_the_recurrence_over_the_weights_of_all_steps(averaged: Path) -> None:
    """By hand, in float64, from the weights of the start and those that each step's checkpoint holds."""
    config = RunFolder(averaged).config()
    by_hand = {name: t.double() for name, t in build_model(config.model, (1, 28, 28), config.seed).state_dict().items()}
    for step in range(STEPS):
        saved = saved_at(averaged, step + 1)
        decay = min(0.9, (1 + step) / (10 + step))
        by_hand = {name: decay * average + (1 - decay) * saved.model[name].double() for name, average in by_hand.items()}
        found = averages_in(saved.trainer)
        assert found.keys() == by_hand.keys()
        for name, average in by_hand.items():
            torch.testing.assert_close(found[name].double(), average, rtol=1e-5, atol=1e-8)


def test_what_a_run_leaves_and_a_checkpoint_loads_is_the_average(averaged: Path) -> None:
    last, folder = saved_at(averaged, STEPS), checkpoint.folder_of_step(averaged / "checkpoints", STEPS)
    assert not same(averages_in(last.trainer), last.model), "a checkpoint's model.safetensors has the weights in training"
    assert same(load_file(averaged / "model.safetensors"), averages_in(last.trainer))
    assert same(weights_of(averaged), averages_in(last.trainer))
    assert same(weights_of(folder), averages_in(last.trainer))
    (averaged / "status.json").write_text('{"state": "running"}')
    shutil.rmtree(folder)
    assert same(weights_of(averaged), averages_in(saved_at(averaged, STEPS - 1).trainer)), "an unfinished run: its newest"


def test_evaluating_the_run_or_its_last_checkpoint_gives_the_test_row(averaged: Path, command: Command) -> None:
    last = next(row for row in reversed(records(averaged)) if row["split"] == "test")
    of_run = command("evaluate", averaged)
    of_checkpoint = command("evaluate", checkpoint.folder_of_step(averaged / "checkpoints", STEPS))
    found = json.loads((averaged / "evaluation.json").read_text())
    assert [found[key] for key in ("n", "loss", "kld_per_dim")] == [last[key] for key in ("n", "loss", "kld_per_dim")]
    assert of_checkpoint.out == of_run.out != ""


def test_pictures_are_the_averages(averaged: Path, command: Command, tmp_path: Path) -> None:
    for source in (averaged, checkpoint.folder_of_step(averaged / "checkpoints", STEPS)):
        out = tmp_path / source.name
        assert command("generate", source, "--out", out).status == 0
        assert (out / "samples.png").read_bytes() == (averaged / "images" / "sample_2.png").read_bytes()
        assert (out / "reconstructions.png").read_bytes() == (averaged / "images" / "reconstruction_2.png").read_bytes()


def test_without_an_average_nothing_is_there_of_it_and_training_is_the_same(
    averaged: Path, quick: list[object], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Trainer] = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: made.append(self) or fit(self))  # type: ignore[func-returns-value]
    assert command("train", *quick, *OFTEN, "--output", tmp_path / "plain").status == 0
    assert made[0].step.averages is None
    assert made[0].result is made[0].model, "no copy"
    plain, with_average = saved_at(tmp_path / "plain", STEPS), saved_at(averaged, STEPS)
    assert same(plain.model, with_average.model)
    assert same(plain.trainer, {name: t for name, t in with_average.trainer.items() if not name.startswith("ema.")})
    assert {name.split(".")[0] for name in plain.trainer} == {"optimizer"}
    train, train_averaged = ([row for row in records(run) if row["split"] == "train"] for run in (tmp_path / "plain", averaged))
    assert train == train_averaged


@pytest.mark.parametrize("cut", [3, 8])
def test_a_run_cut_off_after_a_checkpoint_ends_with_the_same_average(
    cut: int, averaged: Path, quick: list[object], command: Command, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(averaged, again)
    for step in range(cut + 1, STEPS + 1):
        shutil.rmtree(checkpoint.folder_of_step(again / "checkpoints", step))
    for name in ("model.safetensors", "config.json", "status.json"):
        (again / name).unlink()
    assert command("train", *quick, *AVERAGED, *OFTEN, "--output", again).status == 0
    last = checkpoint.folder_of_step(Path("checkpoints"), STEPS)
    for file in (Path("model.safetensors"), last / "trainer.safetensors", Path("images/sample_2.png")):
        assert (again / file).read_bytes() == (averaged / file).read_bytes()
    assert records(again) == records(averaged)


def test_a_run_is_not_gone_on_with_another_average(averaged: Path, quick: list[object], command: Command) -> None:
    refused(command("train", *quick, "--output", averaged), "optimizer.ema: 0.9 there, 0.0 here")


FORGED: list[tuple[dict[str, Tensor], str]] = [
    ({}, 'Missing key(s) in state_dict: "decoder.0.bias"'),
    ({"ema.decoder.0.bias": torch.zeros(2, 3)}, "size mismatch for decoder.0.bias"),
    ({"ema.decoder.0.bias": torch.zeros(40, dtype=torch.int8)}, "are not float32"),
]


@pytest.mark.parametrize(("forged", "told"), FORGED, ids=["missing", "of another shape", "of another type"])
def test_an_average_that_does_not_fit_is_refused(
    forged: dict[str, Tensor], told: str, averaged: Path, quick: list[object], command: Command, tmp_path: Path
) -> None:
    """Under a right hash, as another program would write it: neither gone on from nor evaluated."""
    saved = saved_at(averaged, STEPS)
    others = {name: tensor for name, tensor in saved.trainer.items() if name != "ema.decoder.0.bias"}
    folder = checkpoint.folder_of_step(tmp_path / "forged", STEPS)
    checkpoint.write(folder, saved._replace(trainer=others | forged))
    words = "step_00000016: the averaged weights ", told
    refused(command("train", *quick, *AVERAGED, "--resume", folder, "--output", tmp_path / "new"), *words)
    refused(command("evaluate", folder), *words)
    with pytest.raises(InputError):
        vae_dist.load(folder)
