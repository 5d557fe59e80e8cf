"""The learning rate against the lecture's formula, at the steps where mistakes are common."""

import itertools
import math

import pytest

from rekindle.optim.schedule import learning_rate, linear_learning_rate
from rekindle.recipes import RECIPES

LECTURE = {"peak": 6e-4, "warmup": 715, "steps": 19_073, "final": 0.1}


def lecture_get_lr(it: int) -> float:
    """`get_lr` of karpathy/build-nanogpt, word for word."""
    max_lr = 6e-4
    min_lr = max_lr * 0.1
    warmup_steps = 715
    max_steps = 19073
    if it < warmup_steps:
        return max_lr * (it + 1) / warmup_steps
    if it > max_steps:
        return min_lr
    decay_ratio = (it - warmup_steps) / (max_steps - warmup_steps)
    assert 0 <= decay_ratio <= 1
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (max_lr - min_lr)


EDGES = [0, 1, 713, 714, 715, 716, 10_000, 19_071, 19_072, 19_073, 19_074, 10**6]


def test_every_step_matches_the_lecture() -> None:
    for step in [*EDGES, *range(0, 20_000, 37)]:
        assert learning_rate(step, **LECTURE) == pytest.approx(lecture_get_lr(step), rel=1e-12)


def test_gpt2_124m_recipe_has_the_lectures_schedule() -> None:
    recipe = RECIPES["gpt2-124m"]
    s = recipe.schedule
    numbers = {"peak": recipe.optim.lr, "warmup": s.warmup, "steps": recipe.steps, "final": s.final}
    assert numbers == LECTURE


def test_edges() -> None:
    assert learning_rate(0, **LECTURE) == 6e-4 / 715  # never 0: the first step counts
    assert learning_rate(714, **LECTURE) == 6e-4  # the last step of warm-up
    assert learning_rate(715, **LECTURE) == pytest.approx(6e-4)  # the first step of the cosine
    assert learning_rate(717, **LECTURE) < learning_rate(716, **LECTURE) < 6e-4
    assert learning_rate(19_072, **LECTURE) > 6e-5
    assert learning_rate(19_072, **LECTURE) == pytest.approx(6e-5, rel=1e-6)
    assert learning_rate(19_073, **LECTURE) == pytest.approx(6e-5)
    assert learning_rate(10**9, **LECTURE) == pytest.approx(6e-5)


@pytest.mark.parametrize(
    ("warmup", "steps"), [(715, 10), (715, 715), (715, 716), (10, 1), (0, 5), (0, 1), (0, 0)]
)
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_rate_is_never_negative_or_above_the_peak(warmup: int, steps: int, final: float) -> None:
    rates = [
        learning_rate(step, peak=1.0, warmup=warmup, steps=steps, final=final)
        for step in range(2 * steps + 3)
    ]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    assert all(rate == final for rate in rates[steps:])


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    rates = [learning_rate(s, peak=1.0, warmup=100, steps=10, final=0.1) for s in range(10)]
    assert rates == pytest.approx([(s + 1) / 100 for s in range(10)])


# ---- Linear --------------------------------------------------------------------------------------

TRAPEZOID = {"peak": 0.03, "warmup": 10, "steps": 200, "cooldown": 0.6, "final": 0.1}


def test_warm_up_constant_cool_down() -> None:
    rates = [linear_learning_rate(step, **TRAPEZOID) for step in range(300)]
    assert rates[0] == pytest.approx(0.003)  # never 0: the first step counts
    assert rates[4] == pytest.approx(0.015)
    assert rates[9:81] == [0.03] * 72  # the last 60 % of 200 steps begin at step 80
    assert rates[81] == pytest.approx(0.03 * (1 - 0.9 / 120))
    assert rates[140] == pytest.approx(0.03 * 0.55)  # halfway from 1 to 0.1
    assert rates[199] == pytest.approx(0.03 * (0.1 + 0.9 / 120))
    assert rates[200:] == [0.003] * 100


def test_cool_down_is_linear_for_any_number_of_steps() -> None:
    """A cool-down to zero over 60 % of the run is the fraction of it that is left."""
    for steps in (75, 1_000):
        for step in range(steps):
            rate = linear_learning_rate(
                step, peak=2.0, warmup=0, steps=steps, cooldown=0.6, final=0
            )
            assert rate == pytest.approx(2 * min(1, (steps - step) / (0.6 * steps)))


def test_without_cool_down_the_rate_stays_at_the_peak() -> None:
    numbers = {**TRAPEZOID, "cooldown": 0.0}
    assert [linear_learning_rate(s, **numbers) for s in range(9, 200)] == [0.03] * 191


@pytest.mark.parametrize(("warmup", "steps"), [(10, 200), (715, 10), (10, 12), (0, 1), (0, 0)])
@pytest.mark.parametrize("cooldown", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_linear_rate_stays_in_range_and_falls_only_once(
    warmup: int, steps: int, cooldown: float, final: float
) -> None:
    numbers = {"peak": 1.0, "warmup": warmup, "steps": steps, "cooldown": cooldown, "final": final}
    rates = [linear_learning_rate(step, **numbers) for step in range(steps + 3)]
    assert all(0 < rate <= 1 for rate in rates[:steps])
    assert rates[steps:] == [final] * 3
    falls = [a >= b for a, b in itertools.pairwise(rates)]
    assert falls == sorted(falls)  # it rises, then never rises again
