"""The modern model's configuration, with a switch for each of its ideas. Recipes need it without
importing torch."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from rekindle.errors import UserError
from rekindle.flags import flag

SIZES = ("n_layer", "n_embd", "head_size", "block_size", "vocab_size", "padded_vocab_size")


@dataclass(frozen=True)
class ModernConfig:
    """Everything that determines the model's parameters and arithmetic. 0, False or -1 disables an
    idea.

    Comments give each idea's source ([modded] is modded-nanogpt) and how much higher the loss is
    without it, in nats per byte (4 layers, 128 wide, 150 steps, one seed; differences below 0.015
    are noise: benchmarks/LOG.md). The speed record gained more from some: 15 % of its time by value
    embeddings, 24 % by shortcuts, soft-cap and momentum warm-up. Windows and document masks are off
    by default, because a mask that is computed in full saves no time.

    Raises `UserError` if the values are invalid.
    """

    n_layer: int = flag(12, "blocks")
    n_embd: int = flag(768, "width of the residual stream")
    head_size: int = flag(128, "channels of an attention head")  # 128 is the fastest on a GPU
    block_size: int = flag(1024, "longest context, in tokens")
    vocab_size: int = 50257  # real ids
    padded_vocab_size: int = 0  # rows of the embeddings and the head, with padding; 0: vocab_size
    # 2 pi times the base is the longest wavelength [Su 2021; modded]: 0.67
    rotary_base: int = flag(1024, "base of the rotary positions; 0 disables them")
    qk_norm: bool = flag(True, "normalize queries and keys")  # [Henry 2020]: 0.034
    relu_squared: bool = flag(True, "ReLU² instead of GELU")  # [So 2021, Primer]: 0.026
    zero_init: bool = flag(True, "output projections and head start at zero")  # [modded]: 0.080
    untied: bool = flag(True, "do not tie the head to the embedding")  # [modded]: 0.09
    soft_cap: float = flag(15.0, "soft cap on the head's logits; 0 disables it")  # [Gemma 2]: 0.000
    value_embeddings: int = flag(3, "layers at either end with value embeddings")  # [modded]: 0.012
    value_gates: bool = flag(True, "gate the value embeddings, by head")  # [nanochat]: 0.016
    embedding_shortcut: bool = flag(True, "add the embedding before each block")  # [modded]: 0.002
    # [nanochat]: -0.011 with 32 of 128; the next -0.001
    window: int = flag(0, "attention window of 3 in 4 layers, in tokens; 0: none")
    document_token: int = flag(
        -1, "token id that begins a document; attention stays in it; -1: none"
    )

    def __post_init__(self) -> None:
        if self.padded_vocab_size == 0:
            object.__setattr__(self, "padded_vocab_size", self.vocab_size)  # the class is frozen
        for f in fields(self):
            self._check(f.name, getattr(self, f.name), f.default)
        D, C, V, L = self.head_size, self.n_embd, self.vocab_size, self.n_layer
        rows, token, tables = self.padded_vocab_size, self.document_token, self.value_embeddings
        for wrong, reason in (
            (D % 4 or C % D, f"head_size {D} must be a multiple of 4 that divides n_embd {C}"),
            (rows < V, f"padded_vocab_size {rows} is less than vocab_size {V}"),
            (token >= V, f"document_token {token} is not in the vocabulary"),
            (2 * tables > L, f"value_embeddings {tables} is more than half of n_layer {L}"),
        ):
            if wrong:
                raise UserError(reason)

    @staticmethod
    def _check(name: str, value: Any, default: Any) -> None:
        """Raise `UserError` unless `value` has the type of `default` and is not too small."""
        least = 1 if name in SIZES else min(default, 0)
        wanted, valid = f"a whole number of at least {least}", type(value) is int and value >= least
        if isinstance(default, bool):
            wanted, valid = "true or false", type(value) is bool
        elif isinstance(default, float):
            is_number = type(value) in (int, float)
            wanted, valid = "a number of at least 0", is_number and 0 <= value < math.inf
        if not valid:
            raise UserError(f"{name} must be {wanted}, but is {value!r}")

    @classmethod
    def from_dict(cls, described: dict[str, Any]) -> "ModernConfig":
        """The configuration that a file describes; every field must be present.

        Raises `UserError` if a field is missing or a value is invalid.
        """
        names = [f.name for f in fields(cls)]
        if missing := [name for name in names if name not in described]:
            raise UserError(f"{missing[0]} is missing")
        return cls(**{name: described[name] for name in names})

    def for_training(self) -> "ModernConfig":
        """The same model with the vocabulary padded to a multiple of 128 rows (50,257 → 50,304), a
        size that tensor cores handle faster."""
        return replace(self, padded_vocab_size=-(-self.vocab_size // 128) * 128)

    @property
    def attention_scale(self) -> float:
        """The factor applied to the dot products of queries and keys.

        Normalized queries and keys have a dot product of at most head_size, so the largest score is
        scale · head_size. This rule fixes it at 0.12 · 128 = 15.36 [modded, with heads of 128]. A
        constant 0.12 would limit heads of 32 to 3.84, which costs 0.11 nats per byte.
        """
        return 15.36 / self.head_size if self.qk_norm else self.head_size**-0.5

    def is_windowed(self, layer: int) -> bool:
        """Three windowed layers, then one without, and none in the last layer [nanochat]."""
        return bool(self.window) and (layer + 1) % 4 != 0 and layer != self.n_layer - 1
