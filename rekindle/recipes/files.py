"""Recipes in TOML files: a named recipe as the base, and the numbers that differ.

base = "gpt2-124m"
steps = 5000

[optim]
lr = 1e-3
"""

import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rekindle.errors import UserError
from rekindle.flags import Flag, flags_of
from rekindle.recipes.base import Recipe
from rekindle.recipes.named import RECIPES, customized, get_recipe

SUFFIX = ".toml"


def find_recipe(name: str) -> tuple[Recipe, dict[str, Any]]:
    """A recipe and the changes to it: a named recipe without changes, or the contents of a file if
    `name` ends in .toml. Raises `UserError`."""
    return read_recipe(Path(name)) if name.endswith(SUFFIX) else (get_recipe(name), {})


def named_in(arguments: Sequence[str]) -> Recipe:
    """The recipe named in a command line, or gpt2-124m if there is none. Raises `UserError`."""
    names = [a for a in arguments[1:] if a in RECIPES or a.endswith(SUFFIX)]
    if not names or arguments[0] != "train":
        return RECIPES["gpt2-124m"]
    return customized(*find_recipe(names[0]))


def read_recipe(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """Read a recipe file; return the recipe it is based on, and its changes by dotted name. Raises
    `UserError`, which names the file and the key."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no recipe file {path}") from None
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}") from None
    base = found.pop("base", None)
    if not isinstance(base, str):
        raise UserError(f'{path} does not name a base recipe: add base = "gpt2-124m"')
    recipe = get_recipe(base)
    flags = {flag.name: flag for flag in flags_of(recipe)}
    changes = {key: _value(path, key, value, flags) for key, value in _flat(found).items()}
    about = f"{recipe.name} with the numbers of {path.name}"
    return recipe, {"name": path.stem, "about": about, **changes}


def steps_at_start(run: Path) -> int | None:
    """The steps that a run was started with, on which some of its hyperparameters depend; None for
    a new run, or if its run.json is damaged, which is reported when the run is opened."""
    from rekindle import storage  # which imports NumPy: --help does not wait for it

    try:
        return storage.read_json(run / "run.json", {"recipe": {"steps": int}})["recipe"]["steps"]
    except UserError:
        return None


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _value(path: Path, key: str, value: Any, flags: dict[str, Flag]) -> Any:
    """The value of a key, converted to the type of its field."""
    if key not in flags:
        near = get_close_matches(key, flags, n=2) or ["a flag of `rekindle train --help`"]
        raise UserError(f"{path}: a recipe has no {key}: did you mean {' or '.join(near)}?")
    kind = flags[key].type
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise UserError(f"{path}: {key} is {value!r}, but must be {names[kind]}")
    return value
