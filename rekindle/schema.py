"""Whether what came out of a JSON file has the form that its readers rely on."""

import math
from typing import Any

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
