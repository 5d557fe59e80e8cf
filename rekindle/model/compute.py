"""How a model computes, independent of its architecture."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A model as training and evaluation call it, compiled or not: ids and targets (B, T) → loss.
Forward = Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Compute:
    """How a model computes. All settings give the same result up to rounding."""

    dtype: torch.dtype = torch.float32  # of the residual stream; weights are cast when used
    # "plain": explicit scores, as in the first part of the lecture; "flex": FlexAttention where
    # windows or documents mask tokens, not measured on a GPU yet
    attention: str = "fused"
    separate_qkv: bool = False  # three matmuls, whose gradients need not be copied into one
    loss_kernel: bool = False  # head and loss as one operator; the gradient overwrites the logits
    mlp_kernel: bool = False  # GELU fused into the matmuls around it
    fp8_head: bool = False  # the head in FP8 where gradients are computed; rounds more, see `fp8`
    recompute: bool = False  # activation checkpointing: a third slower, needs less memory
