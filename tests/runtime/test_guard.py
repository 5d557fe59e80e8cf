"""The guard skips steps that are not finite and loss spikes, and no other steps."""

import json
import math
import random
from collections.abc import Iterable

import pytest

from rekindle.runtime.guard import DEVIATION, MARGIN, MIN_LOSSES, WINDOW, Guard


def guard_after(losses: Iterable[float], spike: float = 10.0) -> Guard:
    """A guard that has observed these losses and accepted all of them."""
    guard = Guard(spike)
    for loss in losses:
        assert not guard.observe(loss, 1.0)
    return guard


@pytest.mark.parametrize("spike", [0.0, 10.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_step_is_always_skipped(bad: float, spike: float) -> None:
    guard = Guard(spike)
    assert guard.observe(bad, 1.0) == guard.observe(1.0, bad) == "not finite"
    assert guard.skipped == 2
    assert not guard.observe(1.0, 1.0)
    assert guard.skipped == 0


def test_spike_limit_is_in_deviations_above_the_median() -> None:
    """Losses of 2 ± 0.1: most lie 0.1 from the median, so this is their median deviation."""
    losses = [1.9, 2.0, 2.1] * 20 + [2.0, 1.9]
    limit = 2.0 + 10 * DEVIATION * 0.1
    assert not guard_after(losses).observe(limit - 1e-6, 1.0)
    assert guard_after(losses).observe(limit + 1e-6, 1.0) == "loss spike (recent median 2.0000)"
    assert guard_after(losses, spike=5.0).observe(2.0 + 5 * DEVIATION * 0.1 + 1e-6, 1.0)


def test_outliers_do_not_move_the_limit() -> None:
    losses = [1.9, 2.0, 2.1] * 20
    wild = Guard(10.0)
    wild.restore({"losses": [*losses, 90.0, 95.0], "skipped": 0})
    assert wild.observe(2.0 + 10 * DEVIATION * 0.1 + 1e-6, 1.0)


def test_on_a_flat_curve_a_spike_must_exceed_the_margin() -> None:
    flat = [2.0] * MIN_LOSSES
    assert not guard_after(flat).observe(2.0 * (1 + MARGIN) - 1e-6, 1.0)
    assert guard_after(flat).observe(2.0 * (1 + MARGIN) + 1e-6, 1.0)


def test_low_loss_is_accepted() -> None:
    assert not guard_after([2.0] * MIN_LOSSES).observe(0.1, 1.0)


def test_no_spike_before_enough_losses() -> None:
    assert not guard_after([2.0] * (MIN_LOSSES - 1)).observe(99.0, 1.0)
    assert guard_after([2.0] * MIN_LOSSES).observe(99.0, 1.0)


def test_losses_of_skipped_steps_are_not_recorded() -> None:
    guard = guard_after([2.0] * MIN_LOSSES)
    before = guard.state()["losses"]
    for n in range(1, 2 * WINDOW):
        assert guard.observe(9.0, 1.0)
        assert guard.observe(2.0, math.inf)
        assert guard.skipped == 2 * n
    assert guard.state()["losses"] == before


def test_only_recent_losses_count() -> None:
    guard = guard_after([9.0] * WINDOW)
    for _ in range(WINDOW):
        guard.observe(2.0, 1.0)
    assert guard.observe(9.0, 1.0)
    assert len(guard.state()["losses"]) == WINDOW


def test_zero_disables_the_spike_limit() -> None:
    assert not guard_after([2.0] * WINDOW, spike=0.0).observe(1e30, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_restored_guard_decides_the_same(seed: int) -> None:
    """Saved and restored before every step, also between consecutive skipped steps."""
    chance = random.Random(seed)
    losses = [chance.choice([chance.gauss(2, 0.1)] * 9 + [9.0, math.nan]) for _ in range(400)]
    original, guard, longest = Guard(10.0), Guard(10.0), 0
    for loss in losses:
        saved, guard = json.dumps(guard.state()), Guard(10.0)
        guard.restore(json.loads(saved))
        assert guard.observe(loss, 1.0) == original.observe(loss, 1.0)
        assert guard.skipped == original.skipped
        longest = max(longest, guard.skipped)
    assert longest > 1
    assert json.dumps(guard.state()) == json.dumps(original.state())
