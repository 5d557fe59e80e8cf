"""Muon's hyperparameters, and rules that derive them from model width and training length. Recipes
need them without importing torch.

[track 3]: modded-nanogpt's tuned script with a plain architecture, 768 wide, 3,250 steps of 524,288
tokens. [ours]: the modern model, 128 wide, 75 to 300 steps of 4,096 bytes (benchmarks/LOG.md).
"""

from dataclasses import dataclass

from rekindle.errors import UserError
from rekindle.flags import flag


@dataclass(frozen=True)
class MuonConfig:
    """Learning rates are peak values; the schedule scales all of them together."""

    lr: float = flag(0.03, "peak learning rate of matrices (Muon)")  # 0.025 in [track 3]
    momentum: float = flag(0.95, "Muon's momentum")
    momentum_start: float = flag(0.85, "momentum before the first update")  # [modded-nanogpt]
    momentum_warmup: int = flag(0, "updates until momentum is reached; 0: none")
    nesterov: bool = flag(True, "use Nesterov momentum")
    weight_decay: float = flag(0.0, "weight decay, on matrices only")
    cautious: bool = flag(True, "decay only weights that the update moves towards zero anyway")
    # For weights of about 1; 0.7 in [track 3], 0.3 in nanochat.
    embedding_lr: float = flag(0.3, "peak learning rate of the embedding (AdamW)")
    value_lr: float = flag(0.1, "peak learning rate of value embeddings")
    head_lr: float = flag(0.004, "peak learning rate of the head")  # [track 3]
    vector_lr: float = flag(0.015, "peak learning rate of gates, biases and gains")  # [track 3]
    scalar_lr: float = flag(0.015, "peak learning rate of learned factors")
    beta1: float = flag(0.8, "decay of AdamW's first moment")  # [track 3], like the next two
    beta2: float = flag(0.95, "decay of AdamW's second moment")
    eps: float = flag(1e-10, "AdamW's epsilon")

    def __post_init__(self) -> None:
        if not self.lr > 0:  # the other rates keep their ratios to it
            raise UserError(f"lr must be above 0, but is {self.lr}")

    @classmethod
    def by_rule(cls, n_embd: int, steps: int) -> "MuonConfig":
        """The hyperparameters for a model of width `n_embd` trained for `steps` steps.

        The head's rate falls as 1 / width, since logits are sums over the width (Yang et al. 2022,
        muP): 0.004 at 768 [track 3]; best of two at 256, of three at 128 [ours]. The matrices' rate
        is the same at all widths and batch sizes, but higher in short runs, so that weights can
        move as far: 0.025 for 3,250 steps [track 3]; 0.055 was best of three for 75, 0.04 no worse
        for 150 [ours]. Momentum rises over the first tenth: 300 of 3,250 steps in modded-nanogpt.
        Weight decay over a complete run is constant (Wang and Aitchison 2024), 4 e-foldings in
        [track 3].
        """
        steps = max(1, steps)
        lr = min(0.06, 0.025 + 2.25 / steps)
        head_lr, decay = 0.004 * 768 / n_embd, 4 / (lr * steps)
        return cls(lr=lr, head_lr=head_lr, momentum_warmup=steps // 10, weight_decay=decay)

    def adamw_lr(self, role: str) -> float:
        """The learning rate of parameters that are not matrices, by their role."""
        return getattr(self, f"{'value' if role == 'value_embedding' else role}_lr")


def warmup_steps(steps: int) -> int:
    """Steps of linear warm-up: 1/75 of the run, 2 of 150 [ours]. Orthogonal updates have the same
    size from the first step on, so they need hardly any warm-up."""
    return steps // 75
