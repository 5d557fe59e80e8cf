"""A step is accepted or refused as a whole. The guard decides, by the loss and the gradient's norm.

Both are the same on every rank, and so is the decision. What the guard remembers is saved with the
weights, so that a run which goes on decides as if it had never stopped.
"""

import math
from collections import deque
from statistics import median
from typing import Any

import numpy as np

WINDOW = 128  # accepted losses that say what is usual
ENOUGH = 32  # of them, before any loss is called a spike
MARGIN = 0.2  # a spike is also this much above the median: a flat curve has hardly any deviation
DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations


class Guard:
    """Refuses what is not finite, and losses far above the recent ones."""

    def __init__(self, spike: float = 0.0) -> None:
        """`spike`: how many robust standard deviations above the median of the last accepted losses
        a loss may be; 0: any finite loss will do."""
        self._spike = spike
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.refused = 0  # steps in a row

    def objection(self, loss: float, norm: float) -> str:
        """Why a step with this loss and gradient norm must not be taken; empty if it may be."""
        reason = self._reason(loss, norm)
        if reason:
            self.refused += 1
        else:
            self.refused = 0
            self._losses.append(loss)
        return reason

    def _reason(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "not finite"
        if loss > self.limit():
            return f"a spike, where {median(self._losses):.4f} is usual"
        return ""

    def limit(self) -> float:
        """The largest loss that the next step may have, known before it is taken: infinite while
        any finite loss will do. Rounded to float32, in which a device compares losses with it."""
        if not self._spike or len(self._losses) < ENOUGH:
            return math.inf
        usual = median(self._losses)
        deviation = DEVIATION * median(abs(seen - usual) for seen in self._losses)
        return float(np.float32(usual + max(self._spike * deviation, MARGIN * abs(usual))))

    def state(self) -> dict[str, Any]:
        """What to save; JSON keeps every bit of a float."""
        return {"losses": list(self._losses), "refused": self.refused}

    def restore(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self.refused = state["refused"]
