"""What a run is: frozen dataclasses.

A field's docstring is its help text. Values are checked where the config is made; every error names the flag.
"""

from dataclasses import dataclass, field

from vae_dist.config.checks import ImagesLost, InputError, missing_extra, require, require_types
from vae_dist.config.data import DataConfig
from vae_dist.config.model import ModelConfig, ObjectiveConfig
from vae_dist.config.training import CheckpointConfig, ExpectConfig, OptimizerConfig, TrackingConfig, TrainerConfig

__all__ = [
    "DETERMINISTIC_SHARDS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "ExpectConfig",
    "ImagesLost",
    "InputError",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "TrackingConfig",
    "TrainerConfig",
    "deterministic_rows",
    "missing_extra",
]

# Deterministic mode cuts every batch into so many shards: enough for a node of eight GPUs.
DETERMINISTIC_SHARDS = 8


@dataclass(frozen=True)
class Config:
    """A run. What it computes follows from these fields alone, at any number of processes."""

    output: str = ""
    """The run's folder; empty: runs/<name of the config file, or of the data set>. A run that lies there is continued."""
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint in the output folder; never; or a checkpoint to begin a new folder with."""
    seed: int = 0
    """The one seed."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    expect: ExpectConfig = field(default_factory=ExpectConfig)

    def __post_init__(self) -> None:
        require_types(self)
        require(0 <= self.seed < 2**63, "--seed", self.seed, "in 0 … 2^63 - 1")
        micro, shard = self.trainer.micro_batch_size, deterministic_rows(self.data.batch_size)
        if self.trainer.deterministic and micro is not None and micro < shard:
            wanted = f"at least {shard} in deterministic mode, which takes 1/{DETERMINISTIC_SHARDS} of the batch at once"
            require(False, "--trainer.micro_batch_size", micro, wanted)
        binarize, wanted = self.data.binarize, "none: only --model.likelihood bernoulli is one of black and white pixels"
        is_binary = self.model.likelihood in ("bernoulli", "own")
        require(binarize == "none" or is_binary, "--data.binarize", binarize, wanted)


def deterministic_rows(batch_size: int) -> int:
    """Images of one shard of a batch in deterministic mode, at any number of processes."""
    return -(-batch_size // DETERMINISTIC_SHARDS)
