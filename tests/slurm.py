"""A SLURM of two virtual nodes on this machine, from Debian's packages, with all its files in one folder."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import ROOT, environment

PROGRAMS = ["munged", "mungekey", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel"]
_SEARCHED = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
KillWait=20
ReturnToService=2
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""
_GPUS = "NodeName=n[1-2] Name=gpu File=/dev/null\n"  # no device behind them: the program finds none and takes the CPU


class Slurm:
    """Its commands, and what it knows of a job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = environment(SLURM_CONF=str(folder / "slurm.conf"), OMP_NUM_THREADS="1", PATH=_SEARCHED)

    def run(self, *command: object) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def submit(self, *command: object) -> int:
        return int(self.run("sbatch", "--parsable", *command))

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, such as JobState, Restarts, ExitCode, NodeList."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Starts munge, a controller and two nodes, waits until both are idle, and ends what it started."""
    folder.chmod(0o755)
    slurm = Slurm(folder)
    with contextlib.ExitStack() as sockets:
        free = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [server.getsockname()[1] for server in free]
    (folder / "slurm.conf").write_text(_CONFIG.format(folder=folder, host=socket.gethostname(), ports=ports))
    (folder / "gres.conf").write_text(_GPUS)
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    slurm.run("mungekey", "--create", "--keyfile", folder / "munge.key")
    files = {
        "key-file": "munge.key",
        "socket": "munge.socket",
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "seed-file": "seed",
    }
    munge = ["munged", "--foreground", "--force", *(f"--{option}={folder / name}" for option, name in files.items())]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for daemon in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
            command = [shutil.which(daemon[0], path=_SEARCHED) or daemon[0], *daemon[1:]]
            with (folder / "daemons.log").open("ab") as log:
                started.append(subprocess.Popen(command, env=slurm.environment, stdout=log, stderr=log))
            time.sleep(0.5)
        deadline = time.monotonic() + 60
        while "idle idle" not in " ".join(
            slurm.run("sinfo", "--Node", "--noheader", "--partition=main", "--format=%t").split()
        ):
            assert time.monotonic() < deadline, "the nodes do not come up"
            time.sleep(0.3)
        yield slurm
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            process.kill()
