"""Muon's numbers, and the rules that give them for a size and a length of training. Imports no
torch, so that recipes can.

[track 3]: modded-nanogpt's tuned script with a plain architecture, 768 wide, 3,250 steps of 524,288
tokens. [ours]: the modern model, 128 wide, 75 to 300 steps of 4,096 bytes (benchmarks/LOG.md).
"""

from dataclasses import dataclass

from rekindle.errors import UserError


@dataclass(frozen=True)
class MuonConfig:
    """Learning rates are those at the schedule's peak; all follow the schedule together."""

    lr: float = 0.03  # of matrices, by Muon; 0.025 in [track 3]
    momentum: float = 0.95
    momentum_start: float = 0.85  # before the first update [modded-nanogpt]
    momentum_warmup: int = 0  # updates until `momentum` is reached; 0: at once
    nesterov: bool = True
    weight_decay: float = 0.0  # of matrices
    cautious: bool = True  # decay only numbers that the update moves towards zero anyway
    embedding_lr: float = 0.3  # of weights near 1; 0.7 in [track 3], 0.3 in nanochat
    value_lr: float = 0.1
    head_lr: float = 0.004  # [track 3]
    vector_lr: float = 0.015  # gates, biases and gains [track 3]
    scalar_lr: float = 0.015
    beta1: float = 0.8  # this and the next two of AdamW [track 3]
    beta2: float = 0.95
    eps: float = 1e-10

    def __post_init__(self) -> None:
        if not self.lr > 0:  # the other rates keep their ratios to it
            raise UserError(f"lr must be above 0, but is {self.lr}")

    @classmethod
    def by_rule(cls, n_embd: int, steps: int) -> "MuonConfig":
        """The numbers for a model this wide and a run this long.

        The head's rate falls as 1 / width, since its logits are sums over the width (Yang et al.
        2022, muP): 0.004 at 768 [track 3]; best of two at 256, of three at 128 [ours]. Matrices
        have one rate at all widths and batches, but weights must come as far in a short run: 0.025
        for 3,250 steps [track 3]; 0.055 is best of three for 75, 0.04 no worse for 150 [ours].
        Momentum rises over the first tenth: 300 of 3,250 steps in modded-nanogpt. Decay takes the
        same share of the weights from every run (Wang and Aitchison 2024), 4 e-foldings [track 3].
        """
        steps = max(1, steps)
        lr = min(0.06, 0.025 + 2.25 / steps)
        return cls(
            lr=lr,
            head_lr=0.004 * 768 / n_embd,
            momentum_warmup=steps // 10,
            weight_decay=4 / (lr * steps),
        )

    def adamw_lr(self, role: str) -> float:
        """The learning rate of parameters that are no matrices, by their role."""
        return {
            "embedding": self.embedding_lr,
            "value_embedding": self.value_lr,
            "head": self.head_lr,
            "vector": self.vector_lr,
            "scalar": self.scalar_lr,
        }[role]


def warmup_steps(steps: int) -> int:
    """Steps of linear warm-up for a run this long: a 75th of it, 2 of 150 [ours]. An orthogonal
    update has the same size from the first step on, and needs hardly any."""
    return steps // 75
