"""Hosts of a cluster, each a network namespace with a launcher and its workers, for tests of jobs over several machines."""

import contextlib
import hashlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.namespaces import DEVICE, Hosts, Link, inside, linked
from tests.helpers import ROOT, environment

PORT = 29400  # of the rendezvous: the hosts are alone in their network
NO_LINK = Link()

# A host is dead after three seconds of silence, and others are waited for for three more. torch's defaults: 15 and 30.
IMPATIENT = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"

# Shows a folder, which may lie on a file system that all share, in this host's own way: it cannot write there.
_READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


class Agent(NamedTuple):
    """A launcher on a host, and where it and its workers print."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def lost_peers(self) -> list[str]:
        """The ranks here that said in a line that they lost another."""
        return re.findall(r"^error: (rank \d+): another process of this run is gone", self.text(), re.MULTILINE)

    def is_gone(self) -> bool:
        return self.process.poll() is not None


class Cluster:
    """Hosts that share a file system, and what runs on them."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts = hosts
        self._folder = folder
        self._started: list[Agent] = []

    def start(self, host: int, command: Sequence[object], read_only: Path | None = None) -> Agent:
        """Starts a command on a host. It is killed with the host, at the latest at the end of the test."""
        log = self._folder / f"{len(self._started)}_node{host}.log"
        mounted = ["sh", "-c", _READ_ONLY, str(read_only)] if read_only else []
        # Without a store of its own for each restart, agents hand on the addresses of the dead.
        own = {"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with log.open("wb") as printed:
            process = subprocess.Popen(
                [*inside(self.hosts.names[host]), *mounted, *map(str, command)],
                cwd=ROOT,
                env=environment(**own),
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
        self._started.append(Agent(process, log))
        return self._started[-1]

    def torchrun(
        self, host: int, job: Sequence[object], nodes: str = "2", processes: int = 1, restarts: int = 0, meet_at: int = 0
    ) -> Agent:
        """An agent that meets the others of `nodes` at the host `meet_at`."""
        shape = ["--nnodes", nodes, "--nproc-per-node", processes, "--max-restarts", restarts]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"node{meet_at}:{PORT}"]
        launcher = [sys.executable, "-m", "torch.distributed.run", *shape, *meeting, "--rdzv-conf", IMPATIENT]
        return self.start(host, [*launcher, *job])

    def hold_rendezvous(self, host: int) -> None:
        """What the agents tell each other, for a job that may lose any of its own hosts."""
        self.start(host, [sys.executable, ROOT / "launch" / "rendezvous.py", PORT])

    def wait(self) -> None:
        """For all that were started and have been killed."""
        for agent in self._started:
            agent.process.wait(timeout=10)


@contextlib.contextmanager
def cluster(folder: Path, hosts: int = 2, link: Link = NO_LINK) -> Iterator[Cluster]:
    """Hosts for a test. Whatever runs on them ends with it."""
    with linked(link, hosts) as network:
        made = Cluster(network, folder)
        yield made
    made.wait()


def until(condition: Callable[[], object], seconds: float, what: str) -> float:
    """Waits for something, and returns how long it took, in seconds."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - begun


def ended_well(agents: Sequence[Agent], seconds: float = 90) -> float:
    """Waits for launchers to end, all with status 0, and returns how long it took."""
    taken = until(lambda: all(agent.is_gone() for agent in agents), seconds, "the job ends")
    for agent in agents:
        assert agent.process.returncode == 0, agent.text()[-3000:]
    return taken


def newest_step(run: Path) -> int:
    """Of a run's checkpoints; 0 where there is none."""
    return max((int(folder.name.removeprefix("step_")) for folder in run.glob("checkpoints/step_*")), default=0)


def weights(run: Path) -> str:
    """The SHA-256 of the final weights."""
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
