"""From a YAML file and the command line to a Config, and back; and whether two configs describe the same run."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro
import yaml

from vae_dist.config import Config, InputError

T = TypeVar("T")

# Fields that may differ when a run folder is continued: they leave the meaning of the figures alone.
FREE_FIELDS = frozenset(
    [
        "output",
        "resume",
        "data.root",
        "data.unreadable",
        "data.cache_gb",
        "model.recompute",
        "trainer.epochs",
        "trainer.cuda_graph",
        "trainer.compile",
        "trainer.max_minutes",
        "trainer.micro_batch_size",
        "trainer.check_ranks_every",
        "trainer.timeout_minutes",
        "checkpoint",
        "tracking",
        "expect",
    ]
)

_PROG = "vae_dist.train"
_DESCRIPTION = """Train a variational autoencoder. --config FILE reads the options of a YAML recipe first;
options given here beat it. To run on several processes: accelerate launch [launcher options] -m vae_dist.train ..."""
_WORDS = {"true": "True", "false": "False", "none": "None", "null": "None"}


def parse(args: Sequence[str]) -> Config:
    """The run that a command line asks for. Options beat the file that `--config` names, the file beats the defaults.

    Raises InputError where that file cannot be read; other faults are printed once and end the process with status 2, through
    SystemExit.
    """
    file, options = _take_config_option(args)
    config, name = Config(), None
    if file is not None:
        from_file = list(_as_options(_read_yaml(file)))
        try:
            config, name = command_line(Config, _PROG, from_file), file.stem
        except SystemExit:
            if is_spokesman():
                print(f"(these options were read from {file})", file=sys.stderr)
            raise
    config = command_line(Config, _PROG, _in_python_words(options), config, _DESCRIPTION)
    name = name or config.data.name
    tracking = replace(config.tracking, group=config.tracking.group or name)
    return replace(config, output=config.output or f"runs/{name}", tracking=tracking)


def command_line(kind: type[T], prog: str, args: Sequence[str], default: T | None = None, description: str = "") -> T:
    """An instance of a dataclass from command-line options; wrong ones are printed and end the process with status 2."""
    parsed = tyro.cli(
        kind,
        prog=f"python -m {prog}",
        args=list(args),
        default=default,
        description=description or None,
        use_underscores=True,
        console_outputs=is_spokesman(),
        config=(tyro.conf.FlagConversionOff,),
    )
    return cast(T, parsed)  # with a default that may be None, its type cannot be told


def is_spokesman() -> bool:
    """Whether this process prints errors that every process of its machine finds (before ranks can agree on anything)."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def from_mapping(values: Mapping[str, Any], source: object) -> Config:
    """The Config that `to_mapping` turned into plain values. Raises InputError, naming `source`, where it is none."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro prints some errors whatever `console_outputs` says
            return tyro.cli(Config, args=list(_as_options(values)), config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        raise InputError(f"{source}: not a config that vae_dist of this version can read") from None


def to_mapping(config: Config) -> dict[str, Any]:
    """Plain nested values, fit for YAML and JSON."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))  # tuples to lists
    return values


def to_yaml(config: Config) -> str:
    """The resolved config as YAML: feeding it back gives the same Config."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def flat(config: Config) -> dict[str, Any]:
    """The value of each option by its name, for example `optimizer.lr`."""
    return _flatten(to_mapping(config))


def differences(old: Config, new: Config) -> list[str]:
    """A line for each field that differs and gives the run another meaning, for example `seed: 0 there, 1 here`."""
    before, after = flat(old), flat(new)
    free = FREE_FIELDS if new.optimizer.schedule in ("constant", "iwae") else FREE_FIELDS - {"trainer.epochs"}
    changed = [name for name in after if before.get(name) != after[name]]
    return [
        f"{name}: {before.get(name)} there, {after[name]} here"
        for name in changed
        if name not in free and name.split(".")[0] not in free
    ]


def require_same_run(old: Config, new: Config, where: str) -> None:
    """Raises InputError, naming the fields, where two configs do not describe the same run."""
    if changes := differences(old, new):
        raise InputError(f"{where}: of another config ({'; '.join(changes)}). Name another folder, or give the same options")


def _take_config_option(args: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Splits `--config FILE` or `--config=FILE` off the other options. Raises InputError unless it is there once at most."""
    files, others = [], []
    rest = iter(args)
    for arg in rest:
        name, equals, value = arg.partition("=")
        if name == "--config":
            files.append(value if equals else next(rest, ""))
        else:
            others.append(arg)
    if len(files) > 1 or "" in files:
        raise InputError(f"--config {' '.join(files)}: name one YAML file, such as configs/mnist.yaml")
    return (Path(files[0]) if files else None), others


def _in_python_words(options: list[str]) -> list[str]:
    """`true`, `false` and `none` as tyro wants them, but for fields that hold any text."""
    text = {f"--{name}" for name, value in flat(Config()).items() if isinstance(value, str)}

    def translated(before: str, arg: str) -> str:
        name, equals, value = arg.partition("=")
        if equals and name not in text:
            return f"{name}={_WORDS.get(value, value)}"
        return arg if before in text else _WORDS.get(arg, arg)

    return [translated(before, arg) for before, arg in zip(["", *options], options, strict=False)]


class _UniqueKeys(yaml.SafeLoader):
    """YAML itself lets a later key replace an earlier one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name} is there more than once")
        return super().construct_mapping(node, deep)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise InputError(f"--config {file}: {error.strerror or error}; name a YAML file, such as configs/mnist.yaml") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"--config {file}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or values.keys() & {"help", "h"}:
        raise InputError(f"--config {file}: must hold fields and values, such as `seed: 0`")
    empty = [name for name, value in values.items() if value is None and is_dataclass(getattr(Config(), str(name), None))]
    return {name: value for name, value in values.items() if name not in empty}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _as_options(values: Mapping[str, Any]) -> Iterator[str]:
    """Nested values as the command-line options that mean the same."""
    for name, value in _flatten(values).items():
        if isinstance(value, (list, tuple)):
            yield f"--{name}"
            yield from map(str, value)
        else:
            yield f"--{name}={value}"
