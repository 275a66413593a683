"""The settings in which one process and several must agree."""

from typing import NamedTuple

from vae_dist.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrackingConfig, TrainerConfig


class Setting(NamedTuple):
    images: int  # of the training set
    config: Config
    as_recorded: bool = False  # with what a CUDA graph of the step would hold


def _setting(
    images: int, batch: int, optimizer: OptimizerConfig, micro: int | None = None, deterministic: bool = False
) -> Setting:
    trainer = TrainerConfig(epochs=1, micro_batch_size=micro, deterministic=deterministic)
    config = Config(
        data=DataConfig(batch_size=batch),
        model=ModelConfig(hidden=(30,), latent_dim=4),
        optimizer=optimizer,
        trainer=trainer,
        tracking=TrackingConfig(log_every=1),
    )
    return Setting(images, config)


_ADAM, _SGD = OptimizerConfig(), OptimizerConfig(kind="sgd", lr=1e-5)
_CLIPPED = OptimizerConfig(kind="sgd", lr=1e-3, clip_norm=20.0)

SETTINGS = {
    "adam": _setting(200, 20, _ADAM),
    "sgd": _setting(200, 20, _SGD),
    "sgd, clipped": _setting(200, 20, _CLIPPED),
    "adam, clipped": _setting(200, 20, OptimizerConfig(clip_norm=20.0)),
    "uneven batches and tail": _setting(191, 19, _SGD),
    "accumulated": _setting(191, 19, _CLIPPED, micro=2),
    "fewer images than processes": _setting(22, 2, _SGD),
    "one image a step": _setting(10, 1, _ADAM),
    "one step": _setting(3, 50, _SGD),
    "as recorded": _setting(191, 19, _CLIPPED, micro=2)._replace(as_recorded=True),
    "deterministic": _setting(191, 19, _ADAM, deterministic=True),  # seven shards
    "deterministic, clipped": _setting(200, 20, _CLIPPED, deterministic=True),
    "deterministic, one image a step": _setting(10, 1, _ADAM, deterministic=True),
}
