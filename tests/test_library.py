"""Training from Python: images, modules, a likelihood and callbacks of one's own, and the guarantees of the command."""

import dataclasses
import doctest
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vae_dist
from tests.helpers import ROOT, Outcome, launch, records, refused, resident
from tests.own_program import Dataset, Laplace, Listener, build, settings
from vae_dist import VAE, Config, DataConfig, InputError, ModelConfig, OptimizerConfig, TrackingConfig, TrainerConfig
from vae_dist.data import glyphs
from vae_dist.model import seeded
from vae_dist.run import RunFolder

IMAGES = glyphs.draw(0, 120)[0]
TRAIN, TEST = IMAGES[:90], IMAGES[90:]


def small(output: Path, epochs: int = 2, **changes: Any) -> Config:
    quiet = TrackingConfig(wandb="disabled", log_every=2)
    data, trainer = DataConfig(batch_size=30), TrainerConfig(epochs=epochs)
    return Config(output=str(output), data=data, trainer=trainer, tracking=quiet, **changes)


def test_a_run_from_python_is_the_commands_to_the_byte(
    small_root: Path, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    options = ["--data.root", small_root, "--trainer.epochs", 2, "--model.hidden", 40, "--tracking.wandb", "disabled"]
    assert command("train", *options, "--output", tmp_path / "command").status == 0
    data = DataConfig(root=str(small_root))
    config = dataclasses.replace(small(tmp_path / "python", model=ModelConfig(hidden=(40,))), data=data)
    config = dataclasses.replace(config, tracking=TrackingConfig(wandb="disabled"))
    result = vae_dist.fit(config, resident(data, train=True).pixels, resident(data, train=False).pixels)
    assert result.status == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("command", "python")]
    assert weights[0] == weights[1]
    assert records(tmp_path / "command") == records(tmp_path / "python")
    assert result.test["loss"] == records(tmp_path / "python")[-1]["loss"]
    by_set = dataclasses.replace(config, output=str(tmp_path / "set"))
    assert vae_dist.fit(by_set).test["loss"] == result.test["loss"]


@pytest.mark.slow
def test_own_parts_give_the_same_bytes_at_one_and_at_two_processes(tmp_path: Path) -> None:
    said = []
    for processes in (1, 2):
        done = launch("tests.own_program", tmp_path / str(processes), processes=processes)
        assert done.returncode == 0, done.stderr
        said += [line for line in done.stdout.splitlines() if line.startswith("loss")]
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("1", "2"))
    assert one == two
    assert len(said) == 3
    assert len(set(said)) == 1
    assert said[0].endswith("of 100")


@pytest.mark.parametrize(("result", "status"), [(None, 0), (75, 75)])
def test_a_main_that_returns_nothing_has_done_well(result: int | None, status: int) -> None:
    with pytest.raises(SystemExit) as end:
        vae_dist.run_entry_point(lambda: result)
    assert end.value.code == status


@pytest.mark.slow
def test_what_is_wrong_on_one_process_alone_is_told_once_and_ends_all(tmp_path: Path) -> None:
    done = launch("tests.own_program", tmp_path, processes=2, WRONG_ON_RANK="1")
    assert done.returncode != 0
    assert done.stderr.count("error: train[0]: floats must be in [0, 1], but are from 0 to 255") == 1
    assert "another process of this run is gone" not in done.stderr


def test_a_second_call_returns_at_once_and_more_epochs_go_on(tmp_path: Path) -> None:
    first = vae_dist.fit(small(tmp_path), TRAIN, TEST)
    listener = Listener()
    again = vae_dist.fit(small(tmp_path), TRAIN, TEST, callbacks=[listener])
    assert (again.status, again.test, listener.rows) == (0, first.test, [])
    assert torch.equal(again.model.sample(2), first.model.sample(2))
    more = vae_dist.fit(small(tmp_path, epochs=3), TRAIN, TEST)
    assert more.test["epoch"] == 3
    for train, test, told in ((TRAIN.flip(0), TEST, "trained"), (TRAIN, TEST[:7], "tested")):
        with pytest.raises(InputError, match=f"{told} on other images than those in what"):
            vae_dist.fit(small(tmp_path, epochs=4), train, test)


def test_black_and_white_images_of_ones_own_have_log_likelihoods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = ((images > 127).float() for images in (TRAIN, TEST))
    result = vae_dist.fit(small(tmp_path), train, test)
    assert "not a log-likelihood" not in capsys.readouterr().out
    assert result.test["loss"] == vae_dist.measure(result.model, test)["loss"]
    assert RunFolder(tmp_path).config().data.binarize == "static"


