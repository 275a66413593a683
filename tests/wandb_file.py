"""Reads an offline W&B run's file: LevelDB log framing around protobuf records, behind a 7-byte header."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto import wandb_internal_pb2

_BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")  # checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last part of a record


class WandbRun(NamedTuple):
    id: str
    project: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]


def read_wandb(folder: Path) -> WandbRun:
    """What an offline run folder holds."""
    (file,) = folder.glob("run-*.wandb")
    run_id = project = ""
    config: dict[str, Any] = {}
    history, summary = [], {}
    for content in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # made at import
        record.ParseFromString(content)
        if record.HasField("run"):
            run_id, project = record.run.run_id, record.run.project
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        for item in record.config.update:
            config[item.key] = json.loads(item.value_json)
        if record.HasField("history"):
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        for item in record.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return WandbRun(run_id, project, config, history, summary)


def _records(content: bytes) -> Iterator[bytes]:
    assert content[:7] == b":W&B" + struct.pack("<HB", 0xBEE1, 0)
    position, parts = 7, b""
    while position + _HEADER.size <= len(content):
        if _BLOCK - position % _BLOCK < _HEADER.size:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = _HEADER.unpack_from(content, position)
        parts += content[position + _HEADER.size : position + _HEADER.size + length]
        position += _HEADER.size + length
        if kind in (1, 4):
            yield parts
            parts = b""
