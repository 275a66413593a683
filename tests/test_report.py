"""The report of a run: what is on the page, and what it never asks for."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers import Outcome, everything, launch, records, reference_terms, resident
from tests.html_page import HtmlPage, reported
from vae_dist.config import DataConfig
from vae_dist.data import as_images
from vae_dist.noise import Stream, derive_key, normal
from vae_dist.report import figures
from vae_dist.report.facts import read
from vae_dist.report.insight import principal_axes
from vae_dist.run import RunFolder
from vae_dist.tracking import read_rows

Command = Callable[..., Outcome]
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


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


def test_a_report_begins_with_what_the_run_is_its_state_and_its_main_figure(trained: Path, page: HtmlPage) -> None:
    last = records(trained)[-1]
    header = page.one("header").text
    assert page.one("h1").text == "trained"
    assert "A VAE (mlp, 20 latent dimensions) on mnist, seed 0" in header
    assert "finished 3 epochs are done" in header
    words = f"bce {last['bce']:.2f} + kld {last['kld']:.2f}; epoch 3 of 3"
    assert f"Test loss {last['loss']:.2f} nats per image, not a log-likelihood; n = 300 test images; {words}" in header
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
    name = "<script>alert(2)<b>%{y}"
    other = Path(shutil.copytree(run, run.parent / name))
    (other / "status.json").write_text(json.dumps({"state": evil, "reason": f'"{evil}', "time": evil}))
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
    names = {trace["name"] for trace in page.figures()["Loss"]["data"]}
    assert "&lt;script&gt;alert(2)&lt;b&gt;%\N{WORD JOINER}{y}" in names


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
    found = page.section("worst-reconstructions")
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
    assert page.figures()["Latent map (PCA)"]["layout"]["yaxis"]["scaleanchor"] == "x", "distances are the same in both axes"
    assert "All 300 test images" in page.section("latent-space")


def test_the_kl_of_each_dimension_is_shown_sorted_and_over_the_epochs(trained: Path, page: HtmlPage) -> None:
    figures = page.figures()
    tests = [row for row in records(trained) if row["split"] == "test"]
    [bars] = figures["KL by latent dimension"]["data"]
    assert bars["y"] == sorted(tests[-1]["kld_per_dim"], reverse=True)
    assert [tests[-1]["kld_per_dim"][int(name[1:])] for name in bars["x"]] == bars["y"]
    [heat] = figures["KL by dimension over the epochs"]["data"]
    assert heat["x"] == [1, 2, 3]
    assert heat["z"][-1] == pytest.approx([row["kld_per_dim"][int(heat["y"][-1][1:])] for row in tests], rel=1e-3)
    assert heat["y"][-1] == bars["x"][0], "the largest is on top"
    labels = figures["KL by dimension over the epochs"]["layout"]["yaxis"]["tickvals"]
    assert labels == bars["x"][::2], "every second of twenty, from the top"


def test_config_and_provenance_are_told_in_full(trained: Path, page: HtmlPage) -> None:
    rows = {each.text: each for each in page.all("tr", class_="differs")}
    assert any(text.startswith("● tracking.log_every (differs from the default) 4 50") for text in rows)
    assert len(page.all("tr", class_="usual")) > 40
    start = json.loads(RunFolder(trained).starts.read_text())
    told = page.section("provenance")
    for words in (start["time"], start["versions"]["torch"], start["places"][0]["host"], start["data"]["train"]["sha256"]):
        assert words in told
    assert " ".join(start["command"][1:4]) in told


def test_the_evaluation_is_there_when_it_was_made(run: Path, command: Command) -> None:
    assert f"None yet: python -m vae_dist.evaluate '{run}' makes it." in reported(command, run).section("evaluation")
    assert command("evaluate", run, "--iw_samples", 5).status == 0
    found = json.loads((run / "evaluation.json").read_text())
    page = reported(command, run)
    assert f"mutual_information {found['mutual_information']:.4f}" in page.section("evaluation")
    header = page.one("header").text
    assert f"Importance-weighted loss {found['nll']:.2f} ± {found['nll_stderr']:.2f} nats per image, not a log-l" in header
    assert f"Active units {found['active_units']} of 20 latent dimensions" in header
    (run / "evaluation.json").write_text(json.dumps(found | {"weights_sha256": "of weights of an earlier epoch"}))
    assert "None yet" in reported(command, run).section("evaluation")


def test_runs_are_compared_with_what_differs_marked(run: Path, quick: list[object], command: Command, tmp_path: Path) -> None:
    wider = [*quick, "--output", tmp_path / "wider", "--model.hidden", 50, "--objective.beta", 2]
    assert command("train", *wider).status == 0
    page = reported(command, run, tmp_path / "wider", "--out", tmp_path / "both.html")
    assert page.one("h1").text == "2 runs compared"
    rows = [each.text for each in page.all("tr", class_="differs")]
    assert "≠ model.hidden (differs between the runs) 400 50 400" in rows
    assert "≠ objective.beta (differs between the runs) 1.0 2.0 1.0" in rows
    assert not any("optimizer.lr" in row or row.startswith("≠ output") for row in rows)
    table = page.one("table", class_="figures").text
    assert table.startswith("Final figures; losses in nats per image, not a log-likelihood run state")
    for folder, name, marked in ((run, "a run", r" \(the lowest\)"), (tmp_path / "wider", "wider", "")):
        last = records(folder)[-1]
        assert re.search(rf"{name} finished \d of \d {last['loss']:.2f}{marked} 300", table)
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
    table = page.one("table", class_="figures").text
    assert "the lowest" not in table
    assert re.search(r"a run finished 3 of 3 [\d.]+ nats per image, not a log-likelihood 300", table)
    assert re.search(r"black finished 2 of 2 [\d.]+ nats per image, 0\.\d+ bits per dimension 300", table)


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
    assert "class" not in page.section("worst-reconstructions")
    assert re.search(r"nats per image, [\d.]+ bits per dimension; n = 20", page.one("header").text)
    [sheet] = page.all("img", id="sheet-1")
    with Image.open(io.BytesIO(base64.b64decode((sheet.attributes["src"] or "").partition(",")[2]))) as picture:
        assert (picture.mode, picture.size) == ("RGB", (50 * 18 - 2, 16))


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


def test_twelve_runs_can_be_told_apart_and_are_named_once(trained: Path) -> None:
    runs = [read(trained, f"run {number}") for number in range(12)]
    loss, kl = figures.curve(runs, "loss", "nats", figures.TALL), figures.curve(runs, "kld", "nats")
    looks = {trace.name: (trace.line.color, trace.line.dash) for trace in loss.data}
    assert len(looks) == len(set(looks.values())) == 12
    assert (loss.layout.showlegend, kl.layout.showlegend) == (True, False)
    assert figures.curve(runs[:4], "kld", "nats").layout.showlegend


def test_a_long_run_of_many_dimensions_stays_one_that_can_be_sent(trained: Path) -> None:
    run = read(trained, "long")
    test, epoch = run.tests[-1] | {"kld_per_dim": [1 / 3] * 512}, run.epochs[-1]
    rows = [row | {"epoch": number, "images_seen": 1000 * number} for number in range(1, 5001) for row in (test, epoch)]
    long = replace(run, rows=rows)
    heat = figures.kl_over_epochs(long)
    assert (heat.data[0].x[0], heat.data[0].x[-1], len(heat.data[0].x)) == (1, 5000, 300)
    assert len(heat.to_json()) < 1.5e6
    assert {len(trace.x) for trace in figures.curve([long], "loss", "nats").data} == {2000}
    assert {len(trace.x) for trace in figures.shares(long).data} == {2000}


def test_axes_of_the_gradients_norm_have_few_numbers_beside_each_other(trained: Path) -> None:
    run = read(trained, "it")
    for low, high, expected in ((6e5, 1e6, (None, None)), (2e3, 1e6, ("log", "D2")), (1e-1, 1e6, ("log", 1))):
        norms = [row | {"grad_norm": norm} for row, norm in zip(run.rows, [low, high] * 9, strict=False)]
        axis = figures.step_curve([replace(run, rows=norms)], "grad_norm", "", is_log=True).layout.yaxis
        assert (axis.type, axis.dtick) == expected
