"""Files that were cut, swapped, forged or never finished: refused in one line or passed over, and never run or believed."""

import contextlib
import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import Outcome, refused
from vae_dist import checkpoint
from vae_dist.checkpoint import Checkpoint, folder_of_step, newest_whole
from vae_dist.config import Config, InputError, ModelConfig
from vae_dist.model import build_model
from vae_dist.optimizer import build_optimizer
from vae_dist.run import load_model
from vae_dist.state import Progress, pack, unpack
from vae_dist.tracking import read_rows

SMALL = Config(model=ModelConfig(hidden=(5,), latent_dim=3))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)
often = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def whole() -> Checkpoint:
    """The state of a small run after a step."""
    model = build_model(SMALL.model, (1, 8, 8), seed=0)
    optimizer = build_optimizer(SMALL.optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return pack(SMALL, model, optimizer, None, Progress(step=7, images=100))


class Evil:
    """Unpickled, it would leave a trace."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch unpickled",)


def headed(header: object, length: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


HUGE = {"encoder.1.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
FORGED = {
    "a pickle": pickle.dumps(Evil()),
    "nothing": b"",
    "a header longer than the file": headed({}, length=1 << 20),
    "a header of exabytes": headed({}, length=(1 << 63) - 1),
    "a tensor of terabytes": headed(HUGE),
    "a tensor of terabytes, in few bytes": headed(
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, data=b"1234"
    ),
    "a size that overflows": headed({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 0]}}),
    "a negative size": headed({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, data=b"1234"),
    "offsets outside": headed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, data=b"1234"),
    "a type of its own": headed({"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}, data=b"1234"),
    "a list": headed([1, 2]),
    "a nest": struct.pack("<Q", 100_000) + b"[" * 100_000,
}


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED.keys())
def test_forged_weights_are_refused(
    content: bytes, finished: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (finished / "model.safetensors").write_bytes(content)
    outcome = command("evaluate", finished)
    assert outcome.status == 2
    assert "model.safetensors: not a readable safetensors file" in outcome.err
    assert not Path("unpickled").exists()


@often
@given(
    header=JSON
    | st.dictionaries(st.text(max_size=5), st.fixed_dictionaries({"dtype": JSON, "shape": JSON, "data_offsets": JSON}))
)
def test_any_header_is_read_or_refused(header: object, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(headed(header, data=b"12345678"))
    with contextlib.suppress(InputError):
        checkpoint.read_tensors(file)


def test_a_file_larger_than_the_memory_is_damaged(whole: Checkpoint, tmp_path: Path) -> None:
    """Sparse: it takes no room on the disk."""
    for step in (6, 7):
        progress = whole.progress | {"step": step}
        checkpoint.write(folder_of_step(tmp_path, step), whole._replace(progress=progress))
    os.truncate(folder_of_step(tmp_path, 7) / "model.safetensors", 1 << 43)
    newest, problems = newest_whole(tmp_path)
    assert newest == folder_of_step(tmp_path, 6)
    assert "step_00000007/model.safetensors: larger than the memory" in problems[0]


def places(values: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to each value in nested mappings."""
    for name, value in values.items():
        yield (*before, name)
        if isinstance(value, dict):
            yield from places(value, (*before, name))


def replaced(values: dict[str, Any], place: tuple[str, ...], value: object) -> dict[str, Any]:
    copy = json.loads(json.dumps(values))
    inner = copy
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return copy  # type: ignore[no-any-return]


def is_progress(progress: Progress) -> bool:
    counts, figures = (progress.step, progress.images), (*progress.epoch_sums, *progress.window_sums)
    return all(type(n) is int and n >= 0 for n in counts) and all(type(x) in (int, float) for x in figures)


@often
@given(data=st.data())
def test_json_of_other_types_under_a_right_hash_is_refused_or_means_the_same(
    data: st.DataObject, whole: Checkpoint, tmp_path: Path
) -> None:
    """As another version, or a program that means harm, would write it."""
    part = data.draw(st.sampled_from(["config", "progress"]))
    values = getattr(whole, part)
    forged = replaced(values, data.draw(st.sampled_from(sorted(places(values)))), data.draw(JSON))
    folder = tmp_path / "checkpoint"
    checkpoint.write(folder, whole._replace(**{part: forged}))
    model = build_model(SMALL.model, (1, 8, 8), seed=1)
    with contextlib.suppress(InputError):
        assert is_progress(unpack(checkpoint.read(folder), folder, model, build_optimizer(SMALL.optimizer, model), None))
    with contextlib.suppress(InputError):
        load_model(folder)


@pytest.mark.parametrize("forged", [{}, {"config": 3}, {"config": {"seed": "x"}}, []])
def test_a_checkpoint_that_describes_no_config_is_not_gone_on_from(
    forged: Any, whole: Checkpoint, quick: list[object], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    source = folder_of_step(tmp_path / "checkpoints", 7)
    checkpoint.write(source, whole._replace(config=forged))
    refused(command("train", *quick, "--resume", source, "--output", tmp_path / "run"), "step_00000007")


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "missing": lambda tensor: None,
    "of another shape": lambda tensor: torch.zeros(2, 3),
    "a scalar": lambda tensor: torch.tensor(5.0) if tensor.ndim else torch.zeros(1),
    "of another type": lambda tensor: tensor.to(torch.int8),
}


@pytest.mark.parametrize("forge", TENSORS.values(), ids=TENSORS.keys())
def test_optimizer_tensors_that_do_not_fit_are_refused(
    forge: Callable[[torch.Tensor], torch.Tensor | None], whole: Checkpoint, tmp_path: Path
) -> None:
    for name, tensor in whole.trainer.items():
        others = {key: value for key, value in whole.trainer.items() if key != name}
        forged = forge(tensor)
        saved = whole._replace(trainer=others if forged is None else others | {name: forged})
        model = build_model(SMALL.model, (1, 8, 8), seed=1)
        with pytest.raises(InputError, match=f"{tmp_path}: the optimizer's "):
            unpack(saved, tmp_path, model, build_optimizer(SMALL.optimizer, model), None)


FORGED_SHAPES = [
    "[1, 1e999, 28]",
    "[1, 1e9, 1e9]",
    "[1, -1, 28]",
    "[1, 28]",
    '"abc"',
    "[1, 1000000000, 1000000000]",
    "[1, true, null]",
]


@pytest.mark.parametrize("shape", FORGED_SHAPES)
def test_a_description_of_impossible_sizes_is_refused(shape: str, finished: Path, command: Callable[..., Outcome]) -> None:
    file = finished / "config.json"
    file.write_text(re.sub(r'"image_shape": \[[^]]*\]', f'"image_shape": {shape}', file.read_text()))
    outcome = command("evaluate", finished)
    assert outcome.status == 2
    assert outcome.err.count("error: ") == 1


@pytest.mark.parametrize("width", [10**13, 10**7, 41])
def test_a_description_of_another_network_is_refused(width: int, finished: Path, command: Callable[..., Outcome]) -> None:
    """Without taking the memory that it claims."""
    description = json.loads((finished / "config.json").read_text())
    description["config"]["model"]["hidden"] = [width]
    (finished / "config.json").write_text(json.dumps(description))
    outcome = command("evaluate", finished)
    assert outcome.status == 2
    assert outcome.err.count("error: ") == 1


@pytest.mark.parametrize("scale", [[2.0, 2.0], [float("nan")], [0.0], [-1.0], [float("inf")]])
def test_a_loss_scale_that_is_none_is_refused(scale: list[float], whole: Checkpoint, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu")
    model = build_model(SMALL.model, (1, 8, 8), seed=1)
    optimizer = build_optimizer(SMALL.optimizer, model)
    good = {"scaler.scale": torch.tensor([8.0]), "scaler._growth_tracker": torch.tensor(3.0)}
    unpack(whole._replace(trainer=whole.trainer | good), tmp_path, model, optimizer, scaler)
    assert scaler.get_scale() == 8.0
    forged = whole.trainer | good | {"scaler.scale": torch.tensor(scale)}
    with pytest.raises(InputError, match=str(tmp_path)):
        unpack(whole._replace(trainer=forged), tmp_path, model, optimizer, scaler)


@pytest.mark.parametrize("key", ["step", "epoch", "loss"])
@given(value=JSON)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_rows_of_other_types_are_refused(key: str, value: object, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"split": "test", "epoch": 1, "step": 1, "loss": 2.0} | {key: value}) + "\n")
    with contextlib.suppress(InputError):
        (row,) = read_rows(file)
        assert isinstance(row["step"] + row["epoch"] + row["loss"], (int, float))


