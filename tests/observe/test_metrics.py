"""The console, the progress line and the log."""

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rekindle import storage
from rekindle.observe import console as module
from rekindle.observe.console import Console, duration
from rekindle.observe.json_lines import JsonLinesLogger
from rekindle.observe.metrics import Metrics
from rekindle.storage import JsonLines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The console's clock, set by the test."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (4.23, "4.2 s"), (9.96, "10 s"), (42, "42 s"), (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (60, "1 min 00 s"), (200, "3 min 20 s"), (3599, "59 min 59 s"), (3599.7, "1 h 00 min"),
        (3600, "1 h 00 min"), (5 * 3600 + 7 * 60, "5 h 07 min"), (100 * 3600, "100 h 00 min"),
    ],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plain_lines_without_a_terminal(clock: list[float]) -> None:
    stream = io.StringIO()
    console = Console(stream=stream)
    console.progress("one")
    clock[0] += 9
    console.progress("too early")
    console.progress("important", important=True)
    clock[0] += 11
    console.progress("two")
    console.print("a line")
    assert stream.getvalue() == "one\nimportant\ntwo\na line\n"


def test_terminal_line_is_rewritten_in_place(clock: list[float]) -> None:
    stream = Terminal()
    console = Console(stream=stream)
    console.progress("one")
    clock[0] += 0.1
    console.progress("too early")
    clock[0] += 0.2
    console.progress("two")
    assert stream.getvalue() == "\r\033[Kone\r\033[Ktwo"
    console.print("a line")  # on a separate line
    assert stream.getvalue().endswith("two\na line\n")
    console.progress("three", important=True)
    assert stream.getvalue().endswith("a line\n\r\033[Kthree\n")


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_are_quiet(stream: io.StringIO) -> None:
    console = Console(quiet=True, stream=stream)
    console.print("a")
    console.progress("b", important=True)
    assert stream.getvalue() == ""


def make_metrics(stream: io.StringIO, log: JsonLines | None = None, **changes: Any) -> Metrics:
    numbers = {"steps": 100, "tokens_per_step": 1000, "flops_per_token": 10, "peak_flops": None}
    loggers = [JsonLinesLogger(log, Console(stream=stream).print)] if log else []
    return Metrics(loggers, Console(stream=stream), **{**numbers, **changes})


STEP: dict[str, Any] = {"loss": 3.14159, "lr": 6e-4, "grad_norm": 1.5, "data_wait": 0.0025}


def test_progress_line() -> None:
    stream = io.StringIO()
    make_metrics(stream, peak_flops=20_000.0).step(0, seconds=2.0, **STEP)
    assert stream.getvalue() == (
        "step     0/100 | loss 3.1416 | 500 tok/s | mfu 25.0% | lr 6.00e-04 | grad norm 1.50 | "
        "data 2.5 ms\n"
    )


def test_mfu_of_an_unknown_device_is_omitted(tmp_path: Path) -> None:
    stream, log = io.StringIO(), JsonLines(tmp_path / "log.jsonl")
    make_metrics(stream, log).step(0, seconds=2.0, **STEP)
    assert "mfu" not in stream.getvalue()
    assert storage.read_json_lines(tmp_path / "log.jsonl")[0]["mfu"] is None


def test_skipped_step_is_printed_at_once(clock: list[float]) -> None:
    stream = io.StringIO()
    metrics = make_metrics(stream)
    metrics.step(1, seconds=2.0, **STEP)
    metrics.step(2, seconds=2.0, **{**STEP, "loss": float("nan"), "skip_reason": "not finite"})
    lines = stream.getvalue().splitlines()
    assert "SKIPPED" not in lines[0]
    assert "loss nan" in lines[1]
    assert lines[1].startswith("step     2/100 | SKIPPED: not finite | ")


def test_time_left_is_based_on_a_typical_step(clock: list[float]) -> None:
    """A step that compiles or stalls does not affect the estimate."""
    stream = io.StringIO()
    metrics = make_metrics(stream)
    for step, seconds in enumerate([60.0, 1.0, 1.0, 50.0, 1.0]):
        clock[0] += 11
        metrics.step(step, seconds=seconds, **STEP)
    assert stream.getvalue().splitlines()[-1].split(" | ")[2] == "1 min 35 s left"


