"""The head's matmuls in FP8, which tensor cores since Hopper compute twice as fast as bf16.

Each tensor is scaled so that its largest number becomes FP8's largest: 448 with a mantissa of 3
bits (e4m3) in the forward pass, 57,344 with 2 bits (e5m2) for gradients, whose magnitudes vary more
(Micikevicius et al. 2022). The speed record also computes its head in FP8 [modded-nanogpt].

Shapes in comments: N rows, C channels, V rows of the head.
"""

from typing import Any

import torch
from torch import Tensor

from rekindle.model.kernels.common import in_autocast_dtype

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # every dimension of an FP8 matmul must be a multiple of this


def why_not(device: torch.device) -> str | None:
    """Why a device cannot compute the head in FP8; None if it can."""
    is_nvidia = device.type == "cuda" and not torch.version.hip
    if is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0):
        return None
    return "FP8 needs an NVIDIA Hopper GPU or newer"


def unsupported(model: Any, T: int) -> str | None:
    """Why a model's head cannot be computed in FP8 with T tokens per row; None if it can."""
    if not getattr(model, "has_fp8_head", False):
        return f"{type(model).__name__} does not support it"
    c = model.config
    if c.padded_vocab_size % MULTIPLE:  # from Python only: the command line pads it
        size = f"padded_vocab_size {c.padded_vocab_size}"
        return f"{size} is not a multiple of {MULTIPLE} (recipes.with_vocabulary pads it)"
    sides = {"n_embd": c.n_embd, "batch.length": T}
    wrong = [f"{name} {side}" for name, side in sides.items() if side % MULTIPLE]
    return f"{wrong[0]} is not a multiple of {MULTIPLE}" if wrong else None


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` in an FP8 type, and its scale: the float32 scalar to multiply it by. The host does not
    wait for either. If a number is not finite, all numbers become NaN."""
    largest = x.abs().amax().float()
    scale = largest.clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def matmul(a: Tensor, b: Tensor, scale: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """a (M, K) times the transpose of b (N, K), both in FP8, with their scales → (M, N)."""
    scaled_mm: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return scaled_mm(a, b.T, scale_a=scale[0], scale_b=scale[1], out_dtype=dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x, weight = inputs  # (N, C), (V, C)
        (qx, sx), (qw, sw) = quantize(x, E4M3), quantize(weight, E4M3)
        ctx.save_for_backward(qx, sx, qw, sw)
        return matmul(qx, qw, (sx, sw), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,), (qx, sx, qw, sw) = grad_outputs, ctx.saved_tensors
        q, s = quantize(gradient, E5M2)  # (N, V)
        # Tensor cores read both operands along the summed dimension: three are transposed first.
        dx = matmul(q, qw.T.contiguous(), (s, sw), gradient.dtype)
        dw = matmul(q.T.contiguous(), qx.T.contiguous(), (s, sx), gradient.dtype)
        return dx, dw


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x` (..., C) times the transpose of `weight` (V, C) → (..., V) in x's dtype, or autocast's.
    Gradients are computed in FP8 too. Raises `RuntimeError` if the device does not support FP8 or a
    dimension is not a multiple of `MULTIPLE`."""
    x, weight = in_autocast_dtype(x, weight)
    rows = _Linear.apply(x.flatten(0, -2), weight.to(x.dtype))
    return rows.unflatten(0, x.shape[:-1])
