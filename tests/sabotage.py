"""Run in real processes: vae_dist.train or doctor, but something goes wrong, on one rank or in its gradients.

python -m tests.sabotage FAULT [doctor] [options of vae_dist.train]
"""

import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vae_dist import distributed, starting, train
from vae_dist.config import DataConfig
from vae_dist.data import sources
from vae_dist.data.images import Images, Resident
from vae_dist.doctor import __main__ as doctor
from vae_dist.doctor import network
from vae_dist.trainer import Trainer

RANK, STEP = 1, 11  # where a fault in training strikes


def at_step(fault: Callable[[Trainer], None]) -> None:
    """Lets the fault strike right before one step."""
    step = Trainer._train_step

    def faulty(self: Trainer, pixels: Tensor, indices: Tensor, noise: Tensor) -> None:
        if self.progress.step == STEP:
            fault(self)
        step(self, pixels, indices, noise)

    Trainer._train_step = faulty  # type: ignore[method-assign]


@torch.no_grad()
def last_bit_of_a_weight(trainer: Trainer) -> None:
    weight = trainer.model.get_parameter("decoder.2.bias")
    weight[5] = torch.nextafter(weight[5], weight[5] + 1)


def a_moment(trainer: Trainer) -> None:
    trainer.step.optimizer.state[trainer.model.get_parameter("decoder.2.bias")]["exp_avg_sq"][5] *= 1.0001


@torch.no_grad()
def no_number(trainer: Trainer) -> None:
    trainer.model.get_parameter("encoder.1.bias")[0] = float("nan")


def other_data() -> None:
    load = sources.load

    def flipped(*args: object, **kwargs: object) -> Images:
        images = load(*args, **kwargs)  # type: ignore[arg-type]
        assert isinstance(images, Resident)
        images.pixels[17, 0, 3, 4] ^= 1
        return images

    sources.load = flipped


def other_software() -> None:
    starting.__dict__["__version__"] = "0.0.7"


def another_seed() -> None:
    sys.argv += ["--seed", "6"]


def averaged_gradients() -> None:
    """As DDP has them by itself."""
    DistributedDataParallel.register_comm_hook = lambda *_: None  # type: ignore[method-assign]


def a_dead_file_system(config: DataConfig) -> str:
    time.sleep(60)
    return ""


def hang() -> None:
    sources.to_be_fetched = a_dead_file_system


def odd_in_every_way() -> None:
    other_software()
    another_seed()
    clock, rate = time.time, network._matmul_rate
    time.time = lambda: clock() + 7
    network._matmul_rate = lambda device, precision: rate(device, precision) / 1000


FAULTS: dict[str, Callable[[], None]] = {
    "weight": lambda: at_step(last_bit_of_a_weight),
    "moment": lambda: at_step(a_moment),
    "nan": lambda: at_step(no_number),
    "data": other_data,
    "software": other_software,
    "seed": another_seed,
    "average": averaged_gradients,
    "hang": hang,
    "odd": odd_in_every_way,
}


if __name__ == "__main__":
    fault = sys.argv.pop(1)
    if int(os.environ.get("RANK", "0")) == RANK or fault == "average":
        FAULTS[fault]()
    program = sys.argv.pop(1) if sys.argv[1:2] == ["doctor"] else "train"
    distributed.run_entry_point(doctor.main if program == "doctor" else train.main)
