"""Muon's numbers, and the rules that give them for a size and a length of training. Imports no
torch, so that recipes can.

[track 3]: modded-nanogpt's tuned script with a plain architecture, 768 wide, 3,250 steps of 524,288
tokens. [ours]: the modern model, 128 wide, 75 to 300 steps of 4,096 bytes (benchmarks/LOG.md).
"""

from dataclasses import dataclass

from rekindle.errors import UserError
from rekindle.flags import flag


@dataclass(frozen=True)
class MuonConfig:
    """Learning rates are those at the schedule's peak; all follow the schedule together."""

    lr: float = flag(0.03, "peak learning rate of matrices, by Muon")  # 0.025 in [track 3]
    momentum: float = flag(0.95, "Muon's momentum")
    momentum_start: float = flag(0.85, "momentum before the first update")  # [modded-nanogpt]
    momentum_warmup: int = flag(0, "updates until the momentum is reached; 0: at once")
    nesterov: bool = flag(True, "Nesterov's form of the momentum")
    weight_decay: float = flag(0.0, "weight decay, on matrices only")
    cautious: bool = flag(True, "decay only numbers that the update moves towards zero anyway")
    # Of weights near 1; 0.7 in [track 3], 0.3 in nanochat.
    embedding_lr: float = flag(0.3, "peak learning rate of the embedding, by AdamW")
    value_lr: float = flag(0.1, "peak learning rate of value embeddings")
    head_lr: float = flag(0.004, "peak learning rate of the head")  # [track 3]
    vector_lr: float = flag(0.015, "peak learning rate of gates, biases and gains")  # [track 3]
    scalar_lr: float = flag(0.015, "peak learning rate of learned factors")
    beta1: float = flag(0.8, "decay of AdamW's first moment")  # [track 3], as the next two
    beta2: float = flag(0.95, "decay of AdamW's second moment")
    eps: float = flag(1e-10, "AdamW's epsilon")

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
