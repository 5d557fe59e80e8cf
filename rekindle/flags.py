"""Dataclass fields that are flags of the command line: each carries its own help."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One flag. Its name is the field's path: `optim.lr` is given as `--optim.lr`."""

    name: str
    type: type  # bool, int, float or str; of an optional field, what it is when given
    default: Any
    help: str

    @property
    def spelling(self) -> str:
        return f"--{self.name.replace('_', '-')}"


def flag(default: Any, help: str) -> Any:
    """A dataclass field with a default that the command line offers as a flag."""
    return dataclasses.field(default=default, metadata={"help": help})


def flags_of(value: Any, prefix: str = "") -> Iterator[Flag]:
    """The flags of a dataclass and of those inside it, in the order of the fields."""
    types_ = typing.get_type_hints(type(value))
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        if dataclasses.is_dataclass(inner):
            yield from flags_of(inner, f"{prefix}{item.name}.")
        elif "help" in item.metadata:
            kind = _without_none(types_[item.name])
            yield Flag(f"{prefix}{item.name}", kind, inner, item.metadata["help"])


def _without_none(kind: Any) -> type:
    """`int` for `int | None`."""
    if isinstance(kind, types.UnionType):
        (kind,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
    return kind
