"""The code that Inductor generates for a training step, on a machine without a GPU.

The step is traced on the meta device, whose tensors have shapes but no memory. Then the graph is
moved to a simulated card, partitioned into forward and backward pass, and lowered.

Three functions are replaced, because they depend on a real card. Attention is cuDNN's, which torch
2.11 chooses on Hopper. `F.cross_entropy` is written as the two operators it consists of. Autocast,
which does not work on a simulated card, is replaced by its effect on this model: linear layers get
their inputs and weights in bf16.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rekindle.model import gpt2
from rekindle.model.compute import Compute
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.model.kernels import cross_entropy, mlp


class _Enough(BaseException):
    """Ends a compilation once the needed result is there. Not an `Exception`, which the compiler
    would wrap in one of its own."""


class Part(NamedTuple):
    """The graph of a forward or backward pass, whose tensors belong to a `FakeTensorMode`."""

    graph: torch.fx.GraphModule
    mode: Any
    is_backward: bool


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None, is_causal: bool = False
) -> Tensor:
    """`F.scaled_dot_product_attention` by cuDNN."""
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
    return cudnn(q, k, v, attn_mask, True, 0.0, is_causal)[0]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """`F.cross_entropy`; PyTorch's own operator has no gradient on the meta device."""
    loss = torch.ops.aten.nll_loss_forward
    return loss(torch.log_softmax(logits, -1), targets, None, 1, -100)[0]


def _linear_under_autocast(self: nn.Linear, input: Tensor) -> Tensor:
    bias = None if self.bias is None else self.bias.bfloat16()
    return F.linear(input.bfloat16(), self.weight.bfloat16(), bias)


@contextlib.contextmanager
def _replaced(autocast: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:

        def replace(owner: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        replace(F, "scaled_dot_product_attention", _attention)
        replace(F, "cross_entropy", _cross_entropy)
        for kernel in (cross_entropy, mlp):
            replace(kernel, "why_not", lambda device, dtype: None)
            replace(kernel, "in_autocast_dtype", lambda *tensors: tensors)
        if autocast:
            replace(gpt2.Linear, "forward", _linear_under_autocast)
        yield


def parts(config: GPT2Config, compute: Compute, B: int, T: int) -> list[Part]:
    """Forward and backward pass of `config` over B × T tokens. A graph break is an error. Call this
    before `pretend_to_torch`."""
    return _partition(*_trace(config, compute, B, T))


def _trace(
    config: GPT2Config, compute: Compute, B: int, T: int
) -> tuple[torch.fx.GraphModule, Any, dict[str, Any]]:
    """The joint graph of both passes, its inputs, and the other arguments of its partition."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    traced: list[tuple[torch.fx.GraphModule, Any, dict[str, Any]]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> None:
        options.pop("compiler", None)
        traced.append((graph, inputs, options))
        raise _Enough

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: graph,
        partition_fn=keep,
        decompositions=select_decomp_table(),
    )
    with torch.device("meta"):
        model = GPT2(config).use(compute)
        tokens = torch.empty(B, T, dtype=torch.long)
    with _replaced(autocast=compute.dtype == torch.float32), contextlib.suppress(_Enough):
        torch.compile(model, fullgraph=True, dynamic=False, backend=backend)(tokens, tokens)
    (found,) = traced
    return found


def _partition(graph: torch.fx.GraphModule, inputs: Any, options: dict[str, Any]) -> list[Part]:
    """Move the graph to the card and partition it as Inductor does."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    _move(graph, mode)
    # Constant folding would compute with tensors on the card.
    folding = config.patch(joint_graph_constant_folding=False)
    with folding, mode, tracing(TracingContext(mode)), torch.no_grad():
        _recursive_joint_graph_passes(graph, skip_invoke_subgraph=True)
        cut = min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **options)
    return [Part(one, mode, i == 1) for i, one in enumerate(cut)]


def _move(graph: torch.fx.GraphModule, mode: Any) -> None:
    """Put every tensor of a graph on the card."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    card = torch.device("cuda:0")
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": card}
    graph.recompile()
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    with mode:
        for node in placeholders:
            old = node.meta["val"]
            node.meta["val"] = torch.empty_strided(
                old.shape, old.stride(), dtype=old.dtype, device=card
            )
    values = [node.meta["val"] for node in placeholders]
    FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*values)


def lower(part: Part) -> tuple[Any, str]:
    """Inductor's lowered graph, scheduled and fused, and the code generated from it. Call this
    after `pretend_to_torch`."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    lowered: list[tuple[Any, str]] = []

    def keep(graph: Any) -> None:
        code, _ = graph.codegen()
        lowered.append((graph, code.value))
        raise _Enough

    inputs = [n.meta["val"] for n in part.graph.graph.nodes if n.op == "placeholder"]
    with (
        config.patch(fx_graph_cache=False),
        part.mode,
        tracing(TracingContext(part.mode)),
        torch.no_grad(),
        mock.patch.object(GraphLowering, "compile_to_module", keep),
        contextlib.suppress(_Enough),
    ):
        compile_fx_inner(
            part.graph, inputs, is_backward=part.is_backward, graph_id=int(part.is_backward)
        )
    (found,) = lowered
    return found
