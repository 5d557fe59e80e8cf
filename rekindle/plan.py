"""A description of a run before it starts: `rekindle train --dry-run`."""

from collections.abc import Iterator

import torch

from rekindle.data.shards import Manifest
from rekindle.flags import flags_of
from rekindle.observe.console import counted
from rekindle.run import Run
from rekindle.trainer import Trainer


def plan(run: Run, trainer: Trainer, manifest: Manifest) -> list[str]:
    """A line for each cost in time, memory and disk space, then every setting of the recipe."""
    lines = [f"{name:12} {text}" for name, text in _costs(run, trainer, manifest)]
    numbers = [f"  {flag.spelling} {flag.default}" for flag in flags_of(run.recipe)]
    return ["", *lines, "", f"every setting of {run.recipe.name}:", *numbers]


def _costs(run: Run, trainer: Trainer, manifest: Manifest) -> Iterator[tuple[str, str]]:
    recipe, p = run.recipe, trainer.partition
    batch, steps, data = recipe.batch, recipe.steps, manifest.tokens("train")
    left = max(0, steps - run.step)
    yield "steps", f"{left:,} of {steps:,}, with {batch.tokens:,} tokens each"
    seen = steps * batch.tokens
    yield "tokens", f"{seen:,}: {seen / data:.2f} epochs of {data:,} training tokens"
    yield (
        "batch",
        (
            f"{counted(batch.rows, 'row')} of {batch.length:,} tokens = "
            f"{counted(p.micro_batch, 'row')} per pass × "
            f"{counted(p.accumulation, 'accumulation step')} × {counted(p.ranks, 'rank')}"
        ),
    )
    yield "compute", _flops(trainer, left * batch.tokens)
    yield "memory", _memory(trainer)
    yield "validation", _validation(run, manifest)
    yield "checkpoints", _checkpoints(run, trainer)


def _flops(trainer: Trainer, tokens: int) -> str:
    total = trainer.model.flops_per_token(trainer.recipe.batch.length) * tokens
    peak = trainer.device.peak_flops
    if not peak:
        return f"{total:.2e} FLOPs"
    hours = total / (peak * trainer.world.size * 0.4) / 3600
    return f"{total:.2e} FLOPs, about {hours:.1f} hours at 40% MFU"


def _state_bytes(trainer: Trainer) -> tuple[int, int]:
    """Bytes of the weights and of the optimizer state."""
    weights = sum(p.numel() * p.element_size() for p in trainer.parameters)
    state = trainer.optimizer.state_tensors().values()
    return weights, sum(t.numel() * t.element_size() for t in state)


def _memory(trainer: Trainer) -> str:
    weights, state = _state_bytes(trainer)
    text = (
        f"{_gib(2 * weights + state)} for weights, gradients and optimizer state, plus activations"
    )
    if trainer.device.torch.type != "cuda":
        return text
    return (
        f"{text}; {_gib(torch.cuda.max_memory_allocated(trainer.device.torch))} peak while building"
    )


def _validation(run: Run, manifest: Manifest) -> str:
    there, every = manifest.tokens("val"), run.recipe.eval_every
    if not there:
        return "none: there are no validation tokens"
    when = f"every {every:,} steps and at the end" if every else "at the end"
    return f"{when}, on {min(there, run.recipe.eval_tokens):,} of {there:,} tokens"


def _checkpoints(run: Run, trainer: Trainer) -> str:
    recipe, size = run.recipe, sum(_state_bytes(trainer))
    every = recipe.checkpoint_every
    when = f"every {every:,} steps and at the end" if every else "at the end"
    if not recipe.keep_checkpoints:
        return f"{when}, {_gib(size)} each, all are kept"
    kept = recipe.keep_checkpoints + recipe.keep_best
    return f"{when}, {_gib(size)} each, up to {kept} kept: {_gib(kept * size)}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
