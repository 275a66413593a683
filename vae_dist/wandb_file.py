"""The file that W&B keeps of a run on the disk, read back: what was logged before a crash need not be what it holds.

LevelDB's log format (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind a header of seven bytes; the records
are W&B's protocol buffers.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_FILE_HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
_BLOCK = 32 * 1024
_PART = struct.Struct("<IHB")  # checksum, length, kind
_WHOLE, _FIRST, _LAST = 1, 2, 4


def records(file: Path) -> Iterator[Any]:
    """The records (wandb_internal_pb2.Record) of a .wandb file, up to where a crash cut it off."""
    from wandb.proto import wandb_internal_pb2  # costs a second: only where it is used

    for content in _contents(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # made at import
        record.ParseFromString(content)
        yield record


class Earlier(NamedTuple):
    """What W&B's files know of a run."""

    step: int  # the last optimizer step; 0 where there is none
    tags: list[str]


def earlier(folder: Path) -> Earlier:
    """From the files of all W&B runs below a folder, online ones too."""
    step, tags = 0, dict[str, None]()
    for file in sorted(folder.glob("*run-*/*.wandb")):
        for record in records(file):
            if record.HasField("history"):
                step = max(step, record.history.step.num)
            if record.HasField("run"):
                tags |= dict.fromkeys(record.run.tags)
    return Earlier(step, list(tags))


def _contents(log: bytes) -> Iterator[bytes]:
    """What the parts of a log join to; it ends at the first part that is torn."""
    position, joined = len(_FILE_HEADER), b""
    if log[:position] != _FILE_HEADER:
        return
    while position + _PART.size <= len(log):
        if _BLOCK - position % _BLOCK < _PART.size:  # no room for another part in this block
            position += _BLOCK - position % _BLOCK
            continue
        checksum, length, kind = _PART.unpack_from(log, position)
        part = log[position + _PART.size : position + _PART.size + length]
        if len(part) < length or zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            return
        joined = part if kind in (_WHOLE, _FIRST) else joined + part
        if kind in (_WHOLE, _LAST):
            yield joined
        position += _PART.size + length
