"""The help of a command that takes all options of a run: one screen, and more of each section on demand."""

import difflib
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Any

from vae_dist.config import Config, InputError

_MOST_COLUMNS = 100


def topic_of(args: Sequence[str]) -> str | None:
    """What `--help` was asked about: a section, `all`, or `overview` where it stands alone. None: no help is asked for.

    Raises InputError where there is no such section.
    """
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--help=") else [arg])]
    at = next((i for i, arg in enumerate(args) if arg in ("-h", "--help")), None)
    if at is None:
        return None
    topic = args[at + 1] if at + 1 < len(args) and not args[at + 1].startswith("-") else "overview"
    topics = ["overview", *_sections(), "all"]
    if topic not in topics:
        meant = difflib.get_close_matches(topic, topics, n=1)
        way_out = f"did you mean `--help {meant[0]}`?" if meant else f"the sections are {', '.join(topics[1:])}"
        raise InputError(f"--help {topic}: no such section; {way_out}")
    return topic


def overview(program: str, description: str) -> str:
    """The names of all options, by section."""
    width = min(_MOST_COLUMNS, shutil.get_terminal_size().columns)
    general = {
        "--config FILE or NAME": "recipe to begin with; the options of the command line beat it",
        "--output DIR": "the run's folder; a run that lies there is continued (runs/<name>)",
        "--resume WHAT": "auto, never, or a checkpoint to begin a new folder with (auto)",
        "--seed N": "the one seed (0)",
    }
    lines = [
        f"usage: {program} [--config FILE] [--SECTION.NAME VALUE …]",
        "",
        *textwrap.wrap(description, width),
        "",
        *(f"  {flag:23}{words}" for flag, words in general.items()),
        "",
        f"The sections and their options; `--help {next(iter(_sections()))}` explains those of one, `--help all` everything:",
    ]
    for name, section in _sections().items():
        names = " ".join(f.name for f in fields(section))
        lines += textwrap.wrap(names, width, initial_indent=f"  {name:12}", subsequent_indent=" " * 14, break_on_hyphens=False)
    return "\n".join(lines)


def options_of(section: str) -> Any:
    """A dataclass of that section's options alone, by their whole names; of all of them for `all`."""
    if section == "all":
        return Config
    kind = _sections()[section]
    return make_dataclass("Options", [(section, kind, field(default_factory=kind))])


def _sections() -> dict[str, Any]:
    """The dataclass of each section of a Config."""
    return {f.name: type(getattr(Config(), f.name)) for f in fields(Config) if is_dataclass(getattr(Config(), f.name))}
