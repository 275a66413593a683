"""What `vae_dist.doctor` asks of processes and machines.

A check takes the job, asks all ranks, and judges what they say: the same finding on each. It raises Fault where a rank cannot
answer.
"""

import contextlib
import math
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from vae_dist.config import Config, InputError
from vae_dist.data import sources
from vae_dist.distributed import differences_in
from vae_dist.doctor.meeting import Fault, Meeting
from vae_dist.model import VAE
from vae_dist.options import flat
from vae_dist.starting import check_launch, cpu_name, is_on_cpu, local_processes, require_hardware, versions

_FEW_FILES, _LITTLE_SHM = 1024, 512 << 20


class Finding(NamedTuple):
    """What a check found: without complaints all is well."""

    seen: str
    faults: Sequence[str] = ()
    warnings: Sequence[str] = ()


@dataclass
class Job:
    """What is to be run, and by whom."""

    config: Config
    meeting: Meeting
    model: VAE | None = None  # on the meta device, where the images' shape is known: sizes without memory
    is_output_sound: bool = False
    accelerator: Accelerator | None = None  # once the process group is there
    flops_per_second: float = math.inf  # of the slowest rank, once that is measured

    @property
    def device(self) -> torch.device:
        return self.accelerator.device if self.accelerator else torch.device("cpu")

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters()) if self.model else 0


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


Check = Callable[[Job], Finding]


def processes(job: Job) -> Finding:
    """Whether as many came as were meant."""
    try:
        seconds = job.meeting.call_the_roll()
    except Fault as fault:
        raise type(fault)(
            f"{fault}: see what they print, and whether all machines were told the same MASTER_ADDR, MASTER_PORT and number of "
            "processes, and their firewalls let them through"
        ) from None
    job.meeting.ask(_require_launcher)
    warnings = []
    gpus = torch.cuda.device_count()
    if job.meeting.size == 1 and gpus > 1:
        warnings = [f"one process uses one of {gpus} visible GPUs; accelerate launch --num_processes {gpus} uses all"]
    came = job.meeting.named(range(job.meeting.size))
    return Finding(f"{job.meeting.size} of {job.meeting.size} came within {duration(seconds)}: {came}", warnings=warnings)


def _require_launcher() -> None:
    check_launch()
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(os.environ.get(name, "1")) > 1 and "WORLD_SIZE" not in os.environ:
            raise InputError(
                f"{name} is {os.environ[name]}, but WORLD_SIZE is not set: each copy would take itself for the only one; let "
                "each task start torchrun or accelerate launch, one task a machine"
            )


def software(job: Job) -> Finding:
    facts = job.meeting.ask(lambda: versions() | {name: metadata.version(name) for name in ("safetensors", "wandb")})
    faults = unlike(job, facts, "install the same there")
    return Finding(", ".join(f"{name} {version}" for name, version in facts[0].items()), faults)


def options(job: Job) -> Finding:
    """As the training compares them; and the model that they mean."""
    of_ranks = job.meeting.ask(lambda: {f"--{name}": str(value) for name, value in flat(job.config).items()})
    facts = [{name: value for name, value in fact.items() if name != "--data.root"} for fact in of_ranks]
    faults = unlike(job, facts, "give all the same options")

    def build() -> None:
        shape = sources.known_shape(job.config.data)
        with torch.device("meta"):
            job.model = VAE.from_config(job.config.model, shape) if shape else None

    job.meeting.ask(build)
    model = f"a model of {job.parameters:,} parameters" if job.model else "a model for images of a size that is not known yet"
    return Finding(f"{len(facts[0])} fields, {model}", faults)


def unlike(job: Job, facts: Sequence[Mapping[str, str]], remedy: str) -> list[str]:
    """Words for each thing that some ranks have otherwise than the rest."""
    ranks: dict[tuple[str, str, str], list[int]] = {}
    for rank, name, value, usual in differences_in(facts):
        ranks.setdefault((name, value, usual), []).append(rank)
    return [
        f"{name} is {value} on {job.meeting.named(who)} and {usual} on others; {remedy}"
        for (name, value, usual), who in ranks.items()
    ]


def devices(job: Job) -> Finding:
    facts = job.meeting.ask(lambda: _device(job.config))
    kinds = {rank: f"{fact['name']}" for rank, fact in enumerate(facts)}
    faults, warnings = [], []
    if len({fact["type"] for fact in facts}) > 1:
        faults.append("some ranks have a GPU and some none: look at the driver and CUDA_VISIBLE_DEVICES of those without")
    places = Counter((host, fact["id"]) for host, fact in zip(job.meeting.hosts, facts, strict=True) if fact["id"])
    for (host, device), count in places.items():
        if count > 1:
            faults.append(f"{count} processes share GPU {device} of {host}: give each its own")
    if problems := {rank: fact["problem"] for rank, fact in enumerate(facts) if fact["problem"]}:
        warnings.append(job.meeting.told(problems))
    if len(set(kinds.values())) > 1:
        warnings.append("not all devices are alike: the slowest sets the pace")
    return Finding(job.meeting.told(kinds), faults, warnings)


