"""Arms in the order of their worth, each in a fresh process, until the time is up."""

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
    """A command whose results are worth having by themselves."""

    name: str
    command: tuple[str, ...]
    least: float  # seconds that it needs; with fewer left it is not started
    most: float  # seconds after which it is taken to hang


def in_order(arms: Sequence[Arm], statuses: Mapping[str, str]) -> list[Arm]:
    """What is left to do: not what is done; what failed comes last, since it may fail again."""
    left = [arm for arm in arms if statuses.get(arm.name) != DONE]
    return sorted(left, key=lambda arm: statuses.get(arm.name) == FAILED)


def visit(
    arms: Sequence[Arm],
    record: Record,
    seconds: float,
    env: Mapping[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Run the arms one after the other for at most so many seconds in all. What fails, hangs or
    does not fit into the time left does not keep the next from running. SIGTERM ends the arm, too.
    """
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        _visit(arms, record, time.monotonic() + seconds, env, say)
    finally:
        signal.signal(signal.SIGTERM, before)


def _visit(
    arms: Sequence[Arm],
    record: Record,
    deadline: float,
    env: Mapping[str, str] | None,
    say: Callable[[str], None],
) -> None:
    for arm in arms:
        left = deadline - time.monotonic()
        if left < arm.least:
            say(f"{arm.name}: left out, it needs {arm.least:.0f} s of {max(0, left):.0f} s left")
            continue
        began = time.monotonic()
        status, why = _run(arm, record, min(left, arm.most), left < arm.most, env)
        record.end(arm.name, status, time.monotonic() - began, why)
        say(f"{arm.name}: {status} in {time.monotonic() - began:.0f} s{why and f', {why}'}")


def _run(
    arm: Arm, record: Record, limit: float, is_last: bool, env: Mapping[str, str] | None
) -> tuple[str, str]:
    """Run an arm in a process group of its own; return how it ended, and why."""
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
        return (STOPPED, "the time was up") if is_last else (FAILED, f"not over in {limit:.0f} s")
    finally:
        _kill(process)
        reader.join(5)  # a process that left the group may still hold the pipe
    return (DONE, "") if status == 0 else (FAILED, f"status {status}")


def _copy(pipe: int, record: Record) -> None:
    while text := os.read(pipe, 1 << 16):
        record.printed(text)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started: they would hold the card's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