def test_callbacks_hear_of_rows_and_epochs_and_may_end_the_training(tmp_path: Path) -> None:
    listener = Listener(enough=np.float64(2))  # answers with numpy's bool
    result = vae_dist.fit(settings(tmp_path, epochs=4), Dataset(0, 190), Dataset(190, 290), build, [listener])
    assert listener.epochs == [1, 2]
    assert [row["step"] for row in listener.rows] == [2, 4, 8, 10]
    assert (result.status, result.test["epoch"]) == (0, 2)
    assert (tmp_path / "model.safetensors").is_file()
    again = vae_dist.fit(settings(tmp_path, epochs=4), Dataset(0, 190), Dataset(190, 290), build, [listener])
    assert (again.test, listener.epochs) == (result.test, [1, 2]), "it was enough"
    vae_dist.fit(settings(tmp_path, epochs=5), Dataset(0, 190), Dataset(190, 290), build, [listener])
    assert listener.epochs == [1, 2, 3, 4, 5], "more was asked for"


def test_a_callback_that_fails_loses_nothing(tmp_path: Path) -> None:
    class Fails(vae_dist.Callback):
        def on_epoch(self, epoch: int, train: dict[str, Any], test: dict[str, Any], model: VAE) -> None:
            raise KeyError("a mistake of the caller")

    vae_dist.fit(small(tmp_path / "whole"), TRAIN, TEST)
    with pytest.raises(KeyError):
        vae_dist.fit(small(tmp_path / "run"), TRAIN, TEST, callbacks=[Fails()])
    assert vae_dist.fit(small(tmp_path / "run"), TRAIN, TEST).status == 0
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_training_that_is_told_to_stop_says_75_and_goes_on_when_called_again(tmp_path: Path) -> None:
    class Signal(vae_dist.Callback):
        def on_row(self, row: dict[str, Any]) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert vae_dist.fit(small(tmp_path), TRAIN, TEST, callbacks=[Signal()]).status == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert vae_dist.fit(small(tmp_path), TRAIN, TEST).status == 0


def test_own_modules_are_loaded_with_the_function_that_built_them(tmp_path: Path, command: Callable[..., Outcome]) -> None:
    result = vae_dist.fit(settings(tmp_path, epochs=1), Dataset(0, 190), Dataset(190, 290), build)
    model = vae_dist.load(tmp_path, build)
    assert isinstance(model.likelihood, Laplace)
    assert torch.equal(model.sample(3), result.model.sample(3))
    with pytest.raises(InputError, match=r"vae_dist\.load\(run, build\)"):
        vae_dist.load(tmp_path)
    with pytest.raises(InputError, match="must be a function"):
        vae_dist.load(tmp_path, model)
    with pytest.raises(InputError, match=r"of images of \(1, 28, 28\), but the model is one of \(1, 14, 56\)"):
        vae_dist.load(tmp_path, lambda: VAE(model.encoder, model.decoder, 3, (1, 14, 56), Laplace()))
    refused(command("evaluate", tmp_path), "--model.kind own", "vae_dist.load(run, build)")
    found = vae_dist.measure(model, Dataset(190, 290), iw_samples=5)
    assert found["loss"] == pytest.approx(result.test["loss"], rel=1e-12)
    assert found["is_log_likelihood"], "a Laplace density"
    assert found["nll"] < found["loss"]


def test_what_is_measured_is_what_evaluate_finds(
    trained: Path, small_root: Path, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    outcome = command("evaluate", shutil.copytree(trained, tmp_path / "run"))
    images = resident(DataConfig(root=str(small_root)), train=False).pixels
    assert f"test loss {vae_dist.measure(vae_dist.load(trained), images)['loss']:.4f} " in outcome.out
    assert vae_dist.measure(vae_dist.load(trained), (images > 127).to(torch.uint8) * 255)["is_log_likelihood"]


def with_encoder(*modules: nn.Module) -> Callable[[], VAE]:
    def build() -> VAE:
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), *modules)
        decoder = nn.Sequential(nn.Linear(4, 784), nn.Unflatten(1, (1, 28, 28)))
        return VAE(encoder, decoder, latent_dim=4, image_shape=(1, 28, 28))

    return build


def of(encoder: nn.Module, decoder: nn.Module) -> VAE:
    return VAE(nn.Sequential(nn.Flatten(), encoder), nn.Sequential(decoder, nn.Unflatten(1, (1, 28, 28))), 4, (1, 28, 28))


def partly_frozen() -> VAE:
    model = of(nn.Linear(784, 8), nn.Linear(4, 784))
    model.get_parameter("encoder.1.weight").requires_grad_(False)
    return model


