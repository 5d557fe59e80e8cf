"""The rungs of the ladder: which lever each pulls, and why it helps."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Levers:
    """How a step is computed; as they stand here, the naive way."""

    precision: str = "fp32"
    threads: int = 0  # of a CPU; 0: as many as torch takes
    attention: str = "plain"
    compile: bool = False
    padded: bool = False  # the embedding, to a multiple of 128 rows
    fused_adamw: bool = False
    micro: int = 16  # rows of one forward pass
    loss_kernel: bool = False
    mlp_kernel: bool = False
    separate_qkv: bool = False
    recompute: bool = False
    keep_memory: bool = False  # what a CPU's tensors give back is used again at once


@dataclass(frozen=True)
class Rung:
    """One more lever pulled, and why it helps."""

    name: str
    change: dict[str, Any]
    why: str


GPU_RUNGS = (
    Rung("fp32", {}, "every number in 32 bits, one kernel after the other: where all begin"),
    Rung("TF32", {"precision": "tf32"}, "tensor cores multiply with 10 bits of mantissa"),
    Rung("bf16", {"precision": "autocast"}, "half the bytes to move, twice the tensor cores' rate"),
    Rung("compile", {"compile": True}, "one kernel for what was many: fewer trips to memory"),
    Rung("flash attention", {"attention": "fused"}, "the T × T scores never leave the chip"),
    Rung("padded vocabulary", {"padded": True}, "50,257 becomes 50,304: tiles without a rest"),
    Rung("lecture", {"fused_adamw": True}, "with AdamW as one kernel: the lecture's last step"),
    Rung("larger micro-batch", {"micro": 64}, "the memory saved takes more rows"),
    Rung("bf16 residual", {"precision": "bf16"}, "the residual stream too, but not the weights"),
    Rung("loss kernel", {"loss_kernel": True}, "the logits' gradient is written over the logits"),
    Rung("MLP kernel", {"mlp_kernel": True}, "GELU inside the matrix products around it"),
    Rung("separate q, k, v", {"separate_qkv": True}, "three gradients that need no copy into one"),
)  # fmt: skip

CPU_RUNGS = (
    Rung("one core", {"threads": 1}, "32-bit arithmetic on one thread: where all begin"),
    Rung("all cores", {"threads": 0}, "matrix products share out well"),
    Rung("fused AdamW", {"fused_adamw": True}, "one pass over the weights instead of a dozen"),
    Rung("bf16", {"precision": "autocast"}, "products of 16-bit numbers, where the CPU has them"),
    Rung("compile", {"compile": True}, "one loop for what was many: fewer trips to memory"),
    Rung("padded vocabulary", {"padded": True}, "50,257 becomes 50,304: rows that fill vectors"),
    Rung("memory kept", {"keep_memory": True}, "the same pages every step, not new ones of zeros"),
)  # fmt: skip
