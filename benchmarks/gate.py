"""The correctness gate: a fast step must update the weights like a plain one.

A loss curve does not show this: over 40 steps a wrong GELU does not change it. Here ten fast steps
are compared, parameter by parameter, with ten steps of a plain float64 implementation. To show that
the comparison detects errors, ten bugs are planted, and each must be caught.

    python -m benchmarks.gpu gate        # GPT-2 124M on a GPU
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rekindle.model import gpt2
from rekindle.model.compute import Compute
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.optim.adamw import AdamW
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World
from rekindle.train import train_step

STEPS = 10
# With these numbers every part of the update has a visible effect. The epsilon limits the effect of
# gradients that are mostly rounding.
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.95), 1e-6, 0.1
CLIP = 0.8  # of the first gradient's norm; later norms are smaller
# Relative error of a parameter's update: float32 stays below 1e-4, the smallest bug causes 8e-4.
LIMIT = 2e-4

Updates = dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """Ten small batches, and the initial weights."""

    model: GPT2
    tokens: Tensor  # (steps, accumulation, micro, T + 1)
    clip: float  # below the first gradient's norm, so that at least one step is clipped

    @classmethod
    def make(cls, config: GPT2Config, tokens: Tensor) -> "Trial":
        """A trial with a model in which every weight and bias affects the loss."""
        torch.manual_seed(0)
        model = GPT2(config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.5 * config.n_embd**-0.5)
        model.to(tokens.device)
        return cls(model, tokens, clip=CLIP * _norm(_gradients(model, tokens[0])))


def learning_rate(step: int) -> float:
    return LR * min(1.0, (step + 1) / 4)


def _gradients(model: GPT2, batch: Tensor) -> list[Tensor]:
    """Gradients of the mean loss of a batch, (accumulation, micro-batch, T + 1)."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for rows in batch:
        logits, _ = model(rows[:, :-1])
        assert logits is not None
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        for t, g in zip(total, torch.autograd.grad(loss, [*model.parameters()]), strict=True):
            t += g / len(batch)
    return total


def _norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))


def plain_updates(trial: Trial) -> Updates:
    """The change of each parameter after ten steps of a plain float64 implementation of the
    lecture's loop."""
    plain = Compute(dtype=torch.float64, attention="plain")
    model = copy.deepcopy(trial.model).double().use(plain)
    parameters = [*model.parameters()]
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    for step, batch in enumerate(trial.tokens):
        gradients = _gradients(model, batch)
        scale = min(1.0, trial.clip / (_norm(gradients) + 1e-6))
        lr, n = learning_rate(step), step + 1
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                m.lerp_(g * scale, 1 - BETAS[0])
                v.lerp_((g * scale) ** 2, 1 - BETAS[1])
                if p.dim() >= 2:
                    p *= 1 - lr * DECAY
                p -= lr * (m / (1 - BETAS[0] ** n)) / ((v / (1 - BETAS[1] ** n)).sqrt() + EPS)
    return _difference(trial.model, model)


def fast_updates(
    trial: Trial, compute: Compute, device: Device, compiled: Callable[..., Any] | None = None,
    bug: str | None = None,
) -> Updates:  # fmt: skip
    """The same ten steps with `train_step`, as in training, with one of `BUGS` planted."""
    model = copy.deepcopy(trial.model).use(compute)
    settings: dict[str, Any] = {"clip": trial.clip, "lr": learning_rate, "cut": slice(None)}
    with contextlib.ExitStack() as planted:
        if bug in MODEL_BUGS:
            planted.enter_context(MODEL_BUGS[bug](model))
        optimizer = AdamW(model, AdamWConfig(LR, *BETAS, EPS, DECAY))
        if bug in OPTIMIZER_BUGS:
            optimizer._adamw = OPTIMIZER_BUGS[bug](model, optimizer._adamw)
        settings |= STEP_BUGS.get(bug or "", {})
        forward = compiled(model) if compiled else model
        for step, batch in enumerate(trial.tokens):
            rows = batch[settings["cut"]]
            train_step(
                forward, list(model.parameters()), optimizer, rows[..., :-1], rows[..., 1:],
                lr=settings["lr"](step), grad_clip=settings["clip"], limit=math.inf,
                device=device, world=World(),
            )  # fmt: skip
    return _difference(trial.model, model)


