"""Running out of memory ends the command with one line that says what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle import trainer


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0"), "2 GiB)"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
            "out of memory: ",
        ),
        (MemoryError(), "out of memory: "),
    ],
)
def test_out_of_memory_in_a_step_is_one_line(
    rekindle: Callable[..., Any], command: Callable[[Path], list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, one_thread: None, error: BaseException, message: str,
) -> None:  # fmt: skip
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(trainer, "train_step", fail)
    outcome = rekindle(*command(tmp_path / "run"))
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert "lower --micro-batch" in outcome.err


def test_other_torch_errors_are_not_caught(
    rekindle: Callable[..., Any], command: Callable[[Path], list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, one_thread: None,
) -> None:  # fmt: skip
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(trainer, "train_step", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        rekindle(*command(tmp_path / "run"))


def test_impossible_allocation_is_one_line(
    rekindle: Callable[..., Any], command: Callable[[Path], list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, one_thread: None,
) -> None:  # fmt: skip
    monkeypatch.setattr(trainer, "train_step", lambda *a, **o: torch.empty(2**50))
    outcome = rekindle(*command(tmp_path / "run"))
    assert outcome.status == 2, outcome.err
    assert "out of memory (tried to allocate 4503599627370496 bytes): " in outcome.err
