"""Whether what came out of a JSON file has the form that its readers rely on."""

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")

LARGEST = 2**53  # whole numbers up to here are the same in every JSON reader


def mismatch(value: Any, form: Any, where: str = "") -> str:
    """What in `value` is not of `form`, in a few words; empty if all is.

    A form is `str`, `bool`, `dict`, `int` (whole, not negative), `float` (any finite number), a
    `range` of whole numbers, `None`, `object` (anything), a tuple (one of these forms), a list (of
    the form of every item), or a dict (of the forms of the keys that must be there; one that ends
    in "?" may be missing).
    """
    if isinstance(form, tuple):
        found = [mismatch(value, one, where) for one in form]
        return "" if "" in found else found[-1]
    if isinstance(form, dict) and isinstance(value, dict):
        found = (_mismatch_of_key(value, key, form[key], where) for key in form)
    elif isinstance(form, list) and isinstance(value, list):
        found = (mismatch(item, form[0], f"{where}[{i}]") for i, item in enumerate(value))
    else:
        return "" if _is(value, form) else f"{where or 'it'} is {_short(value)}"
    return next(filter(None, found), "")


def _mismatch_of_key(value: dict[str, Any], key: str, form: Any, where: str) -> str:
    name = key.removesuffix("?")
    path = f"{where}.{name}".lstrip(".")
    if name in value:
        return mismatch(value[name], form, path)
    return "" if name != key else f"{path} is missing"


def _is(value: Any, form: Any) -> bool:
    if form is None:
        return value is None
    if form in (str, bool, dict, object):
        return isinstance(value, form)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if form is float:
        return abs(value) < LARGEST if isinstance(value, int) else math.isfinite(value)
    return isinstance(value, int) and value in (range(LARGEST) if form is int else form)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def form_of(cls: type) -> dict[str, Any]:
    """The form of a dataclass: that of each field's type, unless its metadata names a `form`. A
    field with a default may be missing."""
    hints = typing.get_type_hints(cls)
    form = {}
    for field in dataclasses.fields(cls):
        optional = field.default is not dataclasses.MISSING
        own = field.metadata.get("form", _form_of_type(hints[field.name]))
        form[f"{field.name}?" if optional else field.name] = own
    return form


def _form_of_type(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):  # of a type and None, which comes last
        return tuple(_form_of_type(each) for each in reversed(typing.get_args(kind)))
    if kind is types.NoneType:
        return None
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return form_of(kind)
    return typing.get_origin(kind) or kind


def parse(cls: type[T], value: dict[str, Any]) -> T:
    """A dataclass from what came out of a JSON file; other keys are left out. Raises `ValueError`
    that says what is not of its form."""
    if wrong := mismatch(value, form_of(cls)):
        raise ValueError(wrong)
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.name in value]  # type: ignore
    return cls(**{name: _built(hints[name], value[name]) for name in names})


def _built(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return parse(kind, value)
    return value
