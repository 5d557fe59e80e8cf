"""Optimizers. To add one, write the optimizer and its configuration in a file each, and add a line
to `OPTIMIZERS`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from rekindle.optim.gradients import grad_norm as grad_norm

OPTIMIZERS = {"adamw": "rekindle.optim.adamw.AdamW", "muon": "rekindle.optim.muon.Muon"}


class OptimizerConfig(Protocol):
    """What every optimizer's configuration, a frozen dataclass, has. Each adds fields and flags.
    Its module must not import torch."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def lr(self) -> float:
        """The peak learning rate; groups may scale it."""
        ...


class Optimizer(Protocol):
    """The interface of an optimizer, which is built as `Class(model, config)`."""

    Config: ClassVar[type[Any]]  # its frozen dataclass

    def __init__(self, model: Any, config: Any) -> None: ...

    def set_lr(self, lr: float) -> None:
        """The schedule's value for the next step; groups may scale it."""
        ...

    def step(self, skip: "Tensor") -> None:
        """Update the weights. If `skip`, a scalar bool on the device, is true, nothing changes:
        neither the weights nor the state, including the count of updates."""
        ...

    def state_tensors(self) -> "dict[str, Tensor]":
        """The complete optimizer state by name. Tensors are allocated on construction, may have any
        type and shape, and may be sharded like the parameters. They are saved in checkpoints and
        compared between ranks; to restore them, values are copied into them."""
        ...


def __getattr__(name: str) -> Any:
    """Import `grad_norm` on first use, so that recipes can import this package without torch."""
    if name == "grad_norm":
        return import_module("rekindle.optim.gradients").grad_norm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
