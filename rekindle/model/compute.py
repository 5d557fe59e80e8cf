"""How a model computes, whichever model it is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A model as training and evaluation call it, compiled or not: ids and targets (B, T) → loss.
Forward = Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Compute:
    """How a model computes, never what: all of these give the same result within rounding."""

    dtype: torch.dtype = torch.float32  # of the residual stream; weights are cast where they act
    # "plain": the scores written out, as the lecture begins; "flex": FlexAttention where windows or
    # documents hide tokens, which was not run on a GPU yet
    attention: str = "fused"
    separate_qkv: bool = False  # three products, whose gradients need no copy into one
    loss_kernel: bool = False  # head and loss as one operator, whose gradient replaces the logits
    mlp_kernel: bool = False  # GELU inside the products around it
    fp8_head: bool = False  # where there are gradients, a coarser rounding: see `fp8`
    recompute: bool = False  # keep only the blocks' inputs for backward: a third slower
