"""Every number of every training run."""

from rekindle.recipes.base import (
    FORM,
    FREE_ON_RESUME,
    Batch,
    Recipe,
    Schedule,
    check,
    differences,
    flatten,
    override,
    warnings,
)
from rekindle.recipes.named import RECIPES, get_recipe, with_steps

__all__ = [
    "FORM",
    "FREE_ON_RESUME",
    "RECIPES",
    "Batch",
    "Recipe",
    "Schedule",
    "check",
    "differences",
    "flatten",
    "get_recipe",
    "override",
    "warnings",
    "with_steps",
]
