"""Dataclass fields as command-line arguments: each carries its own help."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One argument. Its name is the field's path: `optim.lr` is given as `--optim.lr`."""

    name: str
    type: Any  # bool, int, float, str, Path or list[str]; of an optional field: of a given value
    default: Any  # MISSING: it is required
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    positional: bool = False

    @property
    def spelling(self) -> str:
        return f"--{self.name.replace('_', '-')}"


def flag(
    default: Any,
    help: str,
    metavar: str | None = None,
    *,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field that is a flag on the command line. `default` MISSING: required."""
    metadata = {"help": help, "metavar": metavar, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def argument(help: str, metavar: str, default: Any = MISSING) -> Any:
    """A dataclass field that is a positional argument on the command line."""
    metadata = {"help": help, "metavar": metavar, "positional": True}
    return dataclasses.field(default=default, metadata=metadata)


def flags_of(value: Any, prefix: str = "") -> Iterator[Flag]:
    """The flags of a dataclass and its nested dataclasses, in the order of the fields. `value`: an
    instance, whose values are the defaults, or the class."""
    hints = typing.get_type_hints(value if isinstance(value, type) else type(value))
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name, item.default)
        if dataclasses.is_dataclass(inner):
            yield from flags_of(inner, f"{prefix}{item.name}.")
        elif "help" in item.metadata:
            kind = _without_none(hints[item.name])
            yield Flag(f"{prefix}{item.name}", kind, inner, **item.metadata)


def _without_none(kind: Any) -> Any:
    """`int` for `int | None`."""
    if isinstance(kind, types.UnionType):
        (kind,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
    return kind
