"""The network and what is optimised."""

from dataclasses import dataclass
from typing import Literal

from vae_dist.config.checks import require

_FIELDS_OF_KINDS = {
    "hidden": ["mlp"],
    "activation": ["mlp", "conv"],
    "channels": ["conv", "resnet"],
    "halvings": ["conv", "resnet"],
    "latent": ["conv", "resnet"],
    "blocks": ["resnet"],
    "attention": ["resnet"],
    "recompute": ["resnet"],
}


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    kind: Literal["mlp", "conv", "resnet", "own"] = "mlp"
    """Architecture of encoder and decoder: fully connected, strided convolutions, or residual blocks with GroupNorm. `own` are
    the modules that a Python program hands to vae_dist.fit."""
    hidden: tuple[int, ...] = (400,)
    """Of mlp: widths of the encoder's hidden layers; the decoder has them in reverse."""
    latent_dim: int = 20
    """Dimensions of the latent."""
    activation: Literal["relu", "tanh", "silu"] = "relu"
    """Between the layers. resnet has silu always."""
    channels: int = 32
    """Of conv and resnet: maps of the first convolution; each halving after it doubles them, up to 8 times as many."""
    halvings: int | None = None
    """Of conv and resnet: how often the resolution is halved. None: until the images' shorter side is 4 to 7 pixels."""
    latent: Literal["vector", "spatial"] = "vector"
    """Of conv and resnet: a vector, or maps of the lowest resolution, of whose positions latent_dim must be a multiple."""
    blocks: int = 1
    """Of resnet: residual blocks at each resolution, in the encoder and in the decoder."""
    attention: int = 0
    """Of resnet: self-attention after each block where both sides are at most so many pixels. 0: nowhere."""
    recompute: bool = False
    """Of resnet: the backward pass computes each block again rather than keep it: the same bits, less memory, more time."""
    output_bias: Literal["random", "data"] = "random"
    """Start of the decoder's last bias: as the others, or the log-odds of the training images' mean: by pixel in mlp, else
    by channel."""
    likelihood: Literal["bernoulli", "continuous_bernoulli", "gaussian", "discretized_logistic", "own"] = "bernoulli"
    """p(x|z) of a pixel value. bernoulli is a log-likelihood only of images that `data.binarize` made black and white. `own` is
    that of kind own."""
    sigma: float | Literal["learned", "optimal"] = "learned"
    """Standard deviation of the gaussian, black being 0 and white 1: a number, learned, or each image's own best."""
    mixtures: int = 1
    """Components of the discretized logistic of a pixel value."""

    def __post_init__(self) -> None:
        require(all(width >= 1 for width in self.hidden), "--model.hidden", self.hidden, "widths of at least 1")
        require(self.latent_dim >= 1, "--model.latent_dim", self.latent_dim, "at least 1")
        require(self.channels >= 1, "--model.channels", self.channels, "at least 1")
        halvings = self.halvings
        require(halvings is None or halvings >= 1, "--model.halvings", halvings, "at least 1, or none")
        require(1 <= self.blocks <= 100, "--model.blocks", self.blocks, "at least 1, and at most 100")
        require(self.attention >= 0, "--model.attention", self.attention, "0 or more")
        for name, kinds in _FIELDS_OF_KINDS.items():
            value, default = getattr(self, name), getattr(ModelConfig, name)
            wanted = f"left out: it is for --model.kind {' and '.join(kinds)} alone"
            require(value == default or self.kind in kinds, f"--model.{name}", value, wanted)
        is_own, wanted = self.likelihood == "own", "own with --model.kind own, and only there"
        require(is_own == (self.kind == "own"), "--model.likelihood", self.likelihood, wanted)
        is_number = not isinstance(self.sigma, str)
        wanted = "a positive number, learned or optimal"
        require(not is_number or 0 < float(self.sigma) < float("inf"), "--model.sigma", self.sigma, wanted)
        is_logistic = self.likelihood == "discretized_logistic"
        wanted = "left out: only --model.likelihood gaussian has one"
        require(self.likelihood == "gaussian" or self.sigma == "learned", "--model.sigma", self.sigma, wanted)
        require(self.mixtures >= 1, "--model.mixtures", self.mixtures, "at least 1")
        wanted = "1: only --model.likelihood discretized_logistic has more"
        require(is_logistic or self.mixtures == 1, "--model.mixtures", self.mixtures, wanted)
        wanted = "random: the outputs of --model.likelihood discretized_logistic are no log-odds"
        require(not is_logistic or self.output_bias == "random", "--model.output_bias", self.output_bias, wanted)


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
        require(self.samples >= 1, "--objective.samples", self.samples, "at least 1")
        require(0 <= self.beta < float("inf"), "--objective.beta", self.beta, "a number of 0 or more")
        is_right = self.anneal_steps == 0 if self.anneal == "none" else self.anneal_steps >= 1
        wanted = "at least 1 where --objective.anneal is linear or cyclical, else 0"
        require(is_right, "--objective.anneal_steps", self.anneal_steps, wanted)
        require(self.anneal_cycles >= 1, "--objective.anneal_cycles", self.anneal_cycles, "at least 1")
        require(0 <= self.free_bits < float("inf"), "--objective.free_bits", self.free_bits, "a number of 0 or more")
        is_bound, wanted = self.kind == "iwae", "{}: --objective.kind iwae has no KL to weigh"
        require(not is_bound or self.beta == 1, "--objective.beta", self.beta, wanted.format(1))
        require(not is_bound or self.anneal == "none", "--objective.anneal", self.anneal, wanted.format("none"))
        require(not is_bound or self.free_bits == 0, "--objective.free_bits", self.free_bits, wanted.format(0))
        doubly, wanted = self.doubly_reparameterized, "false: it is a gradient of --objective.kind iwae"
        require(is_bound or not doubly, "--objective.doubly_reparameterized", doubly, wanted)
