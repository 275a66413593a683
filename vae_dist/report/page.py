"""The page: one file with its style, its script, Plotly, all pictures and all figures in it, which asks no other host."""

import base64
import gzip
import shlex
from collections.abc import Sequence
from importlib import resources

from plotly.offline import get_plotlyjs, get_plotlyjs_version

from vae_dist import __version__
from vae_dist.report import sections, tables
from vae_dist.report.facts import Facts
from vae_dist.report.markup import Html, element, joined, number
from vae_dist.report.sections import Plots, Subject, note, of_each

MARK = '<meta name="generator" content="vae_dist.report'  # by which a report is known, near its beginning
# The browser itself keeps the page from asking anybody for anything. A blob is the page's own: a figure on its way into a PNG.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page(subjects: Sequence[Subject]) -> str:
    """The page about a run, or about several side by side."""
    plots, runs = Plots(), [subject.facts for subject in subjects]
    parts = {
        "Curves": sections.curves(subjects, plots),
        "Pictures": sections.pictures(subjects),
        "Latent space": sections.latent_space(subjects, plots),
        "Worst reconstructions": of_each(subjects, sections.worst),
        "Speed": sections.speed(subjects, plots),
        "Evaluation": tables.evaluation(runs) or joined(map(_not_evaluated, subjects)),
        "Config": tables.config(runs),
        "Provenance": of_each(subjects, lambda subject: tables.provenance(subject.facts)),
    }
    anchors = {title: title.lower().replace(" ", "-") for title in parts}
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    body = element(
        "body",
        element("header", element("h1", title), _one(subjects[0]) if len(runs) == 1 else _several(subjects)),
        element("nav", *(element("a", name, href=f"#{anchor}") for name, anchor in anchors.items()), aria_label="Sections"),
        element(
            "main",
            element("noscript", note("Figures and sliders need JavaScript; tables and the last pictures do not.")),
            *(element("section", element("h2", name), part, id=anchors[name]) for name, part in parts.items()),
        ),
        element(
            "footer", f"vae_dist {__version__}; figures by plotly.js {get_plotlyjs_version()}, © Plotly, Inc., MIT licence."
        ),
        plots.embedded(),
        _program(),
    )
    return f'<!doctype html>\n<html lang="en">\n{_head(title)}\n{body}\n</html>\n'


def _head(title: str) -> Html:
    return element(
        "head",
        element("meta", charset="utf-8"),
        Html(f'{MARK} {__version__}">'),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} · vae_dist"),
        element("link", rel="icon", href="data:,"),
        element("style", Html(_file("page.css"))),
    )


def _program() -> Html:
    """Plotly, compressed to two fifths, and the page's own script, which unpacks it."""
    packed = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
    library = element("script", Html(packed), type="text/plain", id="plotly")
    return joined([library, element("script", Html(_file("page.js")))])


def _file(name: str) -> str:
    return resources.files("vae_dist.report").joinpath(name).read_text(encoding="utf-8")


def _one(subject: Subject) -> Html:
    """What the run is, how it stands, and its main figures."""
    run, config = subject.facts, subject.facts.config
    what = f"A VAE ({config.model.kind}, {config.model.latent_dim} latent dimensions) on {config.data.name}, seed {config.seed}"
    cards = [_card(*each) for each in _main_figures(subject)]
    return joined([element("p", what, class_="lead"), _state(run), element("div", *cards, class_="cards")])


def _state(run: Facts) -> Html:
    """finished, running, interrupted, failed or unknown, since when, and why."""
    reason, since = run.status.get("reason", "nothing was said of it"), run.status.get("time", "")
    badge = element("span", run.state, class_=f"badge {run.state if run.state in _STATES else 'unknown'}")
    return element("p", badge, f" {reason}", f" ({since})" if since else None, class_="state")


_STATES = ("finished", "running", "interrupted", "failed")


def _card(title: str, figure: str, words: str) -> Html:
    return element(
        "div", element("p", title, class_="title"), element("p", figure, class_="figure"), element("p", words), class_="card"
    )


def _main_figures(subject: Subject) -> list[tuple[str, str, str]]:
    """Each with its title and what must be said of it."""
    run, found = subject.facts, []
    last, evaluation = (run.tests[-1] if run.tests else None), run.evaluation
    if last is None:
        found.append(("Test loss", "—", "no epoch is complete yet"))
    else:
        words = f"{tables.in_nats(run, last['loss'], subject.shape)}; n = {number(last['n'])} test images"
        parts = f"bce {number(last.get('bce'))} + kld {number(last.get('kld'))}"
        epoch = f"epoch {last['epoch']} of {run.config.trainer.epochs}"
        found.append(("Test loss", number(last["loss"]), f"{words}; {parts}; {epoch}"))
    if "nll" in evaluation:
        title = "-log p(x)" if evaluation.get("is_log_likelihood") else "Importance-weighted loss"
        words = tables.in_nats(run, evaluation["nll"], subject.shape)
        of = f"± {number(evaluation.get('nll_stderr'))} {words}; k = {number(evaluation.get('iw_samples'))}"
        found.append((title, number(evaluation["nll"]), f"{of}, n = {number(evaluation.get('n'))}"))
    if (active := tables.active_units(run)) is not None:
        found.append(("Active units", number(active, 0), f"of {run.config.model.latent_dim} latent dimensions"))
    if run.epochs:
        on = ", then ".join(map(str, tables.processes(run)))
        words = f"images per second, median over epochs; processes: {on or '—'}"
        found.append(("Speed", number(tables.images_per_second(run.epochs), 0), words))
        words = f"of training and evaluation, without starts; {run.rows[-1]['images_seen']:,} images seen"
        found.append(("Time", duration(60 * run.rows[-1]["minutes"]), words))
    return found


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _not_evaluated(subject: Subject) -> Html:
    """What makes an evaluation, or why nothing can: what the map needs, it needs too."""
    if subject.insight is None:
        return note(f"None: {subject.missing}")
    command = shlex.join(["python", "-m", "vae_dist.evaluate", str(subject.facts.path)])
    return element("p", "None yet: ", element("code", command), " makes it.", class_="note")


def _several(subjects: Sequence[Subject]) -> Html:
    """The runs' final figures side by side, and what keeps them from being compared."""
    runs = [subject.facts for subject in subjects]
    figures = tables.comparison(runs, [subject.shape for subject in subjects])
    if not (aspects := tables.uncomparable(runs)):
        return figures
    words = f"The losses of these runs do not compare: they are of different {' and '.join(aspects)}."
    return joined([figures, element("p", words, class_="warning")])
