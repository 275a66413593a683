"""What ends a run before it does harm: a loss that is no number, and ranks that drifted apart."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from vae_dist.checkpoint import Checkpoint
from vae_dist.config import Config
from vae_dist.data.images import Images
from vae_dist.data.order import Partition
from vae_dist.distributed import TrainingFailed, differences_of_ranks
from vae_dist.optimizer import learning_rate

REMEDY = (
    "Nothing was saved since it was. Try another --output with a lower --optimizer.lr, with --optimizer.warmup_steps, or with "
    "--optimizer.clip_norm"
)
_IMAGES_NAMED, _TENSORS_NAMED = 16, 4


def divergence(
    config: Config, images: Images, partition: Partition, accelerator: Accelerator, sums: Tensor, first_step: int
) -> TrainingFailed:
    """The error that says in which step a loss was no number first, and of which images. All ranks call it.

    `sums`, (steps, columns), are this rank's in the steps from `first_step` on, of one epoch; some rank's are not finite.
    """
    of_ranks: Tensor = accelerator.gather(sums).view(accelerator.num_processes, *sums.shape).cpu()
    broken = ~of_ranks.isfinite().all(2)
    offset = int(broken.any(0).nonzero()[0])
    ranks = broken[:, offset].nonzero().flatten().tolist()
    step = first_step + offset
    epoch, number = divmod(step, partition.steps)
    order = images.order(config.seed, epoch + 1, partition.batch_size).cpu()
    taken = torch.cat([partition.of_rank(order, rank)[number].flatten() for rank in ranks])
    indices = taken[taken >= 0].tolist()
    rate = learning_rate(config.optimizer, step, partition.steps, config.trainer.epochs)
    return TrainingFailed(
        f"the training loss is not finite any more: step {step + 1} (epoch {epoch + 1}), learning rate {rate:g}, "
        f"{len(indices)} images on rank {_listed(ranks)}: {_listed(indices, _IMAGES_NAMED)}. {REMEDY}"
    )


class DriftGuard:
    """Compares what each rank would save, bit by bit: ranks that differ would train different models, in silence."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._agreed: int | None = None

    def compare(self, step: int, pack: Callable[[], Checkpoint]) -> None:
        """Raises TrainingFailed on all ranks, naming those that differ. All ranks call it; one alone has none to ask."""
        if self._accelerator.num_processes == 1 or step == self._agreed:
            return
        if found := differences_of_ranks(self._accelerator, _digests(pack())):
            ranks = sorted({difference.rank for difference in found})
            names = list(dict.fromkeys(difference.name for difference in found))
            is_minority = 2 * len(ranks) < self._accelerator.num_processes
            others = "the others" if is_minority else "the rest (which are wrong cannot be told)"
            before = "from the start" if self._agreed is None else f"all were alike at step {self._agreed}"
            raise TrainingFailed(
                f"rank {_listed(ranks)} differs from {others} at step {step}, in {_listed(names, _TENSORS_NAMED)}; {before}. "
                "Look for faulty hardware; the newest checkpoint is of a step where all were alike"
            )
        self._agreed = step


def _digests(state: Checkpoint) -> dict[str, str]:
    """A SHA-256 of each tensor of a packed state, and of the rest."""
    tensors = state.model | state.trainer
    found = {name: hashlib.sha256(tensor.cpu().contiguous().numpy().data).hexdigest() for name, tensor in tensors.items()}
    return found | {"progress": hashlib.sha256(repr(state.progress).encode()).hexdigest()}


def _listed(things: Sequence[object], most: int = 8) -> str:
    return ", ".join(map(str, things[:most])) + (", …" if len(things) > most else "")
