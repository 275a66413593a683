"""One picture file, of whatever kind and size, to the bytes of a square image."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_FORMATS = ("JPEG", "PNG", "WEBP")  # whatever its name says, a file may hold
_OVERSAMPLING = 2  # a JPEG is decoded at the least of its scales that leaves so many pixels for each one wanted


class Decoding(NamedTuple):
    """How pictures become images."""

    size: int  # the side of an image, pixels
    channels: int  # 1: grey, 3: red, green, blue
    crop: int | None = None  # first cut so large a square from the middle


class Unreadable(Exception):
    """A file that is no whole picture; the message says why, and not which."""


def decode(file: str | Path, how: Decoding) -> bytes:
    """A picture's middle square, resized, channel first: channels * size * size bytes. Raises Unreadable."""
    try:
        with Image.open(file, formats=_FORMATS) as picture:
            if how.crop is None:
                picture.draft(None, (_OVERSAMPLING * how.size,) * 2)
            flat = _flat(ImageOps.exif_transpose(picture), "L" if how.channels == 1 else "RGB")
        if how.crop is not None:
            flat = _middle(flat, how.crop)
        image = ImageOps.fit(flat, (how.size, how.size), Image.Resampling.LANCZOS)
        return b"".join(band.tobytes() for band in image.split())
    except OSError as error:
        raise Unreadable(error.strerror or str(error).replace(f" {str(file)!r}", "")) from None
    except Exception as error:  # on foreign bytes a decoder raises anything, and one file must not end a job of millions
        raise Unreadable(str(error) or type(error).__name__) from None


@contextmanager
def many() -> Iterator[None]:
    """Around threads that decode: loads Pillow's plugins once, and silences its remarks on pictures that it reads anyway."""
    Image.init()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _flat(picture: Image.Image, mode: str) -> Image.Image:
    """A picture in eight bits a channel, over white where it is transparent."""
    if picture.mode.startswith("I"):  # 16 bits of grey, which `convert` would cut off at 255
        picture = picture.convert("I").point(lambda grey: grey * (255 / 65535) + 0.5).convert("L")
    if picture.has_transparency_data:
        ground = Image.new("RGBA", picture.size, "white")
        ground.alpha_composite(picture.convert("RGBA"))
        picture = ground
    return picture.convert("RGB").convert(mode) if picture.mode != mode else picture


def _middle(picture: Image.Image, side: int) -> Image.Image:
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))
