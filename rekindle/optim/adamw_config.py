"""AdamW's hyperparameters. Recipes need them without importing torch."""

from dataclasses import dataclass

from rekindle.flags import flag


@dataclass(frozen=True)
class AdamWConfig:
    """The defaults are GPT-3's for its smallest model (Brown et al. 2020, appendix B)."""

    lr: float = flag(6e-4, "peak learning rate")
    beta1: float = flag(0.9, "decay of AdamW's first moment")
    beta2: float = flag(0.95, "decay of AdamW's second moment")
    eps: float = flag(1e-8, "AdamW's epsilon")
    weight_decay: float = flag(0.1, "weight decay, on matrices only")
