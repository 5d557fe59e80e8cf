"""What the compiler makes of every Triton kernel, on a machine without a GPU:

    python -m benchmarks.hopper                # compile, check, write results/hopper.json
    python -m benchmarks.hopper --check        # exit status 1 if anything differs from that file
    python -m benchmarks.hopper --triton DIR   # with another Triton: pip install --target DIR

The arguments are those of training: the functions that launch the kernels are called with tensors
that have shapes and no memory, and Triton specialises for what it is given (a stride of 1, what 16
divides). `cuobjdump` then reads registers, stack and instructions from the machine code.
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

# What counts in the machine code. Wide: 16 bytes per thread, the most that one instruction moves.
TENSOR_CORES = {80: r"\bHMMA", 89: r"\bHMMA", 90: r"\bHGMMA"}
COUNTED = {
    "wide_loads": r"\bLDG(?:STS)?\.\S*128",
    "wide_stores": r"\bSTG\.\S*128",
    "spills": r"\b(?:LDL|STL)\b",
}


def empty(*shape: int, dtype: torch.dtype = B16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def loss(N: int, V: int, write_grad: bool) -> None:
    """The rows of a head's logits, as `linear_cross_entropy` launches it."""
    targets, count = empty(N, dtype=torch.int64), empty(dtype=torch.int64)
    cross_entropy._row_losses(empty(N, V), targets, count, write_grad)


def forward(N: int, C: int, width: int, keep: bool = True) -> None:
    """GELU after the first matmul of an MLP, as `fused_mlp` launches it."""
    pre = empty(N, width) if keep else None
    mlp._matmul_gelu(empty(N, C), empty(width, C).T, empty(N, width), pre, empty(width))


def backward(N: int, C: int, width: int) -> None:
    """GELU's derivative after the second matmul's gradient."""
    mlp._matmul_gelu(empty(N, C), empty(C, width), empty(N, width), empty(N, width))


ROWS = 64 * 1024  # of a micro-batch of training
CASES: dict[str, Callable[[], None]] = {
    "cross-entropy": lambda: loss(ROWS, 50_304, True),
    "cross-entropy, no gradient": lambda: loss(ROWS, 50_304, False),
    "cross-entropy, 50,257 columns": lambda: loss(ROWS + 1, 50_257, True),
    "MLP forward, K = 768": lambda: forward(ROWS, 768, 3072),
    "MLP backward, K = 768": lambda: backward(ROWS, 768, 3072),
    "MLP forward, K = 3072": lambda: forward(ROWS, 3072, 12_288),
    "MLP backward, K = 3072": lambda: backward(ROWS, 3072, 12_288),
    "MLP forward, no gradient": lambda: forward(ROWS, 768, 3072, keep=False),
    "MLP forward, sizes that do not divide": lambda: forward(1157, 75, 201),
    "MLP backward, sizes that do not divide": lambda: backward(1157, 75, 201),
}
ODD = [name for name in CASES if "50,257" in name or "not divide" in name]
TRAINING = [name for name in CASES if "K = 768" in name or name == "cross-entropy"]


