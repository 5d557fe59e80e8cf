"""The number of cores that a process may use."""

import os

import pytest

from rekindle.data.cores import usable_cores


def test_cores_of_the_process_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert usable_cores() == 3


@pytest.mark.parametrize(("cores", "usable"), [(6, 6), (None, 1)])
def test_cores_of_the_machine_are_the_fallback(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, usable: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert usable_cores() == usable
