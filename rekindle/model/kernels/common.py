"""What both kernels need: Triton, if it is installed, and whether it can be used here."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.compiler.config
from torch import Tensor

if TYPE_CHECKING:
    import triton.knobs
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
else:
    try:
        import triton.knobs
        import triton.language as tl
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:  # macOS, Windows: what follows is never launched, but must be definable
        triton, tl, TensorDescriptor = None, SimpleNamespace(constexpr=object), None

# Triton reads TRITON_INTERPRET when it is imported and then runs kernels in NumPy, for tests.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
jit: Any = triton.jit if triton else lambda kernel=None, **_: kernel or (lambda later: later)

SOURCES = sorted(Path(__file__).parent.glob("*.py"))


def tag_compiled_code() -> None:
    """Make PyTorch's cache of compiled code depend on these operators.

    A cached graph calls them, and what their backward pass called, by name. After a change of
    their code, such a graph would fail or, worse, compute the gradients of the earlier code.
    """
    code = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
    config = torch.compiler.config
    if code not in config.cache_key_tag:
        config.cache_key_tag += f" rekindle.model.kernels {code}"


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


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def why_not_mlp(device: torch.device) -> str | None:
    """Why the MLP kernel should not be used on a device that runs the others; None if it should.
    Before Hopper there is no TMA, and registers spill."""
    return None if INTERPRETED or is_hopper(device) else "the MLP kernel is made for Hopper GPUs"


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors (SMs) of a GPU; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Custom operators are unknown to autocast, so what it would do is done by hand."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)
