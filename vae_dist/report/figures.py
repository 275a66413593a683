"""The figures of a report, as Plotly has them: without colours of text, axes and background, which the page sets by its scheme.

A run has one colour in all figures that show several, and after ten runs another dash too. The colours stand out from white and
from black alike.
"""

import html
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from vae_dist.pace import PARTS
from vae_dist.report.facts import Facts, thinned
from vae_dist.report.insight import Insight
from vae_dist.tracking import Row

COLOURS = ("#3b82d6", "#d9730d", "#2a9d5c", "#b05fd1", "#d9485f", "#1698a6", "#a67c1e", "#7d8590", "#e0559f", "#6a8f1f")
_DASHES = ("solid", "dash", "dot", "dashdot")
_FAINT = 0.45  # of what stands behind the figures that count
TALL, LOW, _MAP = 400, 270, 560  # pixels
_MOST_NAMES = 4  # of runs above a low figure: of more there would be little room below
_MOST_COLUMNS, _MOST_LABELS = 300, 12  # of a heatmap: no screen shows more
# What the x axis may show: the page switches between them.
AXES = {"images": "images seen", "epochs": "epochs", "minutes": "minutes of training and evaluation"}


def shade(number: int) -> str:
    """Of the run, or the class, of a number."""
    return COLOURS[number % len(COLOURS)]


