"""A run from start to end on one process: what it leaves, how it goes on, and what it refuses."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vae_dist
from tests.helpers import Outcome, begin, everything, records, reference_terms, refused, resident, write_idx_set
from vae_dist.config import DataConfig, ModelConfig
from vae_dist.data import as_images
from vae_dist.model import build_model
from vae_dist.noise import Stream, derive_key, normal
from vae_dist.options import parse
from vae_dist.pictures import traversals
from vae_dist.run import RunFolder
from vae_dist.tracking import read_rows

Command = Callable[..., Outcome]


def test_a_run_leaves_what_the_contract_says(trained: Path) -> None:
    files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file() and "wandb" not in path.parts}
    pictures = {f"images/{kind}_{epoch}.png" for kind in ("reconstruction", "sample", "traversal") for epoch in (1, 2, 3)}
    saved = {"config.json", "model.safetensors", "trainer.json", "trainer.safetensors"}
    checkpoints = {f"checkpoints/step_{step:08d}/{name}" for step in (8, 16, 24) for name in saved}
    single = {"config.yaml", "metrics.jsonl", "config.json", "model.safetensors", "status.json", "starts.jsonl", ".lock"}
    assert files == single | pictures | checkpoints
    status = json.loads((trained / "status.json").read_text())
    assert (status["state"], status["epoch"], status["step"], status["steps"]) == ("finished", 3, 24, 24)


def test_rows_say_what_they_are_means_of(trained: Path) -> None:
    rows = read_rows(trained / "metrics.jsonl")
    for row in rows:
        assert {"split", "epoch", "step", "images_seen", "n", "loss", "bce", "kld"} <= row.keys()
        assert row["loss"] == pytest.approx(row["bce"] + row["kld"], rel=1e-12)
        assert row["split"] == "test" or row["objective"] == row["loss"], "by default that is what is optimised"
        assert row["split"] == "train" or sum(row["kld_per_dim"]) == pytest.approx(row["kld"], rel=1e-6)
    curve = [(row["step"], row["n"]) for row in rows if row["split"] == "train"]
    assert curve == [(4, 512), (8, 1000), (12, 512), (16, 1000), (20, 512), (24, 1000)]
    assert [(row["epoch"], row["step"], row["n"]) for row in rows if row["split"] == "test"] == [
        (1, 8, 300),
        (2, 16, 300),
        (3, 24, 300),
    ]
    assert [row["images_seen"] for row in rows] == [512, 1000, 1000, 1512, 2000, 2000, 2512, 3000, 3000]
    train = [row for row in rows if row["split"] == "train"]
    assert all(row["lr"] == 1e-3 and row["grad_norm"] > 0 and row["images_per_second"] > 0 for row in train)
    shares = [[row[f"{part}_share"] for part in ("data", "compute", "communication")] for row in train]
    assert [sum(of_row) for of_row in shares] == pytest.approx([1.0] * len(train), abs=2e-4)
    assert all(data > 0 and compute > 0 and communication == 0 for data, compute, communication in shares)
    tests = [row["loss"] for row in rows if row["split"] == "test"]
    assert tests == sorted(tests, reverse=True), "it learns"


def test_pictures_have_the_size_of_their_grids(trained: Path) -> None:
    with Image.open(trained / "images" / "sample_3.png") as sample:
        assert sample.size == (8 * 30 - 2, 8 * 30 - 2)
        assert max(sample.convert("L").tobytes()) > 50
    with Image.open(trained / "images" / "reconstruction_3.png") as reconstruction:
        assert reconstruction.size == (8 * 30 - 2, 2 * 30 - 2)


def test_the_saved_config_is_the_run(trained: Path, small_root: Path) -> None:
    config = parse(["--config", str(trained / "config.yaml")])
    assert config == RunFolder(trained).config()
    assert (config.data.root, config.trainer.epochs, config.output) == (str(small_root), 3, str(trained))


def test_the_weights_load_with_torch_alone(trained: Path) -> None:
    """The README's snippet."""
    weights = load_file(trained / "model.safetensors")
    decoder = torch.nn.Sequential(torch.nn.Linear(20, 400), torch.nn.ReLU(), torch.nn.Linear(400, 784), torch.nn.Sigmoid())
    decoder.load_state_dict({name.removeprefix("decoder."): t for name, t in weights.items() if name.startswith("decoder.")})
    latents = torch.randn(3, 20)
    torch.testing.assert_close(decoder(latents).view(3, 1, 28, 28), vae_dist.load(trained).decode(latents))


