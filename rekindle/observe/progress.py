"""The progress, speed and remaining time of a preparation, a download or an evaluation."""

import time

from rekindle.observe.console import Console, duration


class Progress:
    """A progress line, first shown after the usual interval."""

    def __init__(self, console: Console, unit: str, label: str = "") -> None:
        self._console, self._unit, self._label = console, unit, label
        self._start = time.monotonic()
        self._part_before: float | None = None  # done by earlier runs, so not counted in our time
        self._count = 0
        console.postpone()

    def update(self, count: int, part: float) -> None:
        """Show that this run has processed `count` units so far and that `part` (0 to 1) of all
        input has been read."""
        self._count = count
        if self._part_before is None:
            self._part_before = part if count == 0 else 0.0
        parts = (
            self._label,
            f"{min(part, 1.0):.0%}",
            self._left(part),
            self._rate(),
            f"{count:,} {self._unit}",
        )
        self._console.progress(*filter(None, parts), passing=True)

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
        if done <= 0 or part >= 1:  # no basis for an estimate, or nothing left
            return ""
        return f"{duration(self._elapsed() * (1 - part) / done)} left"
