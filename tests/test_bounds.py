"""What is optimised in place of the ELBO: schedules of the KL's weight, free bits, importance-weighted bounds and gradients."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tests.helpers import Outcome, records
from vae_dist.config import ModelConfig, ObjectiveConfig
from vae_dist.model import VAE, build_model
from vae_dist.objective import Objective, Terms, kl_weight, negative_elbo

Command = Callable[..., Outcome]
SIGMA = 0.3
ENCODER, DECODER = ("encoder.1.weight", "encoder.1.bias"), ("decoder.0.weight", "decoder.0.bias")


@pytest.fixture
def model() -> VAE:
    """Linear in both directions, one latent, four pixels: small enough for integrals."""
    config = ModelConfig(hidden=(), latent_dim=1, likelihood="gaussian", sigma=SIGMA)
    vae = build_model(config, (1, 2, 2), seed=1).double()
    with torch.no_grad():
        vae.decoder.get_parameter("0.weight").mul_(4)  # a posterior that is not the prior
    return vae


IMAGES = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def terms(model: VAE, noise: Tensor, images: Tensor = IMAGES, **options: Any) -> Terms:
    return Objective(ObjectiveConfig(**options))(model.forward(images, noise), images, model.likelihood)


def drawn(samples: int, seed: int = 0, images: int = 3) -> Tensor:
    return torch.randn(images, samples, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_log_weights(w: dict[str, Tensor], x: Tensor, latents: Tensor, fixed_posterior: bool = False) -> Tensor:
    """log p(x|z) + log p(z) - log q(z|x) by torch.distributions, (batch, k)."""
    mean, logvar = (x.flatten(1) @ w["encoder.1.weight"].T + w["encoder.1.bias"]).unsqueeze(1).split(1, dim=2)
    if fixed_posterior:
        mean, logvar = mean.detach(), logvar.detach()
    p = torch.sigmoid(latents @ w["decoder.0.weight"].T + w["decoder.0.bias"])
    log_likelihood = Normal(p, SIGMA).log_prob(x.flatten(1).unsqueeze(1)).sum(2)
    log_prior, log_posterior = Normal(0.0, 1.0).log_prob(latents), Normal(mean, (logvar / 2).exp()).log_prob(latents)
    total: Tensor = log_likelihood + (log_prior - log_posterior).sum(2)
    return total


def reference_latents(w: dict[str, Tensor], x: Tensor, noise: Tensor) -> Tensor:
    mean, logvar = (x.flatten(1) @ w["encoder.1.weight"].T + w["encoder.1.bias"]).unsqueeze(1).split(1, dim=2)
    latents: Tensor = mean + (logvar / 2).exp() * noise
    return latents


def weights_of(model: VAE) -> dict[str, Tensor]:
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}


def gradient(model: VAE, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("samples", [1, 2, 7])
@pytest.mark.parametrize("doubly", [False, True])
def test_the_bound_agrees_with_a_reference(samples: int, doubly: bool, model: VAE) -> None:
    noise, w = drawn(samples), weights_of(model)
    found = terms(model, noise, kind="iwae", samples=samples, doubly_reparameterized=doubly)
    log_weights = reference_log_weights(w, IMAGES, reference_latents(w, IMAGES, noise))
    expected = log_weights.logsumexp(1) - math.log(samples)
    assert found.other is not None
    torch.testing.assert_close(-found.other, expected)
    if not doubly:
        wanted = torch.autograd.grad(-expected.sum(), list(w.values()))
        for a, b in zip(gradient(model, found.other.sum()).values(), wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_the_elbo_beside_the_bound_is_a_mean_over_the_samples(model: VAE) -> None:
    noise = drawn(5)
    each = [negative_elbo(model(IMAGES, noise[:, i]), IMAGES, model.likelihood) for i in range(5)]
    for kind in ("elbo", "iwae"):
        found = terms(model, noise, kind=kind, samples=5)
        torch.testing.assert_close(found.bce, torch.stack([one.bce for one in each]).mean(0))
        torch.testing.assert_close(found.kld, each[0].kld)


def test_with_one_sample_the_bound_is_the_elbo_with_a_sampled_kl(model: VAE) -> None:
    found = terms(model, drawn(1), kind="iwae", samples=1)
    w = weights_of(model)
    log_weights = reference_log_weights(w, IMAGES, reference_latents(w, IMAGES, drawn(1)))
    assert found.other is not None
    torch.testing.assert_close(found.other, -log_weights.squeeze(1))
    many = terms(model, drawn(1, images=300_000), IMAGES[:1].expand(300_000, -1, -1, -1), kind="iwae", samples=1)
    assert many.other is not None
    gap = (many.other - many.loss).detach()
    assert abs(gap.mean()) < 4 * gap.std() / 300_000**0.5, "in expectation the two are the same"


def log_evidence(model: VAE) -> Tensor:
    """log p(x) by quadrature over the prior."""
    nodes, weight = (torch.tensor(array) for array in numpy.polynomial.hermite_e.hermegauss(80))
    p = torch.sigmoid(model.decoder(nodes.unsqueeze(1)).flatten(1))
    log_likelihoods = Normal(p, SIGMA).log_prob(IMAGES.flatten(1).unsqueeze(1)).sum(2)
    return torch.logsumexp(log_likelihoods + (weight / math.sqrt(2 * math.pi)).log(), dim=1).detach()


@torch.no_grad()
def test_the_bound_rises_with_the_samples_from_the_elbo_to_log_p_of_x(model: VAE) -> None:
    """Burda et al. 2016, theorem 1: in expectation. Of each draw it lies above the mean log weight (Jensen)."""
    draws, bounds = 20_000, {}
    images = IMAGES.repeat_interleave(draws, 0)
    noise = drawn(32, images=len(images))
    for samples in (1, 2, 4, 8, 16, 32):
        found = terms(model, noise[:, :samples], images, kind="iwae", samples=samples)
        assert found.other is not None
        bounds[samples] = -found.other.view(3, draws).mean(1)
    values = list(bounds.values())
    assert all((higher > lower).all() for lower, higher in itertools.pairwise(values))
    assert (values[-1] < log_evidence(model) + 1e-3).all()
    assert (values[-1] > log_evidence(model) - 0.1).all()


def test_the_doubly_reparameterised_gradient_agrees_with_a_reference(model: VAE) -> None:
    """Tucker et al. 2018, sample by sample; the decoder's gradient is the usual one."""
    noise, w = drawn(5), weights_of(model)
    found = terms(model, noise, kind="iwae", samples=5, doubly_reparameterized=True)
    assert found.other is not None
    gradients = gradient(model, found.other.sum())
    latents = reference_latents(w, IMAGES, noise)
    leaf = latents.detach().requires_grad_()
    log_weights = reference_log_weights(w, IMAGES, leaf, fixed_posterior=True)
    normalised = log_weights.detach().softmax(1)
    (along,) = torch.autograd.grad(log_weights.sum(), leaf, retain_graph=True)
    encoder = torch.autograd.grad(latents, [w[name] for name in ENCODER], -normalised.square().unsqueeze(2) * along)
    decoder = torch.autograd.grad(-(normalised * log_weights).sum(), [w[name] for name in DECODER])
    for name, expected in zip((*ENCODER, *DECODER), (*encoder, *decoder), strict=True):
        torch.testing.assert_close(gradients[name], expected)


