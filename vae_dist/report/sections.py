"""The sections of a report that show figures and pictures."""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from vae_dist.pictures import GAP
from vae_dist.report import figures, tables
from vae_dist.report.facts import Facts, Picture
from vae_dist.report.insight import SHEET_COLUMNS, Insight, Worst
from vae_dist.report.markup import Html, data_address, element, embedded_json, joined, number, picture

_KINDS = {
    "reconstruction": ("Reconstructions", "Test images over what the model makes of them."),
    "sample": ("Samples", "Decoded from the prior: the same latents in every epoch."),
    "traversal": (
        "Traversals",
        "Each row moves one latent dimension alone from -3 to 3 around the posterior mean of the first test image; the rows "
        "begin with the dimension in which its posterior tells most.",
    ),
}
# Of training steps: title, name in the rows, unit, whether the axis is logarithmic.
_STEP_FIGURES: tuple[tuple[str, str, str, bool], ...] = (
    ("Norm of the gradient", "grad_norm", "of the summed loss", True),
    ("Learning rate", "lr", "", False),
    ("Gradient noise scale", "noise_scale_images", "images", True),
)
_OF_MAPS = {"UMAP": " Neighbours are neighbours in the latent space; other distances mean little."}
_HOW_TO = "Drag to zoom, double-click for all, click a name to hide it."


class Subject(NamedTuple):
    """A run on the page."""

    facts: Facts
    shape: Sequence[int] | None  # of an image; None where the model cannot be had
    insight: Insight | None
    missing: str  # why there is no insight


class Plots:
    """The figures of a page: the page's script draws each in the place that `add` gives."""

    def __init__(self) -> None:
        self._figures: dict[str, go.Figure] = {}

    def add(self, figure: go.Figure, title: str, caption: str | None = None, sheet: Html | None = None) -> Html:
        """With a `sheet` of thumbnails, of whose images the points tell the numbers, the script shows the one pointed at."""
        name = f"plot-{len(self._figures) + 1}"
        self._figures[name] = figure
        place = element("div", id=name, class_="plot", role="group", aria_label=title, style=f"height:{figure.layout.height}px")
        words = element("figcaption", caption) if caption else None
        return element("figure", element("h3", title), place, sheet, words, class_="drawn")

    def embedded(self) -> Html:
        return embedded_json("figures", {name: json.loads(figure.to_json()) for name, figure in self._figures.items()})


def note(words: str) -> Html:
    return element("p", words, class_="note")


def of_each(subjects: Sequence[Subject], content: Callable[[Subject], Html]) -> Html:
    """The same of each run, under its name where there are several."""
    if len(subjects) == 1:
        return content(subjects[0])
    return joined(element("section", element("h3", subject.facts.name), content(subject)) for subject in subjects)


def curves(subjects: Sequence[Subject], plots: Plots) -> Html:
    runs = [subject.facts for subject in subjects]
    if not any(run.rows for run in runs):
        return note("No step has been recorded yet.")
    in_nats = {"bce": "Reconstruction term (bce)", "kld": "KL term (kld)"}
    if figures.is_other_objective(runs):
        in_nats = {"objective": "What is optimised"} | in_nats
    parts = [plots.add(figures.curve(runs, name, "nats per image"), title) for name, title in in_nats.items()]
    for title, name, unit, is_log in _STEP_FIGURES:
        if figures.has(runs, name):
            parts.append(plots.add(figures.step_curve(runs, name, unit, is_log), title))
    faint = "" if len(runs) == 1 else " Faint: the training curve; strong: the test images."
    caption = f"The negative ELBO, loss = bce + kld. Training rows are means since the row before.{faint} {_HOW_TO}"
    loss = plots.add(figures.curve(runs, "loss", "nats per image", figures.TALL), "Loss", caption)
    return joined([_axis_switch(), loss, element("div", *parts, class_="pair")])


def _axis_switch() -> Html:
    """What the x axes of the curves show."""
    choices = (
        element(
            "label",
            element(
                "input", type="radio", name="axis", value=name, checked=name == "images", data_title=title, autocomplete="off"
            ),
            f" {title}",
        )
        for name, title in figures.AXES.items()
    )
    return element("fieldset", element("legend", "x axis"), *choices, class_="axes")


def pictures(subjects: Sequence[Subject]) -> Html:
    """A slider over the epochs for each kind of picture, which moves all runs."""
    found = dict.fromkeys(kind for subject in subjects for kind in subject.facts.pictures)
    if not found:
        return note("No picture has been drawn yet.")
    kinds = [*(kind for kind in _KINDS if kind in found), *(kind for kind in found if kind not in _KINDS)]
    shown = (_slides(kind, [subject.facts for subject in subjects]) for kind in kinds)
    return element("div", *shown, class_="columns" if len(subjects) == 1 else None)


def _slides(kind: str, runs: Sequence[Facts]) -> Html:
    title, words = _KINDS.get(kind, (kind, ""))
    epochs = sorted({found.epoch for run in runs for found in run.pictures.get(kind, [])})
    shown = (_slide_show(run, kind, title, is_named=len(runs) > 1) for run in runs if kind in run.pictures)
    slider = element(
        "input", type="range", min=0, max=len(epochs) - 1, step=1, value=len(epochs) - 1, data_epochs=json.dumps(epochs),
        aria_label=f"{title}: epoch", aria_valuetext=f"epoch {epochs[-1]}", autocomplete="off",
    )  # fmt: skip
    control = element("div", slider, class_="slider") if len(epochs) > 1 else None
    return element("section", element("h3", title), note(words), control, element("div", *shown, class_="row"), class_="slides")


