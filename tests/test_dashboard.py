"""The dashboard as a W&B server gets it: it is saved by one command, and every panel shows something that a run has."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Outcome, launch, refused
from tests.wandb_file import WandbRun, offline_runs
from vae_dist.charts import GROUPS

KEY = "0123456789" * 4
OF_GPUS = {"system/gpu.0.gpu", "system/gpu.0.memoryAllocatedBytes"}  # which no test has


@contextmanager
def wandb_server(saved: dict[str, Any], refusal: str = "") -> Iterator[str]:
    """The address of a server that keeps the variables of the view that it is told to save, or refuses it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"] or 0))
            answer: dict[str, Any] = {"data": {"viewer": {"id": "somebody", "entity": "my-team"}}}
            if b"upsertView" in asked and refusal:
                answer = {"data": {"upsertView": None}, "errors": [{"message": refusal, "path": ["upsertView"]}]}
            elif b"upsertView" in asked:
                saved.update(json.loads(asked)["variables"])
                answer = {"data": {"upsertView": {"view": {"id": "1", "name": saved["name"]}, "inserted": True}}}
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    """What the command sends."""
    view: dict[str, Any] = {}
    with wandb_server(view) as url:
        done = launch("vae_dist.dashboard", "--project", "digits", WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{url}/my-team/digits?nw=")
    assert done.stderr == ""
    return view


@pytest.fixture(scope="module")
def section(saved: dict[str, Any]) -> dict[str, Any]:
    """All that the view shows."""
    shown: dict[str, Any] = json.loads(saved["spec"])["section"]
    return shown


def panels(section: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The configs of all panels of a kind."""
    found = [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    return [panel["config"] for panel in found if panel["viewType"] == kind]


def of_table(panel: dict[str, Any]) -> str:
    """The table that a panel of any kind asks for, somewhere in its query."""
    if isinstance(panel.get("key"), dict) and "val" in panel["key"]:
        return str(panel["key"]["val"])
    return next((name for value in panel.values() if isinstance(value, dict) and (name := of_table(value))), "")


@pytest.fixture(scope="module")
def run(small_root: Path, tmp_path_factory: pytest.TempPathFactory) -> WandbRun:
    """A run of two processes, so that it has figures of several, whose machine W&B has measured more than once."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--data.root", small_root, "--trainer.epochs", 20, "--tracking.log_every", 4, "--tracking.wandb", "offline"]
    more = {"WANDB_X_STATS_SAMPLING_INTERVAL": "0.2"}
    done = launch("vae_dist.train", *options, "--output", folder, processes=2, **more)
    assert done.returncode == 0, done.stderr
    (wandb,) = offline_runs(folder)
    return wandb


def test_the_view_is_of_the_project_and_has_a_section_for_each_group(saved: dict[str, Any], section: dict[str, Any]) -> None:
    assert (saved["entityName"], saved["projectName"], saved["displayName"]) == ("my-team", "digits", "vae_dist")
    names = [part["name"] for part in section["panelBankConfig"]["sections"]]
    assert sorted(names) == sorted([*GROUPS, "system"])
    assert all(part["isOpen"] for part in section["panelBankConfig"]["sections"])
    assert section["settings"]["xAxis"] == "images_seen"
    assert section["runSets"][0]["grouping"] == [{"section": "run", "name": "group"}]


def test_every_line_is_a_figure_of_a_run_over_the_images_seen(section: dict[str, Any], run: WandbRun) -> None:
    figures = {key.split(".")[0] for row in run.history for key in row}
    system = {f"system/{name}" for name in run.system}
    named = set()
    for panel in panels(section, "Run History Line Plot"):
        is_system = panel["metrics"][0].startswith("system/")
        assert panel["xAxis"] == ("_runtime" if is_system else "images_seen")
        named |= set(panel["metrics"])
    assert len(named) > 20
    assert named - figures - system == OF_GPUS
    assert {"images_seen", "_runtime"} <= figures


def test_every_slider_bar_chart_and_table_is_there_too(section: dict[str, Any], run: WandbRun) -> None:
    media = [key for panel in panels(section, "Media Browser") for key in panel["mediaKeys"]]
    assert media == ["images/reconstruction", "images/sample", "images/traversal"]
    kinds = {key.removesuffix("._type"): kind for row in run.history for key, kind in row.items() if key.endswith("._type")}
    assert {kinds[key] for key in media} == {"image-file"}
    (table,) = map(of_table, panels(section, "Weave"))
    assert (table, kinds[table]) == ("images/worst", "table-file")
    (bars,) = panels(section, "Vega2")
    arguments = [field["args"] for field in bars["userQuery"]["queryFields"][0]["fields"] if field["name"] == "summaryTable"]
    (tables,) = [[argument["value"] for argument in of_field] for of_field in arguments]
    assert (tables, kinds[tables[0]]) == (["posterior/kld_per_dim_table"], "table-file")
    (own,) = (value["panel_config"] for name, value in run.config.items() if name.endswith("visualize.posterior/kld_per_dim"))
    for key in ("panelDefId", "fieldSettings", "stringSettings"):
        assert bars[key] == own[key], "as W&B itself draws it"


def test_every_group_that_a_run_has_charts_in_is_shown(section: dict[str, Any], run: WandbRun) -> None:
    """And figures that the view leaves out are few, each for a reason."""
    shown = json.dumps(section)
    figures = {key.split(".")[0] for row in run.history for key in row if not key.startswith("_")}
    left_out = {name for name in figures if f'"{name}"' not in shown}
    of_epochs = {name for name in left_out if "/epoch_" in name}
    assert left_out - of_epochs == {"epoch", "test/n", "train/n", "train/bce", "train/kld"}


def test_the_columns_of_the_list_of_runs_are_figures_of_a_run(section: dict[str, Any], run: WandbRun) -> None:
    columns = section["runSets"][0]["runFeed"]["columnOrder"]
    assert [name for name in columns if not name.startswith("summary:")] == ["run:displayName", "tags:__ALL__"]
    assert {name.removeprefix("summary:") for name in columns if name.startswith("summary:")} <= run.summary.keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of wandb_workspaces, when it is imported
def test_a_view_that_the_server_does_not_take_is_told_in_its_words(
    command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    view: dict[str, Any] = {}
    with wandb_server(view, refusal="permission denied") as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        outcome = command("dashboard", "--entity", "theirs")
        import_module("wandb").teardown()
    refused(outcome, "--entity theirs: W&B does not take it", "permission denied")
    assert view == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_without_a_key_a_server_or_the_packages_it_is_refused(
    command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(command("dashboard"), "no W&B key", "wandb login", "WANDB_API_KEY")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    refused(command("dashboard"), "pip install '.[dashboard]'")
    monkeypatch.delitem(sys.modules, "wandb_workspaces")
    refused(command("dashboard"), "http://127.0.0.1:9 does not answer")
