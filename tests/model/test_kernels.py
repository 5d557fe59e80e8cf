"""Each kernel matches its plain PyTorch reference: values, gradients, in-place writes, far offsets.

On a GPU, the kernels run there. Elsewhere, Triton's interpreter runs them in NumPy. It must be
enabled before Triton is imported, so all these tests run in one separate process, and the tests
collected here report its results.
"""

import dataclasses
import functools
import importlib
import math
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from rekindle.model import kernels
from rekindle.model.compute import Compute
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.model.kernels import common, cross_entropy, fused_mlp, linear_cross_entropy, mlp

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available() and common.triton is not None and not common.INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"
BF16, FP32 = torch.bfloat16, torch.float32
V = 2 * 8192 + 77  # two full blocks of the vocabulary and a partial one
EXACT = BF16 if CUDA else FP32  # the most precise dtype of the kernels here
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in {BF16: 0, EXACT: 0}]

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's: exp overflows
    pytest.mark.timeout(600),  # the first test waits for the separate process
]
Function = Callable[..., Tensor]


@pytest.fixture(scope="module")
def in_the_interpreter(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The result of each selected test in the interpreting process: "" if it passed."""
    path = tmp_path_factory.mktemp("interpreter") / "results.xml"
    here = [i.nodeid for i in request.session.items if i.path == Path(__file__)]
    selected = [name.rsplit("@", 1)[0] for name in here]  # xdist appends the group
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *selected, f"--junitxml={path}", "--rootdir", str(ROOT)],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert path.exists(), f"the interpreter's process ended with {child.returncode}: {child.stderr}"
    return {
        str(case.get("name")): "\n".join(f"{r.tag}: {r.text or r.get('message')}" for r in case)
        for case in ET.parse(path).iter("testcase")
    }


@pytest.fixture(autouse=True)
def _the_interpreter_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter truncates float32 to bf16; make it round to nearest, as a GPU does."""
    if not common.INTERPRETED:
        return
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder, tl = interpreter.InterpreterBuilder, common.tl
    truncating = builder.cast_impl

    def cast(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return truncating(self, source, to)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(BF16).view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view(np.uint16), to.scalar)

    monkeypatch.setattr(builder, "cast_impl", cast)


@pytest.fixture(autouse=True)
def _where_the_kernels_run(request: pytest.FixtureRequest) -> None:
    if CUDA or common.INTERPRETED or "python" in request.fixturenames:
        return
    if common.triton is None:
        pytest.skip("Triton is not installed")
    result = request.getfixturevalue("in_the_interpreter")[request.node.name]
    if result.startswith("skipped"):
        pytest.skip(result)
    request.node.obj = lambda **_: pytest.fail(result, pytrace=False) if result else None


def normal(*shape: int, dtype: torch.dtype = FP32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to(DEVICE, dtype).requires_grad_()


def values_and_gradients(f: Function, *inputs: Tensor, upstream: Tensor) -> list[Tensor]:
    y = f(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, upstream.to(y.dtype))]


def assert_same(f: Function, plain: Function, *inputs: Tensor, upstream: Tensor) -> None:
    """In fp32: equal up to rounding. In bf16: about as close to fp64 as plain PyTorch."""
    ours = values_and_gradients(f, *inputs, upstream=upstream)
    theirs = values_and_gradients(plain, *inputs, upstream=upstream)
    exact_inputs = [
        t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs
    ]
    exact = values_and_gradients(exact_form(plain), *exact_inputs, upstream=upstream)
    for i, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if inputs[0].dtype == FP32:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item(), msg=str(i))
        else:
            error, plain_error = ((t.double() - e).norm().item() for t in (a, b))
            floor = 2**-9 * e.norm().item()  # one rounding to bf16
            # 1.41 where the upstream gradient is applied after rounding instead of before
            assert error <= 1.5 * max(plain_error, floor), (i, error, plain_error)


def exact_form(plain: Function) -> Function:
    if plain is kernels.plain_mlp:
        return plain
    cap = plain.keywords["cap"] if isinstance(plain, functools.partial) else 0.0
    # Not the plain form, because it calls float().
    return lambda h, w, t: F.cross_entropy(kernels.soft_cap(h @ w.T, cap), t)


# ---- Cross-entropy -------------------------------------------------------------------------------

