"""The embedded data set: 70,000 grey 28 x 28 images of the ten digits, made on the spot, so that nothing need be downloaded.

Each image is a digit of Pillow's own font with a random stroke width, seen through a random affine map and a random smooth
displacement. It is all integer arithmetic on derived randomness, so the images are the same wherever they are made.
"""

from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vae_dist.noise import Stream, derive_key, hashed_words

VERSION = 1  # part of the key: whoever changes the drawing makes a new data set
TRAIN_IMAGES, TEST_IMAGES = 60_000, 10_000

_BLOCK = 500  # images drawn at once: what a core's cache holds
_OVERSAMPLING = 4  # templates are drawn this much larger, then averaged down
_CONTROL_POINTS = 4  # of a smooth field, along each axis
_WORDS = 8 + 2 * _CONTROL_POINTS**2  # random words of one image

# Ranges of the random maps, in fixed point; each is drawn uniformly from ±range.
_MAP_ONE = 1 << 15
_STRETCH, _TILT, _SLANT = _MAP_ONE // 6, _MAP_ONE // 5, _MAP_ONE // 5
_PIXEL = 1 << 16


class Sizes(NamedTuple):
    """Of an image, in pixels unless it says otherwise."""

    side: int
    canvas: int  # side of a template
    font: int
    strokes: tuple[int, ...]  # drawn around the outline, oversampled pixels
    shift: int  # range of the random shift, in 1 / _PIXEL pixels
    displacement: int  # range at a control point, in 1 / _PIXEL pixels


GREY = Sizes(28, 36, 26, (0, 1, 2, 3, 5), 2 * _PIXEL, 8 * _PIXEL // 5)


def draw(start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Images start … stop-1 of the 70,000 as uint8 (n, 1, 28, 28), and their digits as int64 (n,)."""
    key = derive_key(VERSION, Stream.GLYPHS)
    templates = packed_templates(GREY)
    images = torch.empty(stop - start, 1, GREY.side, GREY.side, dtype=torch.uint8)
    digits = torch.empty(stop - start, dtype=torch.int64)
    for first in range(start, stop, _BLOCK):
        words = random_words(key, torch.arange(first, min(first + _BLOCK, stop)), _WORDS)
        block = slice(first - start, first - start + len(words))
        images[block, 0], digits[block] = shapes(templates, words, GREY)
    return images, digits


def random_words(key: int, indices: Tensor, words: int) -> Tensor:
    """Random integers of 32 bits, int64 (n, words)."""
    return hashed_words(key, indices, words) >> 32 & 0xFFFFFFFF


def shapes(templates: Tensor, words: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Random digits from packed templates and random words, (n, _WORDS): int32 (n, side, side) in 0 … 255, and which, (n,)."""
    digit, stroke = words[:, 0] * 10 >> 32, words[:, 1] * len(sizes.strokes) >> 32
    return _read(templates, digit * len(sizes.strokes) + stroke, *_positions(words[:, 2:], sizes), sizes.canvas), digit


def _positions(words: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Where in the template each pixel of each image lies: y and x as int32 (n, side, side), in units of 1 / _PIXEL pixels."""
    stretch_y, stretch_x = uniform(words[:, 0], _STRETCH), uniform(words[:, 1], _STRETCH)
    tilt, slant = uniform(words[:, 2], _TILT), uniform(words[:, 3], _SLANT)
    shift = uniform(words[:, 4:6], sizes.shift) + (sizes.canvas - 1) * _PIXEL // 2
    half_pixels = torch.arange(1 - sizes.side, sizes.side, 2, dtype=torch.int32)  # from the centre
    rows, columns = half_pixels[:, None], half_pixels[None, :]
    controls = uniform(words[:, 6:], sizes.displacement >> 8).view(-1, 2, _CONTROL_POINTS, _CONTROL_POINTS)
    moved = smooth(controls, sizes.side)
    y = (_MAP_ONE + stretch_y) * rows + tilt * columns + shift[:, 0, None, None] + moved[:, 0]
    x = (_MAP_ONE + stretch_x) * columns + (slant - tilt) * rows + shift[:, 1, None, None] + moved[:, 1]
    return y, x


def uniform(words: Tensor, radius: int) -> Tensor:
    """Integers in ±radius from random 32-bit words, int32; (n,) becomes (n, 1, 1) to broadcast over an image."""
    values = ((words * (2 * radius + 1) >> 32) - radius).int()
    return values[:, None, None] if values.ndim == 1 else values


def smooth(controls: Tensor, side: int) -> Tensor:
    """Smooth fields, int32 (…, side, side): 256 times the values at control points, int32 (…, points, points), and between."""
    cells = _CONTROL_POINTS - 1
    blend = torch.zeros(side, _CONTROL_POINTS, dtype=torch.int32)  # rows sum to 256
    for i in range(side):
        cell = min(i * cells // (side - 1), cells - 1)
        a, b = i * cells - cell * (side - 1), side - 1  # a / b of the way through the cell
        blend[i, cell + 1] = 256 * (3 * a * a * b - 2 * a * a * a) // b**3  # smoothstep
        blend[i, cell] = 256 - blend[i, cell + 1]
    return (blend @ controls @ blend.T) >> 8


def _read(templates: Tensor, template: Tensor, y: Tensor, x: Tensor, canvas: int) -> Tensor:
    """Bilinear samples, int32 of the shape of y and x, of packed templates at these positions."""
    side = canvas - 1
    y, x = y.clamp_(0, side * _PIXEL - 1), x.clamp_(0, side * _PIXEL - 1)
    cells = (y >> 16) * side + (x >> 16) + (template.int() * side * side)[:, None, None]
    four = templates[cells.view(-1)].view_as(cells)
    down, right = y >> 8 & 255, x >> 8 & 255
    upper = (four & 255) * (256 - right) + (four >> 8 & 255) * right
    lower = (four >> 16 & 255) * (256 - right) + (four >> 24 & 255) * right
    return (upper * (256 - down) + lower * down + (1 << 15)) >> 16


def packed_templates(sizes: Sizes) -> Tensor:
    """Every digit at every stroke width, as one int32 for each cell between four pixels, a byte each: one read fetches all."""
    pixels = torch.stack([_template(digit, stroke, sizes) for digit in "0123456789" for stroke in sizes.strokes]).int()
    upper, lower = pixels[:, :-1], pixels[:, 1:]
    corners = (upper[:, :, :-1], upper[:, :, 1:], lower[:, :, :-1], lower[:, :, 1:])
    return sum((corner << 8 * i for i, corner in enumerate(corners)), torch.zeros((), dtype=torch.int32)).view(-1)


def _template(digit: str, stroke: int, sizes: Sizes) -> Tensor:
    """One digit, drawn large and averaged down, as uint8 (canvas, canvas)."""
    canvas, side = sizes.canvas, sizes.canvas * _OVERSAMPLING
    picture = Image.new("L", (side, side))
    font = ImageFont.load_default(size=sizes.font * _OVERSAMPLING)
    ImageDraw.Draw(picture).text((side / 2, side / 2), digit, fill=255, font=font, anchor="mm", stroke_width=stroke)
    large = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int()
    blocks = large.view(canvas, _OVERSAMPLING, canvas, _OVERSAMPLING)
    return (blocks.sum(dim=(1, 3)) // _OVERSAMPLING**2).to(torch.uint8)
