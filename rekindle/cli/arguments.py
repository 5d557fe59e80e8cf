"""Arguments of the command line made from dataclass fields."""

import argparse
from collections.abc import Iterable
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from rekindle.errors import UserError
from rekindle.flags import Flag, flags_of

T = TypeVar("T")

METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


class Parser(argparse.ArgumentParser):
    """Raises `UserError` for a mistake, so that it is printed as one line like all others."""

    def __init__(self, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str) -> NoReturn:
        required = "the following arguments are required: "
        if message.startswith(required):
            names = message.removeprefix(required)
            raise UserError(f"`{self.prog}` needs {names} (see `{self.prog} --help`)")
        raise UserError(f"{message.removeprefix('argument ')} (see `{self.prog} --help`)")


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


_CONVERTERS = {int: _integer, float: _number}


def add_flags(parser: Any, flags: Iterable[Flag]) -> None:
    """Add each flag with its help and default. A flag that is not given sets no attribute, so that
    `given` can tell."""
    for flag in flags:
        about = (flag.help + _shown(flag.default)).replace("%", "%%")
        how: dict[str, Any] = {"help": about, "default": argparse.SUPPRESS}
        if flag.type is bool:
            on_or_off = flag.default is not False
            how["action"] = argparse.BooleanOptionalAction if on_or_off else "store_true"
        else:
            how["type"] = _CONVERTERS.get(flag.type, flag.type)
            how["metavar"] = flag.metavar or METAVARS.get(flag.type)
            how["choices"] = flag.choices
        if get_origin(flag.type) is list:  # one or more values
            (how["type"],), how["nargs"] = get_args(flag.type), "+"
        if flag.positional:
            if flag.default is not MISSING:
                how["nargs"] = "?"
            parser.add_argument(flag.name, **how)
        else:
            parser.add_argument(
                flag.spelling, dest=flag.name, required=flag.default is MISSING, **how
            )


def _shown(default: Any) -> str:
    """A default as shown in the help."""
    if default is None or default is False or default in (MISSING, ""):
        return ""
    text = f"{default:.6g}" if isinstance(default, float) else str(default)
    return f" (default: {'yes' if default is True else text})"


def given(namespace: argparse.Namespace, flags: Iterable[Flag]) -> dict[str, Any]:
    """The values of the flags that were given, by name."""
    named = vars(namespace)
    return {flag.name: named[flag.name] for flag in flags if flag.name in named}


def options_of(cls: type[T], namespace: argparse.Namespace) -> T:
    """A command's options: the given values, and the defaults of the other fields."""
    return cls(**given(namespace, flags_of(cls)))
