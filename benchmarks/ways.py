"""The ways to compute a step that the GPU benchmarks compare, each in every form they need it in:
levers of a measured step, a `Compute`, and flags of `rekindle train`.
"""

import dataclasses

import torch

from rekindle.ladder import Levers
from rekindle.model.compute import Compute

# What the lecture ends with, from Rekindle's own code, at the micro-batch that fits such a card.
LECTURE = Levers(
    precision="autocast", attention="fused", compile=True, padded=True, fused_adamw=True, micro=64
)
BF16 = dataclasses.replace(LECTURE, precision="bf16")
KERNELS = dataclasses.replace(BF16, loss_kernel=True, mlp_kernel=True)
ARMS = {
    "lecture, eager": dataclasses.replace(LECTURE, compile=False),
    "lecture": LECTURE,
    "bf16": BF16,
    "bf16 + loss kernel": dataclasses.replace(BF16, loss_kernel=True),
    "bf16 + MLP kernel": dataclasses.replace(BF16, mlp_kernel=True),
    "bf16 + separate qkv": dataclasses.replace(BF16, separate_qkv=True),
    "bf16 + kernels": KERNELS,
    "all": dataclasses.replace(KERNELS, separate_qkv=True),
}
# Of `rekindle train`, where the loss after a whole schedule is compared.
FLAGS = {
    "autocast": ["--precision", "autocast"],
    "autocast, again": ["--precision", "autocast"],
    "bf16": ["--precision", "bf16"],
    "bf16 + kernels": ["--precision", "bf16", "--kernels"],
}
NEED_A_GPU = ("bf16 + kernels",)

# Of the correctness gate: the first must equal float64 within its limit, and the bugs are planted
# into it; the others are in bf16.
EXACT_WAYS = {"fp32, compiled": Compute(), "separate q, k, v": Compute(separate_qkv=True)}
BF16_WAYS = {
    "pytorch": Compute(dtype=torch.bfloat16),
    "kernels": Compute(dtype=torch.bfloat16, loss_kernel=True, mlp_kernel=True),
}
