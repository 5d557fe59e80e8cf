"""The micro-batch search: as many rows as fit into memory and divide the global batch."""

from types import SimpleNamespace

import pytest
import torch

from rekindle.errors import UserError
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import SIZES, GPT2Config
from rekindle.runtime import micro_batch
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World

CPU = Device(torch.device("cpu"), "CPU", "fp32")
GPU = Device(torch.device("cuda"), "NVIDIA H200", "bf16")
TINY = GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=64, padded_vocab_size=64)


@pytest.fixture(scope="module")
def model() -> GPT2:
    return GPT2(TINY)


@pytest.mark.parametrize(
    ("rows", "ranks", "max_rows", "expected"),
    [
        (512, 1, 64, 64),
        (512, 8, 64, 64),
        (512, 8, 50, 32),  # 64 rows per rank, which 50 does not divide
        (480, 1, 64, 60),
        (48, 8, 64, 6),  # at most the rows of the rank
        (6, 2, 2, 1),
        (7, 1, 3, 1),
    ],
)
def test_largest_micro_batch_that_fits_and_divides(
    monkeypatch: pytest.MonkeyPatch,
    model: GPT2,
    rows: int,
    ranks: int,
    max_rows: int,
    expected: int,
) -> None:
    monkeypatch.setattr(micro_batch, "rows_for", lambda config, T, device: max_rows)
    monkeypatch.setattr(World, "min", lambda self, value, device: value)
    found = micro_batch.choose_micro_batch(model, rows, 16, CPU, World(size=ranks), compiled=False)
    assert found == expected


def test_smallest_gpu_decides(monkeypatch: pytest.MonkeyPatch, model: GPT2) -> None:
    monkeypatch.setattr(World, "min", lambda self, value, device: min(value, 4))
    assert micro_batch.choose_micro_batch(model, 64, 16, CPU, World(size=2), compiled=False) == 4


def test_batch_must_divide_over_the_ranks(model: GPT2) -> None:
    with pytest.raises(UserError, match="10 rows does not divide over 4 ranks"):
        micro_batch.choose_micro_batch(model, 10, 16, CPU, World(size=4), compiled=False)


@pytest.mark.parametrize(
    ("config", "T", "gib", "rows"),
    [
        (SIZES["gpt2"].for_training(), 1024, 64, 5),  # 206 MB of logits per row
        (SIZES["gpt2"].for_training(), 1024, 8, 2),  # limited by the machine's memory
        (SIZES["gpt2"].for_training(), 128, 64, 41),
        (TINY, 16, 64, 64),  # at most MAX_ROWS
        (GPT2Config(padded_vocab_size=10**6), 1024, 64, 1),  # at least one
    ],
)
def test_rows_are_limited_by_the_size_of_their_logits(
    config: GPT2Config, T: int, gib: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_batch, "memory_of", lambda device: gib * 2**30)
    assert micro_batch.rows_for(config, T, CPU) == rows


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """`gpu(peaks, total)`: a GPU with `total` bytes, of which one and two rows need `peaks`."""

    def pretend(peaks: list[float], total: float) -> Device:
        remaining = list(peaks)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: remaining.pop(0))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, total))
        # Tensors stay on the CPU; only the decision is tested here.
        fake = SimpleNamespace(
            torch=torch.device("cpu"), name="GPU", autocast=CPU.autocast,
            product_dtype=torch.bfloat16,
        )  # fmt: skip
        return fake  # type: ignore[return-value]

    return pretend


def test_rows_are_extrapolated_from_two_measurements(gpu, model: GPT2) -> None:
    device = gpu([1000.0, 1100.0], (1000 + 550) / 0.9)
    assert (
        micro_batch._rows_in_gpu_memory(model, 16, device, False) == 1 + 5
    )  # 550 bytes left, 100 per row
    assert all(p.grad is None for p in model.parameters())


def test_model_to_be_compiled_is_measured_without_its_head(
    monkeypatch: pytest.MonkeyPatch, gpu, model: GPT2
) -> None:
    """16 tokens × 64 logits × 2 (logits and gradient) × 2 bytes: 4,096 bytes per row."""
    monkeypatch.setattr(model, "head", None)  # must not be called
    device = gpu([10_000.0, 10_100.0], (10_000 + 4_096 + 5.5 * (100 + 4_096)) / 0.9)
    assert micro_batch._rows_in_gpu_memory(model, 16, device, True) == 1 + 5
    assert all(p.grad is None for p in model.parameters())


def test_out_of_memory_limits_the_rows(monkeypatch: pytest.MonkeyPatch, gpu, model: GPT2) -> None:
    forward = model.forward

    def out_of_memory(most: int):
        def call(idx, targets):
            if len(idx) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(idx, targets)

        return call

    device = gpu([1000.0, 1100.0], 1e9)
    monkeypatch.setattr(model, "forward", out_of_memory(1))
    assert micro_batch._rows_in_gpu_memory(model, 16, device, False) == 1
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.setattr(model, "forward", out_of_memory(0))
    assert micro_batch._rows_in_gpu_memory(model, 16, device, False) == 0
    monkeypatch.setattr(micro_batch, "_rows_in_gpu_memory", lambda *arguments: 0)
    with pytest.raises(UserError, match="one row of 16 tokens does not fit in the memory"):
        micro_batch.choose_micro_batch(model, 8, 16, GPU, World(), compiled=False)


@pytest.mark.parametrize(("rows", "recompute"), [(0, True), (3, True), (4, False), (64, False)])
def test_activations_are_recomputed_if_few_rows_fit(
    monkeypatch: pytest.MonkeyPatch, model: GPT2, rows: int, recompute: bool
) -> None:
    monkeypatch.setattr(micro_batch, "_rows_in_gpu_memory", lambda *arguments: rows)
    assert micro_batch.must_recompute(model, 16, GPU, World(), compiled=False) == recompute
    assert not micro_batch.must_recompute(model, 16, CPU, World(), compiled=False)


def test_sharded_model_is_not_measured(monkeypatch: pytest.MonkeyPatch, model: GPT2) -> None:
    monkeypatch.setattr(micro_batch, "is_sharded", lambda model: True)
    assert not micro_batch.must_recompute(model, 16, GPU, World(), compiled=False)
    with pytest.raises(UserError, match=r"--shard: .*: give --micro-batch"):
        micro_batch.choose_micro_batch(model, 8, 16, GPU, World(), compiled=False)
    assert micro_batch.choose_micro_batch(model, 8, 16, CPU, World(), compiled=False) == 8
