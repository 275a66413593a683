"""What more GPUs are expected to bring, on paper: how much of the time they compute, for a network and a model.

python -m benchmarks.scaling --gpus 8 --network nvlink --parameters 652824 --images 128 --step-us 60
Prints the efficiency at 1, 2, 4, … GPUs, says where the model is too small for them, and what would help.
"""

import argparse
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.ring import MEASURED, Ring, read_measured
from vae_dist.config import InputError
from vae_dist.distributed import run_entry_point

BACKWARD = 2 / 3  # of a step: while it lasts, gradients that are ready may travel
ROW = "{:>5}{:>15}{:>13}{:>12}{:>14}{:>13}{:>12}{:>10}"


class Network(NamedTuple):
    """GPUs in nodes; a ring that stays in a node is another one than a ring through several."""

    within: Ring
    between: Ring | None = None  # None: there is no way out of a node
    node: int = 8  # GPUs

    def ring(self, gpus: int) -> Ring:
        ring = self.within if gpus <= self.node else self.between
        if ring is None:
            raise InputError(f"--gpus {gpus}: this network ends at {self.node} GPUs, with the node; take another --network")
        return ring


def everywhere(ring: Ring) -> Network:
    """A network that is the same however many take part."""
    return Network(ring, ring)


# No GPU network has been measured by us: these figures are chosen so that they agree with published orders of magnitude and
# with the times that our targets state for the 2.6 MB of the classic model. A step costs more than the hardware's latency:
# NCCL's too.
_NVLINK = Ring(2.0e-6, 370e9)  # H100, NVLink 4: 450 GB/s each way, of which large sums get some 80 %; 2.6 MB: 40 µs on 8 GPUs
# Two nodes or more, a 400 Gbit/s adapter for each of a node's eight GPUs: 8 x 50 GB/s, 80 % of it; 2.6 MB: 130 µs on two nodes.
_INFINIBAND = Ring(3.8e-6, 320e9)
# TCP, one adapter for a machine: 94 % of the line rate is payload; a step through the kernel and NCCL's sockets some 45 µs.
# 2.6 MB: 3.6 ms at 10 Gbit/s on four GPUs in two machines; all of a ring's bytes pass the adapter, at one GPU a machine too.
_ETHERNET_10G, _ETHERNET_1G = Ring(45e-6, 1.18e9), Ring(45e-6, 0.118e9)

NETWORKS = {
    "nvlink": Network(_NVLINK),
    "infiniband": Network(_NVLINK, _INFINIBAND),
    "ethernet-10g": everywhere(_ETHERNET_10G),
    "ethernet-1g": everywhere(_ETHERNET_1G),
    # Measured by benchmarks/communication.py on two CPU cores: docs/scaling.md.
    "gloo-loopback": everywhere(Ring(237e-6, 0.868e9)),
}


class Model(NamedTuple):
    """The step of one GPU: a part that is there with any batch, and one that grows with the images."""

    parameters: int
    images: int  # of one GPU's step
    fixed: float  # seconds: launching kernels, the optimizer
    per_image: float  # seconds

    @property
    def gradient(self) -> int:
        """Bytes, in float32."""
        return 4 * self.parameters

    def step(self, images: int) -> float:
        return self.fixed + images * self.per_image


