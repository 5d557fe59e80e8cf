"""Learning rate schedules: cosine and trapezoidal."""

import math


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup: int,
    steps: int,
    final: float,
    cooldown: float | None = None,
) -> float:
    """The learning rate at step `step`, counted from 0: the lecture's cosine schedule, or
    `linear_learning_rate` if `cooldown` is given.

    Linear from peak/warmup at step 0 to `peak` at the end of warm-up, then a cosine to `final`·peak
    at `steps`, and constant from there. Never negative. A run shorter than its warm-up only warms
    up.
    """
    if cooldown is not None:
        return linear_learning_rate(
            step, peak=peak, warmup=warmup, steps=steps, cooldown=cooldown, final=final
        )
    if step >= steps:
        return final * peak
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)  # 0 ... 1
    return final * peak + (1 - final) * peak * 0.5 * (1 + math.cos(math.pi * done))


def linear_learning_rate(
    step: int, *, peak: float, warmup: int, steps: int, cooldown: float, final: float
) -> float:
    """Warm-up, constant, linear cool-down: the learning rate at step `step`, counted from 0.

    Linear from peak/warmup at step 0 to `peak` at the end of warm-up, then `peak` until the last
    fraction `cooldown` (0 to 1) of the `steps` begins, then linear to `final`·peak at `steps`, and
    constant from there. If warm-up and cool-down overlap, the smaller value applies, so a run
    shorter than its warm-up never reaches the peak. Known as WSD or trapezoid (Hu et al. 2024,
    MiniCPM; Hägele et al. 2024). A run can be extended from its constant part.
    """
    if step >= steps:
        return final * peak
    rising = (step + 1) / warmup if step < warmup else 1.0
    left = (steps - step) / (cooldown * steps) if cooldown else 1.0  # 1 at the cool-down's start
    return peak * min(rising, final + (1 - final) * min(1.0, left))
