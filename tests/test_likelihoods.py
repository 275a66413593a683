"""Each likelihood against an independent float64 computation, by its gradients, and by what all its values sum to."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from scipy import integrate, optimize, stats
from scipy.special import logsumexp
from torch import Tensor

import vae_dist
from tests.helpers import Outcome, records
from vae_dist.config import ModelConfig
from vae_dist.likelihoods import (
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
    bits_per_dimension,
    build_likelihood,
    remark,
)
from vae_dist.model import build_model

Array = numpy.ndarray[Any, numpy.dtype[numpy.float64]]

Command = Callable[..., Outcome]
SHAPE = (2, 3, 5)  # channels, height, width
EVERY = {
    "bernoulli": Bernoulli(),
    "continuous_bernoulli": ContinuousBernoulli(),
    "gaussian, fixed": Gaussian(0.3),
    "gaussian, learned": Gaussian("learned"),
    "gaussian, optimal": Gaussian("optimal"),
    "discretized_logistic": DiscretizedLogistic(1),
    "discretized_logistic, mixture": DiscretizedLogistic(3),
}


def drawn(likelihood: Likelihood, images: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A decoder's output, and images of grey levels, black and white among them."""
    generator = torch.Generator().manual_seed(seed)
    decoded = 2 * torch.randn(images, likelihood.outputs * SHAPE[0], *SHAPE[1:], generator=generator)
    levels = torch.randint(-40, 296, (images, *SHAPE), generator=generator).clamp(0, 255)
    return decoded, levels / 255


def continuous_bernoulli(logits: Array, x: Array) -> Array:
    """The published formula, in lambda, where it is no quotient of zeros."""
    rate = 1 / (1 + numpy.exp(-logits))
    normaliser = 2 * numpy.arctanh(1 - 2 * rate) / (1 - 2 * rate)
    density: Array = numpy.log(normaliser) + x * numpy.log(rate) + (1 - x) * numpy.log(1 - rate)
    return density


def logistic_level(x: Array, location: Array, log_scale: Array) -> Array:
    """log P(level) from scipy's distribution functions, of -1 … 1; the larger of the two tails is never subtracted."""
    scale = numpy.exp(numpy.maximum(log_scale, -7))
    upper, lower = 2 * x - 1 + 1 / 255, 2 * x - 1 - 1 / 255
    logistic = stats.logistic(location, scale)
    inside = numpy.where(upper < location, logistic.cdf(upper) - logistic.cdf(lower), logistic.sf(lower) - logistic.sf(upper))
    found: Array = numpy.where(x == 0, logistic.logcdf(upper), numpy.where(x == 1, logistic.logsf(lower), numpy.log(inside)))
    return found


def reference(name: str, decoded: Tensor, images: Tensor) -> list[float]:
    """log p(x|z) of each image, by scipy in float64."""
    outputs, x = decoded.double().numpy(), images.double().numpy()
    mean = 1 / (1 + numpy.exp(-outputs[:, : SHAPE[0]]))
    if name == "bernoulli":
        terms = x * numpy.log(mean) + (1 - x) * numpy.log1p(-mean)
    elif name == "continuous_bernoulli":
        terms = continuous_bernoulli(outputs, x)
    elif name.startswith("gaussian"):
        sigma = {"fixed": 0.3, "learned": 1.0}.get(name.split()[-1], 0.0)
        root = sigma or numpy.sqrt(((x - mean) ** 2).mean((1, 2, 3), keepdims=True))
        terms = stats.norm.logpdf(x, mean, root)
    elif name == "discretized_logistic":
        terms = logistic_level(x, outputs[:, :2], outputs[:, 2:])
    else:
        parts = outputs.reshape(-1, 3, 3, *SHAPE)  # locations, log scales and logits of three components
        weights = parts[:, 2] - logsumexp(parts[:, 2], axis=1, keepdims=True)
        terms = logsumexp(weights + logistic_level(x[:, None], parts[:, 0], parts[:, 1]), axis=1)
    return list(terms.sum((1, 2, 3)))


@pytest.mark.parametrize("name", EVERY)
def test_log_prob_agrees_with_a_float64_reference(name: str) -> None:
    decoded, images = drawn(EVERY[name])
    found = EVERY[name].log_prob(decoded, images)
    assert (found.shape, found.dtype) == ((6,), torch.float32)
    expected = torch.tensor(reference(name, decoded, images))
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=0)
    exact = EVERY[name].double().log_prob(decoded.double(), images.double())
    EVERY[name].float()
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=0)  # images were rounded to float32


