"""How long the steps of a run take: what is typical, and whether they have become much slower."""

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
        """Seconds that `steps` more will take; None after the first step, which is not typical."""
        return self._typical() * steps if len(self._recent) > 1 else None

    def slowdown(self) -> tuple[float, float] | None:
        """The best and the present seconds of a step, once, when the present is SLOW times that."""
        if self._warned or not self._best or not self._typical() > SLOW * self._best:
            return None
        self._warned = True
        return self._best, self._typical()

    def _typical(self) -> float:
        return median(self._recent)