def dash(number: int) -> str:
    """Of the lines of the run of a number."""
    return _DASHES[number // len(COLOURS) % len(_DASHES)]


def label(text: object) -> str:
    """Any text as Plotly shows it, which takes some of HTML for markup, and `%{…}` for the place of a figure."""
    return html.escape(str(text), quote=False).replace("%{", "%\N{WORD JOINER}{")


def curve(runs: Sequence[Facts], figure: str, unit: str, height: int = LOW) -> go.Figure:
    """A figure in nats: the training curve, the epochs' means, and the test images."""
    drawn = _curves(runs, figure, unit, height, _SPLITS)
    if height == TALL and len(runs) > _MOST_NAMES:
        drawn.update_layout(height=TALL + 20 * len(runs), showlegend=True, legend={"maxheight": 1})
    shown = [row[figure] for run in runs for row in [*run.tests, *run.epochs[1:]] if row.get(figure) is not None]
    if shown and all(len(run.tests) > 2 for run in runs):  # the first steps are far off: a double click shows them
        low, high = min(shown), max(shown)
        drawn.update_yaxes(range=[low - 0.05 * (high - low), high + 0.1 * (high - low)])
    return drawn


def step_curve(runs: Sequence[Facts], figure: str, unit: str, is_log: bool = False) -> go.Figure:
    """A figure of single training steps."""
    drawn = _curves(runs, figure, unit, LOW, {"training": _training})
    values = [value for trace in drawn.data for value in trace.y if value > 0]
    drawn.update_yaxes(
        _log_axis(min(values), max(values)) if is_log and values else {"rangemode": "tozero", "exponentformat": "power"}
    )
    return drawn


def _log_axis(low: float, high: float) -> dict[str, Any]:
    """Of figures between two; with few enough numbers to have room beside each other."""
    if high < 5 * low:  # less than a decade: there would be hardly a number
        return {"rangemode": "tozero", "tickformat": "~s"}
    return {"type": "log", "tickformat": "~s", "dtick": "D2" if high < 1e4 * low else 1}


def has(runs: Sequence[Facts], figure: str) -> bool:
    return any(row.get(figure) is not None for run in runs for row in run.rows)


def is_other_objective(runs: Sequence[Facts]) -> bool:
    """Whether any run optimises something else than the loss."""
    return any(row["split"] == "train" and row.get("objective", row["loss"]) != row["loss"] for run in runs for row in run.rows)


def speed(runs: Sequence[Facts]) -> go.Figure:
    """Images per second, with a mark where a job took the run up again."""
    drawn = _curves(runs, "images_per_second", "images per second", LOW, _SPLITS)
    drawn.update_yaxes(rangemode="tozero")
    for place, run in enumerate(runs):
        rows = [row for row in run.rows if row.get("images_per_second") is not None]
        firsts = [new for old, new in pairwise(rows) if run.job_of(old) != run.job_of(new)]
        if firsts:
            trace = _trace(runs, run, "taken up again", firsts, "images_per_second", 4 if len(runs) == 1 else place)
            drawn.add_trace(trace.update(mode="markers", marker={"symbol": "diamond", "size": 10}))
    return drawn


def shares(run: Facts) -> go.Figure:
    """Where the time of the steps went, by epoch."""
    rows = [row for row in thinned(run.epochs) if all(row.get(f"{part}_share") is not None for part in PARTS)]
    bars = [
        go.Bar(
            name=part,
            x=[row["epoch"] for row in rows],
            y=[row[f"{part}_share"] for row in rows],
            marker={"color": colour},
            hovertemplate="epoch %{x}: %{y:.1%}<extra>%{fullData.name}</extra>",
        )
        for part, colour in zip(PARTS, COLOURS, strict=False)
    ]
    layout = {"barmode": "stack", "xaxis": _epochs(rows), "yaxis": {"title": "share of a step", "tickformat": ".0%"}}
    return _figure(bars, LOW, **layout)


def kl_by_dimension(runs: Sequence[Facts]) -> go.Figure:
    """The KL of each latent dimension at the last epoch, the largest first: bars of one run, lines of several."""
    traces: list[Any] = []
    for number, run in enumerate(runs):
        spectra = _spectra(run)
        if not spectra:
            continue
        values = spectra[-1]["kld_per_dim"]
        order = sorted(range(len(values)), key=lambda dimension: -values[dimension])
        dimensions, nats = [f"z{dimension}" for dimension in order], [values[dimension] for dimension in order]
        if len(runs) == 1:
            hover = "%{x}: %{y:.4f} nats<extra></extra>"
            traces.append(go.Bar(x=dimensions, y=nats, marker={"color": shade(number)}, hovertemplate=hover))
        else:
            hover = "%{customdata}: %{y:.4f} nats<extra>%{fullData.name}</extra>"
            rank = list(range(1, len(nats) + 1))
            lines = {
                "mode": "lines+markers",
                "line": {"color": shade(number), "dash": dash(number)},
                "hovertemplate": hover,
                "customdata": dimensions,
            }
            traces.append(go.Scatter(x=rank, y=nats, name=label(run.name), **lines))
    title = "latent dimension, by its KL" if len(runs) == 1 else "rank of the latent dimension"
    axes = {"xaxis": {"title": title}, "yaxis": {"title": "nats", "rangemode": "tozero"}}
    return _figure(traces, LOW, showlegend=1 < len(runs) <= _MOST_NAMES, **axes)


def kl_over_epochs(run: Facts) -> go.Figure:
    """The same over the epochs: a row for each dimension, in the order of the last epoch."""
    rows = thinned(_spectra(run), _MOST_COLUMNS)
    last = rows[-1]["kld_per_dim"]
    order = sorted(range(len(last)), key=lambda dimension: last[dimension])
    names = [f"z{dimension}" for dimension in order]
    heat = go.Heatmap(
        x=[row["epoch"] for row in rows],
        y=names,
        z=[[float(f"{row['kld_per_dim'][dimension]:.4g}") for row in rows] for dimension in order],
        colorscale="Viridis",
        colorbar={"title": "nats", "thickness": 12},
        hovertemplate="%{y}, epoch %{x}: %{z:.4~g} nats<extra></extra>",
    )
    labels = names[:: -math.ceil(len(names) / _MOST_LABELS)]  # from the top
    return _figure([heat], LOW, xaxis=_epochs(rows), yaxis={"type": "category", "tickvals": labels})


def has_spectra(run: Facts) -> bool:
    return bool(_spectra(run))


def latent_map(insight: Insight, way: str) -> go.Figure:
    """The test images by their posterior means, coloured by class where classes are known."""
    places, labels = insight.maps[way], insight.labels
    classes = sorted(set(labels)) if labels is not None else [None]
    traces = []
    for number, of_class in enumerate(classes):
        members = [i for i in range(insight.n) if labels is None or labels[i] == of_class]
        traces.append(
            go.Scatter(
                name="images" if of_class is None else f"class {of_class}",
                mode="markers",
                x=[round(place, 4) for place in places[members, 0].tolist()],
                y=[round(place, 4) for place in places[members, 1].tolist()],
                customdata=members,
                marker={"color": shade(number), "size": 4, "opacity": 0.75},
                hovertemplate="image %{customdata}<extra>%{fullData.name}</extra>",
            )
        )
    names = ["", ""]
    if way == "PCA":
        names = [f"axis {axis}, {share:.0%} of the variance" for axis, share in enumerate(insight.explained, start=1)]
    x, y = ({"title": name, "zeroline": False} for name in names)
    return _figure(
        traces,
        _MAP,
        xaxis=x,
        yaxis=y | {"scaleanchor": "x"},
        hovermode="closest",
        legend={"itemsizing": "constant"},
        showlegend=labels is not None,
    )


def _epochs(rows: Sequence[Row]) -> dict[str, Any]:
    """An axis of whole epochs."""
    return {"title": "epoch"} | ({"tickvals": [row["epoch"] for row in rows]} if len(rows) <= 12 else {})


def _spectra(run: Facts) -> list[Row]:
    return [row for row in run.tests if row.get("kld_per_dim") is not None]


def _training(run: Facts) -> list[Row]:
    return thinned([row for row in run.rows if row["split"] == "train"])


# The lines of a figure: their rows, which colour they have where the figure is of one run, and how they are drawn.
_SPLITS: dict[str, Callable[[Facts], list[Row]]] = {
    "training": lambda run: thinned(run.curve),
    "training, whole epochs": lambda run: thinned(run.epochs),
    "test": lambda run: thinned(run.tests),
}
_LINES = {
    "training": (7, {"width": 1}),
    "training, whole epochs": (0, {"width": 1.5, "dash": "dot"}),
    "test": (1, {"width": 2.5}),
}


def _curves(
    runs: Sequence[Facts], figure: str, unit: str, height: int, splits: dict[str, Callable[[Facts], list[Row]]]
) -> go.Figure:
    """A figure of the rows over the images seen: of one run in a colour for each split, of several in a colour for each run."""
    traces = []
    for number, run in enumerate(runs):
        lines = _lines(run, figure, splits, is_alone=len(runs) == 1)
        for split, rows in lines:
            of_split, line = _LINES[split]
            trace = _trace(runs, run, split, rows, figure, of_split if len(runs) == 1 else number).update(line=line)
            if len(runs) > 1:
                trace.update(showlegend=split == lines[-1][0], line={"dash": dash(number)})
            if split == "training":
                trace.update(opacity=1 if len(lines) == 1 or len(runs) == 1 else _FAINT)
            else:
                trace.update(mode="lines+markers" if len(rows) < 100 else "lines", marker={"size": 5})
            traces.append(trace)
    axes = {"xaxis": {"title": AXES["images"]}, "yaxis": {"title": unit}}
    is_named = len(traces) > 1 if len(runs) == 1 else len(runs) <= _MOST_NAMES
    return _figure(traces, height, hovermode="x", showlegend=is_named, **axes)


def _lines(
    run: Facts, figure: str, splits: dict[str, Callable[[Facts], list[Row]]], is_alone: bool
) -> list[tuple[str, list[Row]]]:
    """The rows of the splits that have a figure; beside other runs only of the first and the last."""
    rows = {split: [row for row in of_run(run) if row.get(figure) is not None] for split, of_run in splits.items()}
    found = [(split, of_split) for split, of_split in rows.items() if of_split]
    return found if is_alone or len(found) < 3 else [found[0], found[-1]]


def _trace(runs: Sequence[Facts], run: Facts, what: str, rows: Sequence[Row], figure: str, place: int) -> go.Scatter:
    """Some rows' figure, with all that the x axis may show."""
    per_epoch, is_alone = run.epoch_images, len(runs) == 1
    of_axis: dict[str, Callable[[Row], float]] = {
        "images": lambda row: row["images_seen"],
        "epochs": lambda row: round(row["images_seen"] / per_epoch, 4) if per_epoch else row["epoch"],
        "minutes": lambda row: round(row["minutes"], 4),
    }
    axes = {axis: [value(row) for row in rows] for axis, value in of_axis.items()}
    spoken = what if is_alone else f"{label(run.name)}, {what}"
    return go.Scatter(
        name=what if is_alone else label(run.name),
        x=axes["images"],
        y=[row[figure] for row in rows],
        mode="lines",
        line={"color": shade(place)},
        marker={"color": shade(place)},
        hovertemplate=f"%{{y:,.6~g}}<extra>{spoken}</extra>",
        legendgroup=what if is_alone else run.name,
        meta={"axes": axes},
    )


def _figure(traces: Sequence[Any], height: int, **layout: Any) -> go.Figure:
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0} | layout.pop("legend", {})
    margin = {"l": 56, "r": 12, "t": 8, "b": 44}
    return go.Figure(traces, {"template": None, "height": height, "margin": margin, "legend": legend, **layout})
