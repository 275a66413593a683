"""From a YAML file and the command line to a Config, and back; and whether two configs describe the same run."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import tyro
import yaml

from vae_dist.config import Config, DataConfig, InputError
from vae_dist.options_help import options_of, overview, topic_of

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

RECIPES = Path(__file__).parent / "configs"  # in the repository a link to where everybody looks for them

_DESCRIPTION = """Train a variational autoencoder. --config FILE reads the options of a YAML recipe first, or --config
NAME those of one that comes with the package, such as glyphs; options given here beat it. To run on several processes:
accelerate launch [launcher options] -m vae_dist.train ..."""
_WORDS = {"true": "True", "false": "False", "none": "None", "null": "None"}


def parse(args: Sequence[str], module: str = "vae_dist.train", description: str = _DESCRIPTION) -> Config:
    """The run that a command line asks for. Options beat the file that `--config` names, the file beats the defaults.

    `module` is the entry point, and `description` what its help says of it.
    Raises InputError where that file cannot be read; other faults are printed once and end the process with status 2, through
    SystemExit.
    """
    if (topic := topic_of(args)) is not None:
        _show_help(topic, module, description)
    file, options = _take_config_option(args)
    config, name = Config(), None
    if file is not None:
        from_file = list(_as_options(_read_yaml(file)))
        try:
            config, name = command_line(Config, module, from_file), file.stem
        except SystemExit:
            if is_spokesman():
                print(f"(these options were read from {file})", file=sys.stderr)
            raise
    config = command_line(Config, module, _in_python_words(options), config, description)
    name = name or config.data.name
    tracking = replace(config.tracking, group=config.tracking.group or name)
    return replace(config, output=config.output or f"runs/{name}", tracking=tracking)


def _show_help(topic: str, module: str, description: str) -> NoReturn:
    if topic != "overview":
        command_line(options_of(topic), module, ["--help"], description=description)
    if is_spokesman():
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` has seen enough
        print(overview(program(module), description))
    sys.exit(0)


def command_line(kind: type[T], module: str, args: Sequence[str], default: T | None = None, description: str = "") -> T:
    """An instance of a dataclass from command-line options; wrong ones are printed and end the process with status 2."""
    try:
        parsed = tyro.cli(
            kind,
            prog=program(module),
            args=list(args),
            default=default,
            description=description or None,
            use_underscores=True,
            console_outputs=is_spokesman(),
            config=(tyro.conf.FlagConversionOff,),
        )
    except BrokenPipeError:  # `--help | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    return cast(T, parsed)  # with a default that may be None, its type cannot be told


def program(module: str) -> str:
    """The command line that starts an entry point the way this process was started: `vae-dist evaluate`,
    `python -m vae_dist evaluate`, or `python -m vae_dist.evaluate`.
    """
    started = os.path.abspath(sys.argv[0])
    name, command = os.path.basename(started), module.removeprefix("vae_dist.")
    if name == "vae-dist":
        return f"{as_typed(started, name)} {command}"
    is_one_for_all = Path(started).parts[-2:] == ("vae_dist", "__main__.py")
    return f"{python()} -m {f'vae_dist {command}' if is_one_for_all else module}"


def python() -> str:
    """This Python, as a user would call it."""
    return as_typed(sys.executable, "python")


def as_typed(file: str, name: str) -> str:
    """`name`, where a shell would find that very file by it; else a path to the file."""
    return name if shutil.which(name) == file else min(file, os.path.relpath(file), key=len)


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


def without_places(config: Config) -> Config:
    """The same run without the folders of this machine, which say nothing to others."""
    data, tracking = replace(config.data, root=DataConfig.root), replace(config.tracking, baseline=None)
    return replace(config, output="", resume=Config.resume, data=data, tracking=tracking)


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
        raise InputError(f"--config {' '.join(files)}: name one YAML file, or one recipe, such as mnist")
    return (_recipe(files[0]) if files else None), others


def _recipe(name: str) -> Path:
    """The file of that name, else the recipe of that name that comes with this package."""
    shipped = RECIPES / f"{name}.yaml"
    return shipped if shipped.is_file() and not Path(name).is_file() else Path(name)


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
        shipped = ", ".join(sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml")))
        way_out = f"name a YAML file, or a recipe that comes with this package: {shipped}"
        raise InputError(f"--config {file}: {error.strerror or error}; {way_out}") from None
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
