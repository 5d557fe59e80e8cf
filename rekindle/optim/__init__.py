"""Gradients → weights. A new optimizer is a file here, its numbers in another, and a line in
`OPTIMIZERS`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from rekindle.optim.gradients import grad_norm as grad_norm

OPTIMIZERS = {"adamw": "rekindle.optim.adamw.AdamW", "muon": "rekindle.optim.muon.Muon"}


class OptimizerConfig(Protocol):
    """What every optimizer's frozen dataclass has; each adds its own fields, and flags among them.
    Imports no torch."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def lr(self) -> float:
        """The peak learning rate; groups may scale it."""
        ...


class Optimizer(Protocol):
    """What training asks of an optimizer, which is built as `Class(model, config)`."""

    Config: ClassVar[type[Any]]  # its frozen dataclass

    def __init__(self, model: Any, config: Any) -> None: ...

    def set_lr(self, lr: float) -> None:
        """The schedule's value for the next step; groups may scale it."""
        ...

    def step(self, skip: "Tensor") -> None:
        """One update. Where `skip`, a scalar bool on the device, is true, nothing changes: neither
        weights nor state, its own count of updates included."""
        ...

    def state_tensors(self) -> "dict[str, Tensor]":
        """All that it remembers, by name: allocated when it is built, of any type and shape, whole
        or sharded like the parameters. It is what is saved, compared between ranks and counted;
        to restore it, values are copied into these tensors."""
        ...


def __getattr__(name: str) -> Any:
    """Recipes import a configuration from here, without torch."""
    if name == "grad_norm":
        return import_module("rekindle.optim.gradients").grad_norm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
