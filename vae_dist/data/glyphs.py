"""The embedded data set: 70,000 grey 28 x 28 images of the ten digits, made on the spot, so that nothing need be downloaded.

Each image is a digit of Pillow's own font with a random stroke width, seen through a random affine map and a random smooth
displacement. It is all integer arithmetic on derived randomness, so the images are the same wherever they are made.
"""

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vae_dist.noise import Stream, derive_key, hashed_words

VERSION = 1  # part of the key: whoever changes the drawing makes a new data set
TRAIN_IMAGES, TEST_IMAGES = 60_000, 10_000
SIZE = 28

_BLOCK = 500  # images drawn at once: what a core's cache holds
_CANVAS = 36  # side of a template, pixels
_OVERSAMPLING = 4  # templates are drawn this much larger, then averaged down
_FONT_SIZE = 26 * _OVERSAMPLING
_STROKES = (0, 1, 2, 3, 5)  # drawn around the outline, oversampled pixels
_CONTROL_POINTS = 4  # of the displacement, along each axis
_WORDS = 8 + 2 * _CONTROL_POINTS**2  # random words of one image

# Ranges of the random maps, in fixed point; each is drawn uniformly from ±range.
_MAP_ONE = 1 << 15
_STRETCH, _TILT, _SLANT = _MAP_ONE // 6, _MAP_ONE // 5, _MAP_ONE // 5
_PIXEL = 1 << 16
_SHIFT, _DISPLACEMENT = 2 * _PIXEL, 8 * _PIXEL // 5


def draw(start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Images start … stop-1 of the 70,000 as uint8 (n, 1, 28, 28), and their digits as int64 (n,)."""
    key = derive_key(VERSION, Stream.GLYPHS)
    templates = _packed_templates()
    images = torch.empty(stop - start, 1, SIZE, SIZE, dtype=torch.uint8)
    digits = torch.empty(stop - start, dtype=torch.int64)
    for first in range(start, stop, _BLOCK):
        indices = torch.arange(first, min(first + _BLOCK, stop))
        words = hashed_words(key, indices, _WORDS) >> 32 & 0xFFFFFFFF
        digit, stroke = words[:, 0] * 10 >> 32, words[:, 1] * len(_STROKES) >> 32
        block = slice(first - start, first - start + len(indices))
        digits[block] = digit
        images[block, 0] = _read(templates, digit * len(_STROKES) + stroke, *_positions(words[:, 2:]))
    return images, digits


def _positions(words: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the template each pixel of each image lies: y and x as int32 (n, 28, 28), in units of 1 / _PIXEL pixels."""
    stretch_y, stretch_x = _uniform(words[:, 0], _STRETCH), _uniform(words[:, 1], _STRETCH)
    tilt, slant = _uniform(words[:, 2], _TILT), _uniform(words[:, 3], _SLANT)
    shift = _uniform(words[:, 4:6], _SHIFT) + (_CANVAS - 1) * _PIXEL // 2
    half_pixels = torch.arange(1 - SIZE, SIZE, 2, dtype=torch.int32)  # from the centre
    rows, columns = half_pixels[:, None], half_pixels[None, :]
    moved = _displacement(words[:, 6:])
    y = (_MAP_ONE + stretch_y) * rows + tilt * columns + shift[:, 0, None, None] + moved[:, 0]
    x = (_MAP_ONE + stretch_x) * columns + (slant - tilt) * rows + shift[:, 1, None, None] + moved[:, 1]
    return y, x


def _uniform(words: Tensor, radius: int) -> Tensor:
    """Integers in ±radius from random 32-bit words, int32; (n,) becomes (n, 1, 1) to broadcast over an image."""
    values = ((words * (2 * radius + 1) >> 32) - radius).int()
    return values[:, None, None] if values.ndim == 1 else values


def _displacement(words: Tensor) -> Tensor:
    """A smooth displacement field for each image, int32 (n, 2, 28, 28): random at the control points, blended between."""
    cells = _CONTROL_POINTS - 1
    blend = torch.zeros(SIZE, _CONTROL_POINTS, dtype=torch.int32)  # rows sum to 256
    for i in range(SIZE):
        cell = min(i * cells // (SIZE - 1), cells - 1)
        a, b = i * cells - cell * (SIZE - 1), SIZE - 1  # a / b of the way through the cell
        blend[i, cell + 1] = 256 * (3 * a * a * b - 2 * a * a * a) // b**3  # smoothstep
        blend[i, cell] = 256 - blend[i, cell + 1]
    controls = _uniform(words, _DISPLACEMENT >> 8).view(-1, 2, _CONTROL_POINTS, _CONTROL_POINTS)
    return (blend @ controls @ blend.T) >> 8


def _read(templates: Tensor, template: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear samples, uint8 (n, 28, 28), of packed templates at positions y and x."""
    side = _CANVAS - 1
    y, x = y.clamp_(0, side * _PIXEL - 1), x.clamp_(0, side * _PIXEL - 1)
    cells = (y >> 16) * side + (x >> 16) + (template.int() * side * side)[:, None, None]
    four = templates[cells.view(-1)].view_as(cells)
    down, right = y >> 8 & 255, x >> 8 & 255
    upper = (four & 255) * (256 - right) + (four >> 8 & 255) * right
    lower = (four >> 16 & 255) * (256 - right) + (four >> 24 & 255) * right
    return (upper * (256 - down) + lower * down + (1 << 15)) >> 16


def _packed_templates() -> Tensor:
    """Every digit at every stroke width, as one int32 for each cell between four pixels, a byte each: one read fetches all."""
    pixels = torch.stack([_template(digit, stroke) for digit in "0123456789" for stroke in _STROKES]).int()
    upper, lower = pixels[:, :-1], pixels[:, 1:]
    corners = (upper[:, :, :-1], upper[:, :, 1:], lower[:, :, :-1], lower[:, :, 1:])
    return sum((corner << 8 * i for i, corner in enumerate(corners)), torch.zeros((), dtype=torch.int32)).view(-1)


def _template(digit: str, stroke: int) -> Tensor:
    """One digit, drawn large and averaged down, as uint8 (_CANVAS, _CANVAS)."""
    side = _CANVAS * _OVERSAMPLING
    canvas = Image.new("L", (side, side))
    font = ImageFont.load_default(size=_FONT_SIZE)
    ImageDraw.Draw(canvas).text((side / 2, side / 2), digit, fill=255, font=font, anchor="mm", stroke_width=stroke)
    large = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).int()
    blocks = large.view(_CANVAS, _OVERSAMPLING, _CANVAS, _OVERSAMPLING)
    return (blocks.sum(dim=(1, 3)) // _OVERSAMPLING**2).to(torch.uint8)
