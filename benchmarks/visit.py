"""Runs arms one after another, each in its own process, until the time is up."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.record import DONE, FAILED, STOPPED, Record


@dataclass(frozen=True)
class Arm:
    """A command whose results are useful on their own."""

    name: str
    command: tuple[str, ...]
    least: float  # seconds; with less time left, the arm is not started
    most: float  # seconds after which the arm counts as hung


def in_order(arms: Sequence[Arm], statuses: Mapping[str, str]) -> list[Arm]:
    """The arms that are not done. Failed arms come last, because they may fail again."""
    left = [arm for arm in arms if statuses.get(arm.name) != DONE]
    return sorted(left, key=lambda arm: statuses.get(arm.name) == FAILED)


def visit(
    arms: Sequence[Arm],
    record: Record,
    seconds: float,
    env: Mapping[str, str] | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Run the arms one after another, for at most `seconds` in total. An arm that fails, hangs or
    needs more time than is left does not prevent the next one. SIGTERM also ends the running arm.
    """
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        _visit(arms, record, time.monotonic() + seconds, env, report)
    finally:
        signal.signal(signal.SIGTERM, before)


def _visit(
    arms: Sequence[Arm],
    record: Record,
    deadline: float,
    env: Mapping[str, str] | None,
    report: Callable[[str], None],
) -> None:
    for arm in arms:
        left = deadline - time.monotonic()
        if left < arm.least:
            report(f"{arm.name}: not started, needs {arm.least:.0f} s of {max(0, left):.0f} s left")
            continue
        began = time.monotonic()
        status, why = _run(arm, record, min(left, arm.most), left < arm.most, env)
        record.end(arm.name, status, time.monotonic() - began, why)
        report(f"{arm.name}: {status} in {time.monotonic() - began:.0f} s{why and f', {why}'}")


def _run(
    arm: Arm, record: Record, limit: float, is_last: bool, env: Mapping[str, str] | None
) -> tuple[str, str]:
    """Run an arm in its own process group. Returns how it ended, and why."""
    record.printed(f"\n==== {arm.name}\n".encode())
    process = subprocess.Popen(
        arm.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        start_new_session=True,
    )
    assert process.stdout
    reader = threading.Thread(target=_copy, args=(process.stdout.fileno(), record), daemon=True)
    reader.start()
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return (STOPPED, "no time left") if is_last else (FAILED, f"timeout after {limit:.0f} s")
    finally:
        _kill(process)
        reader.join(5)  # a process that left the group may keep the pipe open
    return (DONE, "") if status == 0 else (FAILED, f"status {status}")


def _copy(pipe: int, record: Record) -> None:
    while text := os.read(pipe, 1 << 16):
        record.printed(text)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its children, which would otherwise keep the GPU's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
