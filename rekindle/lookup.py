"""From the names in recipes and checkpoints to classes, and back."""

from importlib import import_module
from typing import Any

from rekindle.model import MODELS, LanguageModel, ModelConfig
from rekindle.optim import OPTIMIZERS, Optimizer, OptimizerConfig


def models() -> dict[str, type[LanguageModel]]:
    """The classes in `MODELS`."""
    return {name: _load(path) for name, path in MODELS.items()}


def optimizers() -> dict[str, type[Optimizer]]:
    """The classes in `OPTIMIZERS`."""
    return {name: _load(path) for name, path in OPTIMIZERS.items()}


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def model_for(config: ModelConfig) -> type[LanguageModel]:
    """The class in `MODELS` that a recipe's configuration belongs to."""
    return next(c for c in models().values() if c.Config is type(config))


def optimizer_for(config: OptimizerConfig) -> type[Optimizer]:
    """The class in `OPTIMIZERS` that a recipe's configuration belongs to."""
    return next(c for c in optimizers().values() if c.Config is type(config))


def name_of(found: Any, table: dict[str, Any]) -> str:
    """The name of a class in `table`; the class's own if it is not there."""
    return next((name for name, each in table.items() if each is found), found.__name__)
