"""Compile every Triton kernel and inspect its machine code, on a machine without a GPU:

    python -m benchmarks.hopper                # compile, check, write results/hopper.json
    python -m benchmarks.hopper --check        # exit status 1 if anything differs from that file
    python -m benchmarks.hopper --triton DIR   # another Triton: pip install --target DIR

The kernels are specialized as in training: their launching functions are called with tensors on the
meta device, and Triton specializes on the arguments (strides of 1, multiples of 16). `cuobjdump`
then reads registers, stack and instructions from the machine code.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.absent import CARDS, Card, pretend_to_triton
from benchmarks.common import environment, write_result
from rekindle.model.kernels import cross_entropy, mlp

OUT = Path(__file__).parent / "results" / "hopper.json"
B16 = torch.bfloat16
Figures = dict[str, int]

# Instructions counted in the machine code. Wide: 16 bytes per thread, the most one can move.
TENSOR_CORES = {80: r"\bHMMA", 89: r"\bHMMA", 90: r"\bHGMMA"}
COUNTED = {
    "tma_loads": r"\bUTMALDG",  # what the MLP kernel uses instead of wide loads
    "wide_loads": r"\bLDG(?:STS)?\.\S*128",
    "wide_stores": r"\bSTG\.\S*128",
    "spills": r"\b(?:LDL|STL)\b",
}


def empty(*shape: int, dtype: torch.dtype = B16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def loss(N: int, V: int, write_grad: bool) -> None:
    """Cross-entropy over N rows of V logits, launched as in `linear_cross_entropy`."""
    targets, count = empty(N, dtype=torch.int64), empty(dtype=torch.int64)
    cross_entropy._row_losses(empty(N, V), targets, count, write_grad)


def forward(N: int, C: int, width: int, keep: bool = True) -> None:
    """The first matmul of an MLP with GELU, launched as in `fused_mlp`."""
    slope = empty(N, width) if keep else None
    arguments = empty(N, C), empty(width, C), empty(N, width), slope
    mlp._launch(*arguments, mlp.FORWARD_TILES, bias=empty(width))


def backward(N: int, C: int, width: int) -> None:
    """The gradient of the second matmul times the derivative of GELU, and its sums."""
    sums = empty(-(-N // mlp.BACKWARD_TILES.m), width, dtype=torch.float32)
    arguments = empty(N, C), empty(C, width), empty(N, width), empty(N, width)
    mlp._launch(*arguments, mlp.BACKWARD_TILES, sums=sums)


ROWS = 64 * 1024  # tokens of a micro-batch in training
CASES: dict[str, Callable[[], None]] = {
    "cross-entropy": lambda: loss(ROWS, 50_304, True),
    "cross-entropy, no gradient": lambda: loss(ROWS, 50_304, False),
    "cross-entropy, 50,257 columns": lambda: loss(ROWS + 1, 50_257, True),
    "MLP forward, K = 768": lambda: forward(ROWS, 768, 3072),
    "MLP backward, K = 768": lambda: backward(ROWS, 768, 3072),
    "MLP forward, K = 3072": lambda: forward(ROWS, 3072, 12_288),
    "MLP backward, K = 3072": lambda: backward(ROWS, 3072, 12_288),
    "MLP forward, no gradient": lambda: forward(ROWS, 768, 3072, keep=False),
    "MLP forward, sizes that do not divide": lambda: forward(1157, 72, 200),
    "MLP backward, sizes that do not divide": lambda: backward(1157, 72, 200),
}
LOSS = "cross-entropy"
ODD = [name for name in CASES if "50,257" in name]
RESERVED = 1024  # bytes of shared memory per block that CUDA uses itself


class _Recorder:
    """Replaces a kernel: records the arguments of each launch and launches nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.calls.append((arguments, options))


@contextmanager
def _recording() -> Iterator[dict[str, _Recorder]]:
    """Record the launches of both kernels instead of running them."""
    modules = {"_cross_entropy_kernel": cross_entropy, "_matmul_gelu_kernel": mlp}
    recorders = {name: _Recorder() for name in modules}
    kernels = {name: getattr(module, name) for name, module in modules.items()}
    for name, module in modules.items():
        setattr(module, name, recorders[name])
    try:
        yield recorders
    finally:
        for name, module in modules.items():
            setattr(module, name, kernels[name])


