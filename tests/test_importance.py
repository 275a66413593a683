"""log p(x) by importance sampling, and what the latents know: against closed forms and independent float64 computations."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import vae_dist
from tests.helpers import Outcome, everything, resident
from vae_dist import importance
from vae_dist.config import Config, ModelConfig
from vae_dist.data import as_images, glyphs
from vae_dist.data.images import Resident
from vae_dist.evaluate import evaluate
from vae_dist.importance import PartialFile, log_marginals
from vae_dist.likelihoods import Likelihood
from vae_dist.model import VAE, build_model
from vae_dist.noise import Stream, derive_key, normal
from vae_dist.objective import negative_elbo
from vae_dist.posterior import mutual_information
from vae_dist.run import RunFolder

Command = Callable[..., Outcome]
SIGMA = 0.3


class LinearGaussian(Likelihood):
    """N(x; decoded, SIGMA^2): with a linear decoder log p(x) is a closed form."""

    def log_prob(self, decoded: Tensor, images: Tensor) -> Tensor:
        error = ((images - decoded) / SIGMA).square()
        return -0.5 * (error + math.log(2 * math.pi * SIGMA**2)).flatten(1).sum(1)

    def mean(self, decoded: Tensor) -> Tensor:
        return decoded


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def linear() -> tuple[VAE, Tensor, Tensor]:
    """A linear-Gaussian VAE, 200 images of 4 x 3 pixels drawn from it, and their log p(x)."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(12, 2, generator=generator) * 0.2, torch.full((12,), 0.5)
    latents, noise = torch.randn(200, 2, generator=generator), torch.randn(200, 12, generator=generator)
    pixels = ((latents @ weight.T + bias + SIGMA * noise).clamp(0, 1) * 255).round().to(torch.uint8).view(200, 1, 4, 3)
    x = as_images(pixels).flatten(1).double()
    covariance = weight.double() @ weight.double().T + SIGMA**2 * torch.eye(12, dtype=torch.float64)
    log_p = MultivariateNormal(bias.double(), covariance).log_prob(x)
    model = VAE.from_config(ModelConfig(hidden=(), latent_dim=2), (1, 4, 3))
    model.likelihood = LinearGaussian()
    # A posterior that is near the true one, but not it: its mean is off, and it is too wide.
    precision = torch.eye(2) + weight.T @ weight / SIGMA**2
    gain = torch.linalg.solve(precision, weight.T) / SIGMA**2
    with torch.no_grad():
        model.decoder.get_parameter("0.weight").copy_(weight)
        model.decoder.get_parameter("0.bias").copy_(bias)
        model.encoder.get_parameter("1.weight").copy_(torch.cat([0.9 * gain, torch.zeros(2, 12)]))
        model.encoder.get_parameter("1.bias").copy_(torch.cat([-0.9 * gain @ bias, (1.3 / precision.diagonal()).log()]))
    return model, pixels, log_p


def estimate(model: VAE, pixels: Tensor, seed: int, samples: int, accelerator: Accelerator) -> Tensor:
    images = Resident(pixels)
    """Without a file."""
    return log_marginals(model, images, seed, samples, accelerator, PartialFile(None, Config(), model, images, samples))


def test_it_agrees_with_the_closed_form_of_a_linear_gaussian_model(
    linear: tuple[VAE, Tensor, Tensor], accelerator: Accelerator
) -> None:
    model, pixels, log_p = linear
    found = estimate(model, pixels, 0, 5000, accelerator)
    assert found.dtype == torch.float64
    # The error of an image's estimate is that of a mean of 5,000 weights: some hundredths at most.
    assert (found - log_p).abs().max() < 0.1
    assert (found - log_p).mean().abs() < 0.005


def test_more_samples_do_not_lower_it_and_one_is_the_elbo(linear: tuple[VAE, Tensor, Tensor], accelerator: Accelerator) -> None:
    model, pixels, log_p = linear
    means = [estimate(model, pixels, 0, k, accelerator).mean().item() for k in (1, 5, 50, 51, 500, 5000)]
    assert means == sorted(means)
    assert means[-1] <= log_p.mean().item() + 0.005
    elbo = evaluate(model, Resident(pixels), 0, accelerator)
    assert means[0] == pytest.approx(-elbo.sums.figures()["loss"], abs=5 * math.sqrt(2) * elbo.stderr)
    one = torch.cat([estimate(model, pixels, seed, 1, accelerator) for seed in range(30)])
    others = [-evaluate(model, Resident(pixels), seed, accelerator).sums.figures()["loss"] for seed in range(30)]
    assert one.mean().item() == pytest.approx(sum(others) / 30, abs=4 * one.std().item() / math.sqrt(len(one)))