THIRD = torch.tensor(1 / 3, device=DEVICE)  # an upstream gradient that bf16 cannot represent


def make_head(
    N: int = 6, C: int = 24, rows: int = V, dtype: torch.dtype = FP32
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(rows, (N,), device=DEVICE)
    return normal(N, C, dtype=dtype), normal(rows, C, dtype=dtype, scale=0.5), targets


def assert_same_loss(*inputs: Tensor) -> None:
    plain = kernels.plain_linear_cross_entropy
    assert_same(linear_cross_entropy, plain, *inputs, upstream=THIRD)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "rows"), [(6, V), (1, V), (5, 50), (3, 8192)])
def test_cross_entropy(dtype: torch.dtype, N: int, rows: int) -> None:
    assert_same_loss(*make_head(N, rows=rows, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "rows"), [(6, V), (5, 50)])
@pytest.mark.parametrize("cap", [0.5, 15.0])
def test_cross_entropy_of_capped_logits(dtype: torch.dtype, N: int, rows: int, cap: float) -> None:
    """Logits far above and below the cap; ignored rows, and columns beyond the vocabulary."""
    hidden, weight, targets = make_head(N, rows=rows, dtype=dtype)
    targets[1] = -100
    assert 1 < (hidden @ weight.T).abs().max() < 15
    ours = functools.partial(linear_cross_entropy, cap=cap)
    plain = functools.partial(kernels.plain_linear_cross_entropy, cap=cap)
    assert_same(ours, plain, hidden, weight, targets, upstream=THIRD)
    loss = ours(hidden, weight, targets)
    assert abs(loss - math.log(rows)) < cap + 0.5
    assert abs(loss - linear_cross_entropy(hidden, weight, targets)) > 0.01


def test_capped_losses_of_bad_targets_are_nan() -> None:
    hidden, weight, targets = make_head(dtype=BF16)
    targets[1] = V
    assert linear_cross_entropy(hidden, weight, targets, cap=15.0).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_targets_do_not_count(dtype: torch.dtype) -> None:
    hidden, weight, targets = make_head(dtype=dtype)
    targets[::2] = -100
    assert_same_loss(hidden, weight, targets)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert torch.autograd.grad(loss, hidden)[0][::2].count_nonzero() == 0


def test_all_ignored_is_nan_without_a_gradient() -> None:
    hidden, weight, targets = make_head(dtype=BF16)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("bad", [V, V + 10**9, -1, -(10**12)])
def test_a_target_outside_the_vocabulary_is_nan(bad: int) -> None:
    hidden, weight, targets = make_head(dtype=BF16)
    targets[1] = bad
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.isnan()
    dhidden = torch.autograd.grad(loss, hidden)[0]
    assert dhidden.isnan().any(1).tolist() == [False, True, False, False, False, False]


def test_upstream_gradient_is_not_rounded() -> None:
    hidden, weight, targets = make_head(rows=50, dtype=BF16)
    loss = linear_cross_entropy(hidden, weight, targets)
    one = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    third = torch.autograd.grad(loss, (hidden, weight), THIRD)
    for a, b in zip(one, third, strict=True):
        assert torch.equal((a.float() * THIRD).to(BF16), b)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = make_head(dtype=BF16)
    for scale in (100, 100):  # logits of hundreds, whose exp overflows; then of ten thousands
        with torch.no_grad():
            hidden.mul_(scale)
        loss = linear_cross_entropy(hidden, weight, targets)
        plain = kernels.plain_linear_cross_entropy(hidden, weight, targets)
        torch.testing.assert_close(loss, plain, rtol=1e-4, atol=0)
        ours, theirs = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, plain))
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 0.02 * b.norm()


def test_cross_entropy_of_views() -> None:
    hidden, weight, targets = make_head(dtype=EXACT)
    views = (
        hidden.detach().T.contiguous().T.requires_grad_(),
        weight.detach().repeat(1, 2)[:, ::2].requires_grad_(),
        targets.repeat_interleave(3)[::3],
    )
    assert not any(v.is_contiguous() for v in views)
    assert_same_loss(*views)


def test_logits_are_unchanged_without_gradients() -> None:
    hidden, weight, targets = make_head(dtype=BF16)
    logits = (hidden @ weight.T).detach()
    before, count = logits.clone(), torch.tensor(len(targets), device=DEVICE)
    losses = cross_entropy._row_losses(logits, targets, count, write_grad=False)
    assert torch.equal(logits, before)
    assert torch.equal(losses, cross_entropy._row_losses(logits, targets, count, write_grad=True))
    assert not torch.equal(logits, before)


