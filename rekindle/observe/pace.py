"""The duration of a run's steps: the typical one, and whether steps have become much slower."""

from statistics import median

RECENT = 20  # steps
SLOW = 5.0  # times the typical step


class Pace:
    """The durations of a run's last steps."""

    def __init__(self) -> None:
        self._recent: list[float] = []
        self._best: float | None = None  # lowest median of RECENT steps so far
        self._warned = False

    def add(self, seconds: float) -> None:
        self._recent = [*self._recent[1 - RECENT :], seconds]
        if len(self._recent) == RECENT:
            self._best = min(self._best or self._typical(), self._typical())

    def left(self, steps: int) -> float | None:
        """Estimated seconds for `steps` more steps. None until the second step: the first is not
        typical."""
        return self._typical() * steps if len(self._recent) > 1 else None

    def slowdown(self) -> tuple[float, float] | None:
        """The best and the current seconds per step, once the current is more than SLOW times the
        best; returned only once."""
        if self._warned or not self._best or not self._typical() > SLOW * self._best:
            return None
        self._warned = True
        return self._best, self._typical()

    def _typical(self) -> float:
        return median(self._recent)
