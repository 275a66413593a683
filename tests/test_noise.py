"""Noise and order are functions of their keys: the same numbers whoever asks, and good ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vae_dist.noise import Stream, derive_key, hashed_words, normal, permutation

KEY = derive_key(0, Stream.TRAINING, 1)


def test_hash_is_splitmix64() -> None:
    """The published generator's outputs for seed 1234567, which our double hash reaches with a known inner state."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    golden, word = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def splitmix64(state: int) -> int:
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
        return z ^ (z >> 31)

    assert [splitmix64(1234567 + (i + 1) * golden & word) for i in range(4)] == published
    inner = splitmix64((KEY + 5) * golden & word)
    expected = [splitmix64(inner + (i + 1) * golden & word) for i in range(3)]
    assert [x % 2**64 for x in hashed_words(KEY, torch.tensor([5]), 3)[0].tolist()] == expected


@given(st.lists(st.integers(-1, 2**40), min_size=1, max_size=50), st.integers(1, 33))
@settings(max_examples=30, deadline=None)
def test_noise_of_an_image_does_not_depend_on_its_neighbours(indices: list[int], dim: int) -> None:
    together = normal(KEY, torch.tensor(indices), dim)
    alone = torch.cat([normal(KEY, torch.tensor([index]), dim) for index in indices])
    assert torch.equal(together, alone)


def test_noise_is_the_same_in_any_shape_and_across_blocks() -> None:
    indices = torch.arange(12_000)
    whole = normal(KEY, indices, 20)
    assert torch.equal(normal(KEY, indices.view(3, 40, 100), 20).view(12_000, 20), whole)
    assert torch.equal(normal(KEY, indices[5000:5100], 20), whole[5000:5100])
    assert torch.equal(normal(KEY, indices.flip(0), 20), whole.flip(0))


def test_noise_has_the_moments_of_a_standard_normal() -> None:
    noise = normal(KEY, torch.arange(200_000), 10).double()
    n = noise.numel()
    assert abs(noise.mean()) < 4 / n**0.5
    assert abs(noise.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((noise**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((noise**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert torch.isfinite(noise).all()
    assert noise.abs().max() > 4.5


@pytest.mark.parametrize("column", [0, 1, 19])
def test_noise_passes_kolmogorov_smirnov(column: int) -> None:
    noise = normal(KEY, torch.arange(100_000), 20)[:, column]
    assert stats.kstest(noise.tolist(), "norm").pvalue > 1e-3


def test_noise_is_independent_across_keys_images_and_dimensions() -> None:
    images = torch.arange(20_000)
    draws = [normal(derive_key(seed, stream, epoch), images, 4) for seed, stream, epoch in _NEIGHBOURS]
    columns = torch.cat([*draws, draws[0].roll(1, dims=0)], dim=1).double()
    correlation = torch.corrcoef(columns.T) - torch.eye(columns.shape[1], dtype=torch.float64)
    assert correlation.abs().max() < 5 / len(images) ** 0.5
    squares = torch.corrcoef(columns.T.square()) - torch.eye(columns.shape[1], dtype=torch.float64)
    assert squares.abs().max() < 5 / len(images) ** 0.5


_NEIGHBOURS = [
    (0, Stream.TRAINING, 1),
    (0, Stream.TRAINING, 2),
    (1, Stream.TRAINING, 1),
    (2, Stream.TRAINING, 1),
    (0, Stream.EVALUATION, 1),
]


def test_keys_differ_wherever_anything_differs() -> None:
    keys = [derive_key(seed, stream, epoch) for seed in range(20) for stream in Stream for epoch in range(20)]
    keys += [derive_key(seed, stream) for seed in range(20) for stream in Stream]
    assert len(set(keys)) == len(keys)


@given(st.integers(0, 2**63 - 1), st.integers(1, 3000))
@settings(max_examples=30, deadline=None)
def test_permutation_holds_each_index_once(seed: int, n: int) -> None:
    order = permutation(derive_key(seed, Stream.ORDER, 1), n)
    assert torch.equal(order.sort().values, torch.arange(n))


def test_permutations_are_uniform() -> None:
    """Each of the six orders of three things, over 6,000 keys: chi-square with five degrees of freedom."""
    orders = [tuple(permutation(derive_key(0, Stream.ORDER, epoch), 3).tolist()) for epoch in range(6000)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3
