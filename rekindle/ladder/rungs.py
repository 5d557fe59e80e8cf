"""The rungs of the ladder: what each one changes, and why that helps."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Levers:
    """How a step is computed. The defaults are the naive way."""

    precision: str = "fp32"
    threads: int = 0  # on a CPU; 0: torch's default
    attention: str = "plain"
    compile: bool = False
    padded: bool = False  # pad the embedding to a multiple of 128 rows
    fused_adamw: bool = False
    micro: int = 16  # rows per forward pass
    loss_kernel: bool = False
    mlp_kernel: bool = False
    separate_qkv: bool = False
    recompute: bool = False
    keep_memory: bool = False  # on a CPU, keep freed memory for reuse


@dataclass(frozen=True)
class Rung:
    """One more change to the levers, and why it helps."""

    name: str
    change: dict[str, Any]
    why: str


GPU_RUNGS = (
    Rung("fp32", {}, "32-bit arithmetic, one kernel per operation: the baseline"),
    Rung("TF32", {"precision": "tf32"}, "matmuls on tensor cores, with 10 bits of mantissa"),
    Rung("bf16", {"precision": "autocast"}, "half the bytes to move, twice the tensor cores' rate"),
    Rung("compile", {"compile": True}, "many kernels fused into one: fewer trips to memory"),
    Rung("flash attention", {"attention": "fused"}, "the T × T scores never leave the chip"),
    Rung("padded vocabulary", {"padded": True}, "50,257 becomes 50,304: no partial tiles"),
    Rung("lecture", {"fused_adamw": True}, "AdamW as one kernel: the lecture's last step"),
    Rung("larger micro-batch", {"micro": 64}, "the memory saved leaves room for more rows"),
    Rung("bf16 residual", {"precision": "bf16"}, "the residual stream too, but not the weights"),
    Rung("loss kernel", {"loss_kernel": True}, "the logits' gradient overwrites the logits"),
    Rung("MLP kernel", {"mlp_kernel": True}, "GELU fused into the matmuls around it"),
    Rung("separate q, k, v", {"separate_qkv": True}, "no copy of three gradients into one"),
)  # fmt: skip

CPU_RUNGS = (
    Rung("one core", {"threads": 1}, "32-bit arithmetic on one thread: the baseline"),
    Rung("all cores", {"threads": 0}, "matmuls parallelize well"),
    Rung("fused AdamW", {"fused_adamw": True}, "one pass over the weights instead of a dozen"),
    Rung("bf16", {"precision": "autocast"}, "16-bit matmuls, where the CPU supports them"),
    Rung("compile", {"compile": True}, "many loops fused into one: fewer trips to memory"),
    Rung("padded vocabulary", {"padded": True}, "50,257 becomes 50,304: no partial vectors"),
    Rung("memory kept", {"keep_memory": True}, "freed memory is reused without zeroing pages"),
)  # fmt: skip
