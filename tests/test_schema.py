"""What is not as its readers expect is named, and nothing else is."""

from typing import Any

import pytest

from rekindle.schema import mismatch


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ("a", str), (True, bool), ({"a": 1}, dict), (0, int), (-1.5, float), (3, float),
        (None, None), (2, range(3)), ([], [int]), ([1, 2], [int]), (None, (None, str)),
        ("a", (None, str)),
        ({"a": 1, "more": "is fine"}, {"a": int}), ({}, {"a?": str}), ({"a": "b"}, {"a?": str}),
    ],
)  # fmt: skip
def test_what_fits_is_not_objected_to(value: Any, form: Any) -> None:
    assert mismatch(value, form) == ""


@pytest.mark.parametrize(
    ("value", "form", "said"),
    [
        (1, str, "it is 1"), (1, bool, "it is 1"), (True, int, "it is True"),
        (-1, int, "it is -1"), (1.0, int, "it is 1.0"), (2**60, int, f"it is {2**60}"),
        (10**400, float, "it is 1000"),
        (float("nan"), float, "it is nan"), (3, range(3), "it is 3"),
        (True, range(3), "it is True"),
        ([1, "x"], [int], "[1] is 'x'"), ({}, [int], "it is {}"), (1, (None, str), "it is 1"),
        ({"a": {}}, {"a": {"b": int}}, "a.b is missing"), ([], {"a": int}, "it is []"),
        ({"a": {"b": [0, None]}}, {"a": {"b": [int]}}, "a.b[1] is None"),
        ("x" * 100, int, "xxx..."), ({"a": 1}, {"a?": str}, "a is 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(value: Any, form: Any, said: str) -> None:
    assert said in mismatch(value, form)
