"""Muon's numbers, and the rules that give them for a size and a length of training. Imports no
torch, so that recipes can."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MuonConfig:
    """Learning rates are those at the schedule's peak; all follow the schedule together."""

    lr: float = 0.03  # of matrices, by Muon
    momentum: float = 0.95
    momentum_start: float = 0.85  # before the first update
    momentum_warmup: int = 0  # updates until `momentum` is reached; 0: at once
    nesterov: bool = True
    weight_decay: float = 0.0  # of matrices
    cautious: bool = True  # decay only numbers that the update moves towards zero anyway
    embedding_lr: float = 0.3
    value_lr: float = 0.1
    head_lr: float = 0.024
    vector_lr: float = 0.015
    scalar_lr: float = 0.015
    beta1: float = 0.8
    beta2: float = 0.95
    eps: float = 1e-10

    def adamw_lr(self, role: str) -> float:
        """The learning rate of parameters that are no matrices, by their role."""
        return {
            "embedding": self.embedding_lr,
            "value_embedding": self.value_lr,
            "head": self.head_lr,
            "vector": self.vector_lr,
            "scalar": self.scalar_lr,
        }[role]