def test_no_time_left_is_predicted_from_the_first_step() -> None:
    stream = io.StringIO()
    make_metrics(stream).step(0, seconds=60.0, **STEP)
    assert "left" not in stream.getvalue()


@pytest.mark.parametrize("width", [40, 80, 100])
def test_a_narrow_terminal_shows_whole_parts_of_the_line(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], width: int
) -> None:
    monkeypatch.setattr(module.shutil, "get_terminal_size", lambda: os.terminal_size((width, 24)))
    stream = Terminal()
    metrics = make_metrics(stream, peak_flops=50_000.0)
    for step in range(2):
        clock[0] += 11
        metrics.step(step, seconds=2.0, **STEP)
    line = stream.getvalue().split("\033[K")[-1].rstrip("\n")
    assert len(line) < width
    assert line.split(" | ")[:2] == ["step     1/100", "loss 3.1416"]
    assert ("3 min 16 s left" in line) == (width >= 80)
    assert not line.endswith(("|", " ", "3 min"))


def test_log_every_prints_those_steps_and_the_last(clock: list[float]) -> None:
    stream = io.StringIO()
    metrics = make_metrics(stream, steps=10, log_every=4)
    for step in range(10):
        clock[0] += 11
        metrics.step(step, seconds=1.0, **STEP)
    printed = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert printed == [0, 4, 8, 9]


def test_much_slower_steps_are_explained_once(clock: list[float]) -> None:
    stream = io.StringIO()
    metrics = make_metrics(stream, if_slow=": advice")
    durations = [0.1] * 30 + [0.4] * 30 + [9.0] + [0.1] * 9 + [0.6] * 40
    for step, seconds in enumerate(durations):
        metrics.step(step, seconds=seconds, **STEP)
        notes = stream.getvalue().count("note: ")
        assert notes == (step >= 79), step  # once half of the last 20 steps are slow
    assert "note: a step now takes 0.6 s instead of 0.1 s: advice\n" in stream.getvalue()


def test_log_records(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    metrics = make_metrics(io.StringIO(), log, peak_flops=50_000.0)
    metrics.step(7, seconds=0.5, **STEP)
    metrics.record("validation", 8, loss=3.0, tokens=12)
    metrics.close()
    records = storage.read_json_lines(tmp_path / "log.jsonl")
    assert all(abs(record.pop("time") - time.time()) < 60 for record in records)
    assert records == [
        {
            "kind": "train", "step": 7, "loss": 3.14159, "lr": 6e-4, "grad_norm": 1.5,
            "skipped": False, "tokens": 8000, "tokens_per_s": 2000.0, "mfu": 0.4,
            "data_wait_s": 0.0025, "seconds": 0.5,
        },
        {"kind": "validation", "step": 8, "loss": 3.0, "tokens": 12},
    ]  # fmt: skip


def test_log_is_valid_json_for_any_numbers(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    metrics = make_metrics(io.StringIO(), log)
    bad = {"loss": float("nan"), "grad_norm": float("inf"), "skip_reason": "not finite"}
    metrics.step(0, seconds=1.0, **{**STEP, **bad})
    text = (tmp_path / "log.jsonl").read_text()
    record = json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are not valid JSON
    assert (record["loss"], record["grad_norm"], record["skipped"]) == (None, None, True)


def test_rank_without_a_log_logs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens no file and prints nothing; everything else works as on the main rank."""
    monkeypatch.chdir(tmp_path)
    stream, opened = io.StringIO(), []
    monkeypatch.setattr(os, "open", lambda *a: opened.append(a))
    metrics = Metrics(
        [], Console(quiet=True, stream=stream), steps=100, tokens_per_step=1000,
        flops_per_token=10, peak_flops=None,
    )  # fmt: skip
    metrics.step(0, seconds=1.0, **STEP)
    metrics.step(1, seconds=1.0, **{**STEP, "skip_reason": "not finite"})
    metrics.record("validation", 1, loss=float("nan"))
    metrics.rewind(lambda record: pytest.fail("there is no record"))
    metrics.close()
    monkeypatch.undo()
    assert opened == []
    assert list(tmp_path.iterdir()) == []
    assert stream.getvalue() == ""
