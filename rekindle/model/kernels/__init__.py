"""Two Triton kernels for bf16 training on GPUs of Hopper's class, each beside the plain PyTorch
that defines it. They save memory traffic; every other matmul stays cuBLAS's.
"""

from rekindle.model.kernels.common import why_not
from rekindle.model.kernels.cross_entropy import (
    linear_cross_entropy,
    plain_linear_cross_entropy,
    soft_cap,
)
from rekindle.model.kernels.mlp import fused_mlp, plain_mlp

__all__ = [
    "fused_mlp",
    "linear_cross_entropy",
    "plain_linear_cross_entropy",
    "plain_mlp",
    "soft_cap",
    "why_not",
]