def test_load_gives_a_model_that_encodes_decodes_and_samples(trained: Path) -> None:
    model = vae_dist.load(str(trained))
    assert not model.training
    images = torch.rand(4, 1, 28, 28)
    mean, logvar = model.encode(images)
    assert mean.shape == logvar.shape == (4, 20)
    assert model.decode(mean).shape == (4, 1, 28, 28)
    samples = model.sample(5, seed=3)
    assert samples.shape == (5, 1, 28, 28)
    assert 0 <= samples.min() < samples.max() <= 1
    torch.testing.assert_close(model.sample(2, seed=3), samples[:2])
    assert not torch.equal(model.sample(5, seed=4), samples)


def test_a_checkpoint_loads_too(trained: Path) -> None:
    final, last, first = (
        vae_dist.load(path).decoder.get_parameter("0.weight")
        for path in (trained, trained / "checkpoints" / "step_00000024", trained / "checkpoints" / "step_00000008")
    )
    assert torch.equal(final, last)
    assert not torch.equal(final, first)


def test_evaluate_prints_and_writes_the_figures_of_the_last_epoch(trained: Path, command: Command, tmp_path: Path) -> None:
    trained = Path(shutil.copytree(trained, tmp_path / "run"))
    outcome = command("evaluate", trained)
    assert outcome.status == 0
    last = next(row for row in reversed(records(trained)) if row["split"] == "test")
    found = json.loads((trained / "evaluation.json").read_text())
    shared = ("n", "loss", "bce", "kld", "kld_per_dim")
    assert [found[key] for key in shared] == [last[key] for key in shared]
    assert (found["is_log_likelihood"], found["bits_per_dim"]) == (False, None)
    assert found["elbo"] == -found["loss"]
    assert f"test loss {last['loss']:.4f}" in outcome.out
    assert "nats, not a log-likelihood (" in outcome.out
    assert "n=300" in outcome.out


def test_what_is_found_in_other_images_than_the_runs_is_not_written(trained: Path, command: Command, tmp_path: Path) -> None:
    trained = Path(shutil.copytree(trained, tmp_path / "run"))
    images, labels = torch.randint(256, (30, 1, 28, 28), dtype=torch.uint8), torch.zeros(30)
    write_idx_set(tmp_path / "other" / "MNIST" / "raw", images, labels, images, labels)
    outcome = command("evaluate", trained, "--data.root", tmp_path / "other")
    assert outcome.status == 0
    assert "not the test images of" in outcome.out
    assert "test loss " in outcome.out
    assert not (trained / "evaluation.json").exists()


def test_the_test_figures_agree_with_an_independent_float64_computation(trained: Path, small_root: Path) -> None:
    images = as_images(resident(DataConfig(root=str(small_root)), train=False).pixels).double().flatten(1)
    last = next(row for row in reversed(records(trained)) if row["split"] == "test")
    same_draw = normal(derive_key(0, Stream.EVALUATION), torch.arange(300), 20).double()
    bce, kld = reference_terms(trained, images, same_draw)
    assert last["bce"] == pytest.approx(bce.mean().item(), rel=1e-6)
    assert last["kld"] == pytest.approx(kld.mean().item(), rel=1e-6)
    torch.manual_seed(0)
    draws = torch.stack([reference_terms(trained, images, torch.randn(300, 20).double())[0] for _ in range(8)])
    assert abs(last["bce"] - draws.mean().item()) < 4 * draws.std(0).mean().item() / 300**0.5


