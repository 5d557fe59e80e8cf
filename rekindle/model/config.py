"""The shape of a GPT-2, and its four published sizes. Imports no torch, so that recipes can."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class GPT2Config:
    """Everything that decides a GPT-2's parameters and arithmetic."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # real ids: 50,000 merges, 256 bytes, <|endoftext|>
    padded_vocab_size: int = 50257  # rows of the table; ids from vocab_size on are never real

    def for_training(self) -> "GPT2Config":
        """The same shape with the table padded to a multiple of 128 rows: 50,257 → 50,304, sizes
        that matrix units like."""
        return replace(self, padded_vocab_size=-(-self.vocab_size // 128) * 128)

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations per trained token: 6 for every weight that multiplies, and
        attention counted in full (12·n_layer·n_embd·T), as in the PaLM paper's appendix B."""
        weights = self.n_layer * 12 * self.n_embd**2 + self.padded_vocab_size * self.n_embd
        return 6 * weights + 12 * self.n_layer * self.n_embd * T


# Radford et al. 2019, table 2; the heads are those of the released checkpoints.
SIZES = {
    "gpt2": GPT2Config(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": GPT2Config(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPT2Config(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPT2Config(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
