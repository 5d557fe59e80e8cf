"""GPT-2's configuration and its four published sizes. Recipes need it without importing torch."""

from dataclasses import dataclass, fields, replace
from typing import Any

from rekindle.errors import UserError
from rekindle.flags import flag


@dataclass(frozen=True)
class GPT2Config:
    """Everything that determines a GPT-2's parameters and arithmetic.

    Raises `UserError` if the sizes are invalid.
    """

    n_layer: int = flag(12, "blocks")
    n_head: int = flag(12, "attention heads")
    n_embd: int = flag(768, "width of the residual stream")
    block_size: int = flag(1024, "longest context, in tokens")
    vocab_size: int = 50257  # real ids: 50,000 merges, 256 bytes, <|endoftext|>
    padded_vocab_size: int = 0  # rows of the embedding, padding rows included; 0: vocab_size

    def __post_init__(self) -> None:
        if self.padded_vocab_size == 0:
            object.__setattr__(self, "padded_vocab_size", self.vocab_size)  # the class is frozen
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) is not int or value < 1:
                raise UserError(f"{f.name} must be a whole number of at least 1, but is {value!r}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.padded_vocab_size < self.vocab_size:
            raise UserError(
                f"padded_vocab_size {self.padded_vocab_size} is less than "
                f"vocab_size {self.vocab_size}"
            )

    @classmethod
    def from_dict(cls, described: dict[str, Any]) -> "GPT2Config":
        """The configuration that a file describes; every field must be present.

        Raises `UserError` if a field is missing or the sizes are invalid.
        """
        values: dict[str, Any] = {f.name: described.get(f.name) for f in fields(cls)}
        for name, value in values.items():
            if type(value) is not int or value < 1:
                raise UserError(f"{name} is missing or not a positive whole number")
        return cls(**values)

    def for_training(self) -> "GPT2Config":
        """The same model with the embedding padded to a multiple of 128 rows (50,257 → 50,304), a
        size that tensor cores handle faster."""
        return replace(self, padded_vocab_size=-(-self.vocab_size // 128) * 128)


# Radford et al. 2019, table 2; numbers of heads from the released checkpoints.
SIZES = {
    "gpt2": GPT2Config(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": GPT2Config(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPT2Config(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPT2Config(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