def test_no_gradient_is_computed_unless_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = make_head(dtype=BF16)
    wanted, row_losses = [], cross_entropy._row_losses

    def watch(
        logits: Tensor, targets: Tensor, count: Tensor, write_grad: bool, cap: float
    ) -> Tensor:
        wanted.append(write_grad)
        return row_losses(logits, targets, count, write_grad, cap)

    monkeypatch.setattr(cross_entropy, "_row_losses", watch)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    linear_cross_entropy(hidden.detach(), weight.detach(), targets)
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, targets))
    assert wanted == [False, False, True]


def test_only_one_copy_of_the_logits_is_held() -> None:
    N, C = 64, 8
    hidden, weight, targets = make_head(N, C, dtype=BF16)
    linear_cross_entropy(hidden, weight, targets).backward()  # excludes what is allocated only once
    half = N * V * 2 // 2  # bytes
    activities = [ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True) as run:
        linear_cross_entropy(hidden, weight, targets).backward()
    profiler: Any = run.profiler
    events = profiler.kineto_results.events()
    made = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > half]
    assert len(made) == 1


def assert_rounded(ours: Tensor, exact: Tensor) -> None:
    """`ours` are the nearest bf16 numbers to `exact`, except for a few ties."""
    assert ours.dtype == BF16
    assert (ours == exact.to(BF16)).float().mean() > 0.98


def test_gradients_of_logits_are_rounded_to_nearest() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5000, device=DEVICE).to(BF16)
    targets = torch.tensor([3, 99, 4999], device=DEVICE)
    exact = logits.double().requires_grad_()
    F.cross_entropy(exact, targets).backward()
    assert exact.grad is not None
    cross_entropy._row_losses(logits, targets, torch.tensor(3, device=DEVICE), write_grad=True)
    assert_rounded(logits, exact.grad)


def far_rows(near: Tensor, stride: int) -> Tensor:
    """The rows of `near` (N, V), `stride` elements apart. Untouched memory between costs nothing.
    They start in the middle of the allocation, so that offsets that wrap stay inside."""
    N, V = near.shape
    assert (N - 1) * stride >= 2**31
    try:
        storage = torch.empty(2**31 + N * stride, dtype=BF16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"cannot allocate 8.6 GB: {error}")
    return storage.as_strided((N, V), (stride, 1), 2**31).copy_(near)


@pytest.mark.skipif(not CUDA and sys.platform != "linux", reason="needs lazily allocated memory")
def test_offsets_of_logits_have_64_bits() -> None:
    torch.manual_seed(0)
    near = torch.randn(3, 100, device=DEVICE).to(BF16)
    far = far_rows(near, 2**30)
    targets = torch.tensor([3, 99, 50], device=DEVICE)
    count = torch.tensor(3, device=DEVICE)
    losses = [cross_entropy._row_losses(x, targets, count, write_grad=True) for x in (near, far)]
    assert torch.equal(*losses)
    assert torch.equal(near, far)


# ---- MLP -----------------------------------------------------------------------------------------


def make_mlp(
    N: int = 300, C: int = 72, width: int = 200, dtype: torch.dtype = FP32, out: int | None = None
) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (N, C), (width, C), (width,), (out or C, width), (out or C,)
    x, w1, b1, w2, b2 = (torch.randn(shape) for shape in shapes)
    scaled = x, w1 * C**-0.5, b1, w2 * width**-0.5, b2
    return [t.to(DEVICE, dtype).requires_grad_() for t in scaled]


def assert_same_mlp(*inputs: Tensor) -> None:
    shape = *inputs[0].shape[:-1], inputs[3].shape[0]
    upstream = torch.randn(shape, device=DEVICE).to(inputs[0].dtype)
    assert_same(fused_mlp, kernels.plain_mlp, *inputs, upstream=upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "C", "width"), [(300, 72, 200), (128, 64, 256), (1, 16, 40), (1157, 16, 136)]
)
def test_mlp(dtype: torch.dtype, N: int, C: int, width: int) -> None:
    """Full and partial tiles, a single row, and (in the interpreter) more tiles than programs."""
    assert_same_mlp(*make_mlp(N, C, width, dtype))


