"""A logger from outside the package gets the same records as `metrics.jsonl`; one that fails does
not affect the run."""

import io
from pathlib import Path
from typing import Any

import pytest

from rekindle.errors import UserError
from rekindle.observe.console import Console
from rekindle.observe.json_lines import JsonLinesLogger
from rekindle.observe.metrics import Logger, Metrics
from rekindle.storage import JsonLines, read_json_lines
from tests.extension.memory_logger import MemoryLogger

STEP: dict[str, Any] = {"loss": 3.0, "lr": 6e-4, "grad_norm": 1.5, "data_wait": 0.0, "seconds": 1.0}


def make_metrics(*loggers: Logger) -> tuple[Metrics, io.StringIO]:
    printed = io.StringIO()
    metrics = Metrics(
        loggers, Console(stream=printed), steps=100, tokens_per_step=10, flops_per_token=1,
        peak_flops=None,
    )  # fmt: skip
    return metrics, printed


def test_logger_receives_the_same_records_as_the_file(tmp_path: Path) -> None:
    path, memory = tmp_path / "metrics.jsonl", MemoryLogger()
    metrics, _ = make_metrics(memory, JsonLinesLogger(JsonLines(path), pytest.fail))
    for step in range(5):
        metrics.step(step, **STEP)
    metrics.record("validation", 5, loss=float("nan"), tokens=12)
    expected = {"kind": "validation", "step": 5, "loss": None, "tokens": 12}
    assert {**memory[-1], **expected} == memory[-1]
    assert memory == read_json_lines(path)
    metrics.rewind(lambda record: record["step"] < 3)
    assert [record["step"] for record in memory] == [0, 1, 2]
    assert memory == read_json_lines(path)
    metrics.record("rollback", 3, next_batch=7)
    metrics.step(3, **STEP)
    metrics.close()
    assert [record["kind"] for record in memory[3:]] == ["rollback", "train"]
    assert memory == read_json_lines(path)
    assert memory.closed


class BrokenLogger(MemoryLogger):
    """Every method fails while `error` is set."""

    error: Exception | None = None

    def write(self, record: dict[str, Any]) -> None:
        if self.error:
            raise self.error
        super().write(record)

    def rewind(self, keep: Any) -> None:
        if self.error:
            raise self.error
        super().rewind(keep)

    def close(self) -> None:
        if self.error:
            raise self.error


@pytest.mark.parametrize("error", [ConnectionError("no route"), UserError("no route")])
def test_failing_logger_does_not_stop_the_run(error: Exception) -> None:
    broken, memory = BrokenLogger(), MemoryLogger()
    metrics, printed = make_metrics(broken, memory)
    metrics.record("samples", 0)
    broken.error = error
    metrics.record("samples", 1)
    metrics.record("samples", 2)
    name = type(error).__name__
    assert printed.getvalue() == f"BrokenLogger failed, so records are missing ({name}: no route)\n"
    broken.error = None
    metrics.record("samples", 3)
    assert printed.getvalue().endswith("\nBrokenLogger works again; the missing records are lost\n")
    broken.error = error
    metrics.close()
    assert printed.getvalue().count("BrokenLogger failed") == 2
    assert [record["step"] for record in broken] == [0, 3]
    assert [record["step"] for record in memory] == [0, 1, 2, 3]
    assert memory.closed


def test_log_file_that_cannot_be_rewound_ends_the_run() -> None:
    """Otherwise the log would contain steps twice. Other failures do not end the run."""
    broken, memory = BrokenLogger(), MemoryLogger()
    metrics, _ = make_metrics(broken, memory)
    metrics.record("samples", 5)
    broken.error = OSError("gone")
    metrics.rewind(lambda record: False)
    assert (len(broken), len(memory)) == (1, 0)
    broken.error = UserError("make room")
    with pytest.raises(UserError, match="make room"):
        metrics.rewind(lambda record: False)


def test_each_logger_gets_its_own_record() -> None:
    """A logger may modify its record."""

    class Clearing(MemoryLogger):
        def write(self, record: dict[str, Any]) -> None:
            record.clear()

    memory = MemoryLogger()
    metrics, _ = make_metrics(Clearing(), memory)
    metrics.record("samples", 1)
    assert [(record["kind"], record["step"]) for record in memory] == [("samples", 1)]
