"""`resolve` combines the user's options, recorded settings and what the device supports."""

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks import traffic
from benchmarks.ways import FLAGS
from rekindle.data.cores import usable_cores
from rekindle.errors import UserError
from rekindle.machine import Machine, MachineOptions, changes, resolve
from rekindle.model.compute import Compute
from rekindle.model.kernels.common import triton
from rekindle.runtime import device as devices
from rekindle.runtime.distributed import World

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Machine(
    device="cpu", precision="autocast", compile=False, kernels="none", deterministic=True,
    shard=True, threads=1, recompute=True, micro_batch=4, name="CPU",
    memory=devices.memory_of(torch.device("cpu")),
)  # fmt: skip
OPTIONS = MachineOptions(device="cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to have a GPU with 80 GiB and bf16, as far as `resolve` can tell."""
    monkeypatch.setattr(devices, "_choose", lambda wanted: "cuda")
    monkeypatch.setattr(devices, "_probe_cuda", lambda device: None)
    monkeypatch.setattr(devices, "why_not_compile", lambda device: None)
    monkeypatch.setattr(devices, "memory_of", lambda device: 80 * 2**30)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "why_not_compile", lambda device: None)
    found = resolve(OPTIONS)
    assert found == Machine(
        device="cpu", precision=found.precision, compile=True, kernels="none", deterministic=False,
        shard=False, threads=1, recompute=False, micro_batch=None, name="CPU", memory=CPU.memory,
    )  # fmt: skip
    assert found.precision in ("fp32", "autocast")


def test_recorded_settings_are_kept_on_the_same_device() -> None:
    assert resolve(OPTIONS, CPU) == CPU


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp32"}, {"deterministic": False}, {"shard": False}, {"threads": 2},
        {"recompute": False}, {"micro_batch": 8},
    ],
)  # fmt: skip
def test_options_override_recorded_settings(options: dict[str, Any]) -> None:
    found = resolve(dataclasses.replace(OPTIONS, **options), CPU)
    assert found == dataclasses.replace(CPU, **options)
    assert changes(CPU, found, dataclasses.replace(OPTIONS, **options)) == ""


@pytest.mark.parametrize(("factor", "kept"), [(0.5, False), (0.97, True), (1.03, True), (4, False)])
def test_other_memory_means_a_new_micro_batch_search(factor: float, kept: bool) -> None:
    before = dataclasses.replace(CPU, memory=int(CPU.memory * factor))
    found = resolve(OPTIONS, before)
    assert (found.micro_batch, found.recompute) == ((4, True) if kept else (None, False))
    assert (found.precision, found.deterministic) == ("autocast", True)
    assert ("micro-batch None instead of 4" in changes(before, found, OPTIONS)) is not kept


def test_more_threads_than_cores_are_not_kept() -> None:
    before = dataclasses.replace(CPU, threads=usable_cores() + 1)
    assert resolve(OPTIONS, before).threads == 1
    assert resolve(OPTIONS, dataclasses.replace(before, threads=usable_cores())).threads > 1


@pytest.mark.parametrize(
    ("rows", "ranks", "kept"), [(8, 1, 4), (8, 2, 4), (8, 4, None), (6, 1, None), (None, 1, 4)]
)
def test_micro_batch_that_no_longer_divides_is_not_kept(
    rows: int | None, ranks: int, kept: int | None
) -> None:
    assert resolve(OPTIONS, CPU, World(size=ranks), rows=rows).micro_batch == kept


def test_sharded_model_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "why_not_compile", lambda device: None)
    options = MachineOptions(device="cpu", shard=True, compile=True)
    assert [resolve(options, None, World(size=n)).compile for n in (1, 2)] == [True, False]