def test_mlp_whose_widths_the_kernels_cannot_compute() -> None:
    """TMA needs rows of a multiple of 16 bytes, and at least one row."""
    for N, C, width, out in (
        (10, 75, 200, None), (10, 72, 201, None), (10, 72, 200, 33), (0, 72, 200, None),
    ):  # fmt: skip
        inputs = make_mlp(N, C, width, EXACT, out)
        assert torch.equal(fused_mlp(*inputs), kernels.plain_mlp(*inputs))


@pytest.mark.parametrize(("m", "n"), [(256, 128), (128, 256)])
def test_mlp_in_other_tiles(m: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORWARD_TILES", "BACKWARD_TILES"):
        monkeypatch.setattr(mlp, name, dataclasses.replace(mlp.FORWARD_TILES, m=m, n=n, per_sm=1))
    assert_same_mlp(*make_mlp(600, 72, 520, BF16))


def test_gelu_and_its_derivative_are_rounded_to_nearest() -> None:
    x, w1, b1, _, _ = (t.detach() for t in make_mlp(300, 64, 520, BF16))
    _, h, slope = torch.ops.rekindle.mlp(x, w1, b1, w1.T.contiguous(), x[0], True)
    exact = (x.double() @ w1.double().T + b1.double()).requires_grad_()
    gelu = F.gelu(exact, approximate="tanh")
    assert_rounded(h, gelu.detach())
    (derivative,) = torch.autograd.grad(gelu.sum(), exact)
    assert_rounded(slope, derivative)


def test_gradient_of_gelus_argument_and_its_sum() -> None:
    dy, _, _, w2, _ = (t.detach() for t in make_mlp(300, 64, 520, BF16))
    slope = torch.randn(300, 520, device=DEVICE).to(BF16)
    dpre, db1 = torch.ops.rekindle.gelu_backward(dy, w2, slope)
    exact = (dy.double() @ w2.double()) * slope.double()
    assert_rounded(dpre, exact)
    torch.testing.assert_close(db1.double(), exact.sum(0), rtol=0, atol=1e-4)


def test_mlp_of_views_and_another_width() -> None:
    x, w1, b1, w2, b2 = (t.detach() for t in make_mlp(24, 40, 56, EXACT, out=48))
    views = (
        x.T.contiguous().T.unflatten(0, (2, 3, 4)),
        w1.T.contiguous().T,
        b1.repeat_interleave(2)[::2],
        w2.repeat(1, 2)[:, :56],
        b2.repeat_interleave(2)[::2],
    )
    assert not any(v.is_contiguous() for v in views)
    assert_same_mlp(*(v.requires_grad_() for v in views))


def test_gelu_far_from_zero() -> None:
    """Where exp underflows, and beyond its range."""
    x = torch.tensor([[-1e4], [-60.0], [-6.0], [-0.75], [0.0], [0.75], [6.0], [60.0], [1e4]])
    x, one = x.expand(-1, 8) / 8, torch.ones(8, 8)
    inputs = [x, one, one[0] * 0, one / 8, one[0] * 0]
    dtype = EXACT
    inputs = [t.clone().to(DEVICE, dtype).requires_grad_() for t in inputs]
    for name, ours, theirs in zip(
        ("y", "dx"),
        values_and_gradients(fused_mlp, *inputs, upstream=x * 0 + 1)[:2],
        values_and_gradients(kernels.plain_mlp, *inputs, upstream=x * 0 + 1)[:2],
        strict=True,
    ):
        tolerance = 1e-6 if dtype == FP32 else 2**-7
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)


def test_mlp_without_gradients_saves_nothing() -> None:
    inputs = make_mlp(dtype=BF16)
    y, h, slope = torch.ops.rekindle.mlp(*inputs, False)
    assert h.numel() == slope.numel() == 0
    with torch.no_grad():
        assert torch.equal(fused_mlp(*inputs), y)
    assert torch.equal(fused_mlp(*inputs), y)