@pytest.mark.parametrize("name", EVERY)
def test_an_image_alone_has_the_same_figure_and_half_precision_is_upcast(name: str) -> None:
    decoded, images = drawn(EVERY[name])
    torch.testing.assert_close(
        EVERY[name].log_prob(decoded[2:3], images[2:3]), EVERY[name].log_prob(decoded, images)[2:3], rtol=1e-6, atol=0
    )
    half = decoded.bfloat16()
    assert torch.equal(EVERY[name].log_prob(half, images), EVERY[name].log_prob(half.float(), images))


@pytest.mark.parametrize("name", EVERY)
def test_gradients_agree_with_numerical_ones(name: str) -> None:
    likelihood = EVERY[name].double()
    decoded, images = (tensor.double() for tensor in drawn(likelihood, images=2))
    assert torch.autograd.gradcheck(lambda x: likelihood.log_prob(x, images), decoded.requires_grad_(), fast_mode=True)
    likelihood.float()


def values_of_a_pixel(likelihood: Likelihood, outputs: list[float], values: Tensor) -> Tensor:
    """The probability, or density, of each value of one pixel, float64."""
    decoded = torch.tensor(outputs, dtype=torch.float64).view(1, -1, 1, 1).expand(len(values), -1, 1, 1)
    return likelihood.log_prob(decoded, values.double().view(-1, 1, 1, 1)).exp().detach()


@pytest.mark.parametrize("scale", [-9.0, -7.0, -5.0, -2.0, 0.0, 3.0, 9.0])
@pytest.mark.parametrize("location", [-30.0, -1.0, -0.4, 0.1, 1.0, 1.3])
def test_levels_of_a_discretized_logistic_sum_to_one_and_have_its_mean(location: float, scale: float) -> None:
    levels = torch.arange(256) / 255.0
    one, several = DiscretizedLogistic(1), DiscretizedLogistic(2)
    mixture = [location, 0.5, scale, -3.0, 0.3, -0.4]  # locations, log scales, logits
    for likelihood, outputs in ((one, [location, scale]), (several, mixture)):
        probabilities = values_of_a_pixel(likelihood, outputs, levels)
        assert probabilities.sum().item() == pytest.approx(1, abs=2e-7), "levels are rounded to float32"
        mean = likelihood.mean(torch.tensor(outputs).view(1, -1, 1, 1)).item()
        assert mean == pytest.approx((probabilities * levels).sum().item(), abs=1e-5)


@pytest.mark.parametrize(
    "logit", [-60.0, -5.0, -1.0, -0.61, -0.59, -1e-3, -1e-8, 0.0, 1e-12, 2e-8, 0.01, 0.59, 0.61, 3.0, 25.0]
)
def test_a_continuous_bernoulli_integrates_to_one_and_has_its_mean(logit: float) -> None:
    likelihood = ContinuousBernoulli()
    nodes, weights = numpy.polynomial.legendre.leggauss(200)
    x, weight = torch.tensor(nodes / 2 + 0.5), torch.tensor(weights / 2)
    density = values_of_a_pixel(likelihood, [logit], x)
    assert (density * weight).sum().item() == pytest.approx(1, rel=1e-9)
    mean = likelihood.mean(torch.tensor([[logit]], dtype=torch.float64)).item()
    assert mean == pytest.approx((density * weight * x).sum().item(), rel=1e-9)


@pytest.mark.parametrize("likelihood", [Gaussian(0.2), Gaussian(1.7), Gaussian("learned")], ids=["0.2", "1.7", "learned"])
def test_a_gaussian_integrates_to_one(likelihood: Gaussian) -> None:
    likelihood.double()
    density: Callable[[float], float] = lambda x: values_of_a_pixel(likelihood, [0.4], torch.tensor([x])).item()  # noqa: E731
    total, _ = integrate.quad(density, -12, 13, points=[0.6], epsabs=1e-9)
    assert total == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("offset", [0.0, 1e-8, -1e-8, 1e-6, -1e-4, 1e-3])
def test_a_continuous_bernoulli_is_right_near_one_half(offset: float) -> None:
    """At lambda = 1/2 + offset, in float32: the value, and the gradient x - E[x], where the formula divides 0 by 0."""
    rate = 0.5 + offset
    logit = math.log(rate) - math.log1p(-rate)
    x = torch.tensor([[0.0], [0.3], [0.5], [1.0]])
    logits = torch.full((4, 1), logit, requires_grad=True)
    found = ContinuousBernoulli().log_prob(logits, x)
    found.sum().backward()
    squared = logit**2
    expected = math.log(2) + squared / 12 + x.double() * logit - math.log(2) - logit / 2 - squared / 8  # to fourth order
    torch.testing.assert_close(found.double(), expected.squeeze(1), rtol=0, atol=2e-7)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), x.double() - 0.5 - logit / 12, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", EVERY)
