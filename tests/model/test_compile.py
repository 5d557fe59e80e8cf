"""Compilation only changes the speed: losses, gradients, HellaSwag and samples match eager, and
evaluating during training compiles one graph once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from rekindle import placement
from rekindle.data.tokenizer import ByteTokenizer
from rekindle.evaluate import scoring
from rekindle.evaluate.loss import Forward, validation_loss
from rekindle.evaluate.tasks import Item
from rekindle.evaluate.tasks.hellaswag import HellaSwag, Question, tokenize
from rekindle.machine import MachineOptions, resolve
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.runtime.device import Device, why_not_compile
from rekindle.sampling import generate

# Inductor runs a C++ compiler for each kernel: on a busy machine that takes minutes.
pytestmark = pytest.mark.timeout(600)

CPU = Device(torch.device("cpu"), "CPU", "fp32")
T, ROWS = 32, 2
CONFIG = GPT2Config(
    n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=257, padded_vocab_size=384
)


class Compiled(NamedTuple):
    """A model and its compiled forms."""

    model: GPT2
    forward: Forward


def make_model(config: GPT2Config = CONFIG) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.15)
    return model


def compiled(model: GPT2) -> Compiled:
    """Compile a model as training does."""
    machine = dataclasses.replace(resolve(MachineOptions(device="cpu")), compile=True)
    forward = placement.compile_model(model, machine)
    assert forward is not model
    return Compiled(model, forward)


@pytest.fixture(scope="module")
def inductor() -> Compiled:
    if reason := why_not_compile(CPU.torch):
        pytest.skip(reason)
    torch._dynamo.reset()
    return compiled(make_model())


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(257, (ROWS, T + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def questions(count: int, longest: int) -> list[Item]:
    """HellaSwag items of all lengths up to `longest` tokens, including the ending."""
    random = np.random.default_rng(2)

    def text(length: int) -> str:
        return "".join(random.choice(list("abcdefgh ")) for _ in range(length))

    lengths = np.linspace(8, longest - 9, count).astype(int)
    asked = [
        Question(text(n), tuple(text(8) for _ in range(4)), i % 4) for i, n in enumerate(lengths)
    ]
    return [tokenize(question, ByteTokenizer()) for question in asked]


def test_losses_and_gradients_match_eager(inductor: Compiled, batch: tuple[Tensor, Tensor]) -> None:
    gradients, losses = [], []
    for forward in (inductor.model, inductor.forward):
        inductor.model.zero_grad()
        _, loss = forward(*batch)
        assert loss is not None
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in inductor.model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, eager in gradients[0].items():
        scale = eager.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(gradients[1][name], eager, rtol=0, atol=1e-4 * scale, msg=name)


def test_hellaswag_and_validation_match_eager(inductor: Compiled) -> None:
    work = [(HellaSwag(), questions(3, CONFIG.block_size))]
    (asked,) = scoring.pack(work, CONFIG.block_size, CPU, compiled=True, tokens_per_batch=256)
    assert len({batch.idx.shape for batch in asked.batches}) == 2
    tokens = np.random.default_rng(3).integers(0, 257, 200).astype(np.uint16)
    endings, losses = [], []
    body = torch.compile(inductor.model.body, fullgraph=True, dynamic=False)
    for forward, transformer in ((inductor.model, None), (inductor.forward, body)):
        found = scoring.candidate_losses(inductor.model, asked, CPU, body=transformer)
        endings.append(torch.cat([*found.sums, *found.counts]))
        losses.append(
            validation_loss(
                forward, [tokens], ByteTokenizer().token_bytes(), T=T, tokens=10**6, rows=ROWS,
                device=CPU,
            ).nats
        )  # fmt: skip
    torch.testing.assert_close(*endings, rtol=1e-5, atol=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_samples_match_a_model_that_was_never_compiled(
    inductor: Compiled, batch: tuple[Tensor, Tensor]
) -> None:
    """Samples come from the eager model, because every length would need its own graph."""
    inductor.forward(*batch)
    never = generate(make_model(), [1, 2, 3], 20, num=2)
    assert torch.equal(generate(inductor.model, [1, 2, 3], 20, num=2), never)


def test_compiling_does_not_change_parameter_names(inductor: Compiled) -> None:
    assert not [name for name in inductor.model.state_dict() if "_orig_mod" in name]


def test_evaluation_compiles_one_graph_once(
    monkeypatch: pytest.MonkeyPatch, batch: tuple[Tensor, Tensor]
) -> None:
    """One graph for training and one for the validation loss. None for questions of all lengths up
    to GPT-2's context, and none for samples."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    wide = GPT2Config(
        n_layer=1, n_head=1, n_embd=8, block_size=1024, vocab_size=257, padded_vocab_size=384
    )
    model, forward = compiled(make_model(wide))
    work = [(HellaSwag(), questions(40, 1024)), (HellaSwag(), questions(9, 500))]
    tasks = scoring.pack(work, 1024, CPU)
    tokens = np.zeros(3 * ROWS * T + 9, np.uint16)  # full batches, and one that is not full

    def one_round() -> int:
        _, loss = forward(*batch)
        assert loss is not None
        loss.backward()
        bytes_ = ByteTokenizer().token_bytes()
        validation_loss(forward, [tokens], bytes_, T=T, tokens=10**6, rows=ROWS, device=CPU)
        for packed in tasks:
            scoring.evaluate(model, packed, CPU)
        generate(model, [1, 2, 3], 5)
        return len(graphs)

    first = one_round()
    assert first == 2
    assert one_round() == first
    torch._dynamo.reset()
