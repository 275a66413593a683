"""Where a training step of vae_dist goes, and what bounds it: run by bench.py, in one process or through a launcher.

python benchmarks/step_profile.py --data.root DIR --output DIR [options of vae_dist.train]
Rank zero prints one JSON object: shares of the step's time, and the step's matrix products alone in warm caches.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from vae_dist import train
from vae_dist.distributed import run_entry_point
from vae_dist.trainer import Trainer

FIRST, LAST = 100, 200  # the steps that are watched

KINDS = {
    "gemm": ("aten::mm", "aten::addmm", "aten::bmm"),
    "optimizer": ("aten::_fused_adam_", "Optimizer."),
    "data": ("aten::index_select", "aten::div_"),
    "communication": ("c10d::", "gloo:"),
}


def shares(watched: profile) -> dict[str, float]:
    """Parts of the time that the main thread's operators took by themselves."""
    events = [(event.key, event.self_cpu_time_total) for event in watched.key_averages()]
    total = sum(time for _, time in events)
    kinds = {kind: sum(t for key, t in events if key.startswith(names)) / total for kind, names in KINDS.items()}
    return kinds | {"other": 1 - sum(kinds.values())}


def best_seconds(action: Callable[[], object], repetitions: int = 100) -> float:
    def once() -> float:
        start = time.perf_counter()
        for _ in range(repetitions):
            action()
        return (time.perf_counter() - start) / repetitions

    return min(once() for _ in range(5))


def gemm_seconds(model: nn.Module, rows: int, dtype: torch.dtype) -> float:
    """A step's matrix products, each alone and as fast as it will go: the floor of the step."""
    layers: Iterable[nn.Linear] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    seconds = 0.0
    for number, layer in enumerate(layers):
        x = torch.randn(rows, layer.in_features, dtype=dtype)
        w = torch.randn(layer.out_features, layer.in_features, dtype=dtype)
        g = torch.randn(rows, layer.out_features, dtype=dtype)
        products: list[Callable[[], Tensor]] = [lambda x=x, w=w: x.mm(w.t()), lambda x=x, g=g: g.t().mm(x)]  # type: ignore[misc]
        if number > 0:  # the images need no gradient
            products.append(lambda g=g, w=w: g.mm(w))  # type: ignore[misc]
        seconds += sum(map(best_seconds, products))
    return seconds


def main() -> int:
    """Trains as `vae_dist.train` does, but watches some steps."""
    step, watched = Trainer._train_step, profile(activities=[ProfilerActivity.CPU])

    def watching(self: Trainer, indices: Tensor, noise: Tensor) -> None:
        if self.progress.step == FIRST:
            watched.start()
        step(self, indices, noise)
        if self.progress.step == LAST:
            watched.stop()
            dtype = torch.bfloat16 if self.config.trainer.precision == "bf16" else torch.float32
            floor = gemm_seconds(self.model, self.partition.rows, dtype)
            if self.accelerator.is_main_process:
                print(json.dumps({"gemm_floor_seconds": floor, "shares": shares(watched)}), flush=True)
            raise SystemExit(0)  # the rest of the epoch would tell nothing new

    Trainer._train_step = watching  # type: ignore[method-assign]
    return train.main(sys.argv[1:])


if __name__ == "__main__":
    run_entry_point(main)
