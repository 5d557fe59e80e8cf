"""A step is applied or skipped as a whole. The guard decides, by the loss and the gradient norm.

Both are the same on every rank, and so is the decision. The guard's memory is saved with the
weights, so that a resumed run decides as if it had never stopped.
"""

import math
from collections import deque
from statistics import median
from typing import Any

import numpy as np

WINDOW = 128  # losses of applied steps that say what is usual
ENOUGH = 32  # of them, before any loss is called a spike
MARGIN = 0.2  # a spike is also this much above the median: a flat curve has hardly any deviation
DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations


class Guard:
    """Skips steps whose loss or gradient is not finite, or whose loss is far above recent ones."""

    def __init__(self, spike: float = 0.0) -> None:
        """`spike`: how many robust standard deviations a loss may be above the median of recent
        losses; 0: any finite loss will do."""
        self._spike = spike
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped = 0  # steps in a row
        self.reason = ""  # why the last step was skipped; empty if it was applied

    def observe(self, loss: float, grad_norm: float) -> str:
        """Take note of a step; return why it was skipped, empty if it was applied. The rule is the
        one by which `train_step` decides on the device."""
        self.reason = self._reason(loss, grad_norm)
        if self.reason:
            self.skipped += 1
        else:
            self.skipped = 0
            self._losses.append(loss)
        return self.reason

    def _reason(self, loss: float, grad_norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "not finite"
        if loss > self.limit():
            return f"a spike, where {median(self._losses):.4f} is usual"
        return ""

    def limit(self) -> float:
        """The largest loss with which the next step is applied, known before it is taken; infinite
        if any finite loss will do. Rounded to float32, in which a device compares losses with
        it."""
        if not self._spike or len(self._losses) < ENOUGH:
            return math.inf
        usual = median(self._losses)
        deviation = DEVIATION * median(abs(seen - usual) for seen in self._losses)
        return float(np.float32(usual + max(self._spike * deviation, MARGIN * abs(usual))))

    def state(self) -> dict[str, Any]:
        """What to save; JSON keeps every bit of a float."""
        return {"losses": list(self._losses), "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self.skipped = state["skipped"]