def _device(config: Config) -> dict[str, Any]:
    """The device that this process will have. Raises InputError where the options want what it has not."""
    require_hardware(config.trainer)
    driver = Path("/proc/driver/nvidia/version")
    if is_on_cpu():
        problem = ""
        if config.trainer.precision == "bf16" and "bf16" not in Path("/proc/cpuinfo").read_text().lower():
            problem = "this CPU has no bf16 arithmetic, so that it is slower than fp32"
        elif driver.exists() and not torch.cuda.is_available():
            problem = f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU: look at CUDA_VISIBLE_DEVICES"
        return {"type": "cpu", "name": f"CPU {cpu_name()}", "id": "", "problem": problem}
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    version = driver.read_text().split("  ")[1].strip() if driver.exists() else "unknown"
    has_bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
    name = f"{properties.name}, {total / 2**30:.0f} GiB, {has_bf16}, driver {version}"
    problem = f"{(total - free) / 2**30:.1f} GiB of its memory is taken by others" if free < 0.9 * total else ""
    return {"type": "cuda", "name": name, "id": str(properties.uuid), "problem": problem}


def cores(job: Job) -> Finding:
    """Threads as the training will have them, against the cores that there are for them."""
    cpus = job.meeting.ask(lambda: sorted(os.sched_getaffinity(0)))
    facts = job.meeting.ask(lambda: (torch.get_num_threads(), _cpu_quota()))
    words: dict[int, str] = {}
    warnings = []
    for host in dict.fromkeys(job.meeting.hosts):
        ranks = [rank for rank, of in enumerate(job.meeting.hosts) if of == host]
        cores = math.ceil(min(len({cpu for rank in ranks for cpu in cpus[rank]}), *(facts[rank][1] for rank in ranks)))
        threads = sum(facts[rank][0] for rank in ranks)
        words |= dict.fromkeys(ranks, f"{cores} cores, {facts[ranks[0]][0]} threads a process")
        if threads > cores:
            remedy = f"set OMP_NUM_THREADS={cores // len(ranks)}" if len(ranks) <= cores else "start fewer"
            warnings.append(f"{len(ranks)} processes with {threads} threads share {cores} cores of {host}: {remedy}")
    return Finding(job.meeting.told(words), warnings=warnings)


def _cpu_quota() -> float:
    """Cores' worth of time that a container may take; infinity without a limit, which JSON of Python's knows too."""
    try:
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(most) / int(period)
    except (OSError, ValueError):
        return math.inf


def limits(job: Job) -> Finding:
    facts = job.meeting.ask(_limits)
    needed = 16 * job.parameters  # weights, gradient and Adam's moments, float32
    on_cpu, poor, few, small = is_on_cpu(), {}, {}, {}
    for rank, fact in enumerate(facts):
        if on_cpu and fact["memory"] < needed * fact["processes"]:
            poor[rank] = f"the model needs {needed / 2**30:.1f} GiB in each process: start fewer, or shrink it"
        if fact["files"] < _FEW_FILES:
            few[rank] = f"only {fact['files']} open files are allowed: `ulimit -n 65536`"
        if not on_cpu and fact["processes"] > 1 and fact["shm"] < _LITTLE_SHM:
            small[rank] = "NCCL may need more of /dev/shm: docker run --shm-size=1g"
    firsts = [facts[job.meeting.hosts.index(host)] for host in job.meeting.hosts]
    words = {
        rank: f"{fact['memory'] / 2**30:.1f} GiB of memory and {fact['shm'] / 2**30:.1f} GiB of /dev/shm are free, "
        f"{fact['files']} files may be open"
        for rank, fact in enumerate(firsts)
    }
    warnings = [job.meeting.told(each) for each in (few, small) if each]
    return Finding(job.meeting.told(words), [job.meeting.told(poor)] if poor else [], warnings)


def _limits() -> dict[str, int]:
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    memory = int(meminfo["MemAvailable"].split()[0]) << 10
    with contextlib.suppress(OSError, ValueError):  # a container has a limit of its own
        most, taken = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        memory = min(memory, most - taken)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return {"memory": memory, "files": files, "shm": shm, "processes": local_processes()}
