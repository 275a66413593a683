"""The embedded digits in colour: 22,000 images of 64 x 64, a stand-in for photographs where there are none at hand.

A digit of `data.glyphs` in a random colour, before a smooth background of two others on which it casts a shadow, in light from
a random side. Integer arithmetic on derived randomness, as there.
"""

import torch
from torch import Tensor

from vae_dist.data.glyphs import Sizes, packed_templates, random_words, shapes, smooth, uniform
from vae_dist.noise import Stream, derive_key

VERSION = 1  # part of the key: whoever changes the drawing makes a new data set
TRAIN_IMAGES, TEST_IMAGES = 20_000, 2_000

_BLOCK = 100  # images drawn at once: what a core's cache holds
_PIXEL = 1 << 16
_SIZES = Sizes(64, 82, 58, (0, 3, 6, 9, 13), 6 * _PIXEL, 7 * _PIXEL // 2)
_SHAPE_WORDS, _FIELD_WORDS, _COLOUR_WORDS = 40, 16, 9
_SHADOW = (3, 2)  # pixels that it lies below and beside the digit
_DARKEST = 104  # of 256: the shadow where it is full
_LIGHT = 72  # of 256: range of the light, from the middle of the picture to its edge


def draw(start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Images start … stop-1 of the 22,000 as uint8 (n, 3, 64, 64), and their digits as int64 (n,)."""
    key = derive_key(VERSION, Stream.GLYPHS, _SIZES.side)
    templates = packed_templates(_SIZES)
    images = torch.empty(stop - start, 3, _SIZES.side, _SIZES.side, dtype=torch.uint8)
    digits = torch.empty(stop - start, dtype=torch.int64)
    for first in range(start, stop, _BLOCK):
        indices = torch.arange(first, min(first + _BLOCK, stop))
        words = random_words(key, indices, _SHAPE_WORDS + _FIELD_WORDS + _COLOUR_WORDS + 2)
        shape, field, colour, light = torch.split(words, [_SHAPE_WORDS, _FIELD_WORDS, _COLOUR_WORDS, 2], dim=1)
        block = slice(first - start, first - start + len(words))
        mask, digits[block] = shapes(templates, shape, _SIZES)
        images[block] = _paint(mask, field, (colour >> 24).int().view(-1, 3, 3, 1, 1), light)
    return images, digits


def _paint(mask: Tensor, field: Tensor, colours: Tensor, light: Tensor) -> Tensor:
    """Pictures, int32 (n, 3, 64, 64) in 0 … 255.

    The digit is where `mask`, (n, 64, 64) in 0 … 255, is high. `colours`, (n, 3, 3, 1, 1), are red, green and blue of the digit
    and of the background's two; `field`, (n, 16), and `light`, (n, 2), are random words.
    """
    controls = (field >> 24).int().view(-1, 4, 4)
    share = (smooth(controls, _SIZES.side) >> 8)[:, None]  # 0 … 255
    digit, one, other = colours.unbind(1)
    ground = one * (256 - share) + other * share >> 8
    shadow = torch.zeros_like(mask)
    down, right = _SHADOW
    shadow[:, down:, right:] = mask[:, :-down, :-right]
    ground = ground * (256 - (shadow[:, None] * _DARKEST >> 8)) >> 8
    # The digit is pale before dark colours and deep before pale ones: a random colour could be that of its background.
    brightness = (one + other).sum(1, keepdim=True) // 6
    digit = torch.where(brightness < 128, 255 - (digit * 5 >> 4), digit * 7 >> 4)
    mask = mask[:, None]
    scene = ground * (255 - mask) + digit * mask
    return ((scene * 257 >> 16) * _lit(light) >> 8).clamp_(max=255)  # 257 / 2^16: a 255th, without dividing


def _lit(light: Tensor) -> Tensor:
    """How bright the light is, int32 (n, 1, 64, 64) around 256: it falls off along a random direction."""
    steps = torch.arange(1 - _SIZES.side, _SIZES.side, 2, dtype=torch.int32)
    down, right = (uniform(word, _LIGHT) for word in light.unbind(1))
    return (256 + (down * steps[:, None] + right * steps[None, :]) // (2 * _SIZES.side))[:, None]
