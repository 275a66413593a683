"""Convolutional networks fit every image size, give each image a figure of its own, and train from the first step on."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vae_dist
from vae_dist.checkpoint import read_tensors
from vae_dist.config import Config, InputError, ModelConfig
from vae_dist.convolutions import BoundedLogvar, ChannelsLast
from vae_dist.data import glyphs
from vae_dist.data.images import Resident
from vae_dist.model import VAE, Output, build_model
from vae_dist.run import RunFolder

CONV = ModelConfig(kind="conv", channels=4, latent_dim=6)
RESNET = ModelConfig(kind="resnet", channels=4, latent_dim=6, attention=14)
SPATIAL = replace(RESNET, latent="spatial", latent_dim=98)
BOTH = pytest.mark.parametrize("config", [CONV, RESNET], ids=["conv", "resnet"])
ALL = pytest.mark.parametrize("config", [CONV, RESNET, SPATIAL], ids=["conv", "resnet", "spatial"])
GLYPHS = glyphs.draw(0, 32)[0].float() / 255


def shake(model: VAE) -> VAE:
    """Moves every weight a little, so that none is zero as it is in a new residual block."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def losses(model: VAE, images: Tensor) -> Tensor:
    """The negative ELBO of each image, with noise of its own, (batch,)."""
    noise = torch.randn(32, model.latent_dim, generator=torch.Generator().manual_seed(2))[: len(images)]
    output: Output = model(images, noise)
    kl = 0.5 * (output.mean**2 + output.logvar.exp() - 1 - output.logvar).sum(1)
    return kl - model.likelihood.log_prob(output.decoded, images)


