"""The tables of a report: final figures, jobs, evaluation, config and provenance."""

import shlex
import statistics
from collections.abc import Sequence
from typing import Any

from vae_dist.config import Config
from vae_dist.likelihoods import build_likelihood, remark
from vae_dist.options import flat
from vae_dist.pace import PARTS
from vae_dist.report.facts import Facts
from vae_dist.report.figures import dash, shade
from vae_dist.report.markup import Html, element, joined, number, table
from vae_dist.tracking import Row

_NO_STARTS = "Nothing tells of this run's starts: there is no starts.jsonl in its folder."


def in_nats(run: Facts, nats: float, shape: Sequence[int] | None) -> str:
    """What must be said after a loss: its unit, and that it is no log-likelihood, or its bits per dimension if `shape`, an
    image's, is known.
    """
    if run.config.model.likelihood == "own":
        return "nats per image, by a likelihood of the program's own"
    likelihood, is_binary = build_likelihood(run.config.model), run.config.data.binarize != "none"
    if shape is not None:
        return f"nats per image{remark(likelihood, is_binary, nats, shape)}"
    return "nats per image" + ("" if likelihood.is_log_likelihood(is_binary) else ", not a log-likelihood")


def comparison(runs: Sequence[Facts], shapes: Sequence[Sequence[int] | None]) -> Html:
    """The final figures of several runs; the lowest losses are marked where the losses compare."""
    lasts: list[Row] = [run.tests[-1] if run.tests else {} for run in runs]
    units = [in_nats(run, last["loss"], shape) if last else "" for run, last, shape in zip(runs, lasts, shapes, strict=True)]
    unit = units[0] if len(set(units)) == 1 else ""
    marked = _plain if uncomparable(runs) else _lowest_marked
    losses = marked([last.get("loss") for last in lasts])
    columns: dict[str, list[object]] = {
        "run": [element("span", swatch(place), run.name) for place, run in enumerate(runs)],
        "state": [_state(run) for run in runs],
        "epochs": [f"{last.get('epoch', 0)} of {run.config.trainer.epochs}" for run, last in zip(runs, lasts, strict=True)],
        "test loss": [
            joined([loss, None if unit else element("span", f" {of}", class_="unit")])
            for loss, of in zip(losses, units, strict=True)
        ],
        "n": [number(last.get("n")) for last in lasts],
        "bce": [number(last.get("bce")) for last in lasts],
        "kld": [number(last.get("kld")) for last in lasts],
        "lowest loss": marked([min((row["loss"] for row in run.tests), default=None) for run in runs]),
        "importance-weighted loss": marked([run.evaluation.get("nll") for run in runs]),
        "active units": [number(active_units(run), 0) for run in runs],
        "minutes": [number(run.rows[-1]["minutes"] if run.rows else None, 1) for run in runs],
        "images/s": [number(images_per_second(run.epochs), 0) for run in runs],
        "processes": [", ".join(map(str, processes(run))) or "—" for run in runs],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"—"}}
    caption = f"Final figures; losses in {unit}" if unit else "Final figures"
    return table(list(columns), list(zip(*columns.values(), strict=True)), caption, class_="figures")


def _state(run: Facts) -> str:
    return run.state if run.state == "finished" else f"{run.state}: {run.status.get('reason', 'nothing was said')}"


def _plain(losses: Sequence[float | None]) -> list[object]:
    return [number(loss) for loss in losses]


def _lowest_marked(losses: Sequence[float | None]) -> list[object]:
    """Losses of several runs, of which not all are the same."""
    known = sorted(loss for loss in losses if loss is not None)
    lowest = known[0] if known and known[0] < known[-1] else None
    spoken = element("span", " (the lowest)", class_="spoken")
    return [number(loss) if loss is None or loss != lowest else element("strong", number(loss), spoken) for loss in losses]


def swatch(place: int) -> Html:
    """The colour that a run has in the figures, and whether its lines are broken."""
    look = f"border-color:{shade(place)};border-top-style:{'solid' if dash(place) == 'solid' else 'dashed'}"
    return element("span", class_="swatch", style=look, aria_hidden="true")


def active_units(run: Facts) -> float | None:
    """As evaluated, or as of the last epoch; None where neither says."""
    found: float | None = run.evaluation.get("active_units", run.tests[-1].get("active_units") if run.tests else None)
    return found


def images_per_second(rows: Sequence[Row]) -> float | None:
    """The median over epochs."""
    speeds = [row["images_per_second"] for row in rows if row.get("images_per_second") is not None]
    return statistics.median(speeds) if speeds else None


def processes(run: Facts) -> list[int]:
    """The numbers of processes that trained it, one after the other."""
    return list(dict.fromkeys(row["processes"] for row in run.epochs if row.get("processes") is not None))


def uncomparable(runs: Sequence[Facts]) -> list[str]:
    """What keeps the losses of some runs from being compared."""
    aspects: dict[str, set[object]] = {
        "data sets": {(run.config.data.name, run.config.data.binarize) for run in runs},
        "likelihoods": {(run.config.model.likelihood, run.config.model.sigma) for run in runs},
        "test images": {run.starts[-1]["data"]["test"]["sha256"] for run in runs if run.starts},
        "numbers of test images": {run.tests[-1]["n"] for run in runs if run.tests},
    }
    return [name for name, values in aspects.items() if len(values) > 1]


