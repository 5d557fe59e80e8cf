"""Maps the names in recipes and checkpoints to model and optimizer classes, and back."""

from importlib import import_module
from typing import Any

from rekindle.model import MODELS, LanguageModel, ModelConfig
from rekindle.optim import OPTIMIZERS, Optimizer, OptimizerConfig


def models() -> dict[str, type[LanguageModel]]:
    """The model classes by their names in `MODELS`."""
    return {name: _load(path) for name, path in MODELS.items()}


def optimizers() -> dict[str, type[Optimizer]]:
    """The optimizer classes by their names in `OPTIMIZERS`."""
    return {name: _load(path) for name, path in OPTIMIZERS.items()}


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def model_for(config: ModelConfig) -> type[LanguageModel]:
    """The model class for a recipe's configuration."""
    return next(c for c in models().values() if c.Config is type(config))


def optimizer_for(config: OptimizerConfig) -> type[Optimizer]:
    """The optimizer class for a recipe's configuration."""
    return next(c for c in optimizers().values() if c.Config is type(config))


def name_of(cls: Any, classes: dict[str, Any]) -> str:
    """The name of `cls` in `classes`, or its `__name__` if it is not there."""
    return next((name for name, each in classes.items() if each is cls), cls.__name__)