def steps(model: VAE, n: int) -> list[float]:
    """Trains on the same images, and returns the losses in nats per image."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    seen = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = losses(model, GLYPHS).mean()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


@given(
    kind=st.sampled_from(["conv", "resnet"]),
    height=st.integers(28, 80),
    width=st.integers(28, 80),
    channels=st.integers(1, 4),
    halvings=st.none() | st.integers(1, 4),
    likelihood=st.sampled_from(["bernoulli", "discretized_logistic"]),
)
@settings(max_examples=30, deadline=None)
def test_every_size_comes_back_exactly(
    kind: Any, height: int, width: int, channels: int, halvings: int | None, likelihood: Any
) -> None:
    config = ModelConfig(kind=kind, channels=3, latent_dim=5, halvings=halvings, likelihood=likelihood)
    with torch.device("meta"):
        model = VAE.from_config(config, (channels, height, width))
        output = model(torch.empty(2, channels, height, width), torch.empty(2, 5))
    assert output.mean.shape == output.logvar.shape == output.latents.shape == (2, 5)
    assert output.decoded.shape == (2, model.likelihood.outputs * channels, height, width)


@pytest.mark.parametrize(
    ("size", "lowest"), [((28, 28), (7, 7)), ((32, 32), (4, 4)), ((63, 65), (7, 8)), ((29, 256), (7, 64)), ((256, 256), (4, 4))]
)
@BOTH
def test_by_default_the_shorter_side_ends_at_4_to_7_pixels(
    config: ModelConfig, size: tuple[int, int], lowest: tuple[int, int]
) -> None:
    with torch.device("meta"):
        model = VAE.from_config(replace(config, attention=0), (3, *size))
    unflatten = next(module for module in model.decoder.modules() if isinstance(module, nn.Unflatten))
    assert unflatten.unflattened_size[1:] == lowest


def test_widths_double_at_each_halving_up_to_eight_times() -> None:
    with torch.device("meta"):
        models = [VAE.from_config(replace(config, channels=2, attention=0), (1, 256, 256)) for config in (CONV, RESNET)]
    widths = [[m.out_channels for m in model.encoder.children() if isinstance(m, nn.Conv2d)] for model in models]
    assert widths == [[2, 4, 8, 16, 16, 16], [2, 4, 8, 16, 16, 16, 16]]


@ALL
def test_an_image_does_not_know_its_neighbours(config: ModelConfig) -> None:
    model = shake(build_model(config, (1, 28, 28), 0))
    noise = torch.randn(8, config.latent_dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        together = model(GLYPHS[:8], noise)
        alone = [model(GLYPHS[i : i + 1], noise[i : i + 1]) for i in range(8)]
    for i, name in enumerate(together._fields):
        singles = torch.cat([output[i] for output in alone])
        torch.testing.assert_close(together[i], singles, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (CONV, (1, 28, 28)),
        (replace(CONV, activation="silu"), (3, 64, 64)),
        (replace(CONV, activation="tanh"), (3, 64, 64)),
        (RESNET, (1, 28, 28)),
        (replace(RESNET, blocks=6), (3, 64, 64)),
    ],
)
def test_a_new_model_is_near_a_uniform_one(config: ModelConfig, shape: tuple[int, ...]) -> None:
    """However deep: each pixel costs hardly more than log 2, and the latents already tell images apart."""
    model = build_model(config, shape, 0)
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(images, torch.randn(4, config.latent_dim, generator=torch.Generator().manual_seed(1)))
    uniform = math.log(2) * images[0].numel()
    assert (-model.likelihood.log_prob(output.decoded, images)).tolist() == pytest.approx([uniform] * 4, rel=0.05)
    assert 0.01 < output.mean.std() < 1
    assert output.logvar.abs().max() < 2


def test_weights_are_a_function_of_the_seed() -> None:
    a, b, c = (build_model(RESNET, (1, 28, 28), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["encoder.0.weight"], c["encoder.0.weight"])


@ALL
def test_training_falls_at_once_and_reaches_every_weight(config: ModelConfig) -> None:
    model = build_model(config, (1, 28, 28), 0)
    seen = steps(model, 12)
    assert seen[-1] < 0.8 * seen[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def kept_bytes(model: VAE) -> int:
    """What autograd keeps of a forward pass, weights aside."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = losses(model, GLYPHS)
    assert alive.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_recomputing_gives_the_same_bits_in_less_memory(precision: torch.dtype) -> None:
    config = replace(RESNET, blocks=2)
    kept, again = (shake(build_model(replace(config, recompute=recompute), (1, 28, 28), 0)) for recompute in (False, True))
    for model in (kept, again):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = losses(model, GLYPHS).sum()
        loss.backward()
    for (name, a), b in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), name
    assert kept_bytes(again) < 0.5 * kept_bytes(kept)
    again.load_state_dict(kept.state_dict())


def test_log_variances_stay_within_bounds_and_are_left_alone_near_zero() -> None:
    """Smoothly: a clamped one would get no gradient."""
    x = torch.tensor([[-1e4, -30.0, -0.1, 0.0, 0.1, 30.0, 1e4]], dtype=torch.float64, requires_grad=True)
    mean, logvar = BoundedLogvar()(torch.cat([x, x], dim=1)).chunk(2, dim=1)
    assert torch.equal(mean, x)
    assert logvar.abs().max() <= 10
    assert logvar[0, [2, 4]].tolist() == pytest.approx([-0.1, 0.1], rel=1e-3)
    logvar.sum().backward()
    assert x.grad is not None
    assert x.grad[0, 1:-1].min() > 0.001
    assert BoundedLogvar()(x.detach().bfloat16().repeat(1, 2)).dtype == torch.float32


@ALL
def test_half_precision_is_finite(config: ModelConfig) -> None:
    model = shake(build_model(config, (1, 28, 28), 0))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(GLYPHS, torch.zeros(32, config.latent_dim))
    expected = model(GLYPHS, torch.zeros(32, config.latent_dim))
    assert output.decoded.dtype == torch.bfloat16
    assert output.logvar.dtype == torch.float32
    torch.testing.assert_close(output.decoded.float(), expected.decoded, rtol=0.1, atol=0.1)
    torch.testing.assert_close(output.logvar, expected.logvar, rtol=0.1, atol=0.1)


