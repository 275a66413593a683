"""The plot of a benchmark: seconds an epoch of each case, beside the floor that the machine sets.

python -m benchmarks.plot BENCH_JSON PNG
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import Case, Found

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"notebook": "#9aa3ad", "tight": "#7fb8e0", "vae_dist": "#4482c4"}
SEVERAL_PROCESSES = "#e09a4a"


def plot(result: dict[str, Any], file: Path) -> None:
    """Writes a PNG of about 1,400 x 500 pixels, with a panel for each width. Its ground is white, on dark pages too."""
    from matplotlib.figure import Figure

    panels: dict[int, list[tuple[Case, Found]]] = {}
    for found in result["cases"]:
        panels.setdefault(found["case"]["hidden"], []).append((Case(**found["case"]), found))
    are_alike = len({tuple(case._replace(hidden=0) for case, _ in panel) for panel in panels.values()}) == 1
    figure = Figure(figsize=(10.5, 3.9), dpi=130, facecolor="white", layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=are_alike)[0]
    for axes, (width, panel) in zip(all_axes, panels.items(), strict=True):
        axes.set_title(f"784-{width}-20")
        draw_panel(axes, panel)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower right", frameon=False)
    figure.savefig(file)


def draw_panel(axes: "Axes", panel: list[tuple[Case, Found]]) -> None:
    """Horizontal bars from the top down; where the precision changes, a gap."""
    places = [number + 0.5 * (case.precision != panel[0][0].precision) for number, (case, _) in enumerate(panel)]
    for place, (case, found) in zip(places, panel, strict=True):
        seconds, (low, high) = found["epoch_seconds"], found["epoch_seconds_spread"]
        axes.barh(place, seconds, height=0.8, color=COLOURS[case.program] if case.processes == 1 else SEVERAL_PROCESSES)
        axes.errorbar(seconds, place, xerr=[[seconds - low], [high - seconds]], color="#303030", capsize=4, linewidth=1.2)
        axes.annotate(f"{seconds:.3g}", (high, place), xytext=(6, 0), textcoords="offset points", va="center")
    floors = [found["floor"]["seconds"] for _, found in panel]
    label = "floor: matrix products and Adam's memory traffic alone"
    axes.scatter(floors, places, marker="|", s=230, linewidths=2.5, color="#b00020", zorder=3, label=label)
    axes.set_yticks(places, [case.name.partition(": ")[2] + f", {case.precision}" for case, _ in panel])
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.set_xlim(0, 1.15 * max(found["epoch_seconds_spread"][1] for _, found in panel))
    axes.set_xlabel("seconds for an epoch: median, lowest to highest")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
