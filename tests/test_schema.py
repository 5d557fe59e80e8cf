"""`mismatch` describes values that do not match a schema, and accepts those that do."""

from typing import Any

import pytest

from rekindle.schema import mismatch


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ("a", str), (True, bool), ({"a": 1}, dict), (0, int), (-1.5, float), (3, float),
        (None, None), (2, range(3)), ([], [int]), ([1, 2], [int]), (None, (None, str)),
        ("a", (None, str)),
        ({"a": 1, "more": "is fine"}, {"a": int}), ({}, {"a?": str}), ({"a": "b"}, {"a?": str}),
    ],
)  # fmt: skip
def test_matching_values_have_no_mismatch(value: Any, schema: Any) -> None:
    assert mismatch(value, schema) == ""


@pytest.mark.parametrize(
    ("value", "schema", "message"),
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
def test_mismatch_is_described(value: Any, schema: Any, message: str) -> None:
    assert message in mismatch(value, schema)