def test_a_place_in_spatial_latents_is_a_place_in_the_image() -> None:
    """Without attention a latent reaches its surroundings alone."""
    config = ModelConfig(kind="conv", channels=4, latent="spatial", latent_dim=4 * 49)
    model = build_model(config, (1, 28, 28), 0)
    assert model.encode(GLYPHS).mean.shape == (32, 4 * 49)
    latents = torch.zeros(2, 4, 7, 7)
    latents[1, :, 0, 0] = 3
    with torch.no_grad():
        dark, lit = model.decoder(latents.flatten(1))
    changed = (dark != lit)[0]
    assert changed[:4, :4].any()
    assert not changed[14:].any()
    assert not changed[:, 14:].any()


@pytest.mark.parametrize(
    ("config", "shape", "told"),
    [
        (replace(CONV, latent="spatial", latent_dim=20), (1, 28, 28), "--model.latent_dim 20: .* multiple of 49, such as 49"),
        (replace(RESNET, latent="spatial", latent_dim=50), (3, 64, 48), "--model.latent_dim 50: .* multiple of 48, such as 48"),
        (replace(CONV, halvings=5), (1, 28, 28), "--model.halvings 5: must be at most 4 for images of 28 x 28"),
        (replace(RESNET, attention=6), (1, 28, 28), "--model.attention 6: must be 0, or at least 7"),
    ],
)
def test_sizes_that_do_not_fit_the_images_are_refused(config: ModelConfig, shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        build_model(config, shape, 0)


def test_attention_is_only_where_both_sides_are_small() -> None:
    def found(attention: int) -> int:
        model = VAE.from_config(replace(RESNET, attention=attention), (1, 28, 60))  # 28 x 60, 14 x 30, 7 x 15
        return sum(type(module).__name__ == "SelfAttention" for module in model.modules())

    with torch.device("meta"):
        assert [found(side) for side in (0, 15, 29, 30, 60)] == [0, 2, 2, 4, 6]


@BOTH
def test_the_output_bias_starts_at_the_log_odds_of_each_channels_mean(config: ModelConfig) -> None:
    pixels = torch.randint(0, 256, (3000, 3, 28, 30), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pixels[:, 0] //= 4
    pixels[:, 2] = 0
    images = Resident(pixels)
    plain, moved = build_model(config, (3, 28, 30), 0), build_model(replace(config, output_bias="data"), (3, 28, 30), 0, images)
    (name, bias), others = list(moved.named_parameters())[-1], list(moved.named_parameters())[:-1]
    mean = (pixels.double().mean((0, 2, 3)) / 255).clamp(0.001, 0.999)
    assert name.endswith("bias")
    torch.testing.assert_close(bias.double().sigmoid(), mean, rtol=1e-5, atol=0)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in others)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_channels_innermost_in_half_precision_alone() -> None:
    x = torch.randn(2, 3, 4, 5, device="cuda")
    assert ChannelsLast()(x) is x
    assert ChannelsLast()(x.half()).is_contiguous(memory_format=torch.channels_last)


@ALL
def test_saved_weights_load_again(config: ModelConfig, tmp_path: Path) -> None:
    """Through a model on no device, and contiguous, whatever the layout of activations."""
    model = build_model(config, (1, 28, 28), 0)
    steps(model, 1)
    run = RunFolder(tmp_path / "run")
    (tmp_path / "run").mkdir()
    run.save_config(Config(model=config))
    run.save_model(Config(model=config), model)
    assert all(name.startswith(("encoder.", "decoder.")) for name in read_tensors(tmp_path / "run" / "model.safetensors"))
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert torch.equal(vae_dist.load(tmp_path / "run").sample(3), model.eval().sample(3))
