"""What is trained: pure PyTorch, without files, processes or clocks.

`LanguageModel` is the contract that every model fulfils, and `MODELS` names them. Neither imports
torch until a class is asked for.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor, nn

    from rekindle.model.cache import KVCache
    from rekindle.model.compute import Compute

    MODELS: dict[str, type["LanguageModel"]]


class Config(Protocol):
    """What every model's frozen configuration has; each adds its own fields."""

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


class LanguageModel(Protocol):
    """A language model, an `nn.Module`. B sequences, T positions, C channels, V rows of the head.

    Training calls the module itself, which is `forward`. `forward`, `body`, `head` and `losses`
    agree with one another: `head(body(idx))` without padding rows is what `forward` returns.
    """

    def __init__(self, config: Any) -> None: ...

    @property
    def config(self) -> Config: ...

    @property
    def blocks(self) -> Sequence["nn.Module"]:
        """The residual blocks in order: the units of sharding and of recomputation."""
        ...

    def use(self, compute: "Compute") -> "Self":
        """Compute like this from now on; returns the model. The weights stay as they are."""
        ...

    def __call__(
        self, idx: "Tensor", targets: "Tensor | None" = None, cache: "KVCache | None" = None
    ) -> tuple["Tensor | None", "Tensor | None"]:
        """`forward`."""
        ...

    def forward(
        self, idx: "Tensor", targets: "Tensor | None" = None, cache: "KVCache | None" = None
    ) -> tuple["Tensor | None", "Tensor | None"]:
        """Token ids (B, T) → (logits (B, T, vocab_size), None), or with `targets` (B, T), of which
        -100 are ignored, (None, mean cross-entropy in nats)."""
        ...

    def body(
        self,
        idx: "Tensor",
        cache: "KVCache | None" = None,
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

    def parameters(self) -> Iterator["nn.Parameter"]: ...
    def named_parameters(self) -> Iterator[tuple[str, "nn.Parameter"]]: ...
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

    def new_cache(self, B: int, capacity: int) -> "KVCache":
        """An empty key-value cache for B rows of up to `capacity` positions."""
        ...


def __getattr__(name: str) -> Any:
    if name == "MODELS":
        from rekindle.model.gpt2 import GPT2
        from rekindle.model.modern import Modern

        models: dict[str, type[LanguageModel]] = {"gpt2": GPT2, "modern": Modern}
        return models
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