def test_it_is_the_mean_weight_of_the_same_draws_in_float64(accelerator: Accelerator) -> None:
    model = build_model(ModelConfig(hidden=(30,), latent_dim=3), (1, 28, 28), 0)
    pixels, _ = glyphs.draw(0, 40)
    found = estimate(model, pixels, 7, 60, accelerator)
    blocks = [normal(derive_key(7, Stream.IMPORTANCE, block), torch.arange(40), 150).view(40, 50, 3) for block in (0, 1)]
    noise, images = torch.cat(blocks, dim=1)[:, :60].double(), as_images(pixels).double()
    double = model.double()
    mean, logvar = double.encode(images)
    q = Normal(mean.unsqueeze(1), (logvar / 2).exp().unsqueeze(1))
    z = q.loc + q.scale * noise
    p = torch.distributions.Bernoulli(logits=double.decoder(z.flatten(0, 1)).view(40, 60, -1), validate_args=False)
    log_weights = p.log_prob(images.view(40, 1, -1)).sum(2) + Normal(0.0, 1.0).log_prob(z).sum(2) - q.log_prob(z).sum(2)
    torch.testing.assert_close(found, log_weights.logsumexp(1) - math.log(60), rtol=1e-6, atol=1e-4)


def test_standard_errors_are_those_of_a_mean_over_images(finished: Path, command: Command) -> None:
    assert command("evaluate", finished, "--iw_samples", 7).status == 0
    found = json.loads((finished / "evaluation.json").read_text())
    config, model = RunFolder(finished).config(), vae_dist.load(finished)
    pixels = resident(config.data, train=False).pixels
    log_p = estimate(model, pixels, config.seed, 7, Accelerator(cpu=True))
    assert found["nll_stderr"] == pytest.approx(log_p.std(correction=0).item() / math.sqrt(300), rel=1e-9)
    images = as_images(pixels).double()
    draw = normal(derive_key(config.seed, Stream.EVALUATION), torch.arange(300), 20).double()
    with torch.no_grad():
        losses = negative_elbo(model.double()(images, draw), images, model.likelihood).loss
    assert found["stderr"] == pytest.approx(losses.std(correction=0).item() / math.sqrt(300), rel=5e-5)


def test_memory_does_not_grow_with_the_samples(accelerator: Accelerator) -> None:
    model = build_model(ModelConfig(hidden=(4,), latent_dim=2), (1, 28, 28), 0)
    rows: list[int] = []
    model.decoder.register_forward_hook(lambda _module, args, _output: rows.append(len(args[0])))
    estimate(model, glyphs.draw(0, 60)[0], 0, 1000, accelerator)
    assert max(rows) == min(rows) == importance._IMAGES * importance._MOST_SAMPLES
    assert len(rows) == 3 * 20


def test_an_end_in_the_middle_loses_nothing(accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "_SECONDS_BETWEEN_SAVES", 0.0)
    model = build_model(ModelConfig(hidden=(4,), latent_dim=2), (1, 28, 28), 0)
    pixels, _ = glyphs.draw(0, 130)
    whole = estimate(model, pixels, 0, 20, accelerator)
    file = tmp_path / "evaluation.safetensors"

    def partial(samples: int, **changes: Any) -> PartialFile:
        return PartialFile(file, Config(**changes), model, Resident(pixels), samples)

    def killed_at_75(images: int) -> None:
        told.append(images)
        if sum(told) > 75:
            raise KeyboardInterrupt

    told: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        log_marginals(model, Resident(pixels), 0, 20, accelerator, partial(20), killed_at_75)
    assert len(partial(20).read()) == 75
    again: list[int] = []
    found = log_marginals(model, Resident(pixels), 0, 20, accelerator, partial(20), again.append)
    assert again == [75, 25, 25, 5]
    assert torch.equal(found, whole)
    for other in (partial(20, seed=1), partial(21), partial(20, model=ModelConfig(activation="tanh"))):
        assert len(other.read()) == 0, "of another seed, other samples, another model"
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert len(partial(20).read()) == 0, "of another model"
    file.write_bytes(b"torn")
    assert len(partial(20).read()) == 0


