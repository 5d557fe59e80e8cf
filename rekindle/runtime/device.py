"""Chooses the device and its precision, and whether the model can be compiled there."""

import ctypes
import os
import platform
import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from rekindle.errors import UserError
from rekindle.model.compute import Compute

# Peak dense bf16 FLOP/s (without sparsity) by the driver's name for the GPU, from NVIDIA's data
# sheets. Names must match in full: the laptop RTX 4090 is slower than the desktop RTX 4090.
PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}

# Up to this many tokens, plain attention is faster on a CPU than fused attention
# (benchmarks/LOG.md).
SHORT = 256

# autocast: matmuls in bf16, the residual stream in float32, as in the lecture. bf16: the residual
# stream in bf16 too, which is faster. The weights are float32 in all cases.
PRECISIONS = ("auto", "autocast", "bf16", "tf32", "fp32")


@dataclass(frozen=True)
class Device:
    """The device that a run computes on, and its precision."""

    torch: torch.device
    name: str  # human-readable
    precision: str  # one of PRECISIONS other than "auto"

    def autocast(self) -> AbstractContextManager[object]:
        """`torch.autocast` to bf16 if that is the precision; otherwise a context that does
        nothing."""
        if self.precision != "autocast":
            return nullcontext()
        return torch.autocast(self.torch.type, dtype=torch.bfloat16)

    def synchronize(self) -> None:
        """Wait until the device has finished all its work."""
        if self.torch.type != "cpu":
            getattr(torch, self.torch.type).synchronize()

    @property
    def dtype(self) -> "torch.dtype":
        """The type of the residual stream."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def product_dtype(self) -> "torch.dtype":
        """The type of a matmul's inputs."""
        return torch.bfloat16 if self.precision in ("autocast", "bf16") else torch.float32

    @property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s in this precision, or None if unknown."""
        if self.precision not in ("autocast", "bf16"):
            return None
        return PEAKS.get(self.name)


def get_device(wanted: str = "auto", precision: str = "auto", local_rank: int = 0) -> Device:
    """Choose a device and its precision.

    Raises `UserError` if the wanted device, or a GPU that is present, cannot be used: training
    never falls back to the CPU silently.
    """
    kind = _choose(wanted)
    if kind == "cuda":
        device = torch.device("cuda", local_rank)
        _probe_cuda(device)
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
    else:
        device = torch.device(kind)
        name = "Apple GPU" if kind == "mps" else f"CPU, {torch.get_num_threads()} threads"
    precision = _choose_precision(precision, device)
    tf32 = device.type == "cuda" and precision != "fp32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return Device(device, name, precision)


def _choose(wanted: str) -> str:
    if wanted not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"--device must be auto, cpu, cuda or mps, not {wanted!r}")
    if wanted == "cpu":
        return "cpu"
    if wanted in ("auto", "cuda") and torch.cuda.is_available():
        return "cuda"
    if wanted in ("auto", "mps") and torch.backends.mps.is_available():
        return "mps"
    if wanted == "mps":
        raise UserError(
            "--device mps: this torch finds no Apple GPU; it needs macOS 14 on Apple silicon"
        )
    if (gpu := gpu_on_machine()) and wanted == "auto":
        raise UserError(f"{gpu} but {_why_no_cuda()}; or use --device cpu")
    if wanted == "cuda":
        raise UserError(f"--device cuda: {_why_no_cuda()}")
    return "cpu"


def gpu_on_machine() -> str | None:
    """A phrase that says which GPU the operating system has, whether or not torch can use it; None
    if there is none or `CUDA_VISIBLE_DEVICES` hides it."""
    if _hidden():
        return None
    if any(Path("/dev").glob("nvidia[0-9]*")) or (os.name == "nt" and shutil.which("nvidia-smi")):
        return "there is an NVIDIA GPU"
    if Path("/dev/kfd").exists():
        return "there is an AMD GPU"
    return None


def _hidden() -> bool:
    """Whether the user hides all GPUs from torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def _why_no_cuda() -> str:
    if _hidden():
        return "CUDA_VISIBLE_DEVICES hides every GPU: unset it, or use --device cpu"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without GPU support: install a CUDA build"
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it: "
        "update the NVIDIA driver or install a torch for the driver's CUDA (`nvidia-smi` shows it)"
    )


def _probe_cuda(device: torch.device) -> None:
    """Run one kernel, so that a GPU too old or too new for this torch fails here with a clear
    reason."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"torch {torch.__version__} cannot run on the GPU {device} ({reason}): install a "
            "torch build that supports it, or use --device cpu"
        ) from None


def _choose_precision(wanted: str, device: torch.device) -> str:
    if wanted not in PRECISIONS:
        raise UserError(f"--precision must be one of {', '.join(PRECISIONS)}, not {wanted!r}")
    if wanted == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 needs an NVIDIA GPU: use fp32, autocast or bf16")
    if wanted != "auto":
        return wanted
    if device.type == "cpu":
        return "autocast" if _cpu_has_bf16() else "fp32"
    if device.type == "mps":
        return "fp32"
    return "autocast" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"


def _cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 instructions; without them bf16 is slower than float32."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def can_use(precision: str, device: torch.device) -> bool:
    """Whether `device` supports a precision, which a run may have been started with elsewhere."""
    if device.type == "cuda":
        return precision == "fp32" or torch.cuda.get_device_capability(device) >= (8, 0)
    return precision != "tf32" and (device.type == "cpu" or precision == "fp32")


def memory_of(device: torch.device) -> int:
    """The device's memory in bytes; 8 GiB if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return 8 * 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_compute(
    device: Device, T: int, *, kernels: str = "none", fp8_head: bool = False
) -> Compute:
    """The fastest way to compute on `device` with T tokens per sequence. `kernels`: Triton kernels
    for none, the loss or all."""
    plain = device.torch.type == "cpu" and T <= SHORT
    return Compute(
        dtype=device.dtype,
        attention="plain" if plain else "fused",
        loss_kernel=kernels != "none" and not fp8_head,  # its matmuls of the head are not FP8
        mlp_kernel=kernels == "all",
        fp8_head=fp8_head,
    )


def make_deterministic(device: Device, *, on_gpu: bool = False) -> None:
    """Use deterministic algorithms, always on a CPU and on a GPU only if `on_gpu`: there it rules
    out the fastest attention and the autotuning of compiled kernels."""
    if device.torch.type == "cpu" or on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.use_deterministic_algorithms(True)
        # Filling costs time and is not needed: no memory is read before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory(device: Device) -> None:
    """On a CPU, let the C library keep up to 2 GiB of freed memory for reuse.

    By default, glibc returns large freed blocks to the system, and every training step allocates
    the same blocks again. The page faults and the zeroing of pages take a third of a small model's
    step. Does nothing without glibc. The parameter numbers are from malloc.h.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if device.torch.type == "cpu" and mallopt:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        # Blocks up to this size come from the heap instead of mmap. Older versions of glibc accept
        # at most 32 MiB.
        if not mallopt(mmap_threshold, 2**30):
            mallopt(mmap_threshold, 2**25)


def cpu_model() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def why_not_compile(device: torch.device) -> str | None:
    """Why `torch.compile` cannot be used on this machine, or None if it can."""
    if device.type == "mps":
        return "it is not supported on Apple GPUs"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    if not any(name and shutil.which(name) for name in compilers):
        return "there is no C++ compiler"
    include = Path(sysconfig.get_path("include"), "Python.h")
    if not include.exists():
        return f"Python's headers are missing ({include})"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton is not installed or does not support this GPU"
    return None
