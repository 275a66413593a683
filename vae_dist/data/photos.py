"""One picture file, of whatever kind and size, to the bytes of a square image."""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_FORMATS = ("JPEG", "PNG", "WEBP")  # whatever its name says, a file may hold
_MOST_PIXELS = 89_478_485  # that a picture has in memory, up to 2 GiB a thread; Pillow warns of bombs from there
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
        if not stat.S_ISREG(os.stat(file).st_mode):  # reading a pipe may wait for ever
            raise Unreadable("not a regular file")
        with Image.open(file, formats=_FORMATS) as picture:
            full = picture.size
            if how.crop is None:
                picture.draft(None, (_OVERSAMPLING * how.size,) * 2)
            _refuse_bombs(*(full if "progressive" in picture.info else picture.size))  # all of its scans are held
            ImageOps.exif_transpose(picture, in_place=True)  # otherwise it copies even what stands upright
            flat = _flat(picture, "L" if how.channels == 1 else "RGB")
        if how.crop is not None:
            flat = _middle(flat, how.crop)
        image = ImageOps.fit(flat, (how.size, how.size), Image.Resampling.LANCZOS)
        return b"".join(band.tobytes() for band in image.split())
    except OSError as error:
        raise Unreadable(error.strerror or str(error).replace(f" {str(file)!r}", "")) from None
    except Unreadable:
        raise
    except Exception as error:  # on foreign bytes a decoder raises anything, and one file must not end a job of millions
        raise Unreadable(str(error) or type(error).__name__) from None


@contextmanager
def many() -> Iterator[None]:
    """Around threads that decode: loads Pillow's plugins once, and silences its remarks on pictures that it reads anyway."""
    Image.init()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _refuse_bombs(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise Unreadable(f"{width} x {height} pixels are more than {_MOST_PIXELS:,}, the most that is decoded")


def _flat(picture: Image.Image, mode: str) -> Image.Image:
    """A picture in eight bits a channel, over white where it is transparent."""
    clear = picture.info.get("transparency")
    if picture.mode.startswith("I"):  # 16 bits of grey, which `convert` would cut off at 255
        deep = picture.convert("I")
        picture = deep.point(lambda grey: grey * (255 / 65535) + 0.5).convert("L")
        if picture.info.pop("transparency", None) is not None:  # one of 65,536 greys: of the 256 it would be another
            picture.paste(255, mask=Image.fromarray((np.asarray(deep) == clear).astype(np.uint8) * 255))
    elif isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits a channel, of which Pillow keeps the upper eight
        picture.info["transparency"] = tuple(value >> 8 for value in clear)
    if picture.has_transparency_data:
        ground = Image.new("RGBA", picture.size, "white")
        ground.alpha_composite(picture.convert("RGBA"))
        picture = ground
    return picture.convert("RGB").convert(mode) if picture.mode != mode else picture


def _middle(picture: Image.Image, side: int) -> Image.Image:
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))