def _difference(before: GPT2, after: GPT2) -> Updates:
    """The change of each parameter, except the biases of the keys: softmax cancels them, so their
    gradients are only rounding."""
    new, updates = dict(after.named_parameters()), {}
    for name, p in before.named_parameters():
        update = new[name].detach().double() - p.detach().double()
        if name.endswith("c_attn.bias"):
            query, _, value = update.chunk(3)
            update = torch.cat([query, value])
        updates[name] = update
    return updates


def distance(updates: Updates, reference: Updates) -> tuple[float, str]:
    """The largest relative error of any parameter's update, and that parameter's name."""
    errors = {n: float((updates[n] - r).norm() / r.norm()) for n, r in reference.items()}
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


# The ten bugs. Each has occurred in a real implementation.


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _erf_gelu(model: GPT2) -> Any:
    exact = F.gelu
    return _patched(gpt2.F, "gelu", lambda x, approximate: exact(x))


def _wrong_epsilon(model: GPT2) -> Any:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return contextlib.nullcontext()


def _untied(model: GPT2) -> Any:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return contextlib.nullcontext()


def _decay_everywhere(model: GPT2, optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    optimizer.param_groups[1]["weight_decay"] = DECAY
    return optimizer


def _no_decay_of_embeddings(model: GPT2, optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    matrices, others = optimizer.param_groups
    tables = [model.transformer.wte.weight, model.transformer.wpe.weight]
    rest = [p for p in matrices["params"] if not any(p is t for t in tables)]
    groups = [
        {"params": rest, "weight_decay": DECAY},
        {"params": others["params"] + tables, "weight_decay": 0.0},
    ]
    changed = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
    changed.state = optimizer.state
    return changed


def _slow_second_moment(model: GPT2, optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    for group in optimizer.param_groups:
        group["betas"] = (BETAS[0], 0.999)
    return optimizer


MODEL_BUGS = {"erf-GELU": _erf_gelu, "layer norm's epsilon": _wrong_epsilon, "untied": _untied}
OPTIMIZER_BUGS = {
    "decay of biases and norms": _decay_everywhere,
    "no decay of embeddings": _no_decay_of_embeddings,
    "AdamW's default beta2": _slow_second_moment,
}
STEP_BUGS: dict[str, dict[str, Any]] = {
    "a dropped micro-batch": {"cut": slice(0, 1)},
    "a dropped row": {"cut": (slice(None), slice(1, None))},
    "a learning rate one step late": {"lr": lambda step: learning_rate(max(0, step - 1))},
    "no clipping": {"clip": 0.0},
}
BUGS = (*MODEL_BUGS, *OPTIMIZER_BUGS, *STEP_BUGS)


def check(
    trial: Trial, computes: dict[str, Compute], device: Device,
    compiled: Callable[..., Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The error of each way relative to the plain step, and of the first way with each bug planted.

    `passed`: the error of every way is within `LIMIT`, and that of every bug is not.
    """
    reference = plain_updates(trial)
    ways = {
        name: distance(fast_updates(trial, compute, device, compiled), reference)
        for name, compute in computes.items()
    }
    first = next(iter(computes.values()))
    bugs = {bug: distance(fast_updates(trial, first, device, None, bug), reference) for bug in BUGS}
    return {
        "limit": LIMIT,
        "ways": {name: {"error": e, "worst": worst} for name, (e, worst) in ways.items()},
        "bugs": {name: {"error": e, "worst": worst} for name, (e, worst) in bugs.items()},
        "passed": all(e <= LIMIT for e, _ in ways.values())
        and all(e > LIMIT for e, _ in bugs.values()),
    }
