"""The W&B dashboard as code: which charts of a project's runs, and in which order.

python -m vae_dist.dashboard --project vae_dist --entity my-team
"""

import sys
from dataclasses import dataclass
from typing import Any

from vae_dist.charts import CAPTIONS
from vae_dist.config import InputError, missing_extra
from vae_dist.distributed import run_entry_point
from vae_dist.options import command_line
from vae_dist.pace import PARTS
from vae_dist.wandb_server import ask_wandb, wandb_key

_NAME = "vae_dist"
_SERVER_SECONDS = 20.0  # for an answer
# Of the list of runs.
_COLUMNS = [
    "run:displayName",
    "summary:best_test_loss",
    "summary:best_test_epoch",
    "summary:posterior/active_units",
    "tags:__ALL__",
]


@dataclass(frozen=True)
class Options:
    """Save the dashboard of vae_dist's runs to a W&B project, as a view that everybody there can open."""

    project: str = "vae_dist"
    """W&B project of the runs."""
    entity: str | None = None
    """User or team whose project it is; None: the one that W&B takes for your key."""


def main(args: list[str] | None = None) -> int:
    options = command_line(Options, "vae_dist.dashboard", sys.argv[1:] if args is None else args)
    if not wandb_key():
        raise InputError("vae_dist.dashboard: no W&B key; run `wandb login`, or set WANDB_API_KEY")
    try:
        import wandb_workspaces.workspaces  # noqa: F401  # of an extra
    except ImportError:
        raise missing_extra("vae_dist.dashboard needs more packages", "dashboard") from None
    if problem := ask_wandb(_SERVER_SECONDS):
        raise InputError(f"vae_dist.dashboard: {problem}; look at WANDB_BASE_URL, HTTPS_PROXY and `wandb login`")
    print(save(options))
    return 0


def save(options: Options) -> str:
    """Saves the dashboard as a new view. Returns its address. Raises InputError where the server does not take it."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    entity = options.entity or wandb.Api().default_entity
    if not entity:
        raise InputError("--entity: W&B takes none for your key; name a user or a team")
    view = dashboard(entity, options.project)
    try:
        view.save()
    except Exception as error:  # wandb raises its own errors, of no common kind
        words = " ".join(str(error).split())[:300]
        raise InputError(f"--project {options.project} --entity {entity}: W&B does not take it ({words})") from None
    return str(view.url)


def dashboard(entity: str, project: str) -> Any:
    """The view (wandb_workspaces.workspaces.Workspace). Each section shows a group of `vae_dist.charts`, the last W&B's own."""
    import wandb_workspaces.workspaces as ws

    sections = {
        "test": _test(),
        "train": _train(),
        "images": _images(),
        "posterior": _posterior(),
        "speed": _speed(),
        "system": _system(),
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=_NAME,
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()],
        settings=ws.WorkspaceSettings(x_axis="images_seen", group_by_prefix="first"),
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group")], pinned_columns=_COLUMNS),
    )


def _lines(title: str, *figures: str, x: str = "images_seen", unit: str = "nats per image", **options: Any) -> Any:
    from wandb_workspaces.reports.v2 import interface as wr

    return wr.LinePlot(title=title, x=x, y=list(figures), title_y=unit, **options)


def _test() -> list[Any]:
    return [
        _lines("Negative ELBO of the test images", "test/loss"),
        _lines("Cross-entropy of the test images", "test/bce"),
        _lines("KL of the test images", "test/kld"),
    ]


def _train() -> list[Any]:
    return [
        _lines("Negative ELBO in training", "train/loss"),
        _lines("Epoch's training loss, and test loss", "train/epoch_loss", "test/loss"),
        _lines("What is optimised", "train/objective"),
        _lines("Learning rate", "train/lr", unit=""),
        _lines("Norm of the gradient", "train/grad_norm", unit="", log_y=True),
        _lines("Gradient noise scale (several processes)", "train/noise_scale_images", unit="images", log_y=True),
    ]


def _images() -> list[Any]:
    from wandb_workspaces.reports.v2 import interface as wr

    sliders = [
        wr.MediaBrowser(title=name.capitalize() + "s", media_keys=[f"images/{name}"], gallery_axis="step") for name in CAPTIONS
    ]
    return [*sliders, wr.WeavePanelSummaryTable(table_name="images/worst")]


def _posterior() -> list[Any]:
    from wandb_workspaces.reports.v2 import interface as wr

    bars = wr.CustomChart(
        query={"summaryTable": {"tableKey": "posterior/kld_per_dim_table"}},
        chart_name="wandb/bar/v0",
        chart_fields={"label": "dimension", "value": "nats"},
        chart_strings={"title": "KL of each latent dimension"},
    )
    return [
        _lines("Active units", "posterior/active_units", unit="latent dimensions", range_y=(0, None)),
        bars,
        _lines("Posterior means", "posterior/means", unit="mean"),
    ]


def _speed() -> list[Any]:
    shares = [f"speed/{part}_share" for part in PARTS]
    return [
        _lines("Images per second", "speed/images_per_second", unit="images per second", range_y=(0, None)),
        _lines("Where the time of a step goes", *shares, unit="share", range_y=(0, 1)),
        _lines("Seconds of an epoch", "speed/train_seconds", "speed/test_seconds", unit="seconds"),
        _lines("Processes", "speed/processes", unit="processes", range_y=(0, None)),
        _lines("Peak memory of rank zero", "speed/peak_memory_mib", unit="MiB", range_y=(0, None)),
    ]


def _system() -> list[Any]:
    """Of rank zero's machine, by the time that the process runs: these have no images."""
    time = "RelativeTime(Process)"
    return [
        _lines("Processor", "system/cpu", x=time, unit="%"),
        _lines("Memory of the process", "system/proc.memory.rssMB", x=time, unit="MB"),
        _lines("GPU", "system/gpu.0.gpu", x=time, unit="%"),
        _lines("Memory of the GPU", "system/gpu.0.memoryAllocatedBytes", x=time, unit="bytes"),
    ]


if __name__ == "__main__":
    run_entry_point(main)
