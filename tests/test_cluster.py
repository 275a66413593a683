"""A job over several hosts is the job of one process, whatever happens to hosts and network on the way.

Each host is a network namespace; their shared storage is this machine's file system. `make test-cluster` runs the slow ones
and shows the figures that they print.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.namespaces import Link, why_not
from tests.cluster import Agent, cluster, ended_well, newest_step, until, weights
from tests.helpers import ROOT, Outcome, launch, records
from tests.test_faults import state
from tests.wandb_file import offline_runs
from vae_dist.tracking import read_rows

PATIENCE = 12  # seconds of silence that ranks put up with


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    if problem := why_not():
        pytest.skip(problem)


@pytest.fixture(scope="module")
def options(small_root: Path) -> list[object]:
    """A run whose steps are small, and which the hosts have time to disturb."""
    small = ["--data.root", small_root, "--model.hidden", 40, "--trainer.deterministic", "true", "--trainer.epochs", 40]
    return [*small, "--tracking.log_every", 1, "--trainer.timeout_minutes", PATIENCE / 60]


@pytest.fixture(scope="module")
def peaceful(options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one process, which nothing disturbed."""
    return run_alone(options, tmp_path_factory.mktemp("peaceful"))


def run_alone(options: list[object], folder: Path) -> Path:
    """Trains on one process and returns the run's folder."""
    done = launch("vae_dist.train", *options, "--tracking.wandb", "disabled", "--output", folder / "alone")
    assert done.returncode == 0, done.stderr
    return folder / "alone"


def job(options: list[object], run: Path, wandb: str = "disabled") -> list[object]:
    return ["-m", "vae_dist.train", *options, "--tracking.wandb", wandb, "--output", run]


def is_the_same(run: Path, peaceful: Path) -> bool:
    """To the bit: the final weights, and every row, none lost or repeated."""
    return weights(run) == weights(peaceful) and records(run) == records(peaceful)


def worlds(run: Path) -> list[int]:
    """The numbers of processes that epochs were trained on, one after the other."""
    found = [row["processes"] for row in read_rows(run / "metrics.jsonl") if "processes" in row]
    return [count for before, count in zip([None, *found], found, strict=False) if count != before]


def begun(run: Path, steps: int = 0) -> float:
    """Waits for a checkpoint of a later step."""
    return until(lambda: newest_step(run) > steps, 90, "it trains")


def gone_on(agents: list[Agent], run: Path, steps: int) -> float:
    """Waits until a job has a checkpoint of a later step, or has ended, and returns how long it took."""
    return until(lambda: newest_step(run) > steps or all(agent.is_gone() for agent in agents), 90, "it goes on")


def gone(agents: list[Agent]) -> float:
    """Waits for all launchers to end, and returns how long it took."""
    return until(lambda: all(agent.is_gone() for agent in agents), 60, "all launchers end")


def test_two_hosts_do_what_one_process_does(quick: list[object], command: Callable[..., Outcome], tmp_path: Path) -> None:
    quick += ["--trainer.deterministic", "true"]
    with cluster(tmp_path) as network:
        agents = [network.torchrun(host, ["-m", "vae_dist.train", *quick, "--output", tmp_path / "run"]) for host in (0, 1)]
        ended_well(agents)
    assert command("train", *quick, "--output", tmp_path / "one").status == 0
    assert is_the_same(tmp_path / "run", tmp_path / "one")
    assert worlds(tmp_path / "run") == [2]
    assert [agent.text().count("finished: 2 epochs") for agent in agents] == [1, 0]


@pytest.mark.slow
def test_accelerate_launches_on_two_machines_and_rank_zero_alone_writes(
    options: list[object], peaceful: Path, tmp_path: Path
) -> None:
    """The second machine sees the run's folder read-only. Then both evaluate what they trained, which one process does too."""
    run = tmp_path / "run"
    run.mkdir()
    with cluster(tmp_path) as network:

        def on_both(module: str, *args: object) -> list[Agent]:
            agents = []
            for host in (0, 1):
                place = ["--machine_rank", host, "--main_process_ip", "node0", "--num_machines", 2, "--num_processes", 2]
                launcher = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "launch" / "multi_node.yaml", *place]
                agents.append(network.start(host, [sys.executable, *launcher, "-m", module, *args], run if host else None))
            ended_well(agents)
            return agents

        trained = on_both("vae_dist.train", *options, "--tracking.wandb", "offline", "--output", run)
        assert [agent.text().count("epoch 1/40:") for agent in trained] == [1, 0]
        assert is_the_same(run, peaceful)
        (of_wandb,) = offline_runs(run)
        assert {row["_step"] for row in of_wandb.history} == {row["step"] for row in records(run)}
        shutil.copytree(run, tmp_path / "copy")
        evaluated = on_both("vae_dist.evaluate", run, "--iw_samples", 20)
        assert [agent.text().count("test loss") for agent in evaluated] == [1, 0]
    assert launch("vae_dist.evaluate", tmp_path / "copy", "--iw_samples", 20).returncode == 0
    two, one = (json.loads((folder / "evaluation.json").read_text()) for folder in (run, tmp_path / "copy"))
    for figure in ("n", "loss", "nll", "stderr", "mutual_information"):
        assert two[figure] == pytest.approx(one[figure], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["deterministic", "default"])
