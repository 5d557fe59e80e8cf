"""Two Triton kernels for bf16 training, each next to the plain PyTorch that defines it: head and
loss on NVIDIA GPUs, the MLP on Hopper GPUs. They save memory traffic; all other matmuls are
cuBLAS's.
"""

from rekindle.model.kernels.common import is_hopper, tag_compiled_code, why_not, why_not_mlp
from rekindle.model.kernels.cross_entropy import (
    linear_cross_entropy,
    plain_linear_cross_entropy,
    soft_cap,
)
from rekindle.model.kernels.mlp import fused_mlp, plain_mlp

__all__ = [
    "fused_mlp",
    "is_hopper",
    "linear_cross_entropy",
    "plain_linear_cross_entropy",
    "plain_mlp",
    "soft_cap",
    "why_not",
    "why_not_mlp",
]

tag_compiled_code()
