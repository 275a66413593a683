"""The report of a run: what is on the page, what it never asks for, and what is refused."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers import Outcome, everything, launch, records, reference_terms, refused, resident, write_idx_set
from tests.html_page import HtmlPage
from vae_dist.config import DataConfig
from vae_dist.data import as_images, glyphs
from vae_dist.noise import Stream, derive_key, normal
from vae_dist.report.facts import Facts, read, thinned
from vae_dist.report.insight import principal_axes
from vae_dist.run import RunFolder
from vae_dist.tracking import read_rows

Command = Callable[..., Outcome]
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, for its own report."""
    return Path(shutil.copytree(trained, tmp_path / "a run", ignore=shutil.ignore_patterns("wandb")))


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> HtmlPage:
    """The report of the trained run."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    done = launch("vae_dist.report", trained, "--out", out)
    assert done.returncode == 0, done.stderr
    return HtmlPage(out.read_text(encoding="utf-8"))


def reported(command: Command, *args: object) -> HtmlPage:
    """The page that a report is; the last line that the command prints names it."""
    outcome = command("report", *args)
    assert outcome.status == 0, outcome.err
    [(file, size)] = re.findall(r"^(.+) \((.+) MB\): open it in a browser$", outcome.out, re.MULTILINE)
    content = Path(file).read_text(encoding="utf-8")
    assert float(size) == pytest.approx(len(content.encode()) / 1e6, abs=0.06)
    return HtmlPage(content)


def section(page: HtmlPage, anchor: str) -> str:
    return page.one("section", id=anchor).text


def edit_status(run: Path, **changes: object) -> None:
    status = RunFolder(run).status()
    (run / "status.json").write_text(json.dumps(status | changes))


def test_a_report_begins_with_what_the_run_is_its_state_and_its_main_figure(trained: Path, page: HtmlPage) -> None:
    last = records(trained)[-1]
    header = page.one("header").text
    assert page.one("h1").text == "trained"
    assert "A VAE (mlp, 20 latent dimensions) on mnist, seed 0" in header
    assert "finished 3 epochs are done" in header
    assert f"Test loss {last['loss']:.2f} nats per image, not a log-likelihood; n = 300 test images; epoch 3 of 3" in header
    assert f"{last['bce']:.2f} + {last['kld']:.2f}" in header
    assert "3,000 images seen" in header


def test_the_curves_are_the_rows_over_images_epochs_or_minutes(trained: Path, page: HtmlPage) -> None:
    figures = page.figures()
    rows = read_rows(trained / "metrics.jsonl")
    split_of = {"training": "train", "training, whole epochs": "train", "test": "test"}
    for title, name in (("Loss", "loss"), ("Reconstruction term (bce)", "bce"), ("KL term (kld)", "kld")):
        traces = {trace["name"]: trace for trace in figures[title]["data"]}
        assert traces.keys() == split_of.keys()
        for split, trace in traces.items():
            is_epoch = split == "training, whole epochs"
            shown = [row for row in rows if row["split"] == split_of[split] and is_epoch == ("train_seconds" in row)]
            assert trace["y"] == [row[name] for row in shown]
            assert trace["x"] == trace["meta"]["axes"]["images"] == [row["images_seen"] for row in shown]
            assert trace["meta"]["axes"]["epochs"] == pytest.approx([row["images_seen"] / 1000 for row in shown])
            assert trace["meta"]["axes"]["minutes"] == sorted(trace["meta"]["axes"]["minutes"])
    assert figures["Learning rate"]["data"][0]["y"] == [1e-3] * 6


def test_every_epochs_pictures_are_on_the_page_the_last_ones_seen(run: Path, command: Command) -> None:
    shutil.copy(run / "images" / "sample_1.png", run / "images" / "something_else_3.png")
    (run / "images" / "notes.txt").write_text("of a user")
    page = reported(command, run)
    for file in sorted((run / "images").glob("*.png")):
        address = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
        epoch = file.stem.rpartition("_")[2]
        [*shown] = page.all("img", src=address, data_epoch=epoch)
        with Image.open(file) as picture:
            size = (str(picture.width), str(picture.height))
        assert all((each.attributes["width"], each.attributes["height"]) == size for each in shown)
        is_last = file.stem in ("reconstruction_3", "sample_3", "traversal_3", "something_else_3")
        assert {"hidden" in each.attributes for each in shown} == {not is_last} | ({True} if file.stem == "sample_1" else set())
    losses = [row["loss"] for row in records(run) if row["split"] == "test"]
    words = [each.attributes["data-words"] for each in page.all("img") if "Samples" in (each.attributes["alt"] or "")]
    assert words == [f"epoch {epoch}, test loss {loss:.2f}" for epoch, loss in enumerate(losses, start=1)]
    sliders = page.all("input", type="range")
    assert [(each.attributes["max"], each.attributes["data-epochs"]) for each in sliders] == [("2", "[1, 2, 3]")] * 3
    headings = [each.text for each in page.all("h3")]
    assert {"Reconstructions", "Samples", "Traversals", "something_else"} <= set(headings)


def test_every_picture_is_whole_and_has_words_for_who_cannot_see_it(trained: Path, page: HtmlPage) -> None:
    for each in (images := page.all("img")):
        kind, _, content = (each.attributes["src"] or "").partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            assert f"data:image/{(picture.format or '').lower()}" == kind
            picture.load()
        assert each.attributes["alt"] or each.attributes["id"] == "sheet-1", "which is never seen as a whole"
    assert len(images) == 3 + 3 + 3 + 1 + 8


def test_the_page_asks_no_other_host_and_says_so_to_the_browser(trained: Path, page: HtmlPage) -> None:
    assert page.one("meta", http_equiv="Content-Security-Policy").attributes["content"] == POLICY
    for each in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (each.attributes.get(name) or "data:").startswith(("data:", "#"))
        assert "url(" not in (each.attributes.get("style") or "")
    assert re.findall(r"url\(|@import|https?:", page.one("style").text) == []
    [program] = [each for each in page.all("script") if not each.attributes]
    assert re.findall(r"https?:|fetch\(|XMLHttpRequest|import\(", program.text) == []


def test_the_same_run_gives_the_same_page(run: Path, command: Command, tmp_path: Path) -> None:
    before = everything(run)
    reported(command, run, "--out", tmp_path / "one.html")
    reported(command, run, "--out", tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert everything(run) == before, "nothing of the run is touched"


def test_words_from_files_are_never_markup(run: Path, command: Command) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    name = "<script>alert(2)<b>"
    other = Path(shutil.copytree(run, run.parent / name))
    edit_status(other, state=evil, reason=f'"{evil}', time=evil)
    of_weights = json.loads((other / "config.json").read_text())["sha256"]
    (other / "evaluation.json").write_text(json.dumps({evil: evil, "nll": 1.5, "weights_sha256": of_weights}))
    starts = RunFolder(other).starts
    start = json.loads(starts.read_text())
    start |= {"command": ["python", evil], "versions": {evil: evil}, "places": [evil, {"host": evil}], "time": evil}
    starts.write_text(json.dumps(start) + "\n")
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("project: vae_dist", f"project: '{evil}'"))
    for args in ([other], [run, other, "--out", run.parent / "both.html"]):
        page = reported(command, *args)
        assert len(page.all("script")) == 3
        assert all(
            "onerror" not in each.attributes and "alert" not in (each.attributes.get("src") or "") for each in page.elements
        )
        assert evil in page.one("section", id="provenance").text
        assert evil in page.one("section", id="config").text
    assert any(trace["name"] == "&lt;script&gt;alert(2)&lt;b&gt;" for trace in page.figures()["Loss"]["data"])


def test_the_worst_reconstructions_are_those_of_largest_loss(trained: Path, small_root: Path, page: HtmlPage) -> None:
    """Against an independent computation in float64, with the noise of the evaluation."""
    images = resident(DataConfig(root=str(small_root)), train=False)
    bce, kld = reference_terms(
        trained,
        as_images(images.pixels).double().flatten(1),
        normal(derive_key(0, Stream.EVALUATION), torch.arange(300), 20).double(),
    )
    losses, numbers = (bce + kld).topk(8)
    assert images.labels is not None
    expected = [
        f"image {number}, class {images.labels[number]}: {loss:.1f} nats"
        for number, loss in zip(numbers.tolist(), losses.tolist(), strict=True)
    ]
    found = section(page, "worst-reconstructions")
    assert re.findall(r"image \d+, class \d: [\d.]+ nats", found) == expected


def test_the_latent_map_has_every_image_in_the_colour_of_its_class(trained: Path, small_root: Path, page: HtmlPage) -> None:
    labels = resident(DataConfig(root=str(small_root)), train=False).labels
    assert labels is not None
    traces = page.figures()["Latent map (PCA)"]["data"]
    for trace in traces:
        of_class = int(trace["name"].removeprefix("class "))
        assert trace["customdata"] == (labels == of_class).nonzero().flatten().tolist()
        assert len(trace["x"]) == len(trace["y"]) == len(trace["customdata"])
    assert len({trace["marker"]["color"] for trace in traces}) == 10
    assert sum(len(trace["x"]) for trace in traces) == 300
    assert "All 300 test images" in section(page, "latent-space")


def test_the_kl_of_each_dimension_is_shown_sorted_and_over_the_epochs(trained: Path, page: HtmlPage) -> None:
    figures = page.figures()
    tests = [row for row in records(trained) if row["split"] == "test"]
    [bars] = figures["KL by latent dimension"]["data"]
    assert bars["y"] == sorted(tests[-1]["kld_per_dim"], reverse=True)
    assert [tests[-1]["kld_per_dim"][int(name[1:])] for name in bars["x"]] == bars["y"]
    [heat] = figures["KL by dimension over the epochs"]["data"]
    assert heat["x"] == [1, 2, 3]
    assert heat["z"][-1] == [row["kld_per_dim"][int(heat["y"][-1][1:])] for row in tests]
    assert heat["y"][-1] == bars["x"][0], "the largest is on top"


def test_config_and_provenance_are_told_in_full(trained: Path, page: HtmlPage) -> None:
    rows = {each.text: each for each in page.all("tr", class_="differs")}
    assert any(text.startswith("● tracking.log_every (differs from the default) 4 50") for text in rows)
    assert len(page.all("tr", class_="usual")) > 40
    start = json.loads(RunFolder(trained).starts.read_text())
    told = section(page, "provenance")
    for words in (start["time"], start["versions"]["torch"], start["places"][0]["host"], start["data"]["train"]["sha256"]):
        assert words in told
    assert " ".join(start["command"][1:4]) in told


def test_the_evaluation_is_there_when_it_was_made(run: Path, command: Command) -> None:
    assert "None yet" in section(reported(command, run), "evaluation")
    assert command("evaluate", run, "--iw_samples", 5).status == 0
    found = json.loads((run / "evaluation.json").read_text())
    page = reported(command, run)
    assert f"mutual_information {found['mutual_information']:.4f}" in section(page, "evaluation")
    header = page.one("header").text
    assert f"Importance-weighted loss {found['nll']:.2f} ± {found['nll_stderr']:.2f} nats per image, not a log-l" in header
    assert f"Active units {found['active_units']} of 20 latent dimensions" in header
    (run / "evaluation.json").write_text(json.dumps(found | {"weights_sha256": "of weights of an earlier epoch"}))
    assert "None yet" in section(reported(command, run), "evaluation")


def test_runs_are_compared_with_what_differs_marked(run: Path, quick: list[object], command: Command, tmp_path: Path) -> None:
    wider = [*quick, "--output", tmp_path / "wider", "--model.hidden", 50, "--objective.beta", 2]
    assert command("train", *wider).status == 0
    page = reported(command, run, tmp_path / "wider", "--out", tmp_path / "both.html")
    assert page.one("h1").text == "2 runs compared"
    rows = [each.text for each in page.all("tr", class_="differs")]
    assert "≠ model.hidden (differs between the runs) 400 50 400" in rows
    assert "≠ objective.beta (differs between the runs) 1.0 2.0 1.0" in rows
    assert not any("optimizer.lr" in row for row in rows)
    table = page.one("table", class_="figures").text
    for folder, name in ((run, "a run"), (tmp_path / "wider", "wider")):
        last = records(folder)[-1]
        assert re.search(rf"{name} finished \d of \d {last['loss']:.2f} nats per image, not a log-likelihood 300", table)
    colours = {trace["name"]: trace["line"]["color"] for trace in page.figures()["Loss"]["data"]}
    assert len(set(colours.values())) == len(colours) == 2
    assert "What is optimised" in page.figures(), "which is not the loss in both runs"
    assert not page.all("p", class_="warning")
    assert len(page.all("img", id="sheet-1")) == 1, "of images that both runs have"
    assert not page.all("img", id="sheet-2")


def test_losses_that_do_not_compare_are_said_not_to(run: Path, quick: list[object], command: Command, tmp_path: Path) -> None:
    assert command("train", *quick, "--output", tmp_path / "black", "--data.binarize", "static").status == 0
    page = reported(command, run, tmp_path / "black", "--out", tmp_path / "both.html")
    assert "do not compare: they are of different data sets and test images" in page.one("p", class_="warning").text


def test_without_the_data_set_all_else_is_there(run: Path, command: Command, tmp_path: Path) -> None:
    page = reported(command, run, "--data.root", tmp_path / "nowhere")
    for anchor in ("latent-space", "worst-reconstructions"):
        assert "None: --data.name mnist: train-images-idx3-ubyte is missing" in section(page, anchor)
    assert "Latent map (PCA)" not in page.figures()
    assert {"Loss", "KL by latent dimension", "Images per second"} <= page.figures().keys()
    assert len(page.all("img")) == 9
    assert "not a log-likelihood; n = 300" in page.one("header").text


def test_other_test_images_than_the_runs_are_not_taken_for_them(run: Path, command: Command, tmp_path: Path) -> None:
    write_idx_set(tmp_path / "other", *glyphs.draw(0, 20), *glyphs.draw(5000, 5300))
    page = reported(command, run, "--data.root", tmp_path / "other")
    assert "are others than the run's" in section(page, "latent-space")
    assert "Latent map (PCA)" not in page.figures()


def test_unfinished_and_failed_runs_say_their_state(run: Path, command: Command) -> None:
    edit_status(run, state="failed", reason="the loss is not finite any more: step 17")
    assert "failed the loss is not finite any more: step 17" in reported(command, run).one("header").text
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "images")
    for name in ("model.safetensors", "config.json", "metrics.jsonl"):
        (run / name).unlink()
    edit_status(run, state="running", reason="training")
    page = reported(command, run)
    assert "running training" in page.one("header").text
    assert "no epoch is complete yet" in page.one("header").text
    assert page.figures() == {}
    for anchor, words in (
        ("curves", "No step has been recorded yet"),
        ("pictures", "No picture has been drawn yet"),
        ("latent-space", "no weights there"),
        ("speed", "Nothing was timed yet"),
    ):
        assert words in section(page, anchor)
    (run / "status.json").unlink()
    assert "unknown" in reported(command, run).one("header").text


def test_a_run_of_an_older_version_says_that_nothing_tells_of_its_starts(run: Path, command: Command) -> None:
    RunFolder(run).starts.unlink()
    page = reported(command, run)
    assert "Nothing tells of this run's starts" in section(page, "provenance")
    assert "Latent map (PCA)" in page.figures()


def test_a_run_taken_up_again_tells_of_each_job(quick: list[object], command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("train", *quick, "--trainer.epochs", 1, "--output", run).status == 0
    assert command("train", *quick, "--output", run).status == 0
    page = reported(command, run)
    assert re.search(r"run \S+Z 0 1 1 [\d,]+ .* run \S+Z 8 1 1 [\d,]+", section(page, "speed"))
    [mark] = [trace for trace in page.figures()["Images per second"]["data"] if trace["name"] == "taken up again"]
    assert mark["x"] == [2000], "the first row of the second job"
    assert "Job 2: started" in section(page, "provenance")


def test_colour_images_without_classes(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for side, n in (("train", 40), ("test", 20)):
        (tmp_path / "photos" / side).mkdir(parents=True)
        for number in range(n):
            colour = (number * 6, 255 - number * 6, 100)
            Image.new("RGB", (16, 16), colour).save(tmp_path / "photos" / side / f"{number}.png")
    options = ["--data.name", "folder", "--data.root", tmp_path / "photos", "--data.image_size", 16, "--trainer.epochs", 1]
    options += ["--model.hidden", 20, "--model.latent_dim", 1, "--tracking.wandb", "disabled", "--output", tmp_path / "run"]
    assert command("train", *options, "--model.likelihood", "discretized_logistic").status == 0
    page = reported(command, tmp_path / "run")
    [trace] = page.figures()["Latent map (PCA)"]["data"]
    assert trace["customdata"] == list(range(20))
    assert set(trace["y"]) == {0}, "a latent of one dimension has one axis"
    assert "class" not in section(page, "worst-reconstructions")
    assert re.search(r"nats per image, [\d.]+ bits per dimension; n = 20", page.one("header").text)
    [sheet] = page.all("img", id="sheet-1")
    with Image.open(io.BytesIO(base64.b64decode((sheet.attributes["src"] or "").partition(",")[2]))) as picture:
        assert (picture.mode, picture.size) == ("RGB", (50 * 18 - 2, 16))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda run: (run / "config.yaml").unlink(), "is the folder of a run?"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "metrics.jsonl: line 1 is not a row"),
        (lambda run: edit_rows(run, bce="low"), "metrics.jsonl: bce of step 4"),
        (lambda run: edit_rows(run, kld_per_dim=[1.0]), "metrics.jsonl: kld_per_dim of step 4"),
        (lambda run: edit_rows(run, images_seen=None), "metrics.jsonl: images_seen of step 4"),
        (lambda run: (run / "images" / "sample_2.png").write_text("no picture"), "sample_2.png: not a PNG"),
        (lambda run: (run / "evaluation.json").write_text("[]"), "evaluation.json: not what vae_dist.evaluate writes"),
        (lambda run: (run / "evaluation.json").write_text('{"nll": "low"}'), "evaluation.json"),
        (lambda run: RunFolder(run).starts.write_text("{}\n"), "starts.jsonl: line 1"),
    ],
)
def test_a_folder_that_is_no_whole_run_is_refused(
    damage: Callable[[Path], object], told: str, run: Path, command: Command
) -> None:
    damage(run)
    refused(command("report", run), told.replace("is the folder", f"is {run} the folder"))
    assert not (run / "report.html").exists()


def edit_rows(run: Path, **changes: object) -> None:
    rows = read_rows(run / "metrics.jsonl")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | changes) + "\n" for row in rows))


def test_nothing_but_a_report_is_overwritten(run: Path, command: Command, tmp_path: Path) -> None:
    foreign = tmp_path / "thesis.html"
    foreign.write_text("<!doctype html><title>years of work</title>")
    refused(command("report", run, "--out", foreign), "--out", "thesis.html", "name another file")
    assert foreign.read_text() == "<!doctype html><title>years of work</title>"
    refused(command("report", run, "--out", tmp_path), "is a folder; name a file")
    for _ in range(2):
        assert reported(command, run).one("h1").text == "a run"


def test_runs_must_be_named_once_and_the_file_of_several_too(run: Path, command: Command, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "x.html"]
    for args, told in (
        ([], "name the folder of a run"),
        ([run, run.parent / "." / "a run", *out], "is named twice"),
        ([run, tmp_path / "nowhere"], "--out: name the file"),
    ):
        outcome = command("report", *args)
        assert outcome.status == 2
        assert told in " ".join(outcome.err.replace("│", " ").split())
    refused(command("report", run, tmp_path / "nowhere", *out), "nowhere")
    refused(command("report", run / "checkpoints" / "step_00000024"), "the folder of a run?")
    assert not (tmp_path / "x.html").exists()


def test_it_is_the_work_of_one_process(run: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    refused(command("report", run), "one process")


def test_runs_of_one_name_are_called_by_their_paths(run: Path, command: Command, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "elsewhere" / "a run"))
    page = reported(command, run, other, "--out", tmp_path / "both.html")
    assert {trace["name"] for trace in page.figures()["Loss"]["data"]} == {str(run), str(other)}


def test_long_runs_are_thinned_evenly_with_both_ends(run: Path) -> None:
    assert thinned([1, 2, 3], 3) == [1, 2, 3]
    assert thinned(list(range(10)), 4) == [0, 3, 6, 9]
    assert thinned(list(range(100_000)))[:: 2000 - 1] == [0, 99_999]
    picture = (run / "images" / "sample_1.png").read_bytes()
    for epoch in range(4, 90):
        (run / "images" / f"sample_{epoch}.png").write_bytes(picture)
    epochs = [found.epoch for found in facts(run).pictures["sample"]]
    assert (epochs[0], epochs[-1], len(epochs)) == (1, 89, 40)
    steps = {after - before for before, after in pairwise(epochs)}
    assert steps <= {2, 3}


def facts(run: Path) -> Facts:
    return read(run, "it")


def test_minutes_are_those_of_training_and_evaluation(tmp_path: Path, run: Path) -> None:
    def row(split: str, images: int, **times: float) -> dict[str, Any]:
        return {"split": split, "epoch": 1, "step": images, "images_seen": images, "loss": 1.0, "n": 1} | times

    rows = [
        row("train", 600, images_per_second=10),
        row("train", 1200, images_per_second=20),
        row("train", 1800, images_per_second=10, train_seconds=150),
        row("test", 1800, test_seconds=30),
        row("train", 1860, images_per_second=1),
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert [each["minutes"] for each in facts(run).rows] == pytest.approx([1, 1.5, 2.5, 3, 4])


def test_principal_axes_are_those_of_the_singular_values() -> None:
    torch.manual_seed(0)
    points = torch.randn(200, 5, dtype=torch.float64) * torch.tensor([1.0, 5.0, 2.0, 0.5, 0.1]) + 7
    places, shares = principal_axes(points)
    centred = points - points.mean(0)
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(places.abs(), (centred @ axes[:2].T).abs())
    assert shares == pytest.approx((values.square() / values.square().sum())[:2].tolist())
    again, _ = principal_axes(points)
    assert torch.equal(again, places)
    flat, of_flat = principal_axes(points[:, :1])
    assert torch.equal(flat[:, 1], torch.zeros(200, dtype=torch.float64))
    assert of_flat == pytest.approx([1.0, 0.0])
    still, of_still = principal_axes(torch.ones(3, 4, dtype=torch.float64))
    assert torch.equal(still, torch.zeros(3, 2, dtype=torch.float64))
    assert of_still == [0.0, 0.0]
