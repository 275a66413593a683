"""How a run trains, saves and records."""

from dataclasses import dataclass
from typing import Literal

from vae_dist.config.checks import require


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule, counted in optimizer steps."""

    kind: Literal["adam", "adamw", "sgd"] = "adam"
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
    weight_decay: float = 0.0
    """Of adamw: in each step weights lose this share, times the learning rate; biases and scales do not (Loshchilov & Hutter
    2019)."""
    ema: float = 0.0
    """Decay of an average of the weights over steps, such as 0.999, after a warm-up; 0: none. Test figures, pictures and the
    final weights are then the average's."""

    def __post_init__(self) -> None:
        require(0 < self.lr < float("inf"), "--optimizer.lr", self.lr, "a positive number")
        require(all(0 <= b < 1 for b in self.betas), "--optimizer.betas", self.betas, "in [0, 1)")
        require(0 < self.eps < float("inf"), "--optimizer.eps", self.eps, "a positive number")
        require(self.warmup_steps >= 0, "--optimizer.warmup_steps", self.warmup_steps, "0 or more")
        clip = self.clip_norm
        require(clip is None or 0 < clip < float("inf"), "--optimizer.clip_norm", clip, "a positive number, or none")
        decay, wanted = self.weight_decay, "0: only --optimizer.kind adamw decays weights"
        require(0 <= decay < float("inf"), "--optimizer.weight_decay", decay, "a number of 0 or more")
        require(self.kind == "adamw" or decay == 0, "--optimizer.weight_decay", decay, wanted)
        require(0 <= self.ema < 1, "--optimizer.ema", self.ema, "in [0, 1); 0 is no average")


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
    """How long a process waits for the others before the run fails. More than they take to fetch the data set, or decode it."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "--trainer.epochs", self.epochs, "at least 1")
        micro = self.micro_batch_size
        require(micro is None or micro >= 1, "--trainer.micro_batch_size", micro, "at least 1, or none")
        limit = self.max_minutes
        require(limit is None or limit > 0, "--trainer.max_minutes", limit, "a positive number, or none")
        every = self.check_ranks_every
        require(every is None or every >= 1, "--trainer.check_ranks_every", every, "at least 1, or none")
        timeout = self.timeout_minutes
        require(0 < timeout <= 525_600, "--trainer.timeout_minutes", timeout, "positive, and at most a year")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save. There is a checkpoint at every epoch's end in any case."""

    every_steps: int | None = None
    """Save every so many optimizer steps too."""
    keep: int = 3
    """Newest checkpoints to keep."""

    def __post_init__(self) -> None:
        every = self.every_steps
        require(every is None or every >= 1, "--checkpoint.every_steps", every, "at least 1, or none")
        require(self.keep >= 1, "--checkpoint.keep", self.keep, "at least 1")


@dataclass(frozen=True)
class TrackingConfig:
    """What is recorded, besides metrics.jsonl and the pictures."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; `auto` is online where a key is configured, else offline."""
    project: str = "vae_dist"
    """W&B project."""
    group: str = ""
    """W&B group, under which runs lie together; empty: name of the config file, or of the data set."""
    artifact: bool = False
    """Give W&B the final model too, as an artifact."""
    baseline: str | None = None
    """Folder of a run of the same job on one process: a run on several ends by telling how much faster it was."""
    log_every: int = 50
    """Optimizer steps between two points of the training curves."""

    def __post_init__(self) -> None:
        require(self.log_every >= 1, "--tracking.log_every", self.log_every, "at least 1")


@dataclass(frozen=True)
class ExpectConfig:
    """What a recipe promises: `vae-dist verify FILE` holds it to that."""

    figure: Literal["loss", "nll"] = "loss"
    """Of the test images, in nats: the negative ELBO, or -log p(x) by importance sampling."""
    iw_samples: int = 5000
    """Latents of each image for nll."""
    low: float | None = None
    """The figure is at least this …"""
    high: float | None = None
    """… and at most this."""

    def __post_init__(self) -> None:
        require(self.iw_samples >= 1, "--expect.iw_samples", self.iw_samples, "at least 1")
        is_band = self.low is None or self.high is None or self.low < self.high
        require(is_band, "--expect.low", self.low, f"below --expect.high, {self.high}")