# ---- Both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("want_grad", [True, False])
def test_operators_are_what_the_compiler_expects(want_grad: bool) -> None:
    hidden, weight, targets = make_head(rows=50, dtype=BF16)
    inputs = make_mlp(20, 16, 24, BF16)
    if not want_grad:
        hidden, weight = hidden.detach(), weight.detach()
        inputs = [t.detach() for t in inputs]
    ops = torch.ops.rekindle
    torch.library.opcheck(ops.linear_cross_entropy.default, (hidden, weight, targets, want_grad))
    torch.library.opcheck(
        ops.linear_cross_entropy.default, (hidden, weight, targets, want_grad, 15.0)
    )
    torch.library.opcheck(ops.mlp.default, (*inputs, want_grad))
    _, _, _, w2, _ = (t.detach() for t in inputs)
    slope = torch.randn(20, 24, device=DEVICE).to(BF16)
    torch.library.opcheck(ops.gelu_backward.default, (inputs[0].detach(), w2, slope))


@pytest.mark.parametrize("autocast", [True, False])
def test_compiled_into_one_graph(autocast: bool) -> None:
    """As in training: an MLP below a head, in a scaled loss, with and without autocast."""
    dtype = FP32 if autocast else BF16
    inputs = [*make_mlp(20, 16, 24, dtype), *make_head(20, 16, rows=50, dtype=dtype)[1:]]

    def loss_of(x, w1, b1, w2, b2, weight, targets):
        with torch.autocast(DEVICE, dtype=BF16, enabled=autocast):
            hidden = fused_mlp(x.view(4, 5, 16), w1, b1, w2, b2)
            assert hidden.dtype == BF16
            return linear_cross_entropy(hidden.flatten(0, 1), weight, targets) / 3

    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("inductor" if CUDA else "aot_eager")(graph, example)

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=False, backend=backend)
    one = torch.tensor(1.0, device=DEVICE)
    eager = values_and_gradients(loss_of, *inputs, upstream=one)
    for a, b in zip(values_and_gradients(compiled, *inputs, upstream=one), eager, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * b.abs().max().item())
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), loss_of(*inputs))
    called = " ".join(str(node.target) for node in graphs[0].graph.nodes)
    assert "rekindle.mlp" in called
    assert "rekindle.linear_cross_entropy" in called


@pytest.mark.parametrize(("all_kernels", "autocast"), [(False, False), (True, False), (True, True)])
def test_kernels_in_a_model(all_kernels: bool, autocast: bool) -> None:
    """Loss and gradients match those without kernels, with the residual stream in bf16 or not, and
    with recomputed activations."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=257, padded_vocab_size=384
    )
    model, idx = GPT2(config).to(DEVICE), torch.randint(257, (8, 9), device=DEVICE)

    def loss_and_gradients(**options: Any) -> list[Tensor]:
        compute = Compute(dtype=FP32 if autocast else BF16, **options)
        with torch.autocast(DEVICE, dtype=BF16, enabled=autocast):
            _, loss = model.use(compute)(idx[:, :-1], idx[:, 1:])
        assert loss is not None
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    plain = loss_and_gradients(loss_kernel=all_kernels)
    ours = loss_and_gradients(loss_kernel=True, mlp_kernel=all_kernels)
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == FP32
        assert (a - b).norm() <= 0.02 * b.norm()
    assert not all(map(torch.equal, ours, plain))  # equal: the kernel did not run
    if all_kernels:
        again = loss_and_gradients(loss_kernel=True, mlp_kernel=True, recompute=True)
        assert all(map(torch.equal, again, ours))


def test_autocast_decides_the_dtype() -> None:
    """fp32 inputs, bf16 arithmetic, fp32 gradients, like plain PyTorch."""
    head, inputs = make_head(), make_mlp()
    with torch.autocast(DEVICE, dtype=BF16):
        loss = linear_cross_entropy(*head)
        y = fused_mlp(*inputs)
    hidden, weight = (t.detach().to(BF16) for t in head[:2])
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, head[2]))
    assert torch.equal(y, fused_mlp(*(t.detach().to(BF16) for t in inputs)))
    for gradient in torch.autograd.grad(loss + y.float().sum(), [*head[:2], *inputs]):
        assert gradient.dtype == FP32


def test_double_backward_is_rejected() -> None:
    """Otherwise a term of the gradient would be missing silently."""
    head, inputs = make_head(rows=50, dtype=BF16), make_mlp(20, 16, 24, BF16)
    for f, arguments in ((linear_cross_entropy, head), (fused_mlp, inputs)):
        y = f(*arguments)
        (gradient,) = torch.autograd.grad(
            y, arguments[0], torch.ones_like(y).requires_grad_(), create_graph=True
        )
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_mismatched_shapes_are_rejected() -> None:
    hidden, weight, targets = make_head(rows=50, dtype=BF16)
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(hidden, weight, targets[:5])
    x, w1, b1, w2, b2 = make_mlp(20, 16, 24, BF16)
    for wrong in ((x[:, :9], w1, b1, w2, b2), (x, w1, b1[:9], w2, b2), (x, w1.float(), b1, w2, b2)):
        with pytest.raises(ValueError, match="does not fit"):
            fused_mlp(*wrong)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it is then an ImportError
import torch
from rekindle.model import kernels as k
h, w, t = torch.randn(4, 8), torch.randn(9, 8), torch.tensor([0, 8, -100, 3])
assert k.why_not(torch.device("cuda"), torch.bfloat16) == "Triton is not installed"
assert torch.equal(k.linear_cross_entropy(h, w, t), k.plain_linear_cross_entropy(h, w, t))
assert torch.equal(k.fused_mlp(h, w, w[:, 0], w.T, w[0]), k.plain_mlp(h, w, w[:, 0], w.T, w[0]))
"""