class Transposed(nn.Module):
    """A decoder that has no weights of its own."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[:4]


def tied() -> VAE:
    encoder = nn.Linear(784, 8)
    return of(encoder, Transposed(encoder.weight))


@pytest.mark.parametrize("build", [partly_frozen, tied])
@pytest.mark.parametrize("deterministic", [False, True])
def test_weights_may_be_frozen_or_shared(build: Callable[[], VAE], deterministic: bool, tmp_path: Path) -> None:
    def run(name: str, epochs: int) -> vae_dist.Result:
        trainer = TrainerConfig(epochs=epochs, deterministic=deterministic)
        config = small(tmp_path / name, optimizer=OptimizerConfig(ema=0.5))
        return vae_dist.fit(dataclasses.replace(config, trainer=trainer), TRAIN, TEST, build)

    run("in two parts", epochs=1)
    result, whole = run("in two parts", epochs=2), run("whole", epochs=2)
    assert records(tmp_path / "in two parts") == records(tmp_path / "whole")
    loaded = vae_dist.load(tmp_path / "in two parts", build)
    assert torch.equal(loaded.sample(2), whole.model.sample(2))
    start = seeded(0, build)
    is_trained = [not torch.equal(a, b) for a, b in zip(start.parameters(), result.model.parameters(), strict=True)]
    assert is_trained == [weights.requires_grad for weights in start.parameters()]
    assert len(list(loaded.parameters())) == len(is_trained), "what was shared is again"


class Remembers(nn.Module):
    """Keeps a mean of what it saw, which nothing depends on while it trains."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.detach().mean(0)
        return x


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Columns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.eye(8).T)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights


class OverBatch(nn.Module):
    """Takes the batch's mean away, without a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (with_encoder(nn.BatchNorm1d(8)), "BatchNorm"),
        (with_encoder(nn.BatchNorm1d(8, track_running_stats=False)), "GroupNorm"),
        (with_encoder(OverBatch()), "GroupNorm"),
        (with_encoder(nn.Dropout(0.5)), "Dropout"),
        (with_encoder(Idle()), "encoder.2.spare.weight"),
        (with_encoder(nn.Linear(8, 4)), r"must give \(3, 8\)"),
        (with_encoder(nn.Linear(8, 8).double()), "torch.float32"),
        (with_encoder(Remembers()), "encoder.2.seen change with every forward pass"),
        (lambda: of(nn.LazyLinear(8), nn.Linear(4, 784)), "encoder.1.weight has no size yet"),
        (lambda: of(nn.Linear(784, 8), nn.Linear(4, 784)).requires_grad_(False), "no weights to train"),
        (with_encoder(Columns()), "encoder.2.weights is not contiguous"),
        (lambda: VAE(nn.Identity(), nn.Identity(), 2, (1, 5, 5)), r"\(1, 5, 5\)"),
        (lambda: nn.Linear(1, 1), "must build a vae_dist.VAE"),
        (build(), "must be a function"),
        ("conv", "must be a function"),
    ],
)
def test_modules_that_would_break_the_promises_are_refused_before_any_step(build: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        vae_dist.fit(small(tmp_path / "run"), TRAIN, TEST, build)


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"leave config\.model out"):
        vae_dist.fit(small(tmp_path, model=ModelConfig(hidden=(7,))), TRAIN, TEST, build)


def test_a_model_is_measured_in_eval_mode_and_stays_as_it_was() -> None:
    model = with_encoder(nn.Dropout(0.5))()
    assert vae_dist.measure(model, TEST) == vae_dist.measure(model, TEST)
    assert model.training
    with pytest.raises(InputError, match="iw_samples -1"):
        vae_dist.measure(model, TEST, iw_samples=-1)


def test_the_model_that_is_left_computes_without_autocast(tmp_path: Path) -> None:
    config = dataclasses.replace(small(tmp_path), trainer=TrainerConfig(epochs=1, precision="bf16"))
    model = vae_dist.fit(config, TRAIN, TEST).model
    images, noise = TEST / 255, torch.zeros(len(TEST), 20)
    assert torch.equal(model(images, noise).decoded, model.decoder(model.encode(images).mean))


@pytest.mark.parametrize("name", ["own", "glyphs"])
def test_the_command_has_no_modules_or_images_of_ones_own(name: str, command: Callable[..., Outcome], tmp_path: Path) -> None:
    options = ["--data.name", name, "--model.kind", "own", "--model.likelihood", "own", "--output", tmp_path]
    refused(command("train", *options), "vae_dist.fit")


def test_the_examples_of_the_documentation_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    failed, tried = doctest.testfile(str(ROOT / "docs" / "library.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert (failed, tried > 30) == (0, True)


def test_one_side_alone_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="both train and test"):
        vae_dist.fit(small(tmp_path), TRAIN)
