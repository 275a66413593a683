"""What is said of values that cannot be right."""

from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class InputError(ValueError):
    """Bad configuration or data. Entry points print it once, without a traceback, and exit with status 2."""


class ImagesLost(RuntimeError):
    """Images that were there when a run began cannot be had any more. Only some ranks may find it."""


def missing_extra(what: str, extra: str) -> InputError:
    """The error of a command whose packages are an extra that is not installed."""
    return InputError(f"{what}; install the extra: pip install '.[{extra}]' in the repository, or 'FILE.whl[{extra}]'")


def require(condition: bool, flag: str, value: object, wanted: str) -> None:
    if not condition:
        shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
        shown = str(value).lower() if isinstance(value, bool) else shown
        raise InputError(f"{flag} {shown}: must be {wanted}")


def require_types(config: Any, prefix: str = "--") -> None:
    """Raises InputError where a field of a dataclass, or of one within it, is not what it is declared to be.

    The command line is read by these types; a program may put anything there, and a name that is none would be taken for
    another.
    """
    for name, kind in get_type_hints(type(config)).items():
        value, is_section = getattr(config, name), is_dataclass(kind)
        require(type(value) is kind if is_section else _is_of(value, kind), prefix + name, value, _in_words(kind))
        if is_section:
            require_types(value, f"{prefix}{name}.")


def _is_of(value: object, kind: Any) -> bool:
    args = get_args(kind)
    if get_origin(kind) is Literal:
        return value in args
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, one) for one in args)
    if get_origin(kind) is tuple:
        kinds = args[:1] * len(value) if isinstance(value, (tuple, list)) and args[-1] is Ellipsis else args
        return isinstance(value, (tuple, list)) and len(value) == len(kinds) and all(map(_is_of, value, kinds))
    return type(value) in ((int, float) if kind is float else (kind,))


def _in_words(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(kind)))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return str(kind) if get_args(kind) else str(kind.__name__)
