"""A run on the Hugging Face Hub: what is sent, what the model card says, and that it can be used from there."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

import vae_dist
from tests.helpers import Outcome, everything, launch, records, refused
from tests.hub import Hub

Command = Callable[..., Outcome]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(token="secret") as hub:
        yield hub
        hub.shutdown()


def upload(run: Path, hub: Hub, *options: object, token: str = "secret") -> Outcome:
    """In a process of its own: where the Hub is, is read at import."""
    done = launch("vae_dist.upload", run, *options, HF_ENDPOINT=hub.address, HF_TOKEN=token, HF_HUB_DISABLE_XET="1")
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_a_folder_holds_all_that_would_be_sent_and_can_be_loaded(trained: Path, command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert command("evaluate", run, "--iw_samples", 3).status == 0
    outcome = command("upload", run, "--out", tmp_path / "out", "--license", "apache-2.0")
    assert outcome.status == 0, outcome.err
    files = everything(tmp_path / "out")
    assert set(files) == {
        *("README.md", "config.json", "config.yaml", "evaluation.json", "metrics.jsonl", "model.safetensors"),
        *("reconstruction.png", "sample.png", "traversal.png"),
    }
    assert files["sample.png"] == (run / "images" / "sample_3.png").read_bytes()
    assert torch.equal(vae_dist.load(tmp_path / "out").sample(2), vae_dist.load(run).sample(2))
    refused(command("upload", run, "--out", tmp_path / "out"), "is there already")


def test_the_card_says_what_was_measured(trained: Path, small_root: Path, command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    test = records(run)[-1]
    assert command("upload", run, "--out", tmp_path / "before", "--license", "mit").status == 0
    card = (tmp_path / "before" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {
        "library_name": "vae_dist",
        "tags": ["vae", "variational-autoencoder"],
        "license": "mit",
    }
    assert f"| negative ELBO, not a log-likelihood | {test['loss']:.4f} |" in card
    assert f"of {test['n']} test images" in card
    assert "652,824 parameters" in card
    assert "trainer.epochs: 3" in card
    written = b"".join(everything(tmp_path / "before").values())
    for place in (trained, run, tmp_path, small_root):
        assert str(place).encode() not in written, "no place of this machine"
    assert "log p(x)" not in card, "it was not measured"
    assert command("evaluate", run, "--iw_samples", 3).status == 0
    assert command("upload", run, "--out", tmp_path / "after").status == 0
    card, found = (tmp_path / "after" / "README.md").read_text(), json.loads((run / "evaluation.json").read_text())
    assert f"| importance-weighted loss, k = 3 | {found['nll']:.4f} ± {found['nll_stderr']:.2f} |" in card
    assert f"| active units | {found['active_units']} of 20 |" in card
    assert "license" not in card
    (run / "evaluation.json").write_text(json.dumps(found | {"weights_sha256": "of weights of an earlier epoch"}))
    outcome = command("upload", run, "--out", tmp_path / "stale")
    assert "evaluation.json: does not say that it is of the run's weights" in outcome.out
    assert not (tmp_path / "stale" / "evaluation.json").exists()
    assert "importance-weighted" not in (tmp_path / "stale" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_is_sent_as_one_commit(trained: Path, hub: Hub, command: Command, tmp_path: Path) -> None:
    for _ in range(2):
        outcome = upload(trained, hub, "--repo", "user/name", "--visibility", "private")
        assert outcome.status == 0, outcome.err
        assert outcome.out.strip() == f"{hub.address}/user/name/commit/{'1' * 40}"
    assert hub.repos["user/name"]["visibility"] == "private"
    assert sum("/commit/" in request for request in hub.asked) == 2, "one for each upload"
    assert command("upload", trained, "--out", tmp_path / "out").status == 0
    local = everything(tmp_path / "out")
    assert hub.files.keys() == local.keys()
    assert {name: hub.files[name] for name in local if name != "README.md"} == {
        name: content for name, content in local.items() if name != "README.md"
    }
    assert b'snapshot_download("user/name")' in hub.files["README.md"]


@pytest.mark.slow
def test_a_token_that_may_not_write_is_told_of(trained: Path, hub: Hub) -> None:
    refused(upload(trained, hub, "--repo", "user/name", token="another"), "--repo user/name", "hf auth login", "HF_TOKEN")
    assert hub.files == {}


@pytest.mark.slow
def test_no_network_is_told_of(trained: Path, hub: Hub) -> None:
    hub.server_close()
    refused(upload(trained, hub, "--repo", "user/name"), "--repo user/name", "no answer from the Hub")


@pytest.mark.parametrize("options", [[], ["--repo", "a/b", "--out", "c"]])
def test_it_must_be_said_where_the_run_goes(trained: Path, options: list[str], command: Command) -> None:
    outcome = command("upload", trained, *options)
    assert outcome.status == 2
    assert "--repo USER/NAME" in outcome.err


def test_a_run_that_is_not_finished_is_not_sent(trained: Path, command: Command, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "status.json").write_text('{"state": "interrupted"}')
    refused(command("upload", tmp_path / "run", "--out", tmp_path / "out"), "is interrupted, not finished")
    refused(command("upload", tmp_path, "--out", tmp_path / "out"), "no run")
    assert not (tmp_path / "out").exists()
