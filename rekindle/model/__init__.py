"""What is trained: pure PyTorch, without files, processes or clocks.

`LanguageModel` is the contract that every model fulfils, and `MODELS` names them. Imports no torch.
A new model is a file here, its configuration in another, and a line in `MODELS`.
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
    """What every model's frozen dataclass has; each adds its own fields, and flags among them."""

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
        """Rows of the embedding and of the head; ids from `vocab_size` on are never real."""
        ...

    @classmethod
    def from_dict(cls, described: dict[str, Any]) -> "Self":
        """The configuration that a checkpoint describes. Raises `UserError` if there is none."""
        ...

    def for_training(self) -> "Self":
        """The same model, padded to sizes that a device handles faster."""
        ...


class Cache(Protocol):
    """What a model remembers of the positions it has seen, for generating one token at a time.

    The first pass may be a single row, with which all rows begin.
    """

    @property
    def positions(self) -> "Tensor | None":
        """Where the next token stands, (1,), once `fix` was called; what `body` is given."""
        ...

    @property
    def mask(self) -> "Tensor | None":
        """Which slots the next token may look at; None: those it is given."""
        ...

    def advance(self, positions: int) -> None:
        """So many positions have been seen by all blocks."""
        ...

    def fix(self) -> None:
        """Keep all shapes from now on, so that a step is compiled once."""
        ...


class HasParameters(Protocol):
    """What saving, comparing and counting weights ask of a model: any `nn.Module` will do."""

    def parameters(self) -> Iterator["nn.Parameter"]: ...
    def named_parameters(self) -> Iterator[tuple[str, "nn.Parameter"]]: ...


class LanguageModel(HasParameters, Protocol):
    """A language model, an `nn.Module`. B sequences, T positions, C channels, V rows of the head.

    Training calls the module itself, which is `forward`. `forward`, `body`, `head` and `losses`
    agree with one another: `head(body(idx))` without padding rows is what `forward` returns.
    """

    Config: ClassVar[type[Any]]  # its frozen dataclass

    def __init__(self, config: Any) -> None: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def blocks(self) -> Sequence["nn.Module"]:
        """The residual blocks in order: the units of sharding and of recomputation."""
        ...

    def use(self, compute: "Compute") -> "Self":
        """Compute like this from now on; returns the model. The weights stay as they are."""
        ...

    def __call__(
        self, idx: "Tensor", targets: "Tensor | None" = None, cache: "Any | None" = None
    ) -> tuple["Tensor | None", "Tensor | None"]:
        """`forward`."""
        ...

    def cast(self, dtype: "torch.dtype", rows: int = 0) -> "Self":
        """Cast the weights of all matmuls once, for a model that is sampled from in batches of
        `rows` and not trained; returns the model."""
        ...

    def forward(
        self, idx: "Tensor", targets: "Tensor | None" = None, cache: "Any | None" = None
    ) -> tuple["Tensor | None", "Tensor | None"]:
        """Token ids (B, T) → (logits (B, T, vocab_size), None), or with `targets` (B, T), of which
        -100 are ignored, (None, mean cross-entropy in nats)."""
        ...

    def body(
        self,
        idx: "Tensor",
        cache: "Any | None" = None,
        positions: "Tensor | None" = None,
        mask: "Tensor | None" = None,
    ) -> "Tensor":
        """Token ids (B, T) → (B, T, C), what the head reads.

        `positions` (T,) or (B, T): where in the text the tokens stand, if not one after the other
        from the cache's end on. `mask` (B or 1, 1, T, S), boolean: True where a token may look at
        one of S, if not at itself and all before.
        """
        ...

    def head(self, x: "Tensor") -> "Tensor":
        """(..., C) → logits (..., V), padding rows included, as the loss counts them."""
        ...

    def losses(self, x: "Tensor", targets: "Tensor") -> "Tensor":
        """(N, C), (N,) → the cross-entropy of each target in nats, (N,) float32, 0 where it is
        -100. Not all logits exist at once if no gradient is asked for."""
        ...

    def parameter_roles(self) -> dict[str, str]:
        """{name: role} for exactly the `named_parameters`. What optimizers distinguish:
        "embedding" (the head too, if it is tied), "value_embedding", "head", "matrix" (of a hidden
        layer), "vector" (a bias, gain or gate) and "scalar" (a learned factor)."""
        ...

    def parameter_count(self) -> int:
        """Numbers in all parameters, without padding rows."""
        ...

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations per trained token in a context of T tokens."""
        ...

    def new_cache(self, B: int, capacity: int) -> Cache:
        """An empty key-value cache for B rows of up to `capacity` positions."""
        ...
