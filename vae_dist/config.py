"""What a run is: frozen dataclasses.

A field's docstring is its help text. Values are checked where the config is made; every error names the flag.
"""

from dataclasses import dataclass, field
from typing import Literal

# Deterministic mode cuts every batch into so many shards: enough for a node of eight GPUs.
DETERMINISTIC_SHARDS = 8


class InputError(ValueError):
    """Bad configuration or data. Entry points print it once, without a traceback, and exit with status 2."""


class ImagesLost(RuntimeError):
    """Images that were there when a run began cannot be had any more. Only some ranks may find it."""


def _require(condition: bool, flag: str, value: object, wanted: str) -> None:
    if not condition:
        shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
        raise InputError(f"{flag} {shown}: must be {wanted}")


@dataclass(frozen=True)
class DataConfig:
    """Images and batches."""

    name: Literal["mnist", "fashion_mnist", "kmnist", "emnist", "cifar10", "celeba", "folder", "packed", "stream", "glyphs"] = (
        "mnist"
    )
    """Data set. `glyphs` is embedded; `folder` is any folder of JPEG, PNG and WebP pictures, `packed` one that
    `python -m vae_dist.pack` wrote, `stream` the same in a bucket; the others are read from `root`, or, but for celeba,
    downloaded to it where missing."""
    root: str = "data"
    """Folder of the data sets: torchvision's layout, or the raw files themselves (.gz or not); of `folder` and `packed`, that
    very folder; of `stream`, s3://bucket/prefix, or a folder whose files are to be read one after the other."""
    image_size: int | None = None
    """Of folder and celeba: the pictures' middle squares are resized to so many pixels a side. None: 64."""
    channels: Literal[1, 3] = 3
    """Of folder and celeba: 1 for grey, 3 for colour."""
    test_share: float = 0.1
    """Of folder, where its pictures are not in folders train and test (or val): the share for testing, drawn by file name, so
    that a new file moves no other."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """Of folder and celeba: what to do where files are no whole pictures. All are found, and listed, before any step."""
    cache_gb: float = 20.0
    """Of stream: disk space of a machine for fetched shards, 10^9 bytes, in the folder that LITDATA_CACHE_DIR names, if any."""
    batch_size: int = 128
    """Images of one optimizer step, over all processes (the global batch)."""
    binarize: Literal["none", "static", "dynamic"] = "none"
    """Black or white pixels, white with their grey value's probability: drawn once, or anew in each epoch of training."""
    flip: bool = False
    """Mirror training images left to right, half of them, drawn anew in each epoch."""
    shift: int = 0
    """Move training images by up to so many pixels along each axis, drawn anew in each epoch; their edges are repeated."""

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "test_share", "unreadable"):
            names, value = ("folder",) if name == "test_share" else ("folder", "celeba"), getattr(self, name)
            wanted = f"left out: only --data.name {' or '.join(names)} has it; the images of {self.name} are as they are"
            _require(self.name in names or value == getattr(type(self), name), f"--data.{name}", value, wanted)
        _require(self.image_size is None or self.image_size >= 1, "--data.image_size", self.image_size, "at least 1, or none")
        _require(0 < self.test_share < 1, "--data.test_share", self.test_share, "between 0 and 1")
        _require(0 < self.cache_gb < float("inf"), "--data.cache_gb", self.cache_gb, "a positive number")
        wanted = "left out: only --data.name stream has a cache of shards"
        _require(self.name == "stream" or self.cache_gb == type(self).cache_gb, "--data.cache_gb", self.cache_gb, wanted)
        _require(self.batch_size >= 1, "--data.batch_size", self.batch_size, "at least 1")
        _require(0 <= self.shift < 1 << 15, "--data.shift", self.shift, "0 or more pixels, as many as images may have")


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    kind: Literal["mlp"] = "mlp"
    """Architecture of encoder and decoder."""
    hidden: tuple[int, ...] = (400,)
    """Widths of the encoder's hidden layers; the decoder has them in reverse."""
    latent_dim: int = 20
    """Dimensions of the latent."""
    activation: Literal["relu", "tanh"] = "relu"
    """Between the layers."""
    output_bias: Literal["random", "data"] = "random"
    """Start of the decoder's last bias: random as torch has it, or the log-odds of the training images' mean, by pixel."""
    likelihood: Literal["bernoulli", "continuous_bernoulli", "gaussian", "discretized_logistic"] = "bernoulli"
    """p(x|z) of a pixel value. bernoulli is a log-likelihood only of images that `data.binarize` made black and white."""
    sigma: float | Literal["learned", "optimal"] = "learned"
    """Standard deviation of the gaussian, black being 0 and white 1: a number, learned, or each image's own best."""
    mixtures: int = 1
    """Components of the discretized logistic of a pixel value."""

    def __post_init__(self) -> None:
        _require(all(width >= 1 for width in self.hidden), "--model.hidden", self.hidden, "widths of at least 1")
        _require(self.latent_dim >= 1, "--model.latent_dim", self.latent_dim, "at least 1")
        is_number = not isinstance(self.sigma, str)
        wanted = "a positive number, learned or optimal"
        _require(not is_number or 0 < float(self.sigma) < float("inf"), "--model.sigma", self.sigma, wanted)
        is_logistic = self.likelihood == "discretized_logistic"
        wanted = "left out: only --model.likelihood gaussian has one"
        _require(self.likelihood == "gaussian" or self.sigma == "learned", "--model.sigma", self.sigma, wanted)
        _require(self.mixtures >= 1, "--model.mixtures", self.mixtures, "at least 1")
        wanted = "1: only --model.likelihood discretized_logistic has more"
        _require(is_logistic or self.mixtures == 1, "--model.mixtures", self.mixtures, wanted)
        wanted = "random: the outputs of --model.likelihood discretized_logistic are no log-odds"
        _require(not is_logistic or self.output_bias == "random", "--model.output_bias", self.output_bias, wanted)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised. The record has the true ELBO too, whatever is."""

    kind: Literal["elbo", "iwae"] = "elbo"
    """The evidence lower bound, or the importance-weighted one (Burda et al. 2016)."""
    samples: int = 1
    """Latents drawn for each image. The ELBO is averaged over them; the importance-weighted bound rises with them."""
    doubly_reparameterized: bool = False
    """Of iwae: the encoder's gradient of Tucker et al. 2018, which does not drown in noise when samples are many."""
    beta: float = 1.0
    """Weight of the KL (Higgins et al. 2017), after any annealing."""
    anneal: Literal["none", "linear", "cyclical"] = "none"
    """The KL's weight rises from 0: once (Bowman et al. 2016), or again and again (Fu et al. 2019)."""
    anneal_steps: int = 0
    """Optimizer steps of the linear rise, or of one cycle, in whose first half the weight rises."""
    anneal_cycles: int = 4
    """Cycles, after which the weight stays at `beta`."""
    free_bits: float = 0.0
    """Nats of KL that cost nothing (Kingma et al. 2016), of each image and dimension or group."""
    free_bits_per: Literal["dimension", "group"] = "dimension"
    """What has them to itself: each dimension of the latent, or all together (the network's one group)."""

    def __post_init__(self) -> None:
        _require(self.samples >= 1, "--objective.samples", self.samples, "at least 1")
        _require(0 <= self.beta < float("inf"), "--objective.beta", self.beta, "a number of 0 or more")
        is_right = self.anneal_steps == 0 if self.anneal == "none" else self.anneal_steps >= 1
        wanted = "at least 1 where --objective.anneal is linear or cyclical, else 0"
        _require(is_right, "--objective.anneal_steps", self.anneal_steps, wanted)
        _require(self.anneal_cycles >= 1, "--objective.anneal_cycles", self.anneal_cycles, "at least 1")
        _require(0 <= self.free_bits < float("inf"), "--objective.free_bits", self.free_bits, "a number of 0 or more")
        is_bound, wanted = self.kind == "iwae", "{}: --objective.kind iwae has no KL to weigh"
        _require(not is_bound or self.beta == 1, "--objective.beta", self.beta, wanted.format(1))
        _require(not is_bound or self.anneal == "none", "--objective.anneal", self.anneal, wanted.format("none"))
        _require(not is_bound or self.free_bits == 0, "--objective.free_bits", self.free_bits, wanted.format(0))
        doubly, wanted = self.doubly_reparameterized, "false: it is a gradient of --objective.kind iwae"
        _require(is_bound or not doubly, "--objective.doubly_reparameterized", str(doubly).lower(), wanted)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule, counted in optimizer steps."""

    kind: Literal["adam", "sgd"] = "adam"
    """Update rule. The gradient is that of a sum over the global batch, which matters to sgd."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's first and second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    schedule: Literal["constant", "linear", "cosine", "iwae"] = "constant"
    """Learning rate after warm-up: constant; falling to 0 at the end of the last epoch; or lr * 10^(-i/7) for 3^i epochs,
    i = 0 to 7, whatever `trainer.epochs` (iwae, as Burda et al. 2016)."""
    warmup_steps: int = 0
    """Steps over which the learning rate first rises linearly to its peak."""
    clip_norm: float | None = None
    """Largest L2 norm of the gradient of the summed loss; larger ones are scaled down to it."""

    def __post_init__(self) -> None:
        _require(0 < self.lr < float("inf"), "--optimizer.lr", self.lr, "a positive number")
        _require(all(0 <= b < 1 for b in self.betas), "--optimizer.betas", self.betas, "in [0, 1)")
        _require(0 < self.eps < float("inf"), "--optimizer.eps", self.eps, "a positive number")
        _require(self.warmup_steps >= 0, "--optimizer.warmup_steps", self.warmup_steps, "0 or more")
        clip = self.clip_norm
        _require(clip is None or 0 < clip < float("inf"), "--optimizer.clip_norm", clip, "a positive number, or none")