class Plan(NamedTuple):
    """A model on a network."""

    model: Model
    network: Network
    overlap: float  # share of an all-reduce that can hide behind the backward pass, if that is long enough

    def all_reduce(self, gpus: int) -> float:
        return 0.0 if gpus == 1 else self.network.ring(gpus).seconds(gpus, self.model.gradient)

    def step(self, gpus: int, images: int) -> float:
        """Seconds of a step with so many images on each GPU."""
        alone, sums = self.model.step(images), self.all_reduce(gpus)
        return alone + max(sums - self.overlap * sums, sums - BACKWARD * alone)  # the larger: less is hidden

    def weak(self, gpus: int) -> float:
        """Efficiency with the same images on each GPU, however many there are: the share of a step that is no waiting."""
        return self.model.step(self.model.images) / self.step(gpus, self.model.images)

    def strong(self, gpus: int) -> float:
        """Efficiency where one GPU's batch is shared out: the speed-up over the number of GPUs."""
        return self.step(1, self.model.images) / self.step(gpus, self.share(gpus)) / gpus

    def share(self, gpus: int) -> int:
        """Images of each GPU's part of that batch; the last part is filled up."""
        return -(-self.model.images // gpus)

    def images_for(self, gpus: int, efficiency: float) -> int:
        """The images a GPU needs for this efficiency. `overlap` or the backward pass bounds what is hidden: both must do."""
        wanted, sums = efficiency / (1 - efficiency), self.all_reduce(gpus)
        seconds = max(wanted * (1 - self.overlap) * sums, wanted * sums / (1 + wanted * BACKWARD))
        return math.ceil((seconds - self.model.fixed) / self.model.per_image - 1e-9)


def counts(gpus: int) -> list[int]:
    """1, 2, 4, … and the number asked for."""
    return [*(2**k for k in range(gpus.bit_length()) if 2**k < gpus), gpus]


def table(plan: Plan, gpus: int) -> list[str]:
    images = plan.model.images
    lines = [
        f"{'':20}{f'{images:,} images on each GPU':^39}{f'{images:,} images shared out':^35}".rstrip(),
        ROW.format("GPUs", "all-reduce µs", "step µs", "efficiency", "images/s", "step µs", "efficiency", "speed-up"),
    ]
    for count in counts(gpus):
        weak, strong = plan.step(count, images), plan.step(count, plan.share(count))
        figures = [f"{plan.all_reduce(count) * 1e6:,.1f}", f"{weak * 1e6:,.1f}", f"{plan.weak(count):.2f}"]
        figures += [f"{count * images / weak:,.0f}", f"{strong * 1e6:,.1f}", f"{plan.strong(count):.2f}"]
        lines.append(ROW.format(count, *figures, f"{count * plan.strong(count):.2f}x"))
    return lines


def verdict(plan: Plan, gpus: int, wanted: float) -> list[str]:
    """Whether the model is large enough for the GPUs, and what would help."""
    reached = plan.weak(gpus)
    if reached >= wanted:
        lines = [f"ok: {gpus} GPUs compute {reached:.0%} of the time"]
    else:
        enough = max(count for count in range(1, gpus) if plan.weak(count) >= wanted)
        images = plan.images_for(gpus, wanted)
        lines = [
            f"too small for {gpus} GPUs: they compute {reached:.0%} of the time, of the {wanted:.0%} wanted. What would help:",
            f"  {images:,} images on each GPU (a global batch of {images * gpus:,}: see whether it still learns as well)",
            f"  or {enough} GPU{'s' if enough > 1 else ''} ({plan.weak(enough):.0%})",
        ]
    best = max(range(1, gpus + 1), key=lambda count: count * plan.strong(count))
    gain = f"is fastest on {best} GPUs, {best * plan.strong(best):.2f}x" if best > 1 else "gains nothing from a second GPU"
    return [*lines, f"One batch of {plan.model.images:,} images, shared out, {gain}"]


def positive(flag: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise InputError(f"{flag} {value:g}: must be a positive number")
    return value


def within(flag: str, value: float, most: float) -> float:
    if not 0 <= value < most:
        raise InputError(f"{flag} {value:g}: must be at least 0 and below {most:g}")
    return value


def model_of(options: argparse.Namespace) -> Model:
    for flag in ("parameters", "images"):
        positive(f"--{flag}", getattr(options, flag))
    given = [options.step_us is not None, options.mflop_per_image is not None, options.tflops is not None]
    if given == [True, False, False]:
        step = positive("--step-us", options.step_us)
        fixed = within("--fixed-us", options.fixed_us, step)
        per_image = (step - fixed) / options.images
    elif given == [False, True, True]:
        fixed = within("--fixed-us", options.fixed_us, math.inf)
        per_image = positive("--mflop-per-image", options.mflop_per_image) / positive("--tflops", options.tflops)
    else:
        raise InputError("the step of a single GPU: give either --step-us, or both --mflop-per-image and --tflops")
    return Model(options.parameters, options.images, fixed / 1e6, per_image / 1e6)


def network_of(options: argparse.Namespace) -> Network:
    given = [options.network is not None, options.latency_us is not None, options.gbytes_per_s is not None]
    if given == [False, True, True]:
        latency = within("--latency-us", options.latency_us, math.inf)
        return everywhere(Ring(latency / 1e6, positive("--gbytes-per-s", options.gbytes_per_s) * 1e9))
    if given[1] or given[2]:
        raise InputError("a network: give either --network, or both --latency-us and --gbytes-per-s")
    name = options.network or "nvlink"
    if name in NETWORKS:
        return NETWORKS[name]
    measured = read_measured(options.measured) if options.measured.exists() or options.measured != MEASURED else {}
    if name in measured:
        return everywhere(measured[name])
    names = [*NETWORKS, *measured]
    meant = difflib.get_close_matches(name, names, 1)
    raise InputError(f"--network {name}: {f'perhaps {meant[0]}? ' if meant else ''}Known are {', '.join(names)}")


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description="The expected efficiency of several GPUs, for a network and a model."
    )
    parser.add_argument("--gpus", type=int, default=8, help="how many are asked for")
    parser.add_argument("--network", help=f"{', '.join(NETWORKS)} (nvlink by default), or a name in --measured")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="what benchmarks.communication wrote")
    parser.add_argument("--latency-us", type=float, help="of a step of the ring, in place of --network")
    parser.add_argument("--gbytes-per-s", type=float, help="that a GPU sends, in place of --network")
    parser.add_argument("--parameters", type=int, default=652_824, help="of the model (the classic one); gradients are float32")
    parser.add_argument("--images", type=int, default=128, help="of one GPU's step")
    parser.add_argument("--step-us", type=float, help="microseconds of a step on one GPU")
    parser.add_argument("--mflop-per-image", type=float, help="of a training step; with --tflops, in place of --step-us")
    parser.add_argument("--tflops", type=float, help="that the GPU reaches in this model")
    parser.add_argument(
        "--fixed-us", type=float, default=0.0, help="part of the step that any batch costs: kernel launches, Adam"
    )
    parser.add_argument("--overlap", type=float, default=0.0, help="share of the all-reduce that the backward pass can hide")
    parser.add_argument("--efficiency", type=float, default=0.8, help="below it the model is called too small")
    options = parser.parse_args(args)
    if not 1 <= options.gpus <= 100_000:
        raise InputError(f"--gpus {options.gpus}: must be 1 to 100000")
    if not 0 < options.efficiency < 1:
        raise InputError(f"--efficiency {options.efficiency:g}: must lie between 0 and 1")
    if not 0 <= options.overlap <= 1:
        raise InputError(f"--overlap {options.overlap:g}: must be 0 to 1")
    plan = Plan(model_of(options), network_of(options), options.overlap)
    print("\n".join([*table(plan, options.gpus), *verdict(plan, options.gpus, options.efficiency)]))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
