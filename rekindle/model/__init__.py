"""The models: pure PyTorch, without files, processes or clocks.

Every model implements `LanguageModel` and is listed in `MODELS`. To add one, write the model and
its configuration in a file each, and add a line to `MODELS`. This module does not import torch.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from typing import Self

    import torch
    from torch import Tensor, nn

    from rekindle.model.compute import Compute


MODELS = {"gpt2": "rekindle.model.gpt2.GPT2", "modern": "rekindle.model.modern.Modern"}


class ModelConfig(Protocol):
    """What every model's configuration, a frozen dataclass, has. Each adds fields and flags."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def n_layer(self) -> int: ...
    @property
    def block_size(self) -> int:
        """The longest context, in tokens."""
        ...

    @property
    def vocab_size(self) -> int: ...
    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head; ids from `vocab_size` on are padding."""
        ...

    @classmethod
    def from_dict(cls, described: dict[str, Any]) -> "Self":
        """The configuration that a checkpoint describes. Raises `UserError` if it is invalid."""
        ...

    def for_training(self) -> "Self":
        """The same model with sizes padded to what a device handles faster."""
        ...


class Cache(Protocol):
    """A model's state after the tokens so far, for generating one token at a time.

    The first forward pass may have a single row, which is then copied to all rows.
    """

    @property
    def positions(self) -> "Tensor | None":
        """Position of the next token, (1,), to pass to `body`; None until `fix` is called."""
        ...

    @property
    def mask(self) -> "Tensor | None":
        """The slots that the next token may attend to, to pass to `body`; None until `fix`."""
        ...

    def advance(self, positions: int) -> None:
        """Move the end of the cache after a forward pass over this many positions."""
        ...

    def fix(self) -> None:
        """Keep all shapes constant from now on, so that a step is compiled only once."""
        ...


class HasParameters(Protocol):
    """The part of `nn.Module` that is used to save, compare and count weights."""

    def parameters(self) -> Iterator["nn.Parameter"]: ...
    def named_parameters(self) -> Iterator[tuple[str, "nn.Parameter"]]: ...


class LanguageModel(HasParameters, Protocol):
    """A language model, an `nn.Module`. B sequences, T positions, C channels, V rows of the head.

    Training calls the module itself, which runs `forward`. `forward`, `body`, `head` and `losses`
    are consistent: `forward(idx)` returns `head(body(idx))` without the padding rows.
    """

    Config: ClassVar[type[Any]]  # its frozen dataclass

    def __init__(self, config: Any) -> None: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def blocks(self) -> Sequence["nn.Module"]:
        """The residual blocks in order: the units of sharding and activation checkpointing."""
        ...

    def use(self, compute: "Compute") -> "Self":
        """Set how the model computes; returns the model. The weights do not change."""
        ...

    def __call__(
        self, idx: "Tensor", targets: "Tensor | None" = None, cache: "Any | None" = None
    ) -> tuple["Tensor | None", "Tensor | None"]:
        """`forward`."""
        ...

    def cast(self, dtype: "torch.dtype", rows: int = 0) -> "Self":
        """Cast the weights of all matmuls once, for sampling in batches of `rows` without
        training; returns the model."""
        ...

    def forward(
        self, idx: "Tensor", targets: "Tensor | None" = None, cache: "Any | None" = None
    ) -> tuple["Tensor | None", "Tensor | None"]:
        """Token ids (B, T) → (logits (B, T, vocab_size), None). With `targets` (B, T): (None, mean
        cross-entropy in nats); targets of -100 are ignored."""
        ...

    def body(
        self,
        idx: "Tensor",
        cache: "Any | None" = None,
        positions: "Tensor | None" = None,
        mask: "Tensor | None" = None,
    ) -> "Tensor":
        """Token ids (B, T) → the head's input (B, T, C).

        `positions` (T,) or (B, T): the tokens' positions in their texts; by default consecutive,
        starting at the end of the cache. `mask` (B or 1, 1, T, S), boolean: True where a token may
        attend to one of the S keys; by default to itself and all earlier ones.
        """
        ...

    def head(self, x: "Tensor") -> "Tensor":
        """(..., C) → logits (..., V) with padding rows, which are part of the loss."""
        ...

    def losses(self, x: "Tensor", targets: "Tensor") -> "Tensor":
        """(N, C), (N,) → the cross-entropy of each target in nats, (N,) float32, 0 where it is
        -100. Without gradients, the logits are computed in pieces to save memory."""
        ...

    def parameter_roles(self) -> dict[str, str]:
        """{name: role} for exactly the `named_parameters`. Optimizers distinguish the roles
        "embedding" (also of a tied head), "value_embedding", "head", "matrix" (of a hidden layer),
        "vector" (a bias, gain or gate) and "scalar" (a learned factor)."""
        ...

    def parameter_count(self) -> int:
        """Number of weights in all parameters, without padding rows."""
        ...

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations per training token in a context of T tokens."""
        ...

    def new_cache(self, B: int, capacity: int) -> Cache:
        """An empty key-value cache for B rows of up to `capacity` positions."""
        ...
