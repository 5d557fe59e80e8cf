"""The guard refuses what is not finite and what stands far out, and nothing else."""

import json
import math
import random
from collections.abc import Iterable

import pytest

from rekindle.runtime.guard import DEVIATION, MARGIN, MIN_LOSSES, WINDOW, Guard


def accustomed(losses: Iterable[float], spike: float = 10.0) -> Guard:
    """A guard that has accepted these losses."""
    guard = Guard(spike)
    for loss in losses:
        assert not guard.observe(loss, 1.0)
    return guard


@pytest.mark.parametrize("spike", [0.0, 10.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step_on(bad: float, spike: float) -> None:
    guard = Guard(spike)
    assert guard.observe(bad, 1.0) == guard.observe(1.0, bad) == "not finite"
    assert guard.skipped == 2
    assert not guard.observe(1.0, 1.0)
    assert guard.skipped == 0


def test_a_spike_is_so_many_deviations_above_the_median() -> None:
    """2 ± 0.1: half of the losses lie 0.1 from the median, so that this is their deviation."""
    losses = [1.9, 2.0, 2.1] * 20 + [2.0, 1.9]
    limit = 2.0 + 10 * DEVIATION * 0.1
    assert not accustomed(losses).observe(limit - 1e-6, 1.0)
    assert accustomed(losses).observe(limit + 1e-6, 1.0) == "loss spike (recent median 2.0000)"
    assert accustomed(losses, spike=5.0).observe(2.0 + 5 * DEVIATION * 0.1 + 1e-6, 1.0)


def test_a_few_wild_losses_do_not_move_the_limit() -> None:
    losses = [1.9, 2.0, 2.1] * 20
    wild = Guard(10.0)
    wild.restore({"losses": [*losses, 90.0, 95.0], "skipped": 0})
    assert wild.observe(2.0 + 10 * DEVIATION * 0.1 + 1e-6, 1.0)


def test_on_a_flat_curve_a_spike_is_a_fifth_above() -> None:
    flat = [2.0] * MIN_LOSSES
    assert not accustomed(flat).observe(2.0 * (1 + MARGIN) - 1e-6, 1.0)
    assert accustomed(flat).observe(2.0 * (1 + MARGIN) + 1e-6, 1.0)


def test_a_loss_far_below_is_welcome() -> None:
    assert not accustomed([2.0] * MIN_LOSSES).observe(0.1, 1.0)


def test_nothing_is_a_spike_before_enough_losses() -> None:
    assert not accustomed([2.0] * (MIN_LOSSES - 1)).observe(99.0, 1.0)
    assert accustomed([2.0] * MIN_LOSSES).observe(99.0, 1.0)


def test_refused_losses_are_not_learnt() -> None:
    guard = accustomed([2.0] * MIN_LOSSES)
    before = guard.state()["losses"]
    for n in range(1, 2 * WINDOW):
        assert guard.observe(9.0, 1.0)
        assert guard.observe(2.0, math.inf)
        assert guard.skipped == 2 * n
    assert guard.state()["losses"] == before


def test_only_the_last_losses_count() -> None:
    guard = accustomed([9.0] * WINDOW)
    for _ in range(WINDOW):
        guard.observe(2.0, 1.0)
    assert guard.observe(9.0, 1.0)
    assert len(guard.state()["losses"]) == WINDOW


def test_without_a_limit_any_finite_loss_will_do() -> None:
    assert not accustomed([2.0] * WINDOW, spike=0.0).observe(1e30, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_saved_and_restored_it_decides_the_same(seed: int) -> None:
    """Before every step, also in a row of refusals."""
    chance = random.Random(seed)
    losses = [chance.choice([chance.gauss(2, 0.1)] * 9 + [9.0, math.nan]) for _ in range(400)]
    straight, guard, longest = Guard(10.0), Guard(10.0), 0
    for loss in losses:
        saved, guard = json.dumps(guard.state()), Guard(10.0)
        guard.restore(json.loads(saved))
        assert guard.observe(loss, 1.0) == straight.observe(loss, 1.0)
        assert guard.skipped == straight.skipped
        longest = max(longest, guard.skipped)
    assert longest > 1
    assert json.dumps(guard.state()) == json.dumps(straight.state())