@pytest.mark.parametrize("cut", [3, 8, 11])
def test_a_run_cut_off_after_a_checkpoint_ends_with_the_same_bytes(
    cut: int, quick: list[object], command: Command, tmp_path: Path
) -> None:
    """As after a kill: later checkpoints are gone, later rows are there, a row is half written."""
    often = ["--checkpoint.every_steps", 1, "--checkpoint.keep", 99, "--tracking.log_every", 2]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert command("train", *quick, *often, "--output", whole).status == 0
    shutil.copytree(whole, again)
    for folder in (again / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > cut:
            shutil.rmtree(folder)
    for name in ("model.safetensors", "config.json", "status.json"):
        (again / name).unlink()
    with (again / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"split": "train", "ep')
    outcome = command("train", *quick, *often, "--output", again)
    assert outcome.status == 0
    assert f"step_{cut:08d}" in outcome.out
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert records(again) == records(whole)
    for name in ("sample_2.png", "reconstruction_2.png"):
        assert (again / "images" / name).read_bytes() == (whole / "images" / name).read_bytes()


def test_gathering_images_is_a_small_part_of_a_step_with_accumulation_too(
    quick: list[object], command: Command, tmp_path: Path
) -> None:
    assert command("train", *quick, "--output", tmp_path / "run", "--trainer.micro_batch_size", 16).status == 0
    epochs = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "train_seconds" in row]
    assert [row["data_share"] < 0.5 for row in epochs] == [True, True]


def test_saving_often_changes_nothing(quick: list[object], command: Command, tmp_path: Path) -> None:
    assert command("train", *quick, "--output", tmp_path / "a").status == 0
    assert command("train", *quick, "--output", tmp_path / "b", "--checkpoint.every_steps", 3).status == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_finished_run_asked_again_says_so_and_changes_nothing(quick: list[object], command: Command, tmp_path: Path) -> None:
    assert command("train", *quick, "--output", tmp_path / "run").status == 0
    before = everything(tmp_path / "run")
    outcome = command("train", *quick, "--output", tmp_path / "run")
    assert outcome.status == 0
    assert "is finished" in outcome.out
    assert everything(tmp_path / "run") == before


def test_a_run_that_goes_on_does_not_read_the_images_for_where_it_began(
    quick: list[object], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*quick, "--model.output_bias", "data", "--output", tmp_path / "run"]
    assert command("train", *options).status == 0
    monkeypatch.setattr("vae_dist.model.set_output_bias", lambda *_: pytest.fail("all images were read"))
    assert command("train", *options, "--trainer.epochs", 3).status == 0


def test_more_epochs_go_on_from_the_end(quick: list[object], command: Command, tmp_path: Path) -> None:
    assert command("train", *quick, "--output", tmp_path / "two").status == 0
    assert command("train", *quick, "--output", tmp_path / "two", "--trainer.epochs", 3).status == 0
    assert command("train", *quick, "--output", tmp_path / "three", "--trainer.epochs", 3).status == 0
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (tmp_path / "three" / "model.safetensors").read_bytes()
    assert records(tmp_path / "two") == records(tmp_path / "three")


def test_a_run_may_go_on_from_a_checkpoint_of_another_folder(quick: list[object], command: Command, tmp_path: Path) -> None:
    assert command("train", *quick, "--output", tmp_path / "a").status == 0
    source = tmp_path / "a" / "checkpoints" / "step_00000008"
    assert command("train", *quick, "--output", tmp_path / "b", "--resume", source).status == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    outcome = command("train", *quick, "--output", tmp_path / "c", "--resume", source, "--seed", 5)
    refused(outcome, "seed: 0 there, 5 here")
    refused(command("train", *quick, "--output", tmp_path / "d", "--resume", tmp_path / "nowhere"), "nowhere")
    again = command("train", *quick, "--output", tmp_path / "b", "--resume", source)
    assert again.status == 0
    assert "b has checkpoints of its own" in again.out


def test_an_optimizer_with_accumulation_clipping_and_a_schedule_trains(
    quick: list[object], command: Command, tmp_path: Path
) -> None:
    more = ["--trainer.micro_batch_size", 50, "--optimizer.clip_norm", 500, "--optimizer.schedule", "cosine"]
    outcome = command("train", *quick, *more, "--optimizer.warmup_steps", 4, "--output", tmp_path, "--tracking.log_every", 1)
    assert outcome.status == 0, outcome.err
    rates = [row["lr"] for row in records(tmp_path) if row["split"] == "train"]
    assert rates[:4] == [0.00025, 0.0005, 0.00075, 0.001]
    assert rates[-1] < 1e-4


def test_bf16_trains_and_is_evaluated_in_float32(quick: list[object], command: Command, tmp_path: Path) -> None:
    assert command("train", *quick, "--output", tmp_path, "--trainer.precision", "bf16").status == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    assert command("evaluate", tmp_path).status == 0
    last = next(row for row in reversed(records(tmp_path)) if row["split"] == "test")
    assert json.loads((tmp_path / "evaluation.json").read_text())["loss"] == last["loss"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_signal_ends_the_run_with_75_and_the_same_command_goes_on(
    signum: signal.Signals, quick: list[object], command: Command, small_root: Path, tmp_path: Path
) -> None:
    options = [*quick, "--trainer.epochs", 1000, "--tracking.log_every", 2]
    process = begin("vae_dist.train", *options, "--output", tmp_path / "run")
    deadline = time.monotonic() + 60
    while not read_rows(tmp_path / "run" / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75, out
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert 0 < status["step"] < 1000 * 8
    assert len(vae_dist.load(tmp_path / "run").state_dict()) == 8, "an unfinished run loads from its newest checkpoint"
    epochs = ["--trainer.epochs", status["step"] // 8 + 2]
    assert command("train", *options, *epochs, "--output", tmp_path / "run").status == 0
    assert command("train", *options, *epochs, "--output", tmp_path / "whole").status == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_second_ctrl_c_does_not_wait(quick: list[object], tmp_path: Path) -> None:
    slow = ["--model.hidden", 2000, 2000, "--data.batch_size", 500, "--trainer.epochs", 1000]
    process = begin("vae_dist.train", *quick, *slow, "--output", tmp_path / "run")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "status.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    next(line for line in process.stdout if "Ctrl-C again leaves at once" in line)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "interrupted"


def test_the_time_limit_ends_the_run_with_75_and_the_same_command_goes_on(
    quick: list[object], command: Command, tmp_path: Path
) -> None:
    limited = [*quick, "--output", tmp_path / "run", "--trainer.max_minutes", 1e-9]
    assert command("train", *limited).status == 75
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 1
    assert command("train", *limited).status == 75
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 2
    assert command("train", *quick, "--output", tmp_path / "run").status == 0
    assert command("train", *quick, "--output", tmp_path / "whole").status == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_generate_draws_its_pictures(finished: Path, command: Command, tmp_path: Path) -> None:
    outcome = command("generate", finished, "--out", tmp_path / "pictures", "--samples", 10)
    assert outcome.status == 0
    sizes = {}
    for name in ("samples", "reconstructions", "traversals", "interpolations"):
        with Image.open(tmp_path / "pictures" / f"{name}.png") as picture:
            sizes[name] = ((picture.width + 2) // 30, (picture.height + 2) // 30)
    assert sizes == {"samples": (3, 4), "reconstructions": (8, 2), "traversals": (11, 20), "interpolations": (11, 8)}
    again = command("generate", finished, "--out", tmp_path / "again", "--samples", 10)
    assert again.status == 0
    assert everything(tmp_path / "again") == everything(tmp_path / "pictures")
    assert command("generate", finished).status == 0
    assert (finished / "generated" / "samples.png").is_file()
    assert command("generate", finished, "--samples", 0).status == 2


def test_pictures_are_drawn_some_at_a_time_and_traversals_are_few() -> None:
    model = build_model(ModelConfig(kind="conv", channels=1, latent_dim=40), (3, 64, 64), seed=0).eval()
    sizes: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, latents: sizes.append(len(latents[0])))
    picture = traversals(model, torch.rand(1, 3, 64, 64))
    assert picture.shape == (32 * 66 - 2, 11 * 66 - 2, 3)
    assert model.sample(300).shape == (300, 3, 64, 64)
    assert max(sizes) <= 166
    assert sum(sizes) == 32 * 11 + 300
    noise = normal(derive_key(0, Stream.SAMPLES), torch.arange(300), 40)
    torch.testing.assert_close(model.sample(300), model.decode(noise))


def test_the_environment_of_a_launcher_does_not_change_the_gradient(
    quick: list[object], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate's accumulation setting would divide the loss."""
    assert command("train", *quick, "--output", tmp_path / "a").status == 0
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert command("train", *quick, "--output", tmp_path / "b").status == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "4"
