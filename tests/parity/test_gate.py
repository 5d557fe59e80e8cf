"""The correctness gate: every way to compute a step updates each weight like a plain float64
implementation, and ten planted bugs are all caught."""

import pytest
import torch

from benchmarks import gate
from rekindle.model.compute import Compute
from rekindle.model.gpt2_config import GPT2Config
from rekindle.runtime.device import Device, why_not_compile

CPU = Device(torch.device("cpu"), "CPU", "fp32")
CONFIG = GPT2Config(
    n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257, padded_vocab_size=257
)
WAYS = {
    "as training does": Compute(),
    "attention written out": Compute(attention="plain"),
    "separate q, k, v": Compute(separate_qkv=True),
    "recompute": Compute(recompute=True),
}


@pytest.fixture(scope="module")
def trial() -> gate.Trial:
    random = torch.Generator().manual_seed(3)
    skewed = torch.rand(gate.STEPS, 2, 4, 33, generator=random) ** 3  # some tokens are frequent
    return gate.Trial.make(CONFIG, (skewed * 257).long())


@pytest.fixture(scope="module")
def reference(trial: gate.Trial) -> gate.Updates:
    return gate.plain_updates(trial)


@pytest.mark.parametrize("way", WAYS)
def test_every_variant_passes(
    trial: gate.Trial, reference: gate.Updates, way: str, one_thread: None
) -> None:
    error, worst = gate.distance(gate.fast_updates(trial, WAYS[way], CPU), reference)
    assert error < gate.LIMIT / 3, worst


@pytest.mark.timeout(600)
@pytest.mark.slow  # 20 s of C++; model/test_compile.py compares compiled gradients with eager ones
def test_compiled_step_passes(trial: gate.Trial, reference: gate.Updates, one_thread: None) -> None:
    if reason := why_not_compile(CPU.torch):
        pytest.skip(reason)

    def compiled(model: torch.nn.Module) -> object:
        torch._dynamo.reset()
        return torch.compile(model, fullgraph=True, dynamic=False)

    updates = gate.fast_updates(trial, Compute(), CPU, compiled)
    error, worst = gate.distance(updates, reference)
    assert error < gate.LIMIT / 3, worst


@pytest.mark.parametrize("bug", gate.BUGS)
def test_every_planted_bug_is_caught(
    trial: gate.Trial, reference: gate.Updates, bug: str, one_thread: None
) -> None:
    error, _ = gate.distance(gate.fast_updates(trial, Compute(), CPU, bug=bug), reference)
    assert error > 2 * gate.LIMIT
    assert len(gate.BUGS) == 10


def test_complete_gate(trial: gate.Trial, one_thread: None) -> None:
    result = gate.check(trial, {"bf16": Compute(dtype=torch.bfloat16)}, CPU)
    assert not result["passed"]  # bf16 is evaluated by its loss, not by this gate
    result = gate.check(trial, {"fp32": Compute()}, CPU)
    assert result["passed"], result
