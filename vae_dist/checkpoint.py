"""Checkpoints: written whole or not at all, verified when read, found again after any crash. No pickle, ever.

A checkpoint is a folder `step_<8 digits>` of safetensors and JSON. `trainer.json` holds the SHA-256 of every file, itself
included, and the folder gets its name only when all of it lies on the disk.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from vae_dist.config import InputError

FORMAT = 1
_HASHED = ("config.json", "model.safetensors", "trainer.safetensors")
_MANIFEST = "trainer.json"
_SEAL = "sha256_of_the_above"
_NAME = re.compile(r"step_(\d{8,})")


class Checkpoint(NamedTuple):
    """Everything a run needs to go on."""

    config: dict[str, Any]  # what the run is
    model: dict[str, Tensor]
    trainer: dict[str, Tensor]  # optimizer moments, averaged weights, loss scale
    progress: dict[str, Any]  # counters and sums; plain JSON


class Damaged(Exception):
    """A file of a checkpoint is missing or is not what was written; the message says which and how."""


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint as `folder`, atomically: after a kill at any moment it is there and whole, or not there."""
    temporary = folder.with_name(f".{folder.name}.unfinished")
    contents = {
        "config.json": _to_json(checkpoint.config),
        "model.safetensors": to_bytes(checkpoint.model),
        "trainer.safetensors": to_bytes(checkpoint.trainer),
    }
    manifest = {"format": FORMAT, **checkpoint.progress, "sha256": {name: _sha256(contents[name]) for name in _HASHED}}
    contents[_MANIFEST] = _sealed(manifest)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in contents.items():
            _write_and_sync(temporary / name, content)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        room = sum(map(len, contents.values())) / 2**20
        raise OSError(error.errno, f"{error.strerror}; a checkpoint takes {room:.1f} MiB", str(folder)) from None
    _sync_folder(temporary)
    if folder.exists():  # a damaged one of the same step
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    _sync_folder(folder.parent)


def read(folder: Path) -> Checkpoint:
    """Reads and verifies a checkpoint. Raises Damaged, naming the file."""
    manifest = _read_manifest(folder)
    contents = {name: _read_file(folder / name) for name in _HASHED}
    for name, content in contents.items():
        if _sha256(content) != manifest["sha256"].get(name):
            raise Damaged(f"{folder / name}: its SHA-256 is not the one that was written")
    try:
        return Checkpoint(
            config=json.loads(contents["config.json"]),
            model=safetensors.torch.load(contents["model.safetensors"]),
            trainer=safetensors.torch.load(contents["trainer.safetensors"]),
            progress={key: value for key, value in manifest.items() if key not in ("format", "sha256")},
        )
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise Damaged(f"{folder}: cannot be parsed: {error}") from None


def newest_whole(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, None where there is none yet, and what is wrong with newer ones.

    Raises InputError where there are checkpoints but none is whole: starting over would be a loss nobody asked for.
    """
    problems: list[str] = []
    for folder in reversed(list_checkpoints(checkpoints)):
        try:
            read(folder)
        except Damaged as error:
            problems.append(str(error))
        else:
            return folder, problems
    if problems:
        listed = "; ".join(problems)
        raise InputError(f"{checkpoints}: no checkpoint is whole ({listed}). Restore one, or start anew in another --output")
    return None, problems


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in checkpoints.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def prune(newest: Path, keep: int) -> None:
    """Called with a checkpoint that was just written: removes all but the newest `keep` up to it.

    Later ones go too: they were damaged, or the run would not have come by here again. So do folders left unfinished by a
    kill.
    """
    found = list_checkpoints(newest.parent)
    kept = found[: found.index(newest) + 1][-keep:]
    for folder in [*newest.parent.glob(".step_*.unfinished"), *found]:
        if folder not in kept:
            shutil.rmtree(folder)


def folder_of_step(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def write_atomically(file: Path, content: bytes | str) -> None:
    """Writes a file that is, for every reader and after any crash, the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.unfinished")
    _write_and_sync(temporary, content.encode() if isinstance(content, str) else content)
    os.replace(temporary, file)
    _sync_folder(file.parent)


def to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file. Of copies: it refuses tensors that share memory, as tied weights do, or do not lie row by row."""
    copies = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(copies)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises InputError where it is none."""
    try:
        return safetensors.torch.load(file.read_bytes())
    except (OSError, MemoryError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{file}: not a readable safetensors file: {error}") from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / _MANIFEST
    content = _read_file(file)
    try:
        manifest = {key: value for key, value in json.loads(content).items() if key != _SEAL}
        if content != _sealed(manifest) or not isinstance(manifest["sha256"], dict):
            raise Damaged(f"{file}: its SHA-256 is not the one that was written")
    except (ValueError, KeyError, AttributeError, RecursionError):
        raise Damaged(f"{file}: not the JSON that was written") from None
    if manifest.get("format") != FORMAT:
        raise Damaged(f"{file}: format {manifest.get('format')}, this version reads {FORMAT}")
    name = _NAME.fullmatch(folder.name)
    if name and manifest.get("step") != int(name[1]):
        raise Damaged(f"{file}: of step {manifest.get('step')}, in the folder of another")
    return manifest


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest as it is written: JSON that ends with its own hash."""
    return _to_json(manifest | {_SEAL: _sha256(_to_json(manifest))})


def _read_file(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Damaged(f"{file}: {error.strerror}") from None
    except MemoryError:
        raise Damaged(f"{file}: larger than the memory") from None


def _to_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_and_sync(file: Path, content: bytes) -> None:
    with naming(file), file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Lets an OSError name the file: by itself it does so where the file cannot be opened, not where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None


def _sync_folder(folder: Path) -> None:
    """Makes names in a folder durable: a rename is only on the disk when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
