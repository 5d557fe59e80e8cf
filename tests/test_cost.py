"""The cost of a training step, counted instead of timed: operators, bytes allocated, generated
kernels, graph breaks and recompilations. These do not depend on the machine, so that a change that
makes the step more expensive is noticed on any machine.

A budget is the cost when it was last measured, plus a margin for other versions of torch. If a
change exceeds one, find out why, or raise the budget here and explain it in benchmarks/LOG.md.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rekindle.model.compute import Compute
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.optim.adamw import AdamW
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.optim.gradients import clip_gradients, grad_norm
from rekindle.runtime.device import Device, why_not_compile
from rekindle.runtime.distributed import World
from rekindle.train import train_step

ROWS, T = 4, 32


class Counter(TorchDispatchMode):
    """Counts operators other than views, and the bytes that they newly allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.allocated = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        outputs = {
            _storage(t): t.untyped_storage().nbytes()
            for t in tree_leaves(out)
            if isinstance(t, Tensor)
        }
        fresh = {storage: size for storage, size in outputs.items() if storage not in inputs}
        if fresh or func._schema.is_mutable:  # a view costs nothing
            self.calls += 1
        self.allocated += sum(fresh.values())
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def make_config(n_layer: int) -> GPT2Config:
    return GPT2Config(
        n_layer=n_layer, n_head=2, n_embd=32, block_size=T, vocab_size=257, padded_vocab_size=384
    )


def make_step(
    n_layer: int, precision: str, compiled: Callable[[GPT2], Any] = lambda m: m
) -> Callable[[], None]:
    torch.manual_seed(0)
    device = Device(torch.device("cpu"), "CPU", precision)
    model = GPT2(make_config(n_layer)).use(Compute(dtype=device.dtype))
    optimizer = AdamW(model, AdamWConfig(lr=1e-3))
    parameters = list(model.parameters())
    forward = compiled(model)
    tokens = torch.randint(257, (1, ROWS, T + 1))
    x, y = tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()

    def run() -> None:
        result = train_step(
            forward,
            parameters,
            optimizer,
            x,
            y,
            lr=1e-3,
            grad_clip=1.0,
            limit=math.inf,
            device=device,
            world=World(),
        )
        assert not result.skipped

    run()  # the first step may allocate more
    return run


def count(n_layer: int, precision: str) -> Counter:
    step = make_step(n_layer, precision)
    with Counter() as counter:
        step()
    return counter


@pytest.mark.parametrize(
    ("precision", "per_layer", "rest"), [("fp32", 43, 59), ("autocast", 66, 65), ("bf16", 68, 69)]
)
def test_operators_of_a_step(precision: str, per_layer: int, rest: int, one_thread: None) -> None:
    one, two = count(1, precision), count(2, precision)
    assert two.calls - one.calls <= per_layer
    assert 2 * one.calls - two.calls <= rest  # the cost without any layer


@pytest.mark.parametrize(
    ("precision", "per_layer", "rest"), [("fp32", 43, 5.5), ("autocast", 35, 7), ("bf16", 34, 7)]
)
def test_bytes_allocated_by_a_step(
    precision: str, per_layer: float, rest: float, one_thread: None
) -> None:
    """Per layer in units of the float32 residual stream, the rest in units of float32 logits."""
    one, two = count(1, precision), count(2, precision)
    assert (two.allocated - one.allocated) / (4 * ROWS * T * 32) <= per_layer
    assert (2 * one.allocated - two.allocated) / (4 * ROWS * T * 384) <= rest


def test_norm_and_clipping_allocate_only_scalars(one_thread: None) -> None:
    weight = torch.nn.Parameter(torch.randn(200_000))
    weight.grad = torch.randn(200_000)
    with Counter() as counter:
        clip_gradients([weight], 1.0, grad_norm([weight]))
    assert counter.allocated < 200


@pytest.fixture
def fresh_compiler() -> Any:
    if reason := why_not_compile(torch.device("cpu")):
        pytest.skip(reason)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_step_is_one_graph_without_breaks(fresh_compiler: None, one_thread: None) -> None:
    graphs = []

    def count_graphs(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    step = make_step(2, "autocast", lambda m: torch.compile(m, dynamic=False, backend=count_graphs))
    for _ in range(3):
        step()
    assert len(graphs) == 1  # neither a break nor a recompilation
    assert not torch._dynamo.utils.counters["graph_break"]


def test_kernels_of_a_compiled_step(
    fresh_compiler: None, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are generated but not built, since compiling C++ takes half a minute. Their results
    are tested in model/test_compile.py."""
    from torch._inductor import config, metrics
    from torch._inductor.async_compile import AsyncCompile

    built: list[str] = []

    def generated(self: AsyncCompile, types: list[str], source: str) -> Callable[..., None]:
        built.append(source)
        return lambda *arguments: None

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", generated)
    metrics.reset()
    model = GPT2(make_config(n_layer=1))
    tokens = torch.zeros(ROWS, T, dtype=torch.long)
    with config.patch(force_disable_caches=True):  # otherwise nothing is generated or counted
        _, loss = torch.compile(model, fullgraph=True, dynamic=False)(tokens, tokens)
        loss.backward()
    assert 0 < len(built) <= metrics.generated_kernel_count <= 60
