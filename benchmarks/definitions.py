"""Compares the Triton kernels with the plain PyTorch code that defines them, and times both.

The package's own tests need pytest and take minutes on a GPU. These few shapes are those of
training, and two that are not multiples of any block size. Kernels and plain code are both compared
with float64. Without a GPU, Triton's interpreter runs the kernels on small shapes.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rekindle.model import kernels
from rekindle.model.kernels import common, mlp
from rekindle.runtime.device import Device, get_device

# A kernel's error may be this many times the error of plain PyTorch in the same dtype, because it
# sums gradients in another order.
ALLOWED = 1.5
ROUNDING = {torch.bfloat16: 2**-9, torch.float32: 2**-21}  # relative rounding error of a result
REPEATS = 10

Function = Callable[..., Tensor]


def check(o: argparse.Namespace, save: Callable[..., None]) -> None:
    """Compare every shape. `save` is called with errors and, on a GPU, milliseconds."""
    device = get_device(o.device)
    on_gpu = device.torch.type == "cuda"
    if not on_gpu and common.triton and not common.INTERPRETED:
        # Triton reads this variable when it is imported, so another process is needed.
        command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
        subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
        return
    dtype = torch.bfloat16 if on_gpu else torch.float32
    why = kernels.why_not(device.torch, dtype)
    found: dict[str, Any] = {"kernels": why or ("interpreted" if common.INTERPRETED else "run")}
    cases: dict[str, Any] = {}
    tiles = {"forward": asdict(mlp.FORWARD_TILES), "backward": asdict(mlp.BACKWARD_TILES)}
    for name, (ours, plain, exact, inputs) in _cases(on_gpu).items():
        placed = [t.to(device.torch, dtype if t.is_floating_point() else None) for t in inputs]
        cases[name] = _errors(ours, plain, exact, placed)
        if on_gpu:
            cases[name]["ms"] = {
                which: round(_milliseconds(f, placed, device), 3)
                for which, f in (("kernel", ours), ("plain", plain))
            }
        print(name, cases[name], flush=True)
        passed = all(case["passed"] for case in cases.values())
        save({**found, "passed": passed, "cases": cases, "tiles": tiles})


def _cases(on_gpu: bool) -> dict[str, tuple[Function, Function, Function, list[Tensor]]]:
    """For each case: the kernels, the plain code, the same for float64, and random inputs."""
    torch.manual_seed(0)
    heads = [(8192, 768, 50_304), (1157, 75, 50_257)] if on_gpu else [(6, 24, 8192 + 77)]
    mlps = [(65_536, 768, 3072), (1157, 72, 200)] if on_gpu else [(130, 72, 200)]
    found: dict[str, Any] = {}
    for N, C, V in heads:
        inputs = [torch.randn(N, C), torch.randn(V, C) * C**-0.5, torch.randint(V, (N,))]
        forms = kernels.linear_cross_entropy, kernels.plain_linear_cross_entropy, _exact_loss
        found[f"head and loss, {N} × {C} × {V}"] = (*forms, inputs)
    for N, C, width in mlps:
        inputs = [
            torch.randn(N, C), torch.randn(width, C) * C**-0.5, torch.randn(width),
            torch.randn(C, width) * width**-0.5, torch.randn(C),
        ]  # fmt: skip
        forms = kernels.fused_mlp, kernels.plain_mlp, kernels.plain_mlp
        found[f"MLP, {N} × {C} × {width}"] = (*forms, inputs)
    return found


def _exact_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)  # the plain code computes in float32


def _errors(ours: Function, plain: Function, exact: Function, inputs: list[Tensor]) -> Any:
    """The largest error of a value or gradient, relative to plain PyTorch's own error."""
    doubles = [t.double() if t.is_floating_point() else t for t in inputs]
    reference = _values_and_gradients(exact, doubles)
    found = [_values_and_gradients(f, inputs) for f in (ours, plain)]
    worst = {"kernel": 0.0, "plain": 0.0, "ratio": 0.0}
    for mine, theirs, right in zip(*found, reference, strict=True):
        size = right.norm().item()
        error, plain_error = ((t.double() - right).norm().item() for t in (mine, theirs))
        floor = ROUNDING[inputs[0].dtype] * size
        ratio = error / max(plain_error, floor)
        if not ratio <= worst["ratio"]:  # NaN is worse than any number
            worst = {"kernel": error / size, "plain": plain_error / size, "ratio": ratio}
    return {**worst, "passed": worst["ratio"] <= ALLOWED}


def _values_and_gradients(f: Function, inputs: list[Tensor]) -> list[Tensor]:
    """The value of `f` and its gradients, for a fixed random upstream gradient."""
    leaves, wanted = _leaves(inputs)
    y = f(*leaves)
    generator = torch.Generator("cpu").manual_seed(1)
    upstream = torch.randn(y.shape, generator=generator).to(y.device, inputs[0].dtype).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]


def _leaves(inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Copies of the inputs that share their memory, and those of them that have gradients."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    return leaves, [t for t in leaves if t.requires_grad]


def _milliseconds(f: Function, inputs: list[Tensor], device: Device) -> float:
    """The median time of an eager forward and backward pass."""
    times = []
    leaves, wanted = _leaves(inputs)
    upstream = torch.ones_like(f(*leaves))
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.autograd.grad(f(*leaves), wanted, upstream)
        end.record()
        device.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]
