"""The learning rate at the steps where others have had it wrong, against the lecture's formula."""

import math

import pytest

from rekindle.optim.schedule import learning_rate
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


def test_every_step_is_the_lectures() -> None:
    for step in [*EDGES, *range(0, 20_000, 37)]:
        assert learning_rate(step, **LECTURE) == pytest.approx(lecture_get_lr(step), rel=1e-12)


def test_the_lectures_recipe_has_the_lectures_numbers() -> None:
    recipe = RECIPES["gpt2-124m"]
    s = recipe.schedule
    numbers = {"peak": recipe.optim.lr, "warmup": s.warmup, "steps": recipe.steps, "final": s.final}
    assert numbers == LECTURE


def test_edges() -> None:
    assert learning_rate(0, **LECTURE) == 6e-4 / 715  # never 0: the first step counts
    assert learning_rate(714, **LECTURE) == 6e-4  # the last of the warm-up
    assert learning_rate(715, **LECTURE) == pytest.approx(6e-4)  # the first of the cosine
    assert learning_rate(717, **LECTURE) < learning_rate(716, **LECTURE) < 6e-4
    assert learning_rate(19_072, **LECTURE) > 6e-5
    assert learning_rate(19_072, **LECTURE) == pytest.approx(6e-5, rel=1e-6)
    assert learning_rate(19_073, **LECTURE) == pytest.approx(6e-5)
    assert learning_rate(10**9, **LECTURE) == pytest.approx(6e-5)


@pytest.mark.parametrize(
    ("warmup", "steps"), [(715, 10), (715, 715), (715, 716), (10, 1), (0, 5), (0, 1), (0, 0)]
)
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_it_is_never_negative_and_never_above_the_peak(
    warmup: int, steps: int, final: float
) -> None:
    rates = [
        learning_rate(step, peak=1.0, warmup=warmup, steps=steps, final=final)
        for step in range(2 * steps + 3)
    ]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    assert all(rate == final for rate in rates[steps:])


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    rates = [learning_rate(s, peak=1.0, warmup=100, steps=10, final=0.1) for s in range(10)]
    assert rates == pytest.approx([(s + 1) / 100 for s in range(10)])
