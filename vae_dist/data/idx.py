"""IDX files, the format of MNIST and its kin (http://yann.lecun.com/exdb/mnist): read in one go, checked to the last byte."""

import gzip
import zlib
from pathlib import Path

import torch
from torch import Tensor

from vae_dist.config import InputError

_UNSIGNED_BYTE = 8


def read_idx(file: Path, dimensions: int) -> Tensor:
    """The array of unsigned bytes in an IDX file, .gz or not, as uint8 with `dimensions` dimensions.

    Raises InputError, naming the file, where it cannot be read, is no such array, or has bytes too few or too many.
    """
    content = _read(file)
    magic = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    header = 4 + 4 * dimensions
    if len(content) >= 4 and content[:4] != magic:
        raise InputError(f"{file}: wrong magic number {content[:4].hex()}, expected {magic.hex()}; is it another file?")
    if len(content) < header:
        raise InputError(f"{file}: truncated: {len(content)} bytes are less than an IDX header; fetch the file again")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    size = 1
    for length in shape:
        size *= length
    if len(content) - header != size:
        state = "truncated" if len(content) - header < size else "corrupt"
        raise InputError(
            f"{file}: {state}: the header promises {size} bytes of data, there are {len(content) - header}; "
            "fetch the file again"
        )
    if size == 0:
        raise InputError(f"{file}: empty data set: its shape is {' x '.join(map(str, shape))}")
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).view(shape)


def idx_bytes(array: Tensor) -> bytes:
    """An array of unsigned bytes as the content of an IDX file."""
    header = bytes([0, 0, _UNSIGNED_BYTE, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    return header + array.contiguous().numpy().tobytes()


def _read(file: Path) -> bytearray:
    try:
        if file.suffix == ".gz":
            with gzip.open(file) as stream:
                return bytearray(stream.read())
        return bytearray(file.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{file}: truncated or corrupt: {error}; fetch the file again") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
