"""The shapes of a model's parameters, and checks of a file's tensors against them."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from rekindle.errors import UserError
from rekindle.model import HasParameters

Module = TypeVar("Module", bound=HasParameters)


class _WithoutInit(TorchFunctionMode):
    """Skips `torch.nn.init`. On the meta device, initialization has no effect, but the first
    `normal_` takes 2 s because it imports PyTorch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


def on_meta(model_class: Callable[[Any], Module], config: Any) -> Module:
    """Build `model_class(config)` on the meta device: parameters have shapes but no memory.

    Raises `UserError` if PyTorch cannot have tensors of these sizes.
    """
    try:
        with torch.device("meta"), _WithoutInit():
            return model_class(config)
    except (RuntimeError, TypeError) as error:  # a size or a product of sizes exceeds 2^63
        raise UserError(f"a model of these sizes cannot be built: {config}") from error


def without_init(model_class: Callable[[Any], Module], config: Any) -> Module:
    """Build `model_class(config)` with uninitialized parameters, to be overwritten."""
    with _WithoutInit():
        return model_class(config)


def expected_shapes(
    model_class: Callable[[Any], HasParameters], config: Any, found: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the parameters of `model_class(config)`, for a file with tensors `found`.

    Raises `UserError` if the file has fewer tensors than `config.n_layer`. That is checked before
    the model is built, because a file may claim any number of layers.
    """
    if config.n_layer > len(found):
        raise UserError(f"n_layer is {config.n_layer}, but there are only {len(found)} tensors")
    model = on_meta(model_class, config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def check_shapes(
    found: Mapping[str, Iterable[int]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `UserError` naming a tensor that is missing, unknown or has the wrong shape."""
    unknown = set(found)
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"not the weights of this GPT-2: {name} is missing or unknown")
        if tuple(found[name]) != shape:
            raise UserError(f"{name} has shape {tuple(found[name])}, not {shape}")
        unknown.remove(name)
    if unknown:
        raise UserError(f"not the weights of this GPT-2: {min(unknown)} is missing or unknown")