def test_with_one_sample_it_is_the_path_derivative(model: VAE) -> None:
    """Roeder et al. 2017, "sticking the landing": the ELBO's gradient without the score of q."""
    noise, w = drawn(1), weights_of(model)
    found = terms(model, noise, kind="iwae", samples=1, doubly_reparameterized=True)
    assert found.other is not None
    expected = reference_log_weights(w, IMAGES, reference_latents(w, IMAGES, noise), fixed_posterior=True)
    wanted = torch.autograd.grad(-expected.sum(), list(w.values()))
    for a, b in zip(gradient(model, found.other.sum()).values(), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_mixed_precision_lets_the_doubly_reparameterised_gradient_through() -> None:
    """The hook sits on the very latents that the decoder saw, though Accelerate remakes the output."""
    model = build_model(ModelConfig(hidden=(20,), latent_dim=3), (1, 5, 5), seed=0)
    images, noise = torch.rand(4, 1, 5, 5), torch.randn(4, 6, 3)

    def found(forward: Callable[..., Any], doubly: bool) -> Tensor:
        config = ObjectiveConfig(kind="iwae", samples=6, doubly_reparameterized=doubly)
        other = Objective(config)(forward(images, noise), images, model.likelihood).other
        assert other is not None
        return gradient(model, other.sum())["encoder.1.weight"]

    half = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    exact, plain = found(model, True), found(model, False)
    error = (found(half, True) - exact).norm()
    assert error < 0.1 * (plain - exact).norm()


def expected_gradient(model: VAE) -> Tensor:
    """Of the two-sample bound, without noise: by quadrature over both samples."""
    nodes, weight = (torch.tensor(array) for array in numpy.polynomial.hermite_e.hermegauss(40))
    noise = torch.cartesian_prod(nodes, nodes).unsqueeze(2)
    weights = torch.cartesian_prod(weight, weight).prod(1) / (2 * math.pi)
    w, images = weights_of(model), IMAGES[:1].expand(len(noise), -1, -1, -1)
    bounds = reference_log_weights(w, images, reference_latents(w, images, noise)).logsumexp(1) - math.log(2)
    return torch.cat([g.flatten() for g in torch.autograd.grad(-(weights * bounds).sum(), list(w.values()))])


def test_both_gradients_of_the_bound_have_the_same_expectation_and_the_doubly_has_less_noise(model: VAE) -> None:
    chunks, size = 40, 2000
    images = IMAGES[:1].expand(size, -1, -1, -1)
    expected, noise_of = expected_gradient(model), {}
    for doubly in (False, True):
        means = []
        for chunk in range(chunks):
            found = terms(
                model, drawn(2, seed=chunk, images=size), images, kind="iwae", samples=2, doubly_reparameterized=doubly
            )
            assert found.other is not None
            means.append(torch.cat([g.flatten() for g in gradient(model, found.other.mean()).values()]))
        found_mean, error = torch.stack(means).mean(0), torch.stack(means).std(0) / chunks**0.5
        assert ((found_mean - expected).abs() < 4.5 * error + 1e-9).all()
        assert (error < 0.05 * expected.norm()).all(), "the test sees something"
        noise_of[doubly] = error[:4].norm()  # of the encoder's weights for the mean
    assert noise_of[True] < noise_of[False]


def test_the_weight_of_the_kl_at_its_corners() -> None:
    def weights(steps: list[int], **options: Any) -> list[float]:
        return [kl_weight(ObjectiveConfig(**options), step) for step in steps]

    assert weights([0, 7], beta=3.0) == [3.0, 3.0]
    assert weights([0, 1, 5, 9, 10, 11, 10**9], anneal="linear", anneal_steps=10) == [0, 0.1, 0.5, 0.9, 1, 1, 1]
    assert weights([0, 5, 10], anneal="linear", anneal_steps=10, beta=4.0) == [0, 2, 4]
    assert weights([0, 1], anneal="linear", anneal_steps=1) == [0, 1]
    cycles: dict[str, Any] = {"anneal": "cyclical", "anneal_steps": 8, "anneal_cycles": 2}
    one = [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert weights(list(range(18)), **cycles) == [*one, *one, 1, 1]


@torch.no_grad()
def test_beta_and_annealing_weigh_the_kl_and_the_record_keeps_the_elbo(model: VAE) -> None:
    noise = drawn(1).squeeze(1)
    elbo = negative_elbo(model(IMAGES, noise), IMAGES, model.likelihood)
    objective = Objective(ObjectiveConfig(beta=4.0, anneal="linear", anneal_steps=8))
    for step, weight in ((0, 0.0), (2, 1.0), (8, 4.0), (20, 4.0)):
        objective.begin_step(step)
        found = objective(model(IMAGES, noise), IMAGES, model.likelihood)
        assert found.other is not None
        torch.testing.assert_close(found.other, elbo.bce + weight * elbo.kld)
        assert torch.equal(found.loss, elbo.loss)


def test_free_bits_are_each_images_own_and_cost_and_pull_nothing() -> None:
    mean = torch.tensor([[0.1, 2.0, 0.0], [1.0, 1.0, 0.2]], requires_grad=True)
    model = build_model(ModelConfig(hidden=(3,), latent_dim=3), (1, 2, 2), seed=0)
    images, logvar = torch.rand(2, 1, 2, 2), torch.zeros(2, 3)
    kl = kl_divergence(Normal(mean, torch.ones(2, 3)), Normal(torch.zeros(2, 3), torch.ones(2, 3))).detach()

    def penalty(**options: Any) -> Tensor:
        latents = mean.detach()
        output = model(images, latents)._replace(mean=mean, logvar=logvar, latents=latents)
        found = Objective(ObjectiveConfig(**options))(output, images, model.likelihood)
        assert found.other is not None
        return found.other - found.bce

    by_dimension = penalty(free_bits=0.4)
    torch.testing.assert_close(by_dimension, torch.where(kl < 0.4, 0.4, kl).sum(1))
    (pull,) = torch.autograd.grad(by_dimension.sum(), mean)
    assert torch.equal(pull, torch.where(kl < 0.4, 0.0, mean))
    as_group = penalty(free_bits=1.5, free_bits_per="group", beta=2.0)
    torch.testing.assert_close(as_group, 2 * torch.tensor([kl[0].sum().item(), 1.5]))
    (pull,) = torch.autograd.grad(as_group.sum(), mean)
    assert torch.equal(pull[1], torch.zeros(3))
    assert pull[0, 1] == 4.0


@pytest.mark.parametrize("options", [{}, {"samples": 3}, {"kind": "iwae", "samples": 3}, {"beta": 0.0}, {"free_bits": 0.1}])
def test_an_objective_asks_for_its_noise_and_says_how_many_columns_it_has(options: dict[str, Any], model: VAE) -> None:
    objective = Objective(ObjectiveConfig(**options))
    shape = objective.noise_shape(1)
    assert shape == ((options["samples"], 1) if "samples" in options else (1,))
    found = objective(model(IMAGES, torch.zeros(3, *shape).double()), IMAGES, model.likelihood)
    assert found.columns().shape == (objective.columns, 3)
    assert (objective.columns == 3) == ("kind" not in options and "beta" not in options and "free_bits" not in options)


RUNS: dict[str, list[object]] = {
    "iwae": ["--objective.kind", "iwae", "--objective.samples", 4, "--objective.doubly_reparameterized", "true"],
    "annealed": ["--objective.anneal", "cyclical", "--objective.anneal_steps", 6, "--objective.beta", 2],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_records_both_and_goes_on_as_if_it_had_not_stopped(
    name: str, quick: list[object], command: Command, tmp_path: Path
) -> None:
    options = [*quick, *RUNS[name], "--data.binarize", "dynamic", "--tracking.log_every", 1]
    for folder, epochs in (("whole", [2]), ("parts", [1, 2])):
        for n in epochs:
            outcome = command("train", *options, "--trainer.epochs", n, "--output", tmp_path / folder)
            assert outcome.status == 0, outcome.err
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "parts" / "model.safetensors").read_bytes()
    rows = [row for row in records(tmp_path / "whole") if row["split"] == "train"]
    assert rows == [row for row in records(tmp_path / "parts") if row["split"] == "train"]
    steps = [row for row in rows if row["step"] % 8]
    config = ObjectiveConfig(beta=2, anneal="cyclical", anneal_steps=6)
    for row in steps:
        if name == "annealed":
            expected = row["bce"] + kl_weight(config, row["step"] - 1) * row["kld"]
            assert row["objective"] == pytest.approx(expected, rel=1e-6)
        else:
            assert row["loss"] - 8 < row["objective"] < row["loss"], "the bound is tighter than the ELBO"
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_an_averaged_elbo_of_grey_levels_trains(quick: list[object], command: Command, tmp_path: Path) -> None:
    options = ["--objective.samples", 2, "--model.likelihood", "discretized_logistic", "--trainer.epochs", 1]
    outcome = command("train", *quick, *options, "--output", tmp_path)
    assert outcome.status == 0, outcome.err
    assert "bits per dimension (bce" in outcome.out
    train, _ = records(tmp_path)
    assert train["objective"] == train["loss"]
