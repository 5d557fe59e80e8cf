"""The shape of a GPT-2, and its four published sizes. Imports no torch, so that recipes can."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from rekindle.errors import UserError


@dataclass(frozen=True)
class GPT2Config:
    """Everything that decides a GPT-2's parameters and arithmetic.

    Raises `UserError` if no GPT-2 can have these sizes.
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # longest context, in tokens
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
        """The configuration that a file describes, with every field present.

        Raises `UserError` if a field is missing or no GPT-2 can have these sizes.
        """
        values: dict[str, Any] = {f.name: described.get(f.name) for f in fields(cls)}
        for name, value in values.items():
            if type(value) is not int or value < 1:
                raise UserError(f"{name} is missing or no positive whole number")
        return cls(**values)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of the parameters, one by one: a file may claim any `n_layer`."""
        C = self.n_embd
        yield "transformer.wte.weight", (self.padded_vocab_size, C)
        yield "transformer.wpe.weight", (self.block_size, C)
        linear = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C),
                  "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}  # fmt: skip
        for n in range(self.n_layer):
            for norm in ("ln_1", "ln_2"):
                yield f"transformer.h.{n}.{norm}.weight", (C,)
                yield f"transformer.h.{n}.{norm}.bias", (C,)
            for name, shape in linear.items():
                yield f"transformer.h.{n}.{name}.weight", shape
                yield f"transformer.h.{n}.{name}.bias", shape[:1]
        yield "transformer.ln_f.weight", (C,)
        yield "transformer.ln_f.bias", (C,)

    def for_training(self) -> "GPT2Config":
        """The same model with the embedding padded to a multiple of 128 rows (50,257 → 50,304), a
        size that tensor cores handle faster."""
        return replace(self, padded_vocab_size=-(-self.vocab_size // 128) * 128)

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations per trained token: 6 for every weight that multiplies, and
        attention counted in full (12·n_layer·n_embd·T), as in the PaLM paper's appendix B."""
        weights = self.n_layer * 12 * self.n_embd**2 + self.padded_vocab_size * self.n_embd
        return 6 * weights + 12 * self.n_layer * self.n_embd * T


def check_shapes(
    found: Mapping[str, Iterable[int]], expected: Iterable[tuple[str, tuple[int, ...]]]
) -> None:
    """Raises `UserError` that names a tensor which is missing, unknown or of another shape."""
    unknown = set(found)
    for name, shape in expected:
        if name not in found:
            raise UserError(f"not the weights of this GPT-2: {name} is missing or unknown")
        if tuple(found[name]) != shape:
            raise UserError(f"{name} has shape {tuple(found[name])}, not {shape}")
        unknown.remove(name)
    if unknown:
        raise UserError(f"not the weights of this GPT-2: {min(unknown)} is missing or unknown")


# Radford et al. 2019, table 2; the heads are those of the released checkpoints.
SIZES = {
    "gpt2": GPT2Config(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": GPT2Config(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPT2Config(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPT2Config(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
