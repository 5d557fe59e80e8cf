"""Choosing device, precision and compilation, tested without the devices."""

import os
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rekindle.errors import UserError
from rekindle.machine import KERNELS
from rekindle.runtime import device as devices
from rekindle.runtime.device import Device, get_device, gpu_on_machine, why_not_compile

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


@pytest.fixture(autouse=True)
def _restore_matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`machine(cuda=..., mps=..., gpu=...)`: set which devices torch reports, and which GPU the
    operating system has."""

    def pretend(
        cuda: bool = False, mps: bool = False, gpu: str | None = None, built: str | None = "13.0",
        name: str = "NVIDIA H200", capability: tuple[int, int] = (9, 0), broken: str = "",
    ) -> None:  # fmt: skip
        def probe(device: torch.device) -> None:
            if broken:
                raise UserError(broken)

        set_to = SimpleNamespace(device=None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: vars(set_to).update(d=device))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(devices, "gpu_on_machine", lambda: gpu)
        monkeypatch.setattr(devices, "_probe_cuda", probe)

    return pretend


NVIDIA = "there is an NVIDIA GPU"


@pytest.mark.parametrize(
    ("wanted", "present", "chosen"),
    [
        ("auto", {}, "cpu"),
        ("auto", {"cuda": True, "gpu": NVIDIA}, "cuda"),
        ("auto", {"mps": True}, "mps"),
        ("auto", {"cuda": True, "mps": True}, "cuda"),
        ("cpu", {"cuda": True, "gpu": NVIDIA}, "cpu"),
        ("cpu", {"gpu": NVIDIA}, "cpu"),  # a GPU that torch cannot use, but the CPU is wanted
        ("cpu", {"mps": True}, "cpu"),
        ("cuda", {"cuda": True, "mps": True}, "cuda"),
        ("mps", {"mps": True}, "mps"),
        ("mps", {"cuda": True, "mps": True}, "mps"),
    ],
)
def test_chosen_device(
    machine: Callable[..., None], wanted: str, present: dict, chosen: str
) -> None:
    machine(**present)
    assert get_device(wanted).torch.type == chosen


@pytest.mark.parametrize(
    ("wanted", "present", "reason"),
    [
        ("auto", {"gpu": NVIDIA}, "NVIDIA GPU but .*update the NVIDIA driver.*--device cpu"),
        (
            "auto",
            {"gpu": NVIDIA, "built": None},
            "NVIDIA GPU but .*without GPU support.*CUDA build",
        ),
        ("auto", {"cuda": True, "broken": "too old"}, "too old"),
        ("cuda", {"cuda": True, "broken": "too old"}, "too old"),
        ("cuda", {"gpu": NVIDIA}, "--device cuda: .*driver"),
        ("cuda", {}, "--device cuda: "),
        ("cuda", {"mps": True}, "--device cuda: "),
        ("mps", {}, "no Apple GPU"),
        ("mps", {"cuda": True}, "no Apple GPU"),
        ("tpu", {"cuda": True}, "auto, cpu, cuda or mps, not 'tpu'"),
    ],
)
def test_unavailable_device_is_an_error_instead_of_the_cpu(
    machine: Callable[..., None], wanted: str, present: dict, reason: str
) -> None:
    machine(**present)
    with pytest.raises(UserError, match=reason) as caught:
        get_device(wanted)
    assert "\n" not in str(caught.value)


def test_each_rank_uses_its_own_gpu(machine: Callable[..., None]) -> None:
    machine(cuda=True)
    assert get_device("auto", local_rank=3).torch == torch.device("cuda", 3)


def test_gpu_that_fails_its_first_kernel_is_an_error_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def zeros(*shape: int, device: torch.device) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(UserError, match=r"\(CUDA error: no kernel image is available\)") as caught:
        get_device("auto")
    assert "\n" not in str(caught.value)
    assert "--device cpu" in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="on Windows, nvidia-smi is the only sign of a GPU")
def test_nvidia_smi_alone_does_not_count_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Container images may include it on machines without a GPU."""
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(devices.Path, "glob", lambda self, pattern: iter([]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_on_machine() != NVIDIA


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpu_does_not_count(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setattr(devices.Path, "glob", lambda self, pattern: iter([self / "nvidia0"]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_on_machine() == NVIDIA
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert gpu_on_machine() == NVIDIA
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert gpu_on_machine() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert get_device("auto").torch.type == "cpu"


@pytest.mark.parametrize(
    ("device", "capability", "wanted", "precision", "matmul"),
    [
        ("cpu", {}, "auto", "fp32", "highest"),
        ("cpu", {"avx512_bf16": True}, "auto", "autocast", "highest"),
        ("cpu", {"amx_bf16": True}, "auto", "autocast", "highest"),
        ("cpu", {"avx512_bf16": True}, "fp32", "fp32", "highest"),
        ("cpu", {}, "bf16", "bf16", "highest"),
        ("cuda", (9, 0), "bf16", "bf16", "high"),
        ("cpu", {}, "autocast", "autocast", "highest"),
        ("cpu", None, "fp32", "fp32", "highest"),
        ("mps", None, "auto", "fp32", "highest"),
        ("cuda", (8, 0), "auto", "autocast", "high"),
        ("cuda", (10, 0), "auto", "autocast", "high"),
        ("cuda", (7, 5), "auto", "fp32", "highest"),  # no bf16 support
        ("cuda", (9, 0), "tf32", "tf32", "high"),
        ("cuda", (9, 0), "fp32", "fp32", "highest"),
    ],
)
def test_chosen_precision(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, device: str, capability: Any,
    wanted: str, precision: str, matmul: str,
) -> None:  # fmt: skip
    machine(cuda=device == "cuda", mps=device == "mps", capability=capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capability, raising=False)
    assert get_device(device, wanted).precision == precision
    assert torch.get_float32_matmul_precision() == matmul


@pytest.mark.parametrize(
    ("wanted", "reason"), [("tf32", "needs an NVIDIA GPU"), ("fp8", "not 'fp8'")]
)
def test_unavailable_precision_is_an_error(wanted: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        get_device("cpu", wanted)


def test_only_autocast_computes_in_bf16() -> None:
    a = torch.ones(2, 2)
    with Device(CPU, "CPU", "autocast").autocast():
        assert (a @ a).dtype == torch.bfloat16
    with Device(CPU, "CPU", "fp32").autocast():
        assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        # Names that contain another GPU's name, but have a different peak.
        ("NVIDIA L40", 181e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H20", None),
        ("NVIDIA A10", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
        ("Apple GPU", None),
    ],
)
def test_peak_flops_by_exact_gpu_name(name: str, peak: float | None) -> None:
    assert Device(CUDA, name, "autocast").peak_flops == peak


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_peak_flops_is_unknown_in_other_precisions(precision: str) -> None:
    assert Device(CUDA, "NVIDIA H200", precision).peak_flops is None


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with Python's headers and a C++ compiler in `PATH`; returns the compiler's path."""
    include = tmp_path / "include"
    include.mkdir()
    (include / "Python.h").touch()
    program = tmp_path / "bin" / "g++"
    program.parent.mkdir()
    program.touch(0o755)
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda name: str(include))
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.delenv("CXX", raising=False)
    return program


def test_compilation_is_possible_with_compiler_and_headers(compiler: Path) -> None:
    assert why_not_compile(CPU) is None


def test_missing_compiler_prevents_compilation(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = compiler.rename(compiler.parents[1] / "my-compiler")
    assert why_not_compile(CPU) == "there is no C++ compiler"
    monkeypatch.setenv("CXX", str(elsewhere))
    assert why_not_compile(CPU) is None


def test_missing_python_headers_prevent_compilation(compiler: Path, tmp_path: Path) -> None:
    (tmp_path / "include" / "Python.h").unlink()
    assert "headers are missing" in (why_not_compile(CPU) or "")


@pytest.mark.parametrize("installed", [True, False])
def test_compilation_on_a_gpu_needs_triton(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: installed)
    assert ("Triton" in (why_not_compile(CUDA) or "")) is not installed


def test_no_compilation_on_apple_gpus(compiler: Path) -> None:
    assert "Apple" in (why_not_compile(MPS) or "")


FAULTS = """
import resource, sys
import torch
from rekindle.runtime.device import get_device, keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory(get_device("cpu"))
for _ in range(15):  # 80 MB each: the first ones still grow the heap
    torch.ones(20_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_freed_memory_is_reused(python: Callable) -> None:
    faults = {how: int(python("-c", FAULTS, how).stdout) for how in ("keep", "default")}
    assert faults["keep"] < 1000
    assert faults["default"] > 90_000  # otherwise the test would prove nothing


def test_memory_of_the_cpu() -> None:
    assert 2**29 < devices.memory_of(CPU) < 2**50


def test_plain_attention_is_chosen_for_short_windows_on_a_cpu() -> None:
    cpu = Device(CPU, "CPU", "fp32")
    gpu = Device(CUDA, "NVIDIA H200", "bf16")
    assert devices.choose_compute(cpu, devices.SHORT).attention == "plain"
    assert devices.choose_compute(cpu, devices.SHORT + 1).attention == "fused"
    assert devices.choose_compute(gpu, 16).attention == "fused"
    assert devices.choose_compute(gpu, 16).dtype == torch.bfloat16
    assert not devices.choose_compute(gpu, 16).loss_kernel
    found = [devices.choose_compute(gpu, 16, kernels=kernels) for kernels in KERNELS]
    assert [c.loss_kernel for c in found] == [False, True, True]
    assert [c.mlp_kernel for c in found] == [False, False, True]
    fp8 = devices.choose_compute(gpu, 16, kernels="all", fp8_head=True)
    assert (fp8.loss_kernel, fp8.mlp_kernel, fp8.fp8_head) == (False, True, True)


@pytest.mark.parametrize(
    ("precision", "cpu", "mps", "old_gpu", "gpu"),
    [
        ("fp32", True, True, True, True),
        ("autocast", True, False, False, True),
        ("bf16", True, False, False, True),
        ("tf32", False, False, False, True),
    ],
)
def test_supported_precisions(
    machine: Callable[..., None], precision: str, cpu: bool, mps: bool, old_gpu: bool, gpu: bool
) -> None:
    assert devices.can_use(precision, CPU) == cpu
    assert devices.can_use(precision, MPS) == mps
    machine(cuda=True, capability=(7, 5))
    assert devices.can_use(precision, CUDA) == old_gpu
    machine(cuda=True, capability=(8, 0))
    assert devices.can_use(precision, CUDA) == gpu
