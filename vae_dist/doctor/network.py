"""What `vae_dist.doctor` asks of the network between the processes, of their speed, and of their clocks. See `health`."""

import contextlib
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from fcntl import ioctl
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vae_dist.distributed import is_one_machine
from vae_dist.doctor.health import Finding, Job, duration
from vae_dist.shared_memory import share_memory
from vae_dist.starting import connect, is_on_cpu, tf32

_SIOCGIFADDR = 0x8915  # of <linux/sockios.h>
_VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "MASTER_ADDR")
_SMALL_CALLS, _LARGE_CALLS, _SECONDS = 50, 20, 1.0  # at most, of each size
_BANDWIDTH_BYTES, _MOST_BYTES = 16 << 20, 256 << 20
_MATMULS, _CPU_SIDE, _GPU_SIDE = 7, 1024, 8192
_SLOW = 1.5  # times the usual time
_CLOCK_SECONDS = 1.0
_REMEDY = (
    "are these the addresses by which the hosts reach each other (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), and are all ports "
    "open between them? The libraries choose free ones"
)


def network(job: Job) -> Finding:
    """What the libraries will go by: nothing is sent yet."""
    meeting = job.meeting
    facts = meeting.ask(lambda: {"gloo": gloo_address(), "environment": _environment()})
    faults, warnings = [], []
    lonely = [rank for rank, fact in enumerate(facts) if fact["gloo"].startswith("127.")]
    if is_on_cpu() and lonely and len(set(meeting.hosts)) > 1:
        faults.append(
            f"gloo uses the loopback address on {meeting.named(lonely)}, which other hosts cannot reach: set "
            "GLOO_SOCKET_IFNAME to the interface between the hosts (`ip -br addr` lists them), or let the host's name "
            "stand for its address there"
        )
    environments = {rank: fact["environment"] for rank, fact in enumerate(facts)}
    if len(set(environments.values())) > 1:
        warnings.append(f"not the same environment everywhere: {meeting.told(environments)}")
    library = f"gloo at {meeting.told({rank: fact['gloo'] for rank, fact in enumerate(facts)})}"
    if not is_on_cpu():
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        library = f"NCCL {version}, which chooses its interfaces itself (NCCL_DEBUG=INFO tells)"
    return Finding(f"{library}; {environments[0] or 'nothing in the environment'}", faults, warnings)


def gloo_address() -> str:
    """Where gloo of this process listens, as torch decides it. Raises OSError where GLOO_SOCKET_IFNAME names no interface."""
    if names := os.environ.get("GLOO_SOCKET_IFNAME"):
        name = names.split(",")[0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                found = ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError as error:
                known = ", ".join(each for _, each in socket.if_nameindex())
                raise OSError(f"GLOO_SOCKET_IFNAME={name}: {error.strerror}; there are {known}") from None
        return socket.inet_ntoa(found[20:24])
    try:
        for family, _, _, _, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with socket.socket(family) as probe:
                probe.bind((address[0], 0))
                return str(address[0])
    except OSError:
        pass
    return "127.0.0.1"  # torch's way out


def _environment() -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES))


def group(job: Job) -> Finding:
    """The process group that training would have."""
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # a collective that hangs is a finding, and ends no process
    seconds = 0.8 * job.meeting.patience  # the library's own words come before ours
    trainer = replace(job.config.trainer, precision="fp32", compile=False, timeout_minutes=seconds / 60)

    def come_together() -> float:
        begin = time.monotonic()
        job.accelerator = connect(trainer)
        return time.monotonic() - begin

    slowest = max(job.meeting.ask(come_together, _REMEDY))
    if job.meeting.size == 1:
        return Finding("one process has nobody to talk to")
    return Finding(f"{dist.get_backend()} of {job.meeting.size} processes, within {duration(slowest)}")


def speed(job: Job) -> Finding:
    """Ranks at the same work at the same time: the slowest sets the pace of all."""
    rates = job.meeting.ask(lambda: _matmul_rate(job.device, job.config.trainer.precision))
    usual = statistics.median(rates)
    slow = {
        rank: f"{rate / 1e9:,.0f} GFLOP/s, {usual / rate:.1f} times slower than usual: look for other work, heat or a limit"
        for rank, rate in enumerate(rates)
        if rate * _SLOW < usual
    }
    job.flops_per_second = min(rates)
    range_of_rates = f"{min(rates) / 1e9:,.0f} to {max(rates) / 1e9:,.0f} GFLOP/s"
    seen = f"matrix products in {job.config.trainer.precision} at {range_of_rates} a process"
    return Finding(seen, warnings=[job.meeting.told(slow)] if slow else [])