def test_mutual_information_agrees_with_a_direct_computation(accelerator: Accelerator) -> None:
    model = build_model(ModelConfig(hidden=(30,), latent_dim=3), (1, 28, 28), 0)
    with torch.no_grad():
        model.encoder.get_parameter("3.weight").mul_(10)  # so that posteriors differ
    pixels, _ = glyphs.draw(0, 70)
    found, most = mutual_information(model, Resident(pixels), 3, accelerator)
    mean, logvar = (tensor.double() for tensor in model.encode(as_images(pixels)))
    noise = normal(derive_key(3, Stream.EVALUATION), torch.arange(70), 3).double()
    z = mean + (logvar / 2).exp() * noise
    log_q = torch.stack([Normal(m, (v / 2).exp()).log_prob(z).sum(1) for m, v in zip(mean, logvar, strict=True)], dim=1)
    expected = (log_q.diagonal() - (log_q.logsumexp(1) - math.log(70))).mean().item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert most == math.log(70)
    assert 0.1 < found < most


def test_active_units_are_those_whose_mean_moves(accelerator: Accelerator) -> None:
    model = build_model(ModelConfig(hidden=(30,), latent_dim=4), (1, 28, 28), 0)
    pixels, _ = glyphs.draw(0, 100)
    with torch.no_grad():
        model.encoder.get_parameter("3.weight").mul_(torch.tensor([100.0, 0, 100, 0.001, 1, 1, 1, 1]).unsqueeze(1))
    assert evaluate(model, Resident(pixels), 0, accelerator).active_units == 2


def test_of_fewer_images_than_eight_all_are_among_the_worst(accelerator: Accelerator) -> None:
    """And nothing else: a pass is filled up with the first image."""
    model = build_model(ModelConfig(hidden=(30,), latent_dim=4), (1, 28, 28), 0)
    pixels, _ = glyphs.draw(0, 3)
    for images in (pixels, pixels.flip(0)):
        found = evaluate(model, Resident(images), 0, accelerator)
        numbers, losses = zip(*found.worst, strict=True)
        assert sorted(numbers) == [0, 1, 2]
        assert list(losses) == sorted(losses, reverse=True)
        assert sum(losses) == pytest.approx(found.sums.bce + found.sums.kld)
        assert sum(found.mean_counts) == 3 * 4


def test_the_entry_point_tells_and_keeps_all(finished: Path, command: Command) -> None:
    outcome = command("evaluate", finished, "--iw_samples", 40)
    assert outcome.status == 0, outcome.err
    found = json.loads((finished / "evaluation.json").read_text())
    assert found["iw_samples"] == 40
    assert 0 < found["nll"] < found["loss"]
    assert found["nll_stderr"] > 0
    assert 0 < found["active_units"] <= 20 == len(found["kld_per_dim"])
    assert sum(found["kld_per_dim"]) == pytest.approx(found["kld"], rel=1e-6)
    assert f"{found['nll']:.4f}" in outcome.out
    assert "k=40, n=300" in outcome.out
    assert "not a log-likelihood" in outcome.out
    assert "ALARM" not in outcome.out
    assert not (finished / "evaluation.safetensors").exists()
    (finished / "evaluation.safetensors").write_bytes(b"of an evaluation that was cut off")
    before = everything(finished)
    few = command("evaluate", finished, "--images", 20)
    assert "n=20" in few.out
    assert everything(finished) == before
    assert command("evaluate", finished).status == 0
    assert (finished / "evaluation.safetensors").exists()
    for wrong in (["--iw_samples", -1], ["--images", 0]):
        outcome = command("evaluate", finished, *wrong)
        assert outcome.status == 2
        assert " ".join(map(str, wrong)) in outcome.err


def test_a_collapsed_posterior_is_an_alarm(finished: Path, command: Command) -> None:
    newest = finished / "checkpoints" / "step_00000016"
    model = vae_dist.load(newest)
    with torch.no_grad():
        model.encoder.get_parameter("3.weight").zero_()
    (finished / "model.safetensors").write_bytes(safetensors.torch.save(model.state_dict()))
    described = json.loads((finished / "config.json").read_text())
    described["sha256"] = hashlib.sha256((finished / "model.safetensors").read_bytes()).hexdigest()
    (finished / "config.json").write_text(json.dumps(described))
    outcome = command("evaluate", finished)
    assert "ALARM: the posterior has collapsed" in outcome.out
    assert json.loads((finished / "evaluation.json").read_text())["active_units"] == 0
