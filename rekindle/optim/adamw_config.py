"""AdamW's numbers. Imports no torch, so that recipes can."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdamWConfig:
    """The defaults are GPT-3's for its smallest model (Brown et al. 2020, appendix B)."""

    lr: float = 6e-4  # at the peak of the schedule
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