@dataclass(frozen=True)
class TrainerConfig:
    """The loop."""

    epochs: int = 10
    """Passes over the training images."""
    precision: Literal["fp32", "tf32", "fp16", "bf16"] = "fp32"
    """Arithmetic of the network in training; the loss and every evaluation are float32. fp16 and tf32 need a GPU."""
    cuda_graph: bool = True
    """On a GPU, record the step once and replay it, rather than launch its kernels one by one; not with fp16."""
    compile: bool = False
    """Fuse the network's and the loss's kernels with torch.compile: pays in long jobs, after some tens of seconds."""
    micro_batch_size: int | None = None
    """Images a process takes at once; its part of a batch is accumulated in several rounds if larger. None: all."""
    max_minutes: float | None = None
    """Stop after so many minutes of training, with a checkpoint and status 75, to be started again. None: no limit."""
    deterministic: bool = False
    """Weights that are the same to the last bit at any number of processes, and slower."""
    check_ranks_every: int | None = None
    """Steps between two comparisons of all processes' weights and optimizer state, bit by bit. None: before each save."""
    timeout_minutes: float = 10.0
    """How long a process waits for the others before the run fails. More than they may take to download the data set."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "--trainer.epochs", self.epochs, "at least 1")
        micro = self.micro_batch_size
        _require(micro is None or micro >= 1, "--trainer.micro_batch_size", micro, "at least 1, or none")
        limit = self.max_minutes
        _require(limit is None or limit > 0, "--trainer.max_minutes", limit, "a positive number, or none")
        every = self.check_ranks_every
        _require(every is None or every >= 1, "--trainer.check_ranks_every", every, "at least 1, or none")
        timeout = self.timeout_minutes
        _require(0 < timeout <= 525_600, "--trainer.timeout_minutes", timeout, "positive, and at most a year")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save. There is a checkpoint at every epoch's end in any case."""

    every_steps: int | None = None
    """Save every so many optimizer steps too."""
    keep: int = 3
    """Newest checkpoints to keep."""

    def __post_init__(self) -> None:
        every = self.every_steps
        _require(every is None or every >= 1, "--checkpoint.every_steps", every, "at least 1, or none")
        _require(self.keep >= 1, "--checkpoint.keep", self.keep, "at least 1")