def test_hosts_may_have_different_numbers_of_processes(
    mode: str, options: list[object], peaceful: Path, tmp_path: Path
) -> None:
    run, more = tmp_path / "run", [] if mode == "deterministic" else ["--trainer.deterministic", "false", "--trainer.epochs", 2]
    with cluster(tmp_path) as network:
        agents = [network.torchrun(host, [*job(options, run), *more], processes=1 + host) for host in (0, 1)]
        ended_well(agents)
    assert worlds(run) == [3]
    assert not any("cannot share memory" in agent.text() for agent in agents), "gradients go over the network"
    if mode == "deterministic":
        assert is_the_same(run, peaceful)
    else:
        losses, expected = ([row["loss"] for row in records(folder)][:10] for folder in (run, peaceful))
        assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_slow_network_that_loses_packets_changes_no_bit(options: list[object], tmp_path: Path) -> None:
    options = [*options, "--trainer.epochs", 2]
    with cluster(tmp_path, link=Link(delay_ms=50, loss=0.01)) as network:
        agents = [network.torchrun(host, job(options, tmp_path / "run")) for host in (0, 1)]
        ended_well(agents)
        slowed_by = network.hosts.slowed_by
    alone = run_alone(options, tmp_path)
    assert is_the_same(tmp_path / "run", alone)
    slow, fast = epoch_seconds(tmp_path / "run"), epoch_seconds(alone)
    print(f"50 ms each way and 1 % of packets lost, by {slowed_by}: {slow:.2f} s an epoch; one process {fast:.2f} s")


def epoch_seconds(run: Path) -> float:
    """Of the last epoch."""
    return float([row["train_seconds"] for row in read_rows(run / "metrics.jsonl") if "train_seconds" in row][-1])


@pytest.mark.slow
def test_a_host_that_is_cut_off_is_waited_for_and_then_given_up(options: list[object], peaceful: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with cluster(tmp_path) as network:
        agents = [network.torchrun(host, job(options, run)) for host in (0, 1)]
        begun(run)
        network.hosts.cut_off(1)
        time.sleep(PATIENCE / 3)
        network.hosts.join_again(1)
        step = newest_step(run)
        print(f"cut off for {PATIENCE / 3:.0f} s: going on {gone_on(agents, run, step):.1f} s after it is back")
        assert newest_step(run) > step

        network.hosts.cut_off(1)
        told = until(lambda: all(agent.lost_peers() for agent in agents), 3 * PATIENCE, "both ranks give up")
        print(f"cut off for longer: both ranks say so after {told:.1f} s")
        assert [agent.lost_peers() for agent in agents] == [["rank 0"], ["rank 1"]]
        assert not any("vae_dist/train.py" in agent.text() for agent in agents), "no traceback of ours"
        assert state(run) == "failed"
        network.hosts.join_again(1)  # an agent that was cut off from the rendezvous does not notice before
        print(f"all gone {gone(agents):.1f} s after that")
        ended_well([network.torchrun(host, job(options, run)) for host in (0, 1)])
    assert is_the_same(run, peaceful)


@pytest.mark.slow
def test_a_killed_host_ends_the_job_and_the_same_command_goes_on(options: list[object], peaceful: Path, tmp_path: Path) -> None:
    """First another host, then the main one, which has rank zero and the rendezvous."""
    run = tmp_path / "run"
    with cluster(tmp_path) as network:
        agents = [network.torchrun(host, job(options, run)) for host in (0, 1)]
        begun(run)
        for killed in (1, 0):
            network.hosts.kill(killed)
            step = newest_step(run)
            ended = gone(agents)
            assert agents[1 - killed].lost_peers() == [f"rank {1 - killed}"]
            agents = [network.torchrun(host, job(options, run)) for host in (0, 1)]
            again = gone_on(agents, run, step)
            print(f"host {killed} killed: all gone after {ended:.1f} s, going on {again:.1f} s after the next start")
            assert "going on from" in agents[0].text()
        ended_well(agents)
    assert is_the_same(run, peaceful)


@pytest.fixture(scope="module")
def long_options(options: list[object]) -> list[object]:
    """A run that lasts until a host is back."""
    return [*options, "--trainer.epochs", 110]


@pytest.fixture(scope="module")
def long_peaceful(long_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_alone(long_options, tmp_path_factory.mktemp("long"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "cut off"])
def test_an_elastic_job_shrinks_and_grows(fault: str, long_options: list[object], long_peaceful: Path, tmp_path: Path) -> None:
    """It is the host of rank zero that goes; the rendezvous is held by a fourth."""
    run = tmp_path / "run"
    with cluster(tmp_path, hosts=4) as network:

        def agent(host: int) -> Agent:
            return network.torchrun(host, job(long_options, run), nodes="1:3", restarts=10, meet_at=3)

        network.hold_rendezvous(3)
        agents = [agent(host) for host in range(3)]
        begun(run, steps=16)
        step = newest_step(run)
        network.hosts.kill(0) if fault == "killed" else network.hosts.cut_off(0)
        print(f"{fault}: going on with two hosts after {gone_on(agents, run, step):.1f} s")
        until(lambda: worlds(run) == [3, 2], 10, "two hosts train")
        if fault == "killed":
            agents[0] = agent(0)
        else:
            network.hosts.join_again(0)
        taken = until(lambda: worlds(run) == [3, 2, 3], 90, "three hosts train")
        print(f"{fault}: going on with three hosts {taken:.1f} s after the first is back")
        ended_well(agents)
    assert is_the_same(run, long_peaceful)
