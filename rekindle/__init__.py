"""Rekindle: GPT-2 reproduced from scratch in PyTorch, then surpassed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rekindle.loading import load
    from rekindle.machine import Machine, MachineOptions, resolve
    from rekindle.model.gpt2 import GPT2
    from rekindle.model.gpt2_config import GPT2Config
    from rekindle.recipes import Recipe, get_recipe
    from rekindle.sampling import generate
    from rekindle.trainer import Trainer, build

# The module of each public name; `rekindle.loading` adds `from_pretrained` to `GPT2`.
_MODULES = {
    "GPT2": "loading",
    "GPT2Config": "model.gpt2_config",
    "Machine": "machine",
    "MachineOptions": "machine",
    "Recipe": "recipes",
    "Trainer": "trainer",
    "build": "trainer",
    "generate": "sampling",
    "get_recipe": "recipes",
    "load": "loading",
    "resolve": "machine",
}

__all__ = [
    "GPT2",
    "GPT2Config",
    "Machine",
    "MachineOptions",
    "Recipe",
    "Trainer",
    "__version__",
    "build",
    "generate",
    "get_recipe",
    "load",
    "resolve",
]


def __getattr__(name: str) -> Any:
    """Import a module on first use, so that `rekindle --help` does not have to import torch."""
    if name in _MODULES:
        return getattr(import_module(f"rekindle.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'rekindle' has no attribute {name!r}")
