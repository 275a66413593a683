"""What an offline W&B run's folder holds, in plain values."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vae_dist.wandb_file import records


class WandbRun(NamedTuple):
    id: str
    project: str
    group: str
    tags: list[str]
    config: dict[str, Any]
    step_metrics: dict[str, str]  # the x axis of charts, by name or glob
    hidden: list[str]  # figures that get no chart of their own
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    system: set[str]  # names of W&B's own measurements of the machine
    alerts: list[tuple[str, str, str]]  # title, text, level
    artifacts: list[Any]  # ArtifactRecord
    exit_code: int | None


def read_wandb(folder: Path) -> WandbRun:
    (file,) = folder.glob("run-*.wandb")
    found = WandbRun("", "", "", [], {}, {}, [], [], {}, set(), [], [], None)
    for record in records(file):
        if record.HasField("run"):
            run = record.run
            found = found._replace(id=run.run_id, project=run.project, group=run.run_group, tags=list(run.tags))
            found.config.update(_values(run.config.update))
        if record.HasField("metric"):
            name = record.metric.name or record.metric.glob_name
            found.step_metrics.update({name: record.metric.step_metric} if record.metric.step_metric else {})
            found.hidden.extend([name] if record.metric.options.hidden else [])
        if record.HasField("history"):
            found.history.append(_values(record.history.item))
        if record.HasField("alert"):
            found.alerts.append((record.alert.title, record.alert.text, record.alert.level))
        if record.HasField("artifact"):
            found.artifacts.append(record.artifact)
        if record.HasField("exit"):
            found = found._replace(exit_code=record.exit.exit_code)
        found.config.update(_values(record.config.update))
        found.summary.update(_values(record.summary.update))
        found.system.update(item.key for item in record.stats.item)
    return found


def _values(items: Iterable[Any]) -> dict[str, Any]:
    """Those of config, history or summary, whose names are a key or a path of keys."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def logged(wandb: WandbRun, key: str) -> list[tuple[int, Any]]:
    """The steps and values of a figure."""
    return [(row["_step"], row[key]) for row in wandb.history if key in row]


def offline_runs(run: Path) -> list[WandbRun]:
    """The W&B runs in a run's folder, oldest first."""
    return [read_wandb(folder) for folder in sorted((run / "wandb").glob("offline-run-*"))]