class _Recorder:
    """Stands in a kernel's place: keeps the arguments of a launch, and launches nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.calls.append((arguments, options))


@contextmanager
def _recording() -> Iterator[dict[str, _Recorder]]:
    """Record the launches of both kernels instead of making them."""
    places = {"_cross_entropy_kernel": cross_entropy, "_matmul_gelu_kernel": mlp}
    recorders = {name: _Recorder() for name in places}
    kernels = {name: getattr(module, name) for name, module in places.items()}
    for name, module in places.items():
        setattr(module, name, recorders[name])
    try:
        yield recorders
    finally:
        for name, module in places.items():
            setattr(module, name, kernels[name])


def compile_case(name: str, card: Card) -> dict[str, Figures]:
    """Compile a case for this card: for each autotuning configuration, what its machine code needs
    and holds. Cross-entropy has one; what training does not launch gets the first, which any GPU
    can run and deterministic runs take."""
    pretend_to_triton(card)
    with _recording() as recorders:
        CASES[name]()
    [(kernel, arguments, options)] = [
        (kernel, *call) for kernel, r in recorders.items() for call in r.calls
    ]
    if kernel == "_cross_entropy_kernel":
        jitted, configurations = cross_entropy._cross_entropy_kernel, {"": {}}
    else:
        jitted = mlp._matmul_gelu_kernel.fn
        configurations = {
            "{BLOCK_M} × {BLOCK_N} × {BLOCK_K}, {num_warps} warps, {num_stages} stages".format(
                **c.all_kwargs()
            ): c.all_kwargs()
            for c in mlp._matmul_gelu_kernel.configs[: None if name in TRAINING else 1]
        }
    return {
        label: _figures(jitted.warmup(*arguments, grid=(1,), **options, **configuration), card)
        for label, configuration in configurations.items()
    }


def _figures(compiled: Any, card: Card) -> Figures:
    """Registers and stack of a thread, shared memory of a block, and instructions, of a kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said[:500]
    counted = {"tensor_cores": TENSOR_CORES[card.capability], **COUNTED}
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        **{key: len(re.findall(pattern, said)) for key, pattern in counted.items()},
    }


def violations(case: str, card: Card, found: dict[str, Figures]) -> list[str]:
    """What of a case breaks a rule that holds for any version of Triton."""
    broken = []
    for i, (label, x) in enumerate(found.items()):
        rules = {
            "uses no stack": x["stack"] == 0 or i > 0,
            "spills no register": x["spills"] == 0 or i > 0,
            f"fits into {card.block_shared:,} bytes of shared memory": (
                x["shared"] <= card.block_shared or (i > 0 and card.capability != 90)
            ),
            "uses tensor cores": x["tensor_cores"] > 0 or "MLP" not in case,
            "loads 16 bytes at a time": x["wide_loads"] > 0 or case in ODD,
            "stores 16 bytes at a time": (
                x["wide_stores"] > 0 or case in (*ODD, "cross-entropy, no gradient")
            ),
            # 1,024 threads a block, 65,536 registers an SM. Training pads the vocabulary.
            "leaves registers for two blocks on an SM": (
                x["registers"] <= 32 or "MLP" in case or case in ODD or card.sm_threads < 2048
            ),
        }
        place = f"sm_{card.capability}: {case}{', ' + label if label else ''}"
        broken += [f"{place}: not true that it {rule}" for rule, kept in rules.items() if not kept]
    return broken


def compile_all() -> tuple[dict[str, Any], list[str]]:
    """Every case on every architecture: the figures, and the rules that are broken."""
    from triton import knobs

    figures: dict[str, Any] = {}
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        for architecture, card in CARDS.items():
            for case in CASES if architecture == "sm_90" else TRAINING:
                found = compile_case(case, card)
                figures.setdefault(architecture, {})[case] = found
                broken += violations(case, card, found)
    return figures, broken


def differences(expected: Any, found: Any, place: str = "") -> list[str]:
    """Where two trees of figures differ, one line each."""
    if not (isinstance(expected, dict) and isinstance(found, dict)):
        return [] if expected == found else [f"{place}: {found}, expected {expected}"]
    lines = []
    for key in [*expected, *(k for k in found if k not in expected)]:
        below = f"{place}: {key}" if place else str(key)
        lines += differences(expected.get(key), found.get(key), below)
    return lines


def unexpected(committed: dict[str, Any], version: str, figures: dict[str, Any]) -> list[str]:
    """Differences from the figures committed for this Triton: none if none are."""
    return differences(committed["triton"].get(version, figures), figures)


def main() -> None:
    parser = argparse.ArgumentParser(description="compile every Triton kernel without a GPU")
    parser.add_argument("--check", action="store_true", help="compare with the committed figures")
    parser.add_argument("--triton", type=Path, help="folder that another Triton is installed in")
    parser.add_argument("--out", type=Path, default=OUT, help="where the figures go (JSON)")
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
    count = sum(len(labels) for cases in figures.values() for labels in cases.values())
    print(f"Triton {triton.__version__}: {count} kernels compiled, {len(broken)} complaints")
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
