"""Pictures of every kind become images: upright, whole, in eight bits; and what is no whole picture is told, not guessed."""

import contextlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vae_dist.data.photos import Decoding, Unreadable, decode, many

Colour = tuple[int, int, int]
RED, WHITE, GREEN = (255, 0, 0), (255, 255, 255), (0, 255, 0)


def solid(mode: str, colour: Any) -> Image.Image:
    return Image.new(mode, (6, 6), colour)


def sixteen_bits(grey: int) -> Image.Image:
    return Image.fromarray(np.full((6, 6), grey, np.uint16))


def palette() -> Image.Image:
    image = solid("P", 1)
    image.putpalette([0, 0, 255, *RED])
    return image


def film() -> dict[str, object]:
    return {"save_all": True, "append_images": [solid("RGB", GREEN)]}


@pytest.mark.parametrize(
    ("suffix", "picture", "options", "expected"),
    [
        ("png", lambda: solid("RGB", RED), {}, RED),
        ("png", lambda: solid("L", 100), {}, (100, 100, 100)),
        ("png", lambda: solid("1", 1), {}, WHITE),
        ("png", palette, {}, RED),
        ("png", palette, {"transparency": 1}, WHITE),
        ("png", lambda: solid("LA", (0, 0)), {}, WHITE),
        ("png", lambda: solid("LA", (0, 128)), {}, (127, 127, 127)),
        ("png", lambda: solid("RGBA", (*RED, 0)), {}, WHITE),
        ("png", lambda: solid("RGBA", (*RED, 128)), {}, (255, 127, 127)),
        ("png", lambda: solid("RGB", RED), {"transparency": RED}, WHITE),
        ("png", lambda: solid("L", 100), {"transparency": 100}, WHITE),
        ("png", lambda: sixteen_bits(65535), {}, WHITE),
        ("png", lambda: sixteen_bits(100 * 257 + 128), {}, (100, 100, 100)),
        ("png", lambda: sixteen_bits(100 * 257 + 129), {}, (101, 101, 101)),
        ("png", lambda: solid("RGB", RED), film(), RED),
        ("jpg", lambda: solid("RGB", RED), {"quality": 95}, (254, 0, 0)),
        ("JPEG", lambda: solid("L", 100), {}, (100, 100, 100)),
        ("jpg", lambda: solid("CMYK", (0, 255, 255, 0)), {"quality": 95}, RED),
        ("webp", lambda: solid("RGB", RED), {"lossless": True}, RED),
        ("webp", lambda: solid("RGBA", (*RED, 0)), {"lossless": True}, WHITE),
        ("webp", lambda: solid("RGB", RED), {"lossless": True, **film()}, RED),
    ],
)
def test_every_kind_of_picture_has_its_colours(
    suffix: str, picture: Callable[[], Image.Image], options: dict[str, Any], expected: Colour, tmp_path: Path
) -> None:
    file = tmp_path / f"picture.{suffix}"
    picture().save(file, **options)
    red, green, blue = expected
    assert decode(file, Decoding(2, 3)) == bytes([red] * 4 + [green] * 4 + [blue] * 4)
    grey = decode(file, Decoding(2, 1))
    assert len(grey) == 4
    assert abs(grey[0] - (0.299 * red + 0.587 * green + 0.114 * blue)) <= 1


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (6, 1), (3, 2), (8, 3)])
def test_pictures_stand_as_the_camera_was_held(orientation: int, turns: int, tmp_path: Path) -> None:
    upright = np.arange(16, dtype=np.uint8).reshape(4, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.rot90(upright, turns)).save(tmp_path / "turned.png", exif=exif)
    assert decode(tmp_path / "turned.png", Decoding(4, 1)) == upright.tobytes()


@pytest.mark.parametrize("turned", [False, True])
def test_the_middle_square_is_taken(turned: bool, tmp_path: Path) -> None:
    wide = np.arange(48, dtype=np.uint8).reshape(4, 12)
    picture, middle = (wide.T, wide[:, 4:8].T) if turned else (wide, wide[:, 4:8])
    Image.fromarray(np.ascontiguousarray(picture)).save(tmp_path / "wide.png")
    assert decode(tmp_path / "wide.png", Decoding(4, 1)) == middle.tobytes()


def test_a_crop_comes_first(tmp_path: Path) -> None:
    picture = np.arange(63, dtype=np.uint8).reshape(7, 9)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    assert decode(tmp_path / "picture.png", Decoding(3, 1, crop=3)) == picture[2:5, 3:6].tobytes()


def test_a_crop_is_of_a_jpeg_in_its_full_size(tmp_path: Path) -> None:
    picture = Image.new("L", (64, 64), 255)
    picture.paste(0, (24, 24, 40, 40))
    picture.save(tmp_path / "picture.jpg", quality=100)
    assert max(decode(tmp_path / "picture.jpg", Decoding(4, 1, crop=16))) < 5


def test_a_large_jpeg_is_not_decoded_in_full_yet_looks_the_same(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 512).round().astype(np.uint8)
    picture = Image.fromarray(np.broadcast_to(ramp, (512, 512)).copy())
    picture.save(tmp_path / "large.jpg", quality=95)
    picture.save(tmp_path / "large.png")
    jpeg, png = (np.frombuffer(decode(tmp_path / f"large.{kind}", Decoding(16, 1)), np.uint8) for kind in ("jpg", "png"))
    assert np.abs(jpeg.astype(int) - png.astype(int)).max() <= 3


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file that claims to be so large, and holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def saved(suffix: str, tmp_path: Path) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    return (tmp_path / f"whole.{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("truncated.jpg", lambda at: saved("jpg", at)[:-300], "truncated"),
        ("truncated.png", lambda at: saved("png", at)[:-300], "truncated"),
        ("truncated.webp", lambda at: saved("webp", at)[:-300], "."),
        ("text.png", lambda at: b"Not found", "cannot identify image file"),
        ("empty.jpg", lambda at: b"", "cannot identify image file"),
        ("other.png", lambda at: saved("gif", at), "cannot identify image file"),
        ("bomb.png", lambda at: png_of_size(60_000, 60_000), "decompression bomb"),
        ("hollow.png", lambda at: png_of_size(6, 6), "."),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_what_is_no_whole_picture_is_unreadable(name: str, content: Callable[[Path], bytes], told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content(tmp_path))
    with pytest.raises(Unreadable, match=told) as error:
        decode(tmp_path / name, Decoding(4, 3))
    assert str(tmp_path) not in str(error.value), "whoever asked names the file"


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="No such file"):
        decode(tmp_path / "none.png", Decoding(4, 3))


@pytest.mark.parametrize("at", range(20, 140, 6))
def test_damage_in_a_file_is_survived_or_told(at: int, tmp_path: Path) -> None:
    """Whatever a decoder makes of foreign bytes, it is an image, or Unreadable, and no other error."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    solid("RGB", RED).save(tmp_path / "picture.jpg", exif=exif)
    content = bytearray((tmp_path / "picture.jpg").read_bytes())
    content[at : at + 3] = b"\xff\x00\x7f"
    (tmp_path / "picture.jpg").write_bytes(content)
    with many(), contextlib.suppress(Unreadable):
        assert len(decode(tmp_path / "picture.jpg", Decoding(4, 3))) == 48
