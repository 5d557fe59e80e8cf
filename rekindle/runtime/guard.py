"""Decides which optimizer steps are skipped, from the loss and the gradient norm.

Both are the same on every rank, so all ranks decide alike. The guard's state is part of every
checkpoint, so a resumed run decides exactly as an uninterrupted one.
"""

import math
from collections import deque
from statistics import median
from typing import Any

import numpy as np

WINDOW = 128  # number of recent applied losses to compare with
MIN_LOSSES = 32  # number of losses needed before any loss counts as a spike
MARGIN = 0.2  # a spike must exceed the median by this fraction: on a flat curve deviations are tiny
DEVIATION = 1.4826  # standard deviation of a normal distribution / median absolute deviation


class Guard:
    """Skips steps whose loss or gradient is not finite, or whose loss is far above recent ones."""

    def __init__(self, spike: float = 0.0) -> None:
        """`spike`: skip a step whose loss is more than this many robust standard deviations above
        the median of recent losses; 0 disables."""
        self._spike = spike
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped = 0  # consecutive skipped steps, up to the last one
        self.reason = ""  # why the last step was skipped; empty if it was applied

    def observe(self, loss: float, grad_norm: float) -> str:
        """Record a step; return why it was skipped, or an empty string if it was applied.
        `train_step` applies the same rule on the device."""
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
            return f"loss spike (recent median {median(self._losses):.4f})"
        return ""

    def limit(self) -> float:
        """The largest loss with which the next step is applied; infinite if any finite loss is
        accepted. Rounded to float32, because the device compares in float32."""
        if not self._spike or len(self._losses) < MIN_LOSSES:
            return math.inf
        center = median(self._losses)
        deviation = DEVIATION * median(abs(loss - center) for loss in self._losses)
        return float(np.float32(center + max(self._spike * deviation, MARGIN * abs(center))))

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint. JSON preserves every bit of a float."""
        return {"losses": list(self._losses), "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self.skipped = state["skipped"]