def _matmul_rate(device: torch.device, precision: str) -> float:
    """Operations per second, of the quickest of a few products."""
    side = _CPU_SIDE if device.type == "cpu" else _GPU_SIDE
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    factor = torch.ones(side, side, device=device, dtype=dtype)
    with tf32() if precision == "tf32" else contextlib.nullcontext():
        seconds = [_seconds(lambda: factor @ factor, device) for _ in range(_MATMULS)]
    return 2 * side**3 / min(seconds)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def all_reduce(job: Job) -> Finding:
    """Sums over all ranks: right, how soon, and what the gradients' would cost."""
    accelerator, ranks = job.accelerator, job.meeting.size
    if accelerator is None:
        return Finding("", warnings=["not tried, because of the group"])
    if ranks == 1:
        return Finding("one process sums alone")
    facts = job.meeting.ask(lambda: _sums(job, accelerator), _REMEDY)
    faults = []
    if wrong := [rank for rank, fact in enumerate(facts) if not fact["right"]]:
        faults.append(
            f"the sum is wrong on {job.meeting.named(wrong)}: do not train there; try NCCL_P2P_DISABLE=1, a new driver"
        )
    latency, bandwidth, gradient = (max(fact[name] for fact in facts) for name in ("small", "large", "gradient"))
    rate = 2 * (ranks - 1) / ranks * _BANDWIDTH_BYTES / bandwidth
    seen = f"right; 8 bytes in {duration(latency)}, {_BANDWIDTH_BYTES >> 20} MiB at {rate / 1e6:,.0f} MB/s (bus)"
    if job.parameters:
        compute = step_flops(job) / job.flops_per_second
        where = " in shared memory" if facts[0]["shared"] else ""
        share = gradient / (gradient + compute)
        seen += (
            f"; the gradients' {4 * job.parameters / 1e6:,.1f} MB{where} in {duration(gradient)}, at most {share:.0%} of a step"
        )
    return Finding(seen, faults)


def _sums(job: Job, accelerator: Accelerator) -> dict[str, Any]:
    """Median seconds of all-reduces, in lock step with all other ranks."""
    device, rank, ranks = accelerator.device, job.meeting.rank, job.meeting.size
    check = torch.full((_BANDWIDTH_BYTES // 4,), rank + 1.0, device=device)
    dist.all_reduce(check)
    facts: dict[str, Any] = {"right": bool((check == ranks * (ranks + 1) / 2).all()), "gradient": 0.0}
    facts["small"] = _median(dist.all_reduce, torch.zeros(2, device=device), _SMALL_CALLS)
    facts["large"] = _median(dist.all_reduce, torch.zeros(_BANDWIDTH_BYTES // 4, device=device), _LARGE_CALLS)
    memory = share_memory(accelerator, job.meeting.patience) if device.type == "cpu" and is_one_machine() else None
    facts["shared"] = memory is not None
    if job.parameters:
        sent = min(job.parameters, _MOST_BYTES // 4)
        seconds = _median(memory.sum_ if memory else dist.all_reduce, torch.zeros(sent, device=device), _LARGE_CALLS)
        facts["gradient"] = seconds * job.parameters / sent
    return facts


def _median(total: Callable[[Tensor], object], vector: Tensor, most: int) -> float:
    """Median seconds of so many sums as fit into a second, by the first one's time on the slowest rank."""
    _seconds(lambda: total(vector), vector.device)  # connections and memory are made
    first = torch.tensor(_seconds(lambda: total(vector), vector.device), device=vector.device)
    dist.all_reduce(first, dist.ReduceOp.MAX)
    calls = min(most, max(3, int(_SECONDS / first.item())))
    return statistics.median(_seconds(lambda: total(vector), vector.device) for _ in range(calls))


def step_flops(job: Job) -> int:
    """Operations of one step on one rank: of the network's matrix products and convolutions, forward and backward."""
    assert job.model is not None
    images = torch.empty(-(-job.config.data.batch_size // job.meeting.size), *job.model.image_shape, device="meta")
    noise = torch.empty(len(images), job.config.objective.samples, job.model.latent_dim, device="meta")
    with FlopCounterMode(display=False) as counter:
        output = job.model(images, noise)
        sum(field.sum() for field in output).backward()
    return int(counter.get_total_flops())


def clocks(job: Job) -> Finding:
    ahead = job.meeting.ask(job.meeting.clock_ahead)
    furthest = max(ahead, key=abs)
    wrong = {
        rank: f"its clock is {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} rank zero's: start chronyd or ntpd"
        for rank, seconds in enumerate(ahead)
        if abs(seconds) > _CLOCK_SECONDS
    }
    seen = f"at most {duration(abs(furthest))} from rank zero's"
    return Finding(seen, warnings=[job.meeting.told(wrong)] if wrong else [])
