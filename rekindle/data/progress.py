"""How far, how fast and how long still, while data are prepared."""

import time

from rekindle.observe.console import Console, duration


class Progress:
    """The progress line of a preparation or a download. The first comes after the usual time."""

    def __init__(self, console: Console, unit: str) -> None:
        self._console, self._unit = console, unit
        self._start = time.monotonic()
        self._part_before: float | None = None  # done by earlier runs: it took none of our time
        self._count = 0
        console.postpone()

    def update(self, count: int, part: float) -> None:
        """`count` units were made by this run so far; `part` (0 to 1) of all input is read."""
        self._count = count
        if self._part_before is None:
            self._part_before = part if count == 0 else 0.0
        line = f"{count:,} {self._unit} · {self._rate()} · {min(part, 1.0):.0%}{self._left(part)}"
        self._console.progress(line, passing=True)

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
