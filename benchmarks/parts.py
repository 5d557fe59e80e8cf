"""Divides the kernels of a training step among the parts that `benchmarks.roofline` predicts."""

import re
from collections.abc import Iterable

# A kernel belongs to the first part whose pattern its name contains, and else moves memory.
PATTERNS = {
    "matmuls": r"nvjet|gemm|cutlass|splitK|_matmul_gelu",
    "attention": r"cudnn|flash|fmha|sdpa",
    "cross-entropy": r"cross_entropy|log_softmax|nll_loss_backward",
    "gradient sums, optimizer": r"CUDAFunctor(OnSelf)?_add|multi_tensor_apply|Mem(set|cpy)",
}
MEMORY = "memory-bound"


def part_of(kernel: str) -> str:
    return next((part for part, p in PATTERNS.items() if re.search(p, kernel)), MEMORY)


def by_part(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds of each part, from the names and milliseconds of the kernels."""
    found = dict.fromkeys([*PATTERNS, MEMORY], 0.0)
    for name, ms in kernels:
        found[part_of(name)] += ms
    return {part: round(ms, 2) for part, ms in found.items()}