def test_without_triton_plain_pytorch_is_used(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    child = python("-c", WITHOUT_TRITON)
    assert child.returncode == 0, child.stderr


UNINTERPRETED = """
import torch
from rekindle.model import kernels as k
assert not k.common.INTERPRETED
assert "NVIDIA" in k.why_not(torch.device("cpu"), torch.bfloat16)
assert "bf16" in k.why_not(torch.device("cuda"), torch.float32)
assert k.why_not(torch.device("cuda"), torch.bfloat16) is None
h, w, t = torch.randn(4, 8), torch.randn(9, 8), torch.tensor([0, 8, -100, 3])
assert torch.equal(k.linear_cross_entropy(h, w, t), k.plain_linear_cross_entropy(h, w, t))
"""


@pytest.mark.skipif(common.triton is None, reason="Triton is not installed")
def test_cpu_and_fp32_use_plain_pytorch(
    python: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    child = python("-c", UNINTERPRETED)
    assert child.returncode == 0, child.stderr


GRADIENTS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from rekindle.model.kernels import fused_mlp
torch.manual_seed(0)
inputs = [torch.randn(shape).requires_grad_() for shape in ((4, 8), (8, 8), (8,), (8, 8), (8,))]
loss = torch.compile(lambda *t: fused_mlp(*t).square().sum(), fullgraph=True)(*inputs)
print(torch.autograd.grad(loss, inputs)[0].norm().item())
print(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow  # three processes, of which two compile
@pytest.mark.skipif(common.triton is None, reason="Triton is not installed")
def test_compiled_code_of_an_earlier_version_is_not_used(
    python: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A cached graph calls the kernels' backward pass by name, so its gradients would be those of
    the earlier version."""
    shutil.copytree(ROOT / "rekindle", tmp_path / "rekindle")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))

    def gradient() -> tuple[float, int]:
        child = python("-c", GRADIENTS, tmp_path)
        assert child.returncode == 0, child.stderr
        norm, hits = child.stdout.split()
        return float(norm), int(hits)

    (before, miss), (again, hit) = gradient(), gradient()
    assert (miss, hit, again) == (0, 1, before)
    path = tmp_path / "rekindle" / "model" / "kernels" / "mlp.py"
    path.write_text(path.read_text().replace("return dpre @ w1,", "return 2 * (dpre @ w1),"))
    assert gradient() == (pytest.approx(2 * before), 0)


COMPILE = """
from benchmarks import absent, hopper
card = absent.CARDS["sm_90"]
for case in ("cross-entropy", "MLP forward, no gradient", "MLP backward, sizes that do not divide"):
    found = hopper.compile_case(case, card)
    assert not hopper.violations(case, card, found), found
"""


@pytest.mark.slow  # `make gpu-checks` compiles all cases
@pytest.mark.skipif(common.triton is None, reason="Triton is not installed")
def test_the_kernels_compile_for_hopper(
    python: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter accepts code that the compiler rejects, and the compiler needs no GPU. `make
    gpu-checks` covers all cases and other architectures."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    child = python("-c", COMPILE)
    assert child.returncode == 0, child.stderr