def test_a_date_that_is_none_is_not_yaml(finished: Path, quick: list[object], command: Callable[..., Outcome]) -> None:
    (finished / "config.yaml").write_text("seed: 2001-99-99\n")
    refused(command("train", *quick, "--output", finished), "config.yaml: not YAML")
    refused(command("train", "--config", finished / "config.yaml"), "config.yaml: not YAML")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "binary": lambda path: path.write_bytes(b"\x80\x04\x95\xff"),
    "other JSON": lambda path: path.write_text('{"a": {"b": null}}\n'),
    "a nest": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["config.yaml", "config.json", "metrics.jsonl", "status.json"])
def test_any_damage_to_a_runs_own_files_is_told_or_mended(
    file: str, damage: str, finished: Path, quick: list[object], command: Callable[..., Outcome]
) -> None:
    weights = (finished / "model.safetensors").read_bytes()
    DAMAGES[damage](finished / file)
    for outcome in (command("train", *quick, "--output", finished), command("evaluate", finished)):
        assert outcome.status in (0, 2)
        assert outcome.err.count("error: ") == (1 if outcome.status else 0)
        assert "Traceback" not in outcome.err
    assert (finished / "model.safetensors").read_bytes() == weights


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_permission_lost_while_writing_leaves_the_last_checkpoint_and_says_the_room(
    whole: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # whose parents nobody may enter
    checkpoints = Path("checkpoints")
    checkpoint.write(folder_of_step(checkpoints, 7), whole)
    checkpoints.chmod(0o555)
    with as_nobody(), pytest.raises(PermissionError, match=r"Permission denied; a checkpoint takes 0\.0 MiB") as error:
        checkpoint.write(folder_of_step(checkpoints, 8), whole._replace(progress=whole.progress | {"step": 8}))
    assert error.value.filename == "checkpoints/step_00000008"
    checkpoints.chmod(0o755)
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000007"]
    assert newest_whole(checkpoints) == (folder_of_step(checkpoints, 7), [])