def _slide_show(run: Facts, kind: str, title: str, is_named: bool) -> Html:
    """All pictures of a kind, of which one is seen."""
    drawn = run.pictures[kind]
    images = (
        element(
            "img", src=data_address(each.png, "image/png"), width=each.width, height=each.height, hidden=each is not drawn[-1],
            data_epoch=each.epoch, data_words=_words(run, each), alt=f"{title} of {run.name}, {_words(run, each)}",
        )
        for each in drawn
    )  # fmt: skip
    name = element("strong", run.name, " ") if is_named else None
    caption = element("figcaption", name, element("output", _words(run, drawn[-1])))
    return element("figure", *images, caption, class_="wide" if drawn[-1].width > 2 * drawn[-1].height else None)


def _words(run: Facts, drawn: Picture) -> str:
    test = run.test_of_epoch(drawn.epoch)
    return f"epoch {drawn.epoch}" + (f", test loss {number(test['loss'])}" if test else "")


def latent_space(subjects: Sequence[Subject], plots: Plots) -> Html:
    runs, spectra = [subject.facts for subject in subjects], []
    if any(map(figures.has_spectra, runs)):
        caption = "Means over the test images, at the last epoch. A dimension near 0 nats tells nothing of the image."
        spectra = [plots.add(figures.kl_by_dimension(runs), "KL by latent dimension", caption)]
    for run in runs:
        if len(run.tests) > 1 and figures.has_spectra(run):
            title, caption = "KL by dimension over the epochs", "The dimension of most KL at the last epoch is on top."
            spectra.append(plots.add(figures.kl_over_epochs(run), titled(title, run, runs), caption))
    sheets = _Sheets()
    maps = [each for subject in subjects for each in _maps(subject, runs, plots, sheets)]
    if len(runs) == 1:
        return joined([element("div", *spectra, class_="pair"), element("div", *maps, class_="pair")])
    return element("div", *spectra, *maps, class_="pair")


def titled(title: str, run: Facts, runs: Sequence[Facts]) -> str:
    """With the run's name, where there are several."""
    return title if len(runs) == 1 else f"{title}: {run.name}"


class _Sheets:
    """Thumbnails of test images, put on the page once, though several runs have the same."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    def place(self, insight: Insight) -> Html:
        """Where the script shows a thumbnail, and the sheet with all of them where it is not on the page yet."""
        content = insight.thumbnails.numpy().tobytes()
        is_new = content not in self._names
        name = self._names.setdefault(content, f"sheet-{len(self._names) + 1}")
        height, width = insight.side
        canvas = element(
            "canvas", class_="thumbnail", width=width, height=height, aria_hidden="true",
            data_sheet=name, data_columns=SHEET_COLUMNS, data_gap=GAP,
        )  # fmt: skip
        sheet = picture(insight.thumbnails, is_exact=False, id=name, alt="", hidden=True) if is_new else None
        return joined([canvas, sheet])


def _maps(subject: Subject, runs: Sequence[Facts], plots: Plots, sheets: _Sheets) -> list[Html]:
    """A figure for each way to make a map, or why there is none."""
    run, insight = subject.facts, subject.insight
    if insight is None:
        title = element("h3", titled("Latent map", run, runs))
        return [element("section", title, note(f"None: {subject.missing}"))]
    n, of = f"{insight.n:,}", f"{insight.of:,}"
    shown = f"All {n} test images" if n == of else f"The first {n} of {of} test images"
    captions = {
        way: f"{shown} by their posterior means. Point at one to see it.{_OF_MAPS.get(way, '')}" for way in insight.maps
    }
    return [
        plots.add(figures.latent_map(insight, way), titled(f"Latent map ({way})", run, runs), caption, sheets.place(insight))
        for way, caption in captions.items()
    ]


def worst(subject: Subject) -> Html:
    """The test images of largest loss, beside what the model makes of them."""
    insight = subject.insight
    if insight is None:
        return note(f"None: {subject.missing}")
    words = f"Of all {insight.of:,} test images those of largest loss; beside each, what is decoded from its posterior mean."
    return joined([note(words), element("div", *(_bad(each, insight) for each in insight.worst), class_="row worst")])


def _bad(found: Worst, insight: Insight) -> Html:
    of_class = f", class {insight.labels[found.number]}" if insight.labels is not None else ""
    words = f"image {found.number}{of_class}: {number(found.loss, 1)} nats"
    return element("figure", picture(found.picture, alt=f"{words}; its reconstruction beside it"), element("figcaption", words))


def speed(subjects: Sequence[Subject], plots: Plots) -> Html:
    runs = [subject.facts for subject in subjects]
    if not figures.has(runs, "images_per_second"):
        return note("Nothing was timed yet.")
    parts = [plots.add(figures.speed(runs), "Images per second", "Over all processes.")]
    for run in runs:
        if run.epochs:
            title = titled("Where the time of a step goes", run, runs)
            parts.append(plots.add(figures.shares(run), title, "On rank zero, by epoch; compute includes the optimizer."))
    return joined([element("div", *parts, class_="pair"), tables.jobs(runs)])
