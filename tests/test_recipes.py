"""Recipes: their names, flags, and checks of their numbers."""

import dataclasses
from typing import Any

import pytest

from rekindle import recipes
from rekindle.errors import UserError
from rekindle.flags import flags_of
from rekindle.recipes import RECIPES, Recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_trained(name: str) -> None:
    recipe = recipes.get_recipe(name)
    recipes.check(recipe)
    assert recipe.name == name
    assert recipe.schedule.warmup < recipe.steps


def test_lecture_recipe_has_the_lectures_numbers() -> None:
    lecture = recipes.flatten(RECIPES["gpt2-124m"])
    for name, value in {
        "batch.tokens": 524_288, "batch.length": 1024, "batch.order": "lecture",
        "batch.lecture_micro_tokens": 64 * 1024,
        "optim.lr": 6e-4, "optim.beta1": 0.9, "optim.beta2": 0.95, "optim.eps": 1e-8,
        "optim.weight_decay": 0.1, "grad_clip": 1.0, "schedule.warmup": 715,
        "schedule.final": 0.1, "steps": 19_073, "seed": 1337, "eval_every": 250,
        "eval_tokens": 20 * 524_288, "model.n_layer": 12, "model.n_head": 12,
        "model.n_embd": 768, "model.block_size": 1024, "model.vocab_size": 50_257,
    }.items():  # fmt: skip
        assert lecture[name] == value, name
    tuned = RECIPES["gpt2-124m-tuned"]
    assert (tuned.batch.order, tuned.optim.lr) == ("shuffled", 1.8e-3)


def test_unknown_recipe_suggests_the_nearest_names() -> None:
    with pytest.raises(UserError, match=r"no recipe 'gpt2-124': did you mean gpt2-124m or "):
        recipes.get_recipe("gpt2-124")
    with pytest.raises(UserError, match=r"demo or demo-gpu|demo-gpu or demo"):
        recipes.get_recipe("dmeo")
    with pytest.raises(UserError, match="gpt2-xl"):  # no similar name: all are listed
        recipes.get_recipe("%%%")


def test_flatten_and_override_are_inverse() -> None:
    xl, demo = RECIPES["gpt2-xl"], RECIPES["demo"]
    assert recipes.override(demo, recipes.flatten(xl)) == xl
    assert recipes.override(demo, {}) == demo
    changed = recipes.override(demo, {"steps": 3, "optim.lr": 0.5, "optim.eps": 0.25})
    assert (changed.steps, changed.optim.lr, changed.optim.eps) == (3, 0.5, 0.25)
    assert changed.optim.beta2 == demo.optim.beta2
    assert demo.optim.lr == RECIPES["demo"].optim.lr == 3e-3  # the recipe itself has not changed


def test_every_number_has_a_flag() -> None:
    """Except those that the data determines, and the recipe's name and description."""
    names = set(recipes.flatten(RECIPES["demo"]))
    without_flag = {"name", "about", "model.vocab_size", "model.padded_vocab_size"}
    assert {flag.name for flag in flags_of(RECIPES["demo"])} == names - without_flag


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch.length": 33}, "--batch.length 33 is longer than --model.block-size 32"),
        ({"batch.tokens": 130}, "--batch.tokens 130 is not a whole number of windows"),
        ({"batch.tokens": 0}, "--batch.tokens 0"),
        ({"batch.length": 0}, "--batch.length 0"),
        ({"batch.order": "random"}, "shuffled or sequential or lecture, not 'random'"),
        ({"model.n_embd": 15}, "--model.n-embd 15 is not a multiple of --model.n-head 2"),
        ({"model.n_head": 0}, "--model.n-head"),
        ({"model.n_layer": 0}, "--model.n-layer"),
        ({"model.n_embd": 0}, "--model.n-embd must be a whole number of at least 1"),
        ({"optim.lr": -1.0}, "--optim.lr must be at least 0, but is -1.0"),
        ({"optim.lr": float("nan")}, "--optim.lr must be at least 0, but is nan"),
        ({"optim.lr": float("inf")}, "--optim.lr must be a finite number, but is inf"),
        ({"optim.weight_decay": float("inf")}, "--optim.weight-decay must be a finite number"),
        ({"optim.weight_decay": -0.1}, "--optim.weight-decay must be at least 0"),
        ({"steps": -1}, "--steps must be at least 0"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"optim.beta1": 1.0}, "--optim.beta1 must be below 1"),
        (
            {"batch.order": "lecture", "batch.lecture_micro_tokens": 40},
            "--batch.lecture-micro-tokens 40 is not a whole number of windows of --batch.length 16",
        ),
        (
            {"batch.order": "lecture", "batch.lecture_micro_tokens": 0},
            "--batch.lecture-micro-tokens 0 is not a whole number",
        ),
        (
            {"batch.order": "sequential", "batch.lecture_micro_tokens": 32},
            "--batch.lecture-micro-tokens 32 has no effect with --batch.order sequential",
        ),
    ],
)
def test_invalid_numbers_are_rejected(tiny: Recipe, changes: dict[str, Any], words: str) -> None:
    recipes.check(tiny)
    with pytest.raises(UserError) as error:
        recipes.check(recipes.override(tiny, changes))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch.length": 1, "batch.tokens": 1}, {"steps": 0}, {"optim.lr": 0.0},
        {"batch.length": 32}, {"seed": 2**63 - 1}, {"model.n_head": 1},
    ],
)  # fmt: skip
def test_extreme_valid_numbers_are_accepted(tiny: Recipe, changes: dict[str, Any]) -> None:
    recipes.check(recipes.override(tiny, changes))


def test_differences_name_each_field(tiny: Recipe) -> None:
    before = recipes.flatten(tiny)
    now = {**before, "optim.lr": 0.5, "model.n_layer": 9, "seed": 3}
    assert recipes.differences(before, now) == [
        "--model.n-layer was 2, now 9",
        "--optim.lr was 0.01, now 0.5",
        "--seed was 1337, now 3",
    ]


def test_fields_that_may_change_on_resume(tiny: Recipe) -> None:
    before = recipes.flatten(tiny)
    free = {
        "steps": 99, "eval_every": 9, "checkpoint_every": 9, "keep_checkpoints": 9,
            "keep_best": 9, "keep_every": 9,
        "eval_tokens": 9, "tokenizer": "x", "prompt": "x", "passage": "x", "about": "x",
        "batch.micro": 2,
    }  # fmt: skip
    assert recipes.differences(before, {**before, **free}) == []
    for name in set(before) - set(free):
        assert len(recipes.differences(before, {**before, name: "other"})) == 1, name


def test_a_field_newer_than_the_run_has_its_default(tiny: Recipe) -> None:
    now = recipes.flatten(tiny)
    before = {name: value for name, value in now.items() if name != "batch.lecture_micro_tokens"}
    assert recipes.differences(before, now) == []
    changed = {**now, "batch.lecture_micro_tokens": 32}
    expected = ["--batch.lecture-micro-tokens was 65536, now 32"]
    assert recipes.differences(before, changed) == expected
    assert recipes.differences(now, changed) == expected


def test_recipes_are_immutable(tiny: Recipe) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.steps = 3  # pyright: ignore[reportAttributeAccessIssue]
