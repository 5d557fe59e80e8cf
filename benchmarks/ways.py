"""The ways to compute a step that the GPU benchmarks compare: as levers of a measured step, as a
`Compute`, and as flags of `rekindle train`.
"""

import dataclasses

import torch

from rekindle.ladder import Levers
from rekindle.model.compute import Compute

# The lecture's final configuration, computed by Rekindle, with a micro-batch that fits an H100.
LECTURE = Levers(
    precision="autocast", attention="fused", compile=True, padded=True, fused_adamw=True, micro=64
)
BF16 = dataclasses.replace(LECTURE, precision="bf16")
LOSS_KERNEL = dataclasses.replace(BF16, loss_kernel=True)
KERNELS = dataclasses.replace(LOSS_KERNEL, mlp_kernel=True)
ARMS = {
    "lecture, eager": dataclasses.replace(LECTURE, compile=False),
    "lecture": LECTURE,
    "autocast + kernels": dataclasses.replace(LECTURE, loss_kernel=True, mlp_kernel=True),
    "bf16": BF16,
    "bf16 + loss kernel": LOSS_KERNEL,
    "bf16 + MLP kernel": dataclasses.replace(BF16, mlp_kernel=True),
    "bf16 + separate qkv": dataclasses.replace(BF16, separate_qkv=True),
    "bf16 + kernels": KERNELS,
    "bf16 + kernels, 128 rows": dataclasses.replace(KERNELS, micro=128),
    "all": dataclasses.replace(KERNELS, separate_qkv=True),
}
# Flags of `rekindle train`, for comparing losses after a full schedule.
FLAGS = {
    "autocast": ["--precision", "autocast", "--kernels", "none"],
    "autocast, again": ["--precision", "autocast", "--kernels", "none"],
    "bf16 + loss kernel": ["--precision", "bf16", "--kernels", "loss"],
    "bf16": ["--precision", "bf16", "--kernels", "none"],
    "bf16 + kernels": ["--precision", "bf16", "--kernels", "all"],
}
NEED_A_GPU = ("bf16 + loss kernel", "bf16 + kernels")

# The correctness gate requires these to equal float64 within its limit, and plants its bugs in the
# first; `BF16_WAYS` are only measured.
EXACT_WAYS = {"fp32, compiled": Compute(), "separate q, k, v": Compute(separate_qkv=True)}
BF16_WAYS = {
    "pytorch": Compute(dtype=torch.bfloat16),
    "loss kernel": Compute(dtype=torch.bfloat16, loss_kernel=True),
    "kernels": Compute(dtype=torch.bfloat16, loss_kernel=True, mlp_kernel=True),
}
