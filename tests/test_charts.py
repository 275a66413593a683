"""What W&B is shown: charts by groups over the images seen, pictures, bars, histogram and table; and when it sends word."""

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

import vae_dist
from tests.helpers import Outcome, reference_terms, resident
from tests.wandb_file import WandbRun, logged, offline_runs
from vae_dist.charts import GROUPS
from vae_dist.config import Config, DataConfig
from vae_dist.data import as_images
from vae_dist.noise import Stream, derive_key, normal
from vae_dist.options import parse, to_mapping
from vae_dist.posterior import COLLAPSED
from vae_dist.run import RunFolder
from vae_dist.tracking import Row, RunTracker, read_rows

Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def wandb(trained: Path) -> WandbRun:
    (wandb,) = offline_runs(trained)
    return wandb


@pytest.fixture(scope="module")
def tests(trained: Path) -> list[Row]:
    return [row for row in read_rows(trained / "metrics.jsonl") if row["split"] == "test"]


def media(trained: Path, wandb: WandbRun, key: str) -> list[Path]:
    """The files of a chart, in the order of the epochs."""
    (folder,) = (trained / "wandb").glob("offline-run-*")
    return [folder / "files" / path for _, path in logged(wandb, f"{key}.path")]


def table(file: Path) -> list[dict[str, Any]]:
    content = json.loads(file.read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def files_of(artifact: Any) -> dict[str, Path]:
    return {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}


def picture(file: Path) -> Tensor:
    with Image.open(file) as opened:
        return torch.from_numpy(np.array(opened))


def test_every_figure_of_metrics_jsonl_has_a_chart(trained: Path, wandb: WandbRun) -> None:
    rows = read_rows(trained / "metrics.jsonl")
    curve = [row for row in rows if row["split"] == "train" and row["step"] % 8]
    epochs = [row for row in rows if row["split"] == "train" and not row["step"] % 8]
    tests = [row for row in rows if row["split"] == "test"]
    speed = ("images_per_second", "data_share", "compute_share", "communication_share")
    for chart, keys, expected in (
        ("train/", ("loss", "bce", "kld", "n", "objective", "lr", "grad_norm"), curve),
        ("speed/", speed, curve),
        ("train/epoch_", ("loss", "bce", "kld", "n", "objective", "lr", "grad_norm"), epochs),
        ("speed/epoch_", speed, epochs),
        ("speed/", ("train_seconds", "processes"), epochs),
        ("test/", ("loss", "bce", "kld", "n"), tests),
        ("speed/", ("test_seconds",), tests),
        ("posterior/", ("active_units",), tests),
    ):
        for key in keys:
            assert logged(wandb, f"{chart}{key}") == [(row["step"], row[key]) for row in expected], key
    assert all(size > 100 for _, size in logged(wandb, "speed/peak_memory_mib"))


def test_charts_lie_in_groups_over_the_images_seen(trained: Path, wandb: WandbRun) -> None:
    """Media over epochs, for their sliders. The two axes get no charts of their own."""
    names = {key for row in wandb.history for key in row if not key.startswith("_")}
    assert {name.split("/")[0] for name in names} == {*GROUPS, "epoch", "images_seen"}
    assert wandb.step_metrics == {f"{group}/*": "epoch" if group == "images" else "images_seen" for group in GROUPS}
    assert wandb.hidden == ["images_seen", "epoch"]
    rows = {row["step"]: row for row in read_rows(trained / "metrics.jsonl")}
    for axis in ("images_seen", "epoch"):
        assert logged(wandb, axis) == [(step, row[axis]) for step, row in rows.items()]


def test_pictures_are_those_of_the_folder_and_say_what_they_show(trained: Path, wandb: WandbRun, tests: list[Row]) -> None:
    for name in ("reconstruction", "sample", "traversal"):
        files = media(trained, wandb, f"images/{name}")
        assert [file.read_bytes() for file in files] == [
            (trained / "images" / f"{name}_{epoch}.png").read_bytes() for epoch in (1, 2, 3)
        ]
        for (step, caption), row in zip(logged(wandb, f"images/{name}.caption"), tests, strict=True):
            assert step == row["step"]
            assert caption.startswith(f"epoch {row['epoch']}, test loss {row['loss']:.2f} nats: ")
    with Image.open(trained / "images" / "traversal_3.png") as traversal:
        assert traversal.size == (11 * 30 - 2, 20 * 30 - 2), "a row for a dimension"


def test_the_bars_are_the_kl_of_each_dimension(trained: Path, wandb: WandbRun, tests: list[Row]) -> None:
    bars = [table(file) for file in media(trained, wandb, "posterior/kld_per_dim_table")]
    assert [[bar["nats"] for bar in of_epoch] for of_epoch in bars] == [row["kld_per_dim"] for row in tests]
    assert [bar["dimension"] for bar in bars[0]] == [f"{dimension:02}" for dimension in range(20)]
    (panel,) = (value["panel_config"] for name, value in wandb.config.items() if name.endswith("posterior/kld_per_dim"))
    assert panel["fieldSettings"] == {"label": "dimension", "value": "nats"}


def test_the_histogram_counts_every_posterior_mean_once(trained: Path, wandb: WandbRun, small_root: Path) -> None:
    *_, (step, counts) = logged(wandb, "posterior/means.values")
    *_, (_, edges) = logged(wandb, "posterior/means.bins")
    assert step == 24
    images = resident(DataConfig(root=str(small_root)), train=False)
    with torch.no_grad():
        means = vae_dist.load(trained).encode(as_images(images.pixels)).mean
    expected, _ = torch.histogram(means.clamp(-3.99, 3.99).flatten(), torch.tensor(edges))
    assert sum(counts) == 300 * 20
    assert (torch.tensor(counts) - expected).abs().sum() <= 4, "means on an edge"


def test_the_table_has_the_images_of_the_highest_losses(trained: Path, wandb: WandbRun, small_root: Path) -> None:
    images = resident(DataConfig(root=str(small_root)), train=False)
    noise = normal(derive_key(0, Stream.EVALUATION), torch.arange(300), 20).double()
    bce, kld = reference_terms(trained, as_images(images.pixels).double().flatten(1), noise)
    highest = (bce + kld).topk(8)
    *_, artifact = (artifact for artifact in wandb.artifacts if artifact.name.startswith(f"run-{wandb.id}-imagesworst"))
    files = files_of(artifact)
    last = table(files["images/worst.table.json"])
    assert [row["index"] for row in last] == highest.indices.tolist()
    assert [row["loss"] for row in last] == pytest.approx(highest.values.tolist(), rel=1e-5)
    assert images.labels is not None
    assert [row["label"] for row in last] == images.labels[highest.indices].tolist()
    model = vae_dist.load(trained)
    for row in last:
        image, reconstruction = (picture(files[row[side]["path"]]) for side in ("image", "reconstruction"))
        pixels = images.pixels[row["index"]]
        assert torch.equal(image, pixels[0])
        with torch.no_grad():
            expected = model.decode(model.encode(as_images(pixels.unsqueeze(0))).mean)[0, 0] * 255
        assert (reconstruction - expected).abs().max() < 0.51


def test_all_that_waits_for_an_upload_lies_in_the_runs_folder(trained: Path, wandb: WandbRun) -> None:
    staged = [file for artifact in wandb.artifacts for file in files_of(artifact).values()]
    assert len(staged) >= 3 * (8 + 8 + 2)
    assert all(trained / "wandb" in path.parents and path.is_file() for path in staged)


def test_runs_lie_together_by_recipe_and_are_tagged(
    wandb: WandbRun, quick: list[object], command: Command, tmp_path: Path
) -> None:
    assert (wandb.group, wandb.tags) == ("mnist", ["cpu", "1 process", "fp32"])
    recipe = tmp_path / "wide.yaml"
    recipe.write_text("seed: 3\n")
    assert parse(["--config", str(recipe)]).tracking.group == "wide"
    assert parse(["--config", str(recipe), "--tracking.group", "sweep"]).tracking.group == "sweep"
    more = ["--tracking.wandb", "offline", "--trainer.epochs", 1, "--trainer.precision", "bf16", "--output", tmp_path / "run"]
    assert command("train", "--config", recipe, *quick, *more).status == 0
    import_module("wandb").teardown()
    assert [(part.group, part.tags) for part in offline_runs(tmp_path / "run")] == [("wide", ["cpu", "1 process", "bf16"])]


@pytest.fixture
def tracker(tmp_path: Path) -> Callable[..., RunTracker]:
    """A tracker that goes on after a step, of one run."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    accelerator = Accelerator(cpu=True, log_with="wandb")
    return lambda step, mode="offline": RunTracker(accelerator, run, Config(), mode, step)


def row_of(epoch: int, loss: float, active_units: int = 2) -> Row:
    figures = {"images_seen": 100 * epoch, "n": 5, "loss": loss, "bce": loss, "kld": 0.0, "kld_per_dim": [0.0, 0.0]}
    return {"split": "test", "epoch": epoch, "step": epoch, **figures, "active_units": active_units}


def closed(tracker: RunTracker, folder: Path) -> WandbRun:
    """The W&B run that a tracker leaves."""
    tracker.close(0)
    import_module("wandb").teardown()  # as at the end of a process: its files are then on the disk
    return offline_runs(folder)[-1]


def test_the_best_epoch_so_far_is_in_the_summary_also_of_a_run_that_goes_on(
    tracker: Callable[..., RunTracker], tmp_path: Path
) -> None:
    for epochs, losses in (([1, 2, 3], [3.0, 2.0, 5.0]), ([4], [4.0])):
        part = tracker(epochs[0] - 1)
        for epoch, loss in zip(epochs, losses, strict=True):
            part.log(row_of(epoch, loss))
        summary = closed(part, tmp_path / "run").summary
        assert (summary["best_test_loss"], summary["best_test_epoch"]) == (2.0, 2)


def test_a_collapsed_posterior_is_told_once_to_w_and_b_and_on_the_console(
    tracker: Callable[..., RunTracker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tracker(0)
    for epoch, active in enumerate([2, 0, 0, 1, 0], start=1):
        first.log(row_of(epoch, 3.0, active))
    ((title, text, level),) = closed(first, tmp_path / "run").alerts
    assert (title, level) == ("posterior collapse", "ERROR")
    assert text == f"run: epoch 2: {COLLAPSED}"
    assert capsys.readouterr().out.count(f"ALARM, epoch 2: {COLLAPSED}") == 1
    second = tracker(5)
    second.log(row_of(6, 3.0, 0))
    assert closed(second, tmp_path / "run").alerts == []
    assert "ALARM" not in capsys.readouterr().out


def test_what_a_crash_kept_from_w_and_b_is_shown_as_far_as_files_have_it(trained: Path, tmp_path: Path) -> None:
    """Rows, pictures and bars; the histogram and the table are of epochs evaluated since."""
    shutil.copytree(trained, tmp_path / "run")
    for folder in (tmp_path / "run" / "wandb").glob("offline-run-*"):
        shutil.rmtree(folder)
    run = RunFolder(tmp_path / "run")
    wandb = closed(RunTracker(Accelerator(cpu=True, log_with="wandb"), run, Config(), "offline", 24), run.path)
    steps = [8, 16, 24]
    for key in ("test/loss", "images/traversal.path", "images/sample.caption", "posterior/kld_per_dim_table.path"):
        assert [step for step, _ in logged(wandb, key)] == steps
    assert not any(key.startswith(("posterior/means", "images/worst")) for row in wandb.history for key in row)


def test_a_run_whose_posterior_collapses_says_so(quick: list[object], command: Command, tmp_path: Path) -> None:
    options = [*quick, "--objective.beta", 300, "--tracking.wandb", "offline", "--output", tmp_path / "run"]
    outcome = command("train", *options, "--trainer.epochs", 3)
    import_module("wandb").teardown()
    assert outcome.status == 0
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["active_units"] == 0
    assert outcome.out.count("ALARM") == 1
    assert [title for title, _, _ in offline_runs(tmp_path / "run")[0].alerts] == ["posterior collapse"]


def test_a_loss_that_is_no_number_is_told_with_the_remedy(quick: list[object], command: Command, tmp_path: Path) -> None:
    more = ["--optimizer.kind", "sgd", "--optimizer.lr", 1e6, "--tracking.wandb", "offline", "--output", tmp_path / "run"]
    outcome = command("train", *quick, *more)
    import_module("wandb").teardown()
    assert outcome.status == 1
    (wandb,) = offline_runs(tmp_path / "run")
    ((title, text, level),) = wandb.alerts
    assert (title, level, wandb.exit_code) == ("training failed", "ERROR", 1)
    assert text == "run: " + outcome.err.removeprefix("error: ").strip()


def models(part: WandbRun) -> list[Any]:
    return [artifact for artifact in part.artifacts if artifact.type == "model"]


def test_the_model_is_an_artifact_if_asked_for_and_again_with_its_evaluation(
    quick: list[object], command: Command, trained: Path, tmp_path: Path
) -> None:
    assert models(offline_runs(trained)[0]) == []
    run = tmp_path / "run"
    assert command("train", *quick, "--tracking.wandb", "offline", "--tracking.artifact", "true", "--output", run).status == 0
    assert command("evaluate", run).status == 0
    import_module("wandb").teardown()
    first, second = [model for part in offline_runs(run) for model in models(part)]
    assert first.name == second.name == f"model-{RunFolder(run).wandb_id()}"
    files = ["config.json", "config.yaml", "model.safetensors"]
    for model, names in ((first, files), (second, sorted([*files, "evaluation.json"]))):
        content = {name: file.read_bytes() for name, file in files_of(model).items()}
        assert sorted(content) == names
        assert content == {name: (run / name).read_bytes() for name in names}
    told, evaluated = (json.loads(model.metadata) for model in (first, second))
    assert told["config"] == evaluated["config"] == to_mapping(RunFolder(run).config())
    assert told["figures"] == read_rows(run / "metrics.jsonl")[-1]
    assert evaluated["figures"] == json.loads((run / "evaluation.json").read_text())
