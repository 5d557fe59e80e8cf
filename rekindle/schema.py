"""Check that a value read from a JSON file has the expected types."""

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")

LARGEST = 2**53  # integers up to this are exact in every JSON reader


def mismatch(value: Any, schema: Any, where: str = "") -> str:
    """Describe the first part of `value` that does not match `schema`; empty if everything matches.

    A schema is `str`, `bool`, `dict`, `int` (not negative), `float` (any finite number), a `range`
    of integers, `None`, `object` (anything), a tuple of alternatives, a list with the schema of
    its items, or a dict with the schema of each required key; a key that ends in "?" is optional.
    """
    if isinstance(schema, tuple):
        found = [mismatch(value, one, where) for one in schema]
        return "" if "" in found else found[-1]
    if isinstance(schema, dict) and isinstance(value, dict):
        found = (_mismatch_of_key(value, key, schema[key], where) for key in schema)
    elif isinstance(schema, list) and isinstance(value, list):
        found = (mismatch(item, schema[0], f"{where}[{i}]") for i, item in enumerate(value))
    else:
        return "" if _is(value, schema) else f"{where or 'it'} is {_short(value)}"
    return next(filter(None, found), "")


def _mismatch_of_key(value: dict[str, Any], key: str, schema: Any, where: str) -> str:
    name = key.removesuffix("?")
    path = f"{where}.{name}".lstrip(".")
    if name in value:
        return mismatch(value[name], schema, path)
    return "" if name != key else f"{path} is missing"


def _is(value: Any, schema: Any) -> bool:
    if schema is None:
        return value is None
    if schema in (str, bool, dict, object):
        return isinstance(value, schema)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if schema is float:
        return abs(value) < LARGEST if isinstance(value, int) else math.isfinite(value)
    return isinstance(value, int) and value in (range(LARGEST) if schema is int else schema)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def schema_of(cls: type) -> dict[str, Any]:
    """The schema of a dataclass: each field's `schema` metadata, or else its type. A field with a
    default is optional."""
    hints = typing.get_type_hints(cls)
    schema = {}
    for field in dataclasses.fields(cls):
        optional = field.default is not dataclasses.MISSING
        own = field.metadata.get("schema", _schema_of_type(hints[field.name]))
        schema[f"{field.name}?" if optional else field.name] = own
    return schema


def _schema_of_type(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):  # `X | None`: X last, so that `mismatch` reports it
        return tuple(_schema_of_type(each) for each in reversed(typing.get_args(kind)))
    if kind is types.NoneType:
        return None
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return schema_of(kind)
    return typing.get_origin(kind) or kind


def parse(cls: type[T], value: dict[str, Any]) -> T:
    """Build a dataclass from a JSON object, ignoring unknown keys. Raises `ValueError` that
    describes the first mismatch."""
    if wrong := mismatch(value, schema_of(cls)):
        raise ValueError(wrong)
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.name in value]  # type: ignore
    return cls(**{name: _built(hints[name], value[name]) for name in names})


def _built(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return parse(kind, value)
    return value
