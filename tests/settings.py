"""The settings in which one process and several must agree."""

from dataclasses import replace
from typing import Literal, NamedTuple

from vae_dist.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TrackingConfig, TrainerConfig

_SMALL, _ELBO = ModelConfig(hidden=(30,), latent_dim=4), ObjectiveConfig()


class Setting(NamedTuple):
    images: int  # of the training set
    config: Config
    as_recorded: bool = False  # with what a CUDA graph of the step would hold


def _setting(
    images: int,
    batch: int,
    optimizer: OptimizerConfig,
    micro: int | None = None,
    deterministic: bool = False,
    model: ModelConfig = _SMALL,
    objective: ObjectiveConfig = _ELBO,
    binarize: Literal["none", "dynamic"] = "none",
) -> Setting:
    trainer = TrainerConfig(epochs=1, micro_batch_size=micro, deterministic=deterministic)
    config = Config(
        data=DataConfig(batch_size=batch, binarize=binarize),
        model=model,
        objective=objective,
        optimizer=optimizer,
        trainer=trainer,
        tracking=TrackingConfig(log_every=1),
    )
    return Setting(images, config)


_ADAM, _SGD = OptimizerConfig(), OptimizerConfig(kind="sgd", lr=1e-5)
_CLIPPED = OptimizerConfig(kind="sgd", lr=1e-3, clip_norm=20.0)
_DECAYED = OptimizerConfig(kind="adamw", weight_decay=0.1, ema=0.99)
_DOUBLY = ObjectiveConfig(kind="iwae", samples=3, doubly_reparameterized=True)
_FREE_BITS = ObjectiveConfig(beta=2.0, anneal="linear", anneal_steps=5, free_bits=0.1)
_SIGMA = replace(_SMALL, likelihood="gaussian")
_CONV = ModelConfig(kind="conv", channels=4, latent_dim=4)
_RESNET = ModelConfig(kind="resnet", channels=4, attention=14, recompute=True, latent="spatial", latent_dim=49)

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
    "doubly reparameterised, accumulated, binarised": _setting(191, 19, _SGD, micro=2, objective=_DOUBLY, binarize="dynamic"),
    "learned sigma, annealed, free bits": _setting(191, 19, _ADAM, model=_SIGMA, objective=_FREE_BITS),
    "adamw, averaged": _setting(191, 19, _DECAYED, micro=2),
    "conv, accumulated": _setting(191, 19, _CLIPPED, micro=2, model=_CONV),
    "deterministic": _setting(191, 19, _ADAM, deterministic=True),  # seven shards
    "deterministic, clipped": _setting(200, 20, _CLIPPED, deterministic=True),
    "deterministic, doubly reparameterised, binarised": _setting(
        191, 19, _ADAM, deterministic=True, objective=_DOUBLY, binarize="dynamic"
    ),
    "deterministic, adamw, averaged": _setting(191, 19, _DECAYED, deterministic=True),
    "deterministic, resnet with attention": _setting(191, 19, _ADAM, deterministic=True, model=_RESNET),
    "deterministic, one image a step": _setting(10, 1, _ADAM, deterministic=True),
}
