"""From the figures of a benchmark's runs to what is told: medians, spreads, shares, and what bounds a case."""

import statistics
from typing import Any, NamedTuple

from benchmarks.watch import ADAM_BYTES

Found = dict[str, Any]  # what is known of a case, as it goes into bench.json

HEAD = ["", "s/epoch", "images/s", "start s", "MiB", "GEMM", "optimizer", "data", "sum", "other", "floor s"]
ROW = "{:<45}{:>20}{:>10}{:>9}{:>8}{:>7}{:>11}{:>7}{:>7}{:>8}{:>9}"
LEGEND = (
    "start: from the process's start to the end of the first step. GEMM, optimizer, data, sum (of the processes' gradients),\n"
    "other: shares of the step. floor: an epoch's matrix products and Adam's memory traffic, each alone and in warm caches."
)

IN_WORDS = {
    "gemm": "matrix products",
    "optimizer": "the optimizer",
    "data": "getting its data",
    "communication": "the sum of gradients over processes",
    "other": "all else: operations on single numbers, Python, waiting",
}


class Case(NamedTuple):
    program: str  # notebook, tight or vae_dist
    hidden: int
    precision: str = "fp32"
    processes: int = 1

    @property
    def name(self) -> str:
        processes = f", {self.processes} processes" if self.processes > 1 else ""
        return f"784-{self.hidden}-20 {self.precision}: {self.program}{processes}"


def summary(case: Case, images: int, runs: list[dict[str, Any]]) -> Found:
    """Medians over the runs of a case, and for seconds also the lowest and the highest."""
    epochs, starts = ([run[name] for run in runs] for name in ("epoch_seconds", "start_seconds"))
    shares = [run["communication_share"] for run in runs if run["communication_share"] is not None]
    return {
        "case": case._asdict(),
        "epoch_seconds": statistics.median(epochs),
        "epoch_seconds_spread": [min(epochs), max(epochs)],
        "images_per_second": images / statistics.median(epochs),
        "start_seconds": statistics.median(starts),
        "start_seconds_spread": [min(starts), max(starts)],
        "outside_epochs_seconds": statistics.median(run["outside_epochs_seconds"] for run in runs),
        "peak_mib": max(run["peak_mib"] for run in runs),
        "communication_share": statistics.median(shares) if shares else None,
    }


def with_shares(found: Found, profile: dict[str, Any]) -> Found:
    """A case's summary with the shares of its step; other is what is left, the communication too where it is unknown."""
    shares = profile["shares"] | {"communication": found["communication_share"]}
    shares["other"] = max(0.0, 1 - sum(share or 0.0 for share in shares.values()))
    return found | {"shares": shares, "profiled_step_seconds": profile["step_seconds"]}


def epoch_floor(profiles: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """The floor of an epoch of so many steps. Cases of one width, precision and number of processes have one: the lowest."""
    gemm = min(profiles, key=lambda profile: profile["gemm_seconds"])
    optimizer = min(profiles, key=lambda profile: profile["optimizer_seconds"])
    return {
        "seconds": steps * (gemm["gemm_seconds"] + optimizer["optimizer_seconds"]),
        "gemm_seconds": steps * gemm["gemm_seconds"],
        "gemm_flops_per_second": gemm["gemm_flops_per_second"],
        "optimizer_seconds": steps * optimizer["optimizer_seconds"],
        "moved_bytes_per_second": optimizer["moved_bytes_per_second"],
    }


def line(found: Found) -> str:
    """A case's line of the table."""
    low, high = found["epoch_seconds_spread"]
    shares = [found["shares"][kind] for kind in IN_WORDS]
    return ROW.format(
        Case(**found["case"]).name,
        f"{found['epoch_seconds']:.2f} ({low:.2f}-{high:.2f})",
        f"{found['images_per_second']:,.0f}",
        f"{found['start_seconds']:.1f}",
        f"{found['peak_mib']:,.0f}",
        *("?" if share is None else f"{share:.0%}" for share in shares),
        f"{found['floor']['seconds']:.2f}",
    )


def bound(found: Found) -> str:
    """What bounds a case, and how far it is from the floor."""
    shares, floor = found["shares"], found["floor"]
    kind = max(IN_WORDS, key=lambda kind: shares[kind] or 0.0)
    gflops, gigabytes = floor["gemm_flops_per_second"] / 1e9, floor["moved_bytes_per_second"] / 1e9
    times = found["epoch_seconds"] / floor["seconds"]
    distance = f"it takes {times:.1f} times that floor"
    if times < 1:
        distance = "but it takes less: the machine was busy when the floor was measured, which is void"
    return (
        f"bound by {IN_WORDS[kind]} ({shares[kind]:.0%} of the step). Alone, its matrix products would take "
        f"{floor['gemm_seconds']:.2f} s an epoch, at {gflops:,.0f} GFLOP/s, and Adam's {ADAM_BYTES} bytes a parameter "
        f"{floor['optimizer_seconds']:.2f} s, at {gigabytes:,.0f} GB/s; {distance}"
    )
