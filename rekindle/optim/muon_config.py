"""Muon's numbers, and the rules that give them for a size and a length of training. Imports no
torch, so that recipes can.

[track 3]: modded-nanogpt's tuned script with a plain architecture, 768 wide, 3,250 steps of 524,288
tokens. [ours]: the modern model, 128 wide, 75 to 300 steps of 4,096 bytes (benchmarks/LOG.md).
"""

from dataclasses import dataclass


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

    @classmethod
    def by_rule(cls, n_embd: int, steps: int) -> "MuonConfig":
        """The numbers for a model this wide and a run this long.

        The head's rate falls as 1 / width, since its logits are sums over the width (Yang et al.
        2022, muP): 0.004 at 768 [track 3], 0.024 at 128 [ours]. The other rates are alike at both
        sizes, whatever the batch: AdamW moves an embedding's row, and Muon a matrix's output, by
        as much at any width. Momentum rises over the first tenth of a run: 300 of 3,250 steps in
        modded-nanogpt. Decay forgets a fixed share of the weights over the whole run (Wang and
        Aitchison 2024): 0.05 per step and rate for 3,250 steps [track 3].
        """
        return cls(
            head_lr=0.004 * 768 / n_embd,
            momentum_warmup=steps // 10,
            weight_decay=0.05 * 3_250 / max(1, steps),
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
    """Steps of linear warm-up for a run this long: a 75th of it. Orthogonal updates have one size
    from the first step on, and need hardly any [ours: 0, 2 and 8 of 150 steps are ties]."""
    return steps // 75