def test_extreme_outputs_give_finite_figures_and_gradients(name: str) -> None:
    likelihood = EVERY[name]
    _, images = drawn(likelihood)
    for size in (30.0, 1e4):
        decoded = (size * drawn(likelihood)[0].sign()).requires_grad_()
        if "logistic" in name:  # log scales of 10,000 are beyond any network
            decoded = decoded.detach().clamp(-80, 80).requires_grad_()
        figures = likelihood.log_prob(decoded, images)
        (gradient,) = torch.autograd.grad(figures.sum(), decoded)
        assert figures.isfinite().all()
        assert gradient.isfinite().all()
        assert likelihood.mean(decoded).isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_means_are_images(name: str) -> None:
    decoded, images = drawn(EVERY[name])
    mean = EVERY[name].mean(3 * decoded)
    assert mean.shape == images.shape
    assert 0 <= mean.min() < mean.max() <= 1


def test_the_optimal_sigma_is_the_best_of_all_for_each_image() -> None:
    likelihood = Gaussian("optimal")
    decoded, images = drawn(likelihood)
    best = likelihood.log_prob(decoded, images).double()
    for image in range(len(images)):
        shown = decoded[image : image + 1], images[image : image + 1]
        found = optimize.minimize_scalar(lambda sigma: -Gaussian(sigma).log_prob(*shown).item(), bounds=(0.01, 3))  # noqa: B023
        assert best[image].item() == pytest.approx(-found.fun, rel=1e-6)
    perfect = torch.logit(images.clamp(0.01, 0.99).double())
    assert likelihood.log_prob(perfect, torch.sigmoid(perfect)).isfinite().all(), "an image that is met exactly"


def test_a_learned_sigma_is_a_parameter_that_starts_at_one_and_the_default_model_has_none() -> None:
    config = ModelConfig(hidden=(5,), latent_dim=2, likelihood="gaussian")
    model = build_model(config, (1, 2, 3), seed=0)
    assert model.get_parameter("likelihood.log_sigma").item() == 0
    plain = build_model(ModelConfig(hidden=(5,), latent_dim=2), (1, 2, 3), seed=0).state_dict()
    assert all(name.startswith(("encoder.", "decoder.")) for name in plain)
    assert [name for name in model.state_dict() if name not in plain] == ["likelihood.log_sigma"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize(
    ("model", "binarize", "told"),
    [
        (ModelConfig(), "none", ", not a log-likelihood"),
        (ModelConfig(), "static", ", 0.2500 bits per dimension"),
        (ModelConfig(), "dynamic", ", 0.2500 bits per dimension"),
        (ModelConfig(likelihood="continuous_bernoulli"), "none", ""),
        (ModelConfig(likelihood="gaussian"), "none", ""),
        (ModelConfig(likelihood="gaussian", sigma="optimal"), "none", ", not a log-likelihood"),
        (ModelConfig(likelihood="discretized_logistic", mixtures=2), "none", ", 0.2500 bits per dimension"),
    ],
)
def test_figures_are_called_what_they_are(model: ModelConfig, binarize: str, told: str) -> None:
    likelihood, is_binary = build_likelihood(model), binarize != "none"
    nats = 0.25 * math.log(2) * 12
    assert remark(likelihood, is_binary, nats, (3, 2, 2)) == told
    assert bits_per_dimension(likelihood, is_binary, nats, (3, 2, 2)) == (pytest.approx(0.25) if "bits" in told else None)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(likelihood="discretized_logistic", mixtures=3, activation="tanh"),
        ModelConfig(likelihood="gaussian", sigma=0.1),
        ModelConfig(likelihood="continuous_bernoulli"),
    ],
)
def test_a_network_gives_what_its_likelihood_takes(config: ModelConfig) -> None:
    model = build_model(config, (3, 4, 4), seed=0)
    images = torch.rand(2, 3, 4, 4)
    output = model(images, torch.zeros(2, 20))
    assert output.decoded.shape == (2, 3 * model.likelihood.outputs, 4, 4)
    assert build_likelihood(config).log_prob(output.decoded, images).shape == (2,)
    assert model.sample(5).shape == (5, 3, 4, 4)


def test_a_learned_sigma_is_trained_saved_and_loaded(quick: list[object], command: Command, tmp_path: Path) -> None:
    options = [*quick, "--model.likelihood", "gaussian", "--optimizer.lr", 0.05, "--output", tmp_path]
    assert command("train", *options).status == 0
    assert vae_dist.load(tmp_path).get_parameter("likelihood.log_sigma").item() < -0.3
    outcome = command("evaluate", tmp_path)
    assert outcome.status == 0, outcome.err
    assert "nats (bce" in outcome.out, "a density: neither bits per dimension nor a warning"
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["loss"] == records(tmp_path)[-1]["loss"]
    assert found["is_log_likelihood"]