@dataclass(frozen=True)
class TrackingConfig:
    """What is recorded, besides metrics.jsonl and the pictures."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; `auto` is online where a key is configured, else offline."""
    project: str = "vae_dist"
    """W&B project."""
    baseline: str | None = None
    """Folder of a run of the same job on one process: a run on several ends by telling how much faster it was."""
    log_every: int = 50
    """Optimizer steps between two points of the training curves."""

    def __post_init__(self) -> None:
        _require(self.log_every >= 1, "--tracking.log_every", self.log_every, "at least 1")


@dataclass(frozen=True)
class ExpectConfig:
    """What a recipe promises: `python -m vae_dist.verify FILE` holds it to that."""

    figure: Literal["loss", "nll"] = "loss"
    """Of the test images, in nats: the negative ELBO, or -log p(x) by importance sampling."""
    iw_samples: int = 5000
    """Latents of each image for nll."""
    low: float | None = None
    """The figure is at least this …"""
    high: float | None = None
    """… and at most this."""

    def __post_init__(self) -> None:
        _require(self.iw_samples >= 1, "--expect.iw_samples", self.iw_samples, "at least 1")
        is_band = self.low is None or self.high is None or self.low < self.high
        _require(is_band, "--expect.low", self.low, f"below --expect.high, {self.high}")


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
        _require(0 <= self.seed < 2**63, "--seed", self.seed, "in 0 … 2^63 - 1")
        micro, shard = self.trainer.micro_batch_size, deterministic_rows(self.data.batch_size)
        if self.trainer.deterministic and micro is not None and micro < shard:
            wanted = f"at least {shard} in deterministic mode, which takes 1/{DETERMINISTIC_SHARDS} of the batch at once"
            _require(False, "--trainer.micro_batch_size", micro, wanted)
        binarize, wanted = self.data.binarize, "none: only --model.likelihood bernoulli is one of black and white pixels"
        _require(binarize == "none" or self.model.likelihood == "bernoulli", "--data.binarize", binarize, wanted)


def deterministic_rows(batch_size: int) -> int:
    """Images of one shard of a batch in deterministic mode, at any number of processes."""
    return -(-batch_size // DETERMINISTIC_SHARDS)
