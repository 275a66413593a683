"""Counter-based randomness: a permutation and normal noise that are functions of their keys, with no generator state.

Every number is hashed from (seed, stream, counters, index) by splitmix64 (Steele, Lea & Flood 2014), in int64 tensor
operations that are exact on every device. So an image gets the same noise whichever process, batch or restart asks for it.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_WORD = (1 << 64) - 1

# Hashes computed at once: large enough to hide the price of a kernel launch, small enough for a core's cache.
_BLOCK_HASHES = 40_960


class Stream(IntEnum):
    """What the randomness is for. Streams never share a number, whatever their counters are."""

    ORDER = 1
    TRAINING = 2
    EVALUATION = 3
    SAMPLES = 4
    GLYPHS = 5
    BINARY_TRAIN = 6
    BINARY_TEST = 7
    BINARY_EPOCH = 8
    IMPORTANCE = 9
    AUGMENTATION = 10


def derive_key(seed: int, stream: Stream, *counters: int) -> int:
    """Key (a 64-bit integer) of one purpose, for example `derive_key(seed, Stream.TRAINING, epoch)`."""
    key = 0
    for word in (seed, stream, *counters):
        key = _mix_int((key + _GOLDEN) ^ _mix_int(word + _GOLDEN))
    return key


def signed(key: int) -> int:
    """The int64 with the same 64 bits."""
    return key - (1 << 64) if key >> 63 else key


def hashed_words(key: int | Tensor, indices: Tensor, words: int) -> Tensor:
    """64 random bits, as int64 of shape (*indices.shape, words), for each index (int64) and word number.

    The key may lie on the device, as `signed` has it, int64 (): there it can change without a new kernel or graph.
    """
    scratch = torch.empty_like(indices)
    rows = _mix((indices + (signed(key) if isinstance(key, int) else key)).mul_(signed(_GOLDEN)), scratch)
    numbers = torch.arange(1, words + 1, device=indices.device) * signed(_GOLDEN)
    hashes = rows.unsqueeze(-1) + numbers
    return _mix(hashes, torch.empty_like(hashes))


def permutation(key: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of 0 … n-1 as int64 of shape (n,): the indices sorted by their hashes (which never collide)."""
    return hashed_words(key, torch.arange(n, device=device), 1).squeeze(-1).argsort()


def normal(key: int, indices: Tensor, dim: int) -> Tensor:
    """Standard normal noise, float32 of shape (*indices.shape, dim): row i depends on (key, indices[i], dim) alone.

    Box & Muller (1958) on pairs of 32-bit uniforms. The bits are the same on every device; `log`, `cos` and `sin` may
    differ between devices in the last digits. Drawing for thousands of indices in one call costs far less than row by row.
    """
    flat = indices.reshape(-1)
    noise = torch.empty(len(flat), dim, device=indices.device)
    pairs = (dim + 1) // 2
    rows = max(1, _BLOCK_HASHES // pairs)
    for start in range(0, len(flat), rows):
        noise[start : start + rows] = _box_muller(hashed_words(key, flat[start : start + rows], pairs))[:, :dim]
    return noise.reshape(*indices.shape, dim)


def uniform16(key: int | Tensor, indices: Tensor, dim: int) -> Tensor:
    """Uniform integers in 0 … 65535, int32 of shape (*indices.shape, dim): row i depends on (key, indices[i], dim) alone.

    Each hash is read as four; the lowest comes first on the little-endian machines that torch is built for.
    """
    hashes = hashed_words(key, indices, (dim + 3) // 4)
    return hashes.view(torch.int16)[..., :dim].to(torch.int32).bitwise_and_(0xFFFF)


def _box_muller(hashes: Tensor) -> Tensor:
    """(rows, pairs) hashes, which are overwritten, to (rows, 2 * pairs) normals."""
    angle = (hashes >> 32).float().mul_(math.pi * 2.0**-31)
    hashes.bitwise_and_(0xFFFFFFFF).add_(1)
    radius = hashes.float().mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    return torch.cat([torch.cos(angle).mul_(radius), torch.sin(angle).mul_(radius)], dim=-1)


def _mix(x: Tensor, scratch: Tensor) -> Tensor:
    """splitmix64's finalizer on int64, in place. `>>` is arithmetic in torch: the mask makes it a logical shift."""
    for round_, shift in enumerate(_SHIFTS):
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_((1 << (64 - shift)) - 1))
        if round_ < len(_MULTIPLIERS):
            x.mul_(signed(_MULTIPLIERS[round_]))
    return x


def _mix_int(x: int) -> int:
    """`_mix` on a Python integer, modulo 2^64."""
    x &= _WORD
    for round_, shift in enumerate(_SHIFTS):
        x ^= x >> shift
        if round_ < len(_MULTIPLIERS):
            x = x * _MULTIPLIERS[round_] & _WORD
    return x
