"""What an offline W&B run's folder holds, in plain values."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from vae_dist.wandb_file import records


class WandbRun(NamedTuple):
    id: str
    project: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    exit_code: int | None


def read_wandb(folder: Path) -> WandbRun:
    (file,) = folder.glob("run-*.wandb")
    run_id = project = ""
    config: dict[str, Any] = {}
    history, summary, exit_code = [], {}, None
    for record in records(file):
        if record.HasField("run"):
            run_id, project = record.run.run_id, record.run.project
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        for item in record.config.update:
            config[item.key] = json.loads(item.value_json)
        if record.HasField("history"):
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        for item in record.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("exit"):
            exit_code = record.exit.exit_code
    return WandbRun(run_id, project, config, history, summary, exit_code)


def offline_runs(run: Path) -> list[WandbRun]:
    """The W&B runs in a run's folder, oldest first."""
    return [read_wandb(folder) for folder in sorted((run / "wandb").glob("offline-run-*"))]
