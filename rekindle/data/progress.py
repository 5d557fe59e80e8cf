"""What a person sees while data are prepared: how far, how fast, how long still."""

import shutil
import sys
import time
from collections.abc import Callable

from rekindle.observe.console import duration

Say = Callable[[str], None]


class Progress:
    """A progress line: rewritten in place on a terminal, a plain line now and then elsewhere."""

    def __init__(self, say: Say, unit: str) -> None:
        self._say = say
        self._unit = unit
        self._in_place = say is print and sys.stdout.isatty()
        self._every = 0.2 if self._in_place else 10.0
        self._start = self._last = time.monotonic()
        self._part_before: float | None = None  # done by earlier runs: it took none of our time
        self._count = 0

    def update(self, count: int, part: float) -> None:
        """`count` units were made by this run so far; `part` (0 to 1) of all input is read."""
        self._count = count
        if self._part_before is None:
            self._part_before = part if count == 0 else 0.0
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        line = f"{count:,} {self._unit} · {self._rate()} · {min(part, 1.0):.0%}{self._left(part)}"
        if self._in_place:
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", flush=True)
        else:
            self._say(line)

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._in_place:
            print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="")
        self._say(line)

    def summary(self) -> str:
        return f"{duration(self._elapsed())}, {self._rate()}"

    def _elapsed(self) -> float:
        return time.monotonic() - self._start

    def _rate(self) -> str:
        rate = self._count / max(self._elapsed(), 1e-6)
        for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if rate >= size:
                return f"{rate / size:.1f}{suffix} {self._unit}/s"
        return f"{rate:.0f} {self._unit}/s"

    def _left(self, part: float) -> str:
        done = part - (self._part_before or 0.0)
        if done <= 0 or part >= 1:  # nothing to judge by, or nothing left
            return ""
        return f" · {duration(self._elapsed() * (1 - part) / done)} left"
