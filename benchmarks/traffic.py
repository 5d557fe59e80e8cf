"""Count the memory traffic of a training step on an H200, on a machine without a GPU:

    python -m benchmarks.traffic           # count, check, write results/traffic.json
    python -m benchmarks.traffic --check   # exit status 1 if anything differs from that file

For each way to compute, Inductor generates the code of the forward and backward pass of GPT-2 124M
with one layer and with two, for one micro-batch (see `benchmarks.generated`). The difference is one
layer, the remainder is the rest of the step. Counted are GB moved by kernels, kernels launched, and
matmuls by shape. Each kernel is counted as reading and writing each of its buffers once, the least
it can do.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.absent import CARDS, pretend_to_torch
from benchmarks.common import environment, write_result
from benchmarks.generated import lower, parts
from benchmarks.hopper import differences
from rekindle.model.compute import Compute
from rekindle.model.gpt2_config import SIZES

OUT = Path(__file__).parent / "results" / "traffic.json"
B, T = 64, 1024  # the micro-batch
CONFIG = SIZES["gpt2"].for_training()
N, C, V = B * T, CONFIG.n_embd, CONFIG.padded_vocab_size
BF16 = Compute(dtype=torch.bfloat16)
WAYS = {
    "autocast": Compute(),
    "bf16": BF16,
    "bf16 + loss kernel": dataclasses.replace(BF16, loss_kernel=True),
    "bf16 + kernels": dataclasses.replace(BF16, loss_kernel=True, mlp_kernel=True),
}
# Matmuls inside our own operators, as (M, K, N), and whether GELU is fused into them.
INSIDE = {
    "rekindle.mlp.default": [((N, C, 4 * C), True), ((N, 4 * C, C), False)],
    "rekindle.gelu_backward.default": [((N, C, 4 * C), True)],
    "rekindle.linear_cross_entropy.default": [((N, C, V), False)],
}
KINDS = ("memory", "cross_entropy", "matmul", "attention")
CALL = re.compile(r"^ +(?:\w+ = )?(?:triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.\w+\S*)\(")


def count(graph: Any, code: str) -> Counter[str]:
    """Bytes by kind, kernels launched, matmuls by shape, and buffers as large as the logits."""
    from torch._inductor.virtualized import V as VIRTUALIZED

    counted: Counter[str] = Counter()
    with VIRTUALIZED.set_graph_handler(graph):
        for node in graph.scheduler.nodes:
            accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
            moved = {name: _bytes(graph, name, size) for name, size in accesses.items()}
            kind = _kind(node, graph, moved)
            counted[f"{kind}_bytes"] += sum(moved.values())
            for shape, gelu in _matmuls(node):
                counted[f"matmul {' × '.join(map(str, shape))}{' with GELU' if gelu else ''}"] += 1
            # Our own operator allocates its logits internally.
            counted["logits bfloat16"] += _name(node) == "rekindle.linear_cross_entropy.default"
    counted["kernels"] += sum(bool(CALL.match(line)) for line in code.splitlines())
    for shape, dtype in re.findall(r"= empty_strided_cuda\(\(([\d, ]+)\),.*torch\.(\w+)\)", code):
        if math.prod(int(n) for n in shape.split(",") if n.strip()) >= N * V:
            counted[f"logits {dtype}"] += 1
    return counted


def _bytes(graph: Any, name: str, accessed: int) -> int:
    """Bytes of a buffer that a kernel accesses. Inductor stops counting at 10⁹ elements for fused
    kernels, so a larger buffer counts in full."""
    size = _elements(graph, name)
    if size <= 10**9:
        return accessed
    return size * torch.empty(0, dtype=graph.get_dtype(name), device="meta").element_size()


def _elements(graph: Any, name: str) -> int:
    try:
        return math.prod(int(n) for n in graph.get_buffer(name).get_size())
    except (AttributeError, NotImplementedError, RuntimeError):  # a buffer without a single size
        return 0


def _name(node: Any) -> str:
    """The name of the operator if Inductor calls a library or our own kernel, else empty."""
    return str(getattr(getattr(node, "node", None), "op_overload", None) or "")


def _kind(node: Any, graph: Any, moved: dict[str, int]) -> str:
    if "cudnn_attention" in _name(node):
        return "attention"
    if type(node).__name__ == "ExternKernelSchedulerNode":
        return "matmul"
    of_logits = any(_elements(graph, name) >= N * V for name in moved)
    return "cross_entropy" if of_logits else "memory"


def _matmuls(node: Any) -> list[tuple[tuple[int, int, int], bool]]:
    name = _name(node)
    if name in INSIDE:
        return INSIDE[name]
    if name not in ("aten.mm.out", "aten.addmm.out"):
        return []
    a, b = ([int(n) for n in x.get_size()] for x in node.node.inputs[-2:])
    return [((a[0], a[1], b[1]), False)]


def measure() -> dict[str, Any]:
    """For each way to compute: a layer, the rest of the step, and buffers as large as the
    logits."""
    traced = {
        (way, layers): parts(dataclasses.replace(CONFIG, n_layer=layers), compute, B, T)
        for way, compute in WAYS.items()
        for layers in (1, 2)
    }
    pretend_to_torch(CARDS["sm_90"])
    counted = {
        key: sum((count(*lower(part)) for part in both), Counter()) for key, both in traced.items()
    }
    return {way: _layer_and_rest(counted[way, 1], counted[way, 2]) for way in WAYS}


def _layer_and_rest(one: Counter[str], two: Counter[str]) -> dict[str, Any]:
    def figures(part: dict[str, int]) -> dict[str, Any]:
        return {
            **{f"{kind}_gb": round(part.get(f"{kind}_bytes", 0) / 1e9, 3) for kind in KINDS},
            "kernels": part["kernels"],
            "matmuls": {
                k[7:]: part[k] for k in sorted(part) if k.startswith("matmul ") and part[k]
            },
        }

    layer = {key: two[key] - one[key] for key in two}
    rest = {key: one[key] - layer[key] for key in two}
    logits = {
        key.removeprefix("logits "): two[key] for key in sorted(two) if key.startswith("logits ")
    }
    return {"layer": figures(layer), "rest": figures(rest), "buffers_like_logits": logits}


def violations(ways: dict[str, Any]) -> list[str]:
    """The rules that are broken, a line each. The rules hold for any version of torch."""
    broken = []
    for way, found in ways.items():
        buffers = found["buffers_like_logits"]
        # Logits and their gradient; the loss kernel overwrites the logits with the gradient.
        allowed = 1 if WAYS[way].loss_kernel else 2
        if wide := [dtype for dtype in buffers if dtype != "bfloat16"]:
            broken.append(f"{way}: a buffer as large as the logits in {', '.join(wide)}")
        if (have := buffers.get("bfloat16", 0)) != allowed:
            broken.append(f"{way}: {have} buffers as large as the logits, not {allowed}")
        if WAYS[way].loss_kernel and found["rest"]["cross_entropy_gb"]:
            broken.append(f"{way}: a generated kernel reads the logits again")
    return broken


def problems(committed: dict[str, Any], ways: dict[str, Any]) -> list[str]:
    """Broken rules and, if the version of torch is the same, differences from the committed
    figures. Another version fuses differently."""
    same = committed["versions"]["torch"] == version("torch")
    return violations(ways) + (differences(committed["ways"], ways) if same else [])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="count the memory traffic of a training step without a GPU"
    )
    parser.add_argument("--check", action="store_true", help="compare with the committed figures")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write")
    o = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that a real card is not queried
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        ways = measure()
    if o.check:
        broken = problems(json.loads(OUT.read_text()), ways)
    else:
        broken = violations(ways)
        write_result(o.out, {**environment("torch", "triton"), "rows": N, "ways": ways})
    for way, found in ways.items():
        layer = found["layer"]
        print(f"{way:20} {layer['memory_gb']:.2f} GB and {layer['kernels']} kernels per layer")
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
