"""The shape of the modern model, and a switch for each of its ideas. Imports no torch, so that
recipes can."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from rekindle.errors import UserError
from rekindle.flags import flag

SIZES = ("n_layer", "n_embd", "head_size", "block_size", "vocab_size", "padded_vocab_size")


@dataclass(frozen=True)
class ModernConfig:
    """Everything that decides the model's parameters and arithmetic; 0, False or -1 switches an
    idea off. Behind each stands its source, where [modded] is modded-nanogpt, and its worth: by how
    much the loss is higher without it, in nats a byte (4 layers, 128 wide, 150 steps, one seed;
    less than 0.015 is noise: benchmarks/LOG.md). The record gained more from some: 15 % of its time
    by value embeddings, 24 % by shortcuts, soft-cap and momentum warm-up. Windows and documents
    stay off, because a mask that is computed in full saves no time.

    Raises `UserError` if no model can have these values.
    """

    n_layer: int = flag(12, "blocks")
    n_embd: int = flag(768, "width of the residual stream")
    head_size: int = flag(128, "channels of an attention head")  # 128 is the fastest on a GPU
    block_size: int = flag(1024, "longest context, in tokens")
    vocab_size: int = 50257  # real ids
    padded_vocab_size: int = 0  # rows of the embeddings and the head, with padding; 0: vocab_size
    # 2 pi times the base is the longest wavelength [Su 2021; modded]: 0.67
    rotary_base: int = flag(1024, "base of the rotary positions; 0: no positions")
    # To unit mean square [Henry 2020]: 0.034
    qk_norm: bool = flag(True, "normalize queries and keys")
    relu_squared: bool = flag(True, "ReLU² instead of GELU")  # [So 2021, Primer]: 0.026
    # [modded]: 0.080
    zero_init: bool = flag(True, "output projections and the head begin at zero")
    untied: bool = flag(True, "the head has weights of its own")  # [modded]: 0.09
    soft_cap: float = flag(15.0, "largest logit of the head; 0: any")  # [Gemma 2]: 0.000
    # [modded]: 0.012
    value_embeddings: int = flag(3, "how many layers at either end have value embeddings")
    # [nanochat]: 0.016
    value_gates: bool = flag(True, "gates on the value embeddings, one a head")
    # [modded]: 0.002
    embedding_shortcut: bool = flag(True, "the embedding is added to the input of every block")
    # [nanochat]: -0.011 with 32 of 128
    window: int = flag(0, "tokens that 3 of 4 layers look back at; 0: all")
    # -0.001
    document_token: int = flag(
        -1, "id that begins a document, which attention does not leave; -1: none"
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
        """Raises `UserError` unless `value` is of the type of `default` and not too small."""
        least = 1 if name in SIZES else min(default, 0)
        wanted, fits = f"a whole number of at least {least}", type(value) is int and value >= least
        if isinstance(default, bool):
            wanted, fits = "true or false", type(value) is bool
        elif isinstance(default, float):
            is_number = type(value) in (int, float)
            wanted, fits = "a number of at least 0", is_number and 0 <= value < math.inf
        if not fits:
            raise UserError(f"{name} must be {wanted}, but is {value!r}")

    @classmethod
    def from_dict(cls, described: dict[str, Any]) -> "ModernConfig":
        """The configuration that a file describes, with every field present.

        Raises `UserError` if a field is missing or no model can have these values.
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
        """What queries times keys are multiplied by.

        Normalised ones have a product of at most head_size, so the largest score is scale times
        that. The rule keeps it at 0.12 · 128 = 15.36 [modded, whose heads have 128]: the bare 0.12
        holds heads of 32 to 3.84, which costs 0.11 nats a byte.
        """
        return 15.36 / self.head_size if self.qk_norm else self.head_size**-0.5

    def is_windowed(self, layer: int) -> bool:
        """Three layers with a window, then one without, and none in the last [nanochat]."""
        return bool(self.window) and (layer + 1) % 4 != 0 and layer != self.n_layer - 1