def test_run_from_a_cpu_resumes_on_a_gpu(gpu: None) -> None:
    found = resolve(MachineOptions(), CPU)
    assert (found.device, found.memory) == ("cuda", 80 * 2**30)
    assert (found.precision, found.deterministic, found.compile) == ("autocast", True, False)
    assert (found.micro_batch, found.recompute) == (None, None)  # to be measured
    line = changes(CPU, found, MachineOptions())
    assert line.startswith("device cuda instead of cpu")


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_compute_for_each_precision_and_kernels(gpu: None) -> None:
    def compute(**options: Any) -> Compute:
        machine = resolve(MachineOptions(**options))
        device = devices.get_device(machine.device, machine.precision)
        return devices.choose_compute(device, 1024, kernels=machine.kernels)

    assert compute() == compute(kernels="none") == Compute()
    assert compute(precision="fp32") == compute(precision="tf32") == Compute()
    bf16 = Compute(dtype=torch.bfloat16)
    assert compute(precision="bf16", kernels="none") == bf16
    assert compute(precision="bf16", shard=True) == bf16
    loss = dataclasses.replace(bf16, loss_kernel=True)
    assert compute(precision="bf16") == loss == traffic.WAYS["bf16 + loss kernel"]
    assert compute(kernels="loss") == Compute(loss_kernel=True)
    both = dataclasses.replace(loss, mlp_kernel=True)
    assert compute(precision="bf16", kernels="all") == both == traffic.WAYS["bf16 + kernels"]


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_run_in_bf16_without_kernels_stays_without(gpu: None) -> None:
    before = resolve(MachineOptions(precision="bf16", kernels="none"))
    assert resolve(MachineOptions(), before).kernels == "none"


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_compared_schedules_compute_differently(gpu: None) -> None:
    """The arms that decide the defaults must not follow the defaults."""
    found = {}
    for name, flags in FLAGS.items():
        pairs = zip(flags[::2], flags[1::2], strict=True)
        options: dict[str, Any] = {flag[2:]: value for flag, value in pairs}
        found[name] = resolve(MachineOptions(**options))
    assert found.pop("autocast, again") == found["autocast"]
    assert len({(m.precision, m.kernels) for m in found.values()}) == len(found)


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_kernels_on_a_gpu_before_hopper(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper = resolve(MachineOptions(kernels="all"))
    assert on_hopper.kernels == "all"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert resolve(MachineOptions(precision="bf16")).kernels == "none"  # not measured there
    assert resolve(MachineOptions(kernels="loss")).kernels == "loss"
    assert resolve(MachineOptions(), on_hopper).kernels == "loss"
    with pytest.raises(UserError, match=r"--kernels all: .*Hopper.*use --kernels loss"):
        resolve(MachineOptions(kernels="all"))


def test_fp8_is_off_by_default(gpu: None) -> None:
    assert not resolve(MachineOptions()).fp8_head
    found = resolve(MachineOptions(fp8_head=True))
    assert found.fp8_head
    assert resolve(MachineOptions(), found).fp8_head


def test_run_from_a_gpu_resumes_on_a_cpu() -> None:
    before = Machine(
        device="cuda", precision="tf32", compile=False, kernels="all", deterministic=False,
        shard=False, threads=16, recompute=False, micro_batch=64, memory=80 * 2**30, fp8_head=True,
    )  # fmt: skip
    found = resolve(OPTIONS, before)
    assert (found.kernels, found.micro_batch, found.threads) == ("none", None, 1)
    assert not found.fp8_head
    assert found.precision == resolve(OPTIONS).precision  # a CPU has no TF32
    line = changes(before, found, OPTIONS)
    assert "kernels none instead of all" in line
    assert "precision" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernels": "loss", "precision": "fp32"}, "--kernels loss: .*; use --kernels none"),
        ({"kernels": "mlp"}, "--kernels must be none, loss or all, not 'mlp'"),
        ({"fp8_head": True}, "--fp8-head: FP8 needs an NVIDIA Hopper GPU or newer; leave it out"),
        ({"precision": "tf32"}, "--precision tf32 needs an NVIDIA GPU"),
        ({"precision": "fp64"}, "--precision must be one of"),
        ({"device": "tpu"}, "--device must be"),
        ({"micro_batch": 0}, "--micro-batch must be at least 1, but is 0"),
        ({"threads": -1}, "--threads must be at least 1, but is -1"),
    ],
)
def test_unavailable_option_is_an_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve(MachineOptions(**{"device": "cpu", **options}))


def test_settings_that_may_differ_between_ranks() -> None:
    for field in dataclasses.fields(Machine):
        other = dataclasses.replace(CPU, **{field.name: "other"})
        own = field.name in ("name", "memory", "threads", "keep_memory")
        assert (other.agreed() == CPU.agreed()) == own, field.name
