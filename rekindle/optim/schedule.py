"""The learning rate as a function of the step."""

import math


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, final: float) -> float:
    """The lecture's schedule at the update numbered `step`, from 0.

    Linear from peak/warmup at step 0 to `peak` at the end of warm-up, a cosine from there to
    `final`·peak at `steps`, and that for ever after. Never negative, and a run shorter than its
    warm-up only warms up.
    """
    if step >= steps:
        return final * peak
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)  # 0 ... 1
    return final * peak + (1 - final) * peak * 0.5 * (1 + math.cos(math.pi * done))