def compile_case(name: str, card: Card) -> Figures:
    """Compile a case for this card and return its figures."""
    pretend_to_triton(card)
    with _recording() as recorders:
        CASES[name]()
    [(kernel, (arguments, options))] = [
        (kernel, call) for kernel, r in recorders.items() for call in r.calls
    ]
    module = cross_entropy if kernel == "_cross_entropy_kernel" else mlp
    compiled = getattr(module, kernel).warmup(*arguments, grid=(1,), **options)
    return _figures(compiled, card)


def _figures(compiled: Any, card: Card) -> Figures:
    """Registers and stack per thread, shared memory per block, and counted instructions of a
    kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert found, dump[:500]
    counted = {"tensor_cores": TENSOR_CORES[card.capability], **COUNTED}
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        **{key: len(re.findall(pattern, dump)) for key, pattern in counted.items()},
    }


def violations(case: str, card: Card, x: Figures) -> list[str]:
    """The rules that a case breaks, one per line. The rules hold for any version of Triton."""
    is_mlp = "MLP" in case
    blocks = (
        (mlp.BACKWARD_TILES if "backward" in case else mlp.FORWARD_TILES).per_sm if is_mlp else 1
    )
    rules = {
        "uses no stack": x["stack"] == 0,
        "spills no register": x["spills"] == 0,
        f"{blocks} blocks fit in {card.sm_shared:,} bytes of shared memory": (
            x["shared"] <= card.block_shared and blocks * (x["shared"] + RESERVED) <= card.sm_shared
        ),
        "uses tensor cores": x["tensor_cores"] > 0 or not is_mlp,
        "loads tiles by TMA": x["tma_loads"] > 0 or not is_mlp,
        "loads 16 bytes at a time": x["wide_loads"] > 0 or is_mlp or case in ODD,
        "stores 16 bytes at a time": (
            x["wide_stores"] > 0 or is_mlp or case in (*ODD, "cross-entropy, no gradient")
        ),
        # 1,024 threads per block, 65,536 registers per SM. Training pads the vocabulary.
        "leaves registers for two blocks on an SM": (
            x["registers"] <= 32 or is_mlp or case in ODD or card.sm_threads < 2048
        ),
    }
    location = f"sm_{card.capability}: {case}"
    return [f"{location}: breaks the rule: {rule}" for rule, kept in rules.items() if not kept]


def compile_all() -> tuple[dict[str, Any], list[str]]:
    """Compile every case for every architecture; return the figures and the broken rules."""
    from triton import knobs

    figures: dict[str, Any] = {}
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        for architecture, card in CARDS.items():
            for case in CASES if architecture == "sm_90" else [LOSS]:  # the MLP's is for Hopper
                found = compile_case(case, card)
                figures.setdefault(architecture, {})[case] = found
                broken += violations(case, card, found)
    return figures, broken


def differences(expected: Any, found: Any, path: str = "") -> list[str]:
    """The paths at which two trees of figures differ, a line each."""
    if not (isinstance(expected, dict) and isinstance(found, dict)):
        return [] if expected == found else [f"{path}: {found}, expected {expected}"]
    lines = []
    for key in [*expected, *(k for k in found if k not in expected)]:
        below = f"{path}: {key}" if path else str(key)
        lines += differences(expected.get(key), found.get(key), below)
    return lines


def unexpected(committed: dict[str, Any], version: str, figures: dict[str, Any]) -> list[str]:
    """Differences from the figures committed for this version of Triton; none if there are none."""
    return differences(committed["triton"].get(version, figures), figures)


def main() -> None:
    parser = argparse.ArgumentParser(description="compile every Triton kernel without a GPU")
    parser.add_argument("--check", action="store_true", help="compare with the committed figures")
    parser.add_argument("--triton", type=Path, help="folder of another Triton installation")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write")
    o = parser.parse_args()
    if o.triton and os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] != str(o.triton):
        path = os.pathsep.join(filter(None, [str(o.triton), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "benchmarks.hopper", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})
    import triton

    committed = json.loads(OUT.read_text()) if OUT.exists() else {"triton": {}}
    figures, broken = compile_all()
    if o.check:
        broken += unexpected(committed, triton.__version__, figures)
    else:
        by_version = {**committed["triton"], triton.__version__: figures}
        write_result(o.out, {**environment("torch"), "triton": dict(sorted(by_version.items()))})
    count = sum(map(len, figures.values()))
    print(f"Triton {triton.__version__}: {count} kernels compiled, {len(broken)} problems")
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
