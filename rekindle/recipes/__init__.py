"""Recipes: all hyperparameters of a training run."""

from rekindle.recipes.base import (
    FREE_ON_RESUME,
    SCHEMA,
    Batch,
    Recipe,
    Schedule,
    check,
    differences,
    flatten,
    override,
    warnings,
    with_vocabulary,
)
from rekindle.recipes.files import find_recipe, named_in, steps_at_start
from rekindle.recipes.named import RECIPES, customized, get_recipe, with_steps

__all__ = [
    "FREE_ON_RESUME",
    "RECIPES",
    "SCHEMA",
    "Batch",
    "Recipe",
    "Schedule",
    "check",
    "customized",
    "differences",
    "find_recipe",
    "flatten",
    "get_recipe",
    "named_in",
    "override",
    "steps_at_start",
    "warnings",
    "with_steps",
    "with_vocabulary",
]
