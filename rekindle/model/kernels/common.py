"""What both kernels need: Triton, if it is installed, and whether it can be used here."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton.knobs
    import triton.language as tl
else:
    try:
        import triton.knobs
        import triton.language as tl
    except ImportError:  # macOS, Windows: what follows is never launched, but must be definable
        triton, tl = None, SimpleNamespace(constexpr=object)

# Triton reads TRITON_INTERPRET when it is imported and then runs kernels in NumPy, for tests.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
jit: Any = triton.jit if triton else lambda kernel=None, **_: kernel or (lambda later: later)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not compute such tensors, which plain PyTorch then does; or None."""
    if triton is None:
        return "Triton is not installed"
    if INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.hip:
        return "the kernels are made for NVIDIA GPUs"
    if dtype != torch.bfloat16:
        return "the kernels are made for bf16"
    return None


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Custom operators are unknown to autocast, so what it would do is done by hand."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)