def jobs(runs: Sequence[Facts]) -> Html:
    """The speed of each job that worked on a run."""
    rows = [_job(run, number) for run in runs for number in range(len(run.starts))]
    head = ("run", "started", "from step", "epochs", "processes", "images/s", *PARTS)
    without = [element("p", f"{run.name}: {_NO_STARTS}", class_="note") for run in runs if not run.starts]
    return joined([table(head, rows, "Jobs, by their start") if rows else None, *without])


def _job(run: Facts, job: int) -> tuple[object, ...]:
    start, epochs = run.starts[job], [row for row in run.epochs if run.job_of(row) == job]
    counts = (number(start["step"]), number(len(epochs)), number(start["processes"]))
    shares = [statistics.mean(row.get(f"{part}_share") or 0.0 for row in epochs) if epochs else None for part in PARTS]
    words = ("—" if share is None else f"{share:.1%}" for share in shares)
    return (run.name, start["time"], *counts, number(images_per_second(epochs), 0), *words)


def evaluation(runs: Sequence[Facts]) -> Html | None:
    """What evaluation.json holds of each run that has one, but for figures by dimension."""
    found = [run for run in runs if run.evaluation]
    if not found:
        return None
    plain = (str, int, float)
    names = dict.fromkeys(name for run in found for name, value in run.evaluation.items() if isinstance(value, plain))
    rows = [(name, *(number(run.evaluation.get(name), 4) for run in found)) for name in names]
    return table(
        ("figure", *(run.name for run in found)), rows, "evaluation.json; in nats per image where nothing else is said"
    )


def config(runs: Sequence[Facts]) -> Html:
    """Every field of each run: what differs from the defaults is marked, and what differs between the runs."""
    usual, of_runs = flat(Config()), [flat(run.config) for run in runs]
    several = len(runs) > 1
    body = []
    for name, default in usual.items():
        values = [values[name] for values in of_runs]
        is_set, differs = any(value != default for value in values), any(value != values[0] for value in values)
        is_shown = differs and name != "output" if several else is_set
        mark = element("span", "≠ " if several else "● ", class_="mark", aria_hidden="true") if is_shown else None
        spoken = f" (differs {'between the runs' if several else 'from the default'})" if is_shown else None
        heading = element("th", mark, name, element("span", spoken, class_="spoken") if spoken else None, scope="row")
        cells = [element("td", _value(value), class_=None if value == default else "set") for value in values]
        row_class = "differs" if is_shown else "usual"
        body.append(element("tr", heading, *cells, element("td", _value(default), class_="default"), class_=row_class))
    head = element("tr", *(element("th", title, scope="col") for title in ("field", *(run.name for run in runs), "default")))
    inner = element("table", element("thead", head), element("tbody", *body), class_="config")
    what = "what differs between the runs" if several else "what differs from the defaults"
    switch = element("input", type="checkbox", id="all-fields", class_="all-fields", autocomplete="off")
    words = element("label", f" all fields, not only {what}", for_="all-fields")
    region = element("div", inner, class_="scroll", tabindex=0, role="region", aria_label="Config")
    return element("div", switch, words, region)


def _value(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or "(empty)"


def provenance(run: Facts) -> Html:
    """Where, when, by whom and of what each job of the run was."""
    jobs = [_start(start, number) for number, start in enumerate(run.starts, start=1)]
    reason, moment = run.status.get("reason", "nothing was said of it"), run.status.get("time", "at no known time")
    last = element("p", element("code", run.path), f": {run.state}, {reason}, {moment}")
    return joined([*(jobs or [element("p", _NO_STARTS, class_="note")]), last])


def _start(start: dict[str, Any], job: int) -> Html:
    """A job as a list of terms."""
    terms: dict[str, object] = {
        "command": element("code", shlex.join(map(str, start["command"]))),
        "in": element("code", start.get("folder", "—")),
        "processes": number(start["processes"]),
        "on": "; ".join(_place(place) for place in start["places"]),
        "versions": ", ".join(f"{name} {version}" for name, version in start["versions"].items()),
        "commit of vae_dist": _commit(start.get("code")),
        "commit of the folder": _commit(start.get("project")),
    }
    for split, images in start["data"].items():
        shape = " x ".join(map(str, images.get("shape", [])))
        terms[f"{split} images"] = element(
            "span", f"{number(images['n'])} of {shape}, SHA-256 ", element("code", images["sha256"])
        )
    pairs = (part for name, value in terms.items() for part in (element("dt", name), element("dd", value)))
    title = f"Job {job}: started {start['time']}, from step {start['step']:,}"
    return element("section", element("h4", title), element("dl", *pairs))


def _place(place: object) -> str:
    facts = place if isinstance(place, dict) else {}
    return f"{facts.get('host')}: {facts.get('processes')} on {facts.get('device')}"


def _commit(code: object) -> object:
    if not isinstance(code, dict):
        return "no repository"
    state = {True: ", with changes that are not committed", False: "", None: ", changes unknown"}
    return element("span", element("code", code.get("commit")), state.get(code.get("dirty"), ""))
