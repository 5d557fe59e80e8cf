"""Every number of every training run."""

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
)
from rekindle.recipes.named import RECIPES, get_recipe, with_rules, with_steps

__all__ = [
    "FREE_ON_RESUME",
    "RECIPES",
    "SCHEMA",
    "Batch",
    "Recipe",
    "Schedule",
    "check",
    "differences",
    "flatten",
    "get_recipe",
    "override",
    "warnings",
    "with_rules",
    "with_steps",
]
