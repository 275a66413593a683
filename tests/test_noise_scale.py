"""The gradient noise scale, from gradients whose mean and covariance are known."""

import torch

from vae_dist.noise_scale import NoiseScale


def estimate(images: list[int], steps: int, signal: float, noise: float, dim: int = 2000) -> float | None:
    """From ranks with so many images each; |G|^2 is `signal` and the trace of one image's covariance `noise`."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((dim,), (signal / dim) ** 0.5, dtype=torch.float64)
    scale = NoiseScale()
    for _ in range(steps):
        draws = [torch.randn(n, dim, generator=generator, dtype=torch.float64) * (noise / dim) ** 0.5 + mean for n in images]
        gradients = torch.stack([draw.sum(0) for draw in draws])
        squares = gradients.square().sum().item()
        scale.add(sum(images), sum(n * n for n in images), squares, gradients.sum(0).square().sum().item())
    return scale.images()


def test_the_estimate_is_the_true_scale_on_average_however_the_images_lie() -> None:
    for images in ([32, 32], [16, 16, 16, 16], [40, 23], [30, 20, 14, 0]):
        found = estimate(images, steps=60, signal=2.0, noise=80.0)
        assert found is not None
        assert 33 < found < 48, "40 images"


def test_it_is_unknown_where_nothing_can_be_told() -> None:
    assert NoiseScale().images() is None
    assert estimate([64], steps=10, signal=1.0, noise=10.0) is None, "one rank"
    assert estimate([64, 0], steps=10, signal=1.0, noise=10.0) is None, "all images on one rank"
    broken = NoiseScale()
    broken.add(64, 2048, float("nan"), 1.0)
    assert broken.images() is None
