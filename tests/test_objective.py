"""BCE, KL and their sum against independent computations: float64 formulas, torch.distributions, numerical gradients."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Independent, Normal, kl_divergence

from vae_dist.config import ModelConfig
from vae_dist.likelihoods import Bernoulli
from vae_dist.model import Output, Posterior, build_model, reparameterize
from vae_dist.objective import Sums, kl_by_dimension, minimised, negative_elbo
from vae_dist.state import Progress

torch.manual_seed(0)
LOGITS, IMAGES = 4 * torch.randn(6, 1, 5, 7), torch.rand(6, 1, 5, 7)
MEAN, LOGVAR = 2 * torch.randn(6, 3), 2 * torch.randn(6, 3)


def reference_bce(logits: Tensor, images: Tensor) -> Tensor:
    """-sum x log p + (1 - x) log(1 - p), pixel by pixel in Python's float64."""

    def pixel(logit: float, x: float) -> float:
        log_p, log_not_p = -math.log1p(math.exp(-logit)), -math.log1p(math.exp(logit))
        return -(x * log_p + (1 - x) * log_not_p)

    rows = zip(logits.flatten(1).tolist(), images.flatten(1).tolist(), strict=True)
    return torch.tensor([sum(map(pixel, *row)) for row in rows], dtype=torch.float64)


def test_bce_agrees_with_a_float64_reference() -> None:
    bce = -Bernoulli().log_prob(LOGITS, IMAGES)
    torch.testing.assert_close(bce.double(), reference_bce(LOGITS, IMAGES), rtol=1e-6, atol=0)


def test_bce_agrees_with_torch_distributions_on_binary_images() -> None:
    binary = IMAGES.round()
    expected = Independent(TorchBernoulli(logits=LOGITS), 3).log_prob(binary)
    torch.testing.assert_close(Bernoulli().log_prob(LOGITS, binary), expected)


def test_bernoulli_sums_to_one_over_all_images() -> None:
    """Over the 2^6 binary images of six pixels."""
    every = torch.tensor([[(i >> bit) & 1 for bit in range(6)] for i in range(64)], dtype=torch.float32)
    total = Bernoulli().log_prob(LOGITS.flatten()[:6].expand(64, 6), every).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0))


@pytest.mark.parametrize("logit", [17.0, 40.0, 100.0])
def test_gradient_lives_at_extreme_logits(logit: float) -> None:
    """Where a sigmoid before the cross-entropy has lost it: the gradient of the BCE of a black pixel is p = 1."""
    logits = torch.tensor([[logit]], requires_grad=True)
    (-Bernoulli().log_prob(logits, torch.zeros(1, 1))).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.ones(1, 1))


def test_kl_agrees_with_torch_distributions() -> None:
    posterior, prior = Normal(MEAN, (0.5 * LOGVAR).exp()), Normal(torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(kl_by_dimension(MEAN, LOGVAR), kl_divergence(posterior, prior), rtol=1e-5, atol=1e-6)
    assert kl_by_dimension(torch.zeros(2, 3), torch.zeros(2, 3)).count_nonzero() == 0


def test_gradients_agree_with_numerical_ones() -> None:
    model = build_model(ModelConfig(hidden=(5,), latent_dim=2), (1, 2, 3), seed=0).double()
    torch.manual_seed(1)
    images, noise = torch.rand(4, 1, 2, 3).double(), torch.randn(4, 2).double()
    names, weights = zip(*model.named_parameters(), strict=True)

    def loss(*values: Tensor) -> Tensor:
        output = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (images, noise))
        return negative_elbo(output, images, model.likelihood).loss

    assert torch.autograd.gradcheck(loss, weights)


def test_reparameterized_latents_have_the_posteriors_moments() -> None:
    posterior = Posterior(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, math.log(4.0)]]))
    torch.testing.assert_close(reparameterize(posterior, torch.zeros(1, 2)), posterior.mean)
    torch.testing.assert_close(reparameterize(posterior, torch.ones(1, 2)), torch.tensor([[2.0, 0.0]]))


def test_terms_are_per_image_and_depend_on_that_image_alone() -> None:
    terms = negative_elbo(Output(LOGITS, MEAN, LOGVAR, MEAN), IMAGES, Bernoulli())
    assert terms.bce.shape == terms.kld.shape == terms.loss.shape == (6,)
    alone = negative_elbo(Output(LOGITS[2:3], MEAN[2:3], LOGVAR[2:3], MEAN[2:3]), IMAGES[2:3], Bernoulli())
    torch.testing.assert_close(terms.loss[2:3], alone.loss)


def test_loss_is_float32_under_autocast() -> None:
    model = build_model(ModelConfig(), (1, 28, 28), seed=0)
    images, noise = torch.rand(4, 1, 28, 28), torch.randn(4, 20)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, noise)
        assert output.decoded.dtype == torch.bfloat16
        terms = negative_elbo(output, images, model.likelihood)
    assert terms.bce.dtype == terms.kld.dtype == torch.float32


def test_sums_give_means_and_their_count() -> None:
    sums = Sums(bce=300.0, kld=60.0, images=3.0).plus(Sums(100.0, 40.0, 1.0))
    assert sums.figures() == {"n": 4, "loss": 125.0, "bce": 100.0, "kld": 25.0}
    assert sums.objective() == 125.0
    other = Sums.of_columns(300.0, 60.0, 3.0, 390.0).plus(Sums.of_columns(100.0, 40.0, 1.0, 90.0))
    assert (other.figures(), other.objective()) == (sums.figures(), 120.0)


def test_sums_saved_before_objectives_were_recorded_are_of_the_loss() -> None:
    old = {"step": 3, "images": 4, "epoch_sums": [300.0, 60.0, 3.0], "window_sums": [0.0, 0.0, 0.0]}
    assert Progress.from_json(old).epoch_sums.objective() == 120.0


def test_what_is_optimised_is_the_loss_unless_it_is_another_thing() -> None:
    terms = negative_elbo(Output(LOGITS, MEAN.clone().requires_grad_(), LOGVAR, MEAN), IMAGES, Bernoulli())
    assert torch.equal(minimised(terms.columns().sum(1)), terms.bce.sum() + terms.kld.sum())
    other = terms._replace(other=3 * terms.loss).columns().sum(1)
    assert torch.equal(minimised(other), (3 * terms.loss).sum())
    assert other[:3].tolist() == [terms.bce.sum().item(), terms.kld.sum().item(), 6.0]
