"""What W&B is told, read back from the offline run's file; and that nothing about W&B can stop a run."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, Outcome, arguments, environment, launch
from tests.wandb_file import logged, offline_runs
from vae_dist.config import Config, InputError, TrackingConfig
from vae_dist.run import RunFolder
from vae_dist.tracking import read_rows
from vae_dist.wandb_server import wandb_mode


def test_the_offline_run_holds_the_config_and_how_it_ended(trained: Path) -> None:
    (wandb,) = offline_runs(trained)
    assert wandb.project == "vae_dist"
    assert wandb.id == RunFolder(trained).wandb_id()
    assert wandb.config["data"]["batch_size"] == 128
    assert wandb.config["optimizer"]["lr"] == 1e-3
    assert wandb.exit_code == 0


def test_a_resumed_run_keeps_its_id_and_its_steps_go_on(small_root: Path, tmp_path: Path) -> None:
    options = ["--data.root", small_root, "--model.hidden", 40, "--tracking.log_every", 4, "--output", tmp_path / "run"]
    for epochs in (1, 2):
        done = launch("vae_dist.train", *options, "--trainer.epochs", epochs)
        assert done.returncode == 0, done.stderr
        assert "wandb sync" in done.stdout
    first, second = offline_runs(tmp_path / "run")
    assert first.id == second.id
    assert [step for step, _ in logged(first, "test/loss") + logged(second, "test/loss")] == [8, 16]
    assert [step for step, _ in logged(first, "train/loss") + logged(second, "train/loss")] == [4, 12]


def test_a_wandb_that_fails_in_the_middle_is_said_once_and_training_goes_on(
    small_root: Path, command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run object is finished behind the tracker's back, so every further call on it fails for real."""
    import wandb

    from vae_dist.wandb_run import WandbRun

    show = WandbRun.show

    def sabotaged(self: WandbRun, rows: Any, *more: Any) -> None:
        if rows[0]["step"] == 8 and wandb.run is not None:
            wandb.run.finish()
        show(self, rows, *more)

    monkeypatch.setattr(WandbRun, "show", sabotaged)
    options = ["--data.root", small_root, "--model.hidden", 40, "--trainer.epochs", 3, "--tracking.wandb", "offline"]
    outcome = command("train", *options, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("W&B failed") == 1
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["split"] == "test"] == [8, 16, 24]


def test_an_unreachable_server_is_given_up_soon_and_the_run_recorded_offline(small_root: Path, tmp_path: Path) -> None:
    options = ["--data.root", small_root, "--model.hidden", 40, "--trainer.epochs", 1, "--output", tmp_path / "run"]
    started = time.monotonic()
    done = launch("vae_dist.train", *options, WANDB_API_KEY="0123456789" * 4, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 75
    assert done.stdout.count("going on offline") == 1
    assert [wandb.summary["best_test_loss"] for wandb in offline_runs(tmp_path / "run")] == [
        row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["split"] == "test"
    ]


class _NoSuchKey(BaseHTTPRequestHandler):
    """Answers every request as W&B answers a wrong key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_error(401)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_key_that_the_server_refuses_leaves_the_run_offline(small_root: Path, tmp_path: Path) -> None:
    options = ["--data.root", small_root, "--model.hidden", 40, "--trainer.epochs", 1, "--output", tmp_path / "run"]
    with ThreadingHTTPServer(("127.0.0.1", 0), _NoSuchKey) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        done = launch("vae_dist.train", *options, WANDB_API_KEY="0123456789" * 4, WANDB_BASE_URL=url)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on offline") == 1
    assert "401" in done.stdout
    assert [step for wandb in offline_runs(tmp_path / "run") for step, _ in logged(wandb, "test/loss")] == [8]


def test_a_full_disk_for_wandbs_files_does_not_stop_training(
    quick: list[object], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    """A disk of 40 KiB, mounted where nobody else sees it, takes W&B's files; the run's own go where they always go."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs leave to mount a small disk (unshare -rm)")
    run = tmp_path / "run"
    assert command("train", *quick, "--output", run).status == 0
    (run / "wandb").mkdir()
    more = ["--trainer.epochs", 6, "--tracking.wandb", "offline"]
    mount = f'mount -t tmpfs -o size=40k none "{run}/wandb" && exec "$@"'
    job = arguments("vae_dist.train", *quick, *more, "--output", run)
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", mount, "-", *job],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("No space left on device") == 1
    assert done.stdout.count("going on without it") == 1
    assert [row["epoch"] for row in read_rows(run / "metrics.jsonl") if row["split"] == "test"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("asked", "variables", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "offline"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("online", {"WANDB_API_KEY": "k"}, "online"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_the_mode_is_decided_without_asking(
    asked: Any, variables: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(Config(tracking=TrackingConfig(wandb=asked))) == mode


def test_a_key_in_netrc_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password k\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(Config()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")
    assert wandb_mode(Config()) == "offline"
    with pytest.raises(InputError, match="WANDB_API_KEY"):
        wandb_mode(Config(tracking=TrackingConfig(wandb="online")))
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings").write_text("[default]\nbase_url = https://other.example\n")
    assert wandb_mode(Config()) == "offline", "no key of the server that `wandb login --host` chose"
    (tmp_path / "settings").write_text("[default]\nmode = disabled\n")
    assert wandb_mode(Config()) == "disabled"
    (tmp_path / "settings").write_bytes(b"\xff not settings")
    assert wandb_mode(Config()) == "online"
    (tmp_path / "netrc").write_bytes(b"\xff")
    assert wandb_mode(Config()) == "offline"


def test_half_a_row_at_the_end_is_no_row(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    row = {"split": "test", "epoch": 1, "step": 1, "loss": 2.0}
    file.write_text(json.dumps(row) + "\n" + '{"split": "test", "ep')
    assert read_rows(file) == [row]
    assert read_rows(tmp_path / "none") == []


def test_an_evaluation_goes_to_the_summary_of_the_same_run(
    trained: Path, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    before = {part.id for part in offline_runs(tmp_path / "run")}
    assert command("evaluate", tmp_path / "run", "--iw_samples", 3).status == 0
    import_module("wandb").teardown()  # as at the end of a process: its files are then on the disk
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    *_, last = offline_runs(tmp_path / "run")
    assert {part.id for part in offline_runs(tmp_path / "run")} == before
    assert last.summary["evaluation/nll"] == pytest.approx(found["nll"])
    assert last.summary["evaluation/active_units"] == found["active_units"]


def test_an_evaluation_of_an_online_run_whose_key_is_gone_is_done_all_the_same(
    trained: Path, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    described = json.loads(config.read_text())
    described["config"]["tracking"]["wandb"] = "online"
    config.write_text(json.dumps(described))
    outcome = command("evaluate", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert "W&B failed (InputError: --tracking.wandb online: no key" in outcome.out
    assert (tmp_path / "run" / "evaluation.json").is_file()
