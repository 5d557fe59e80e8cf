"""Evaluation during training: validation loss, tasks and samples."""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from rekindle.data.tokenizer import Tokenizer
from rekindle.errors import UserError
from rekindle.evaluate import scoring
from rekindle.evaluate.loss import validation_loss
from rekindle.evaluate.scoring import Packed
from rekindle.evaluate.tasks import Item, Task
from rekindle.model import LanguageModel
from rekindle.model.compute import Forward
from rekindle.observe.console import Console
from rekindle.observe.progress import Progress
from rekindle.recipes import Recipe
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World
from rekindle.runtime.sharding import is_sharded, unsharded_root
from rekindle.sampling import cut_at_end, generate


class InterruptedEvaluationError(Exception):
    """A signal asked to stop while a model was being evaluated."""


class Logger(Protocol):
    """The part of a metrics logger that the evaluator uses."""

    def record(self, kind: str, step: int, **values: Any) -> None: ...


@dataclass
class Evaluator:
    """Evaluates a model during training. Every rank must call `evaluator(step)`."""

    model: LanguageModel
    forward: Forward  # the model or its compiled form, for the validation loss
    recipe: Recipe  # batch.length, eval_tokens, passage and prompt are used
    validation: Sequence[np.ndarray]  # shards; may be empty
    tasks: Sequence[Packed]
    tokenizer: Tokenizer
    micro_batch: int  # sequences per forward pass
    device: Device
    world: World
    logger: Logger
    console: Console
    # Whether a signal asked any rank to stop; every rank must call it. It ends an evaluation.
    stop_requested: Callable[[], int] = lambda: 0
    token_bytes: np.ndarray = field(init=False)  # (vocab_size,)

    def __post_init__(self) -> None:
        self.token_bytes = self.tokenizer.token_bytes()

    def __call__(self, step: int) -> float | None:
        """Evaluate; return the validation loss in nats per token if there are validation shards.

        Raises `InterruptedEvaluationError` on every rank once a signal asked to stop.
        """
        loss = self.validate(step) if self.validation else None
        with unsharded_root(self.model):
            for packed in self.tasks:
                self._check_stop()
                self.score(packed, step)
            self._check_stop()
            if step:  # samples of an untrained model are noise
                self.sample(step)
        return loss

    def compile(self) -> float:
        """Compile the forward pass of the validation loss; return the seconds it took, 0 if there
        is nothing to compile. Tasks and samples run the model itself, uncompiled."""
        if self.forward is self.model or not self.validation:
            return 0.0
        began = time.perf_counter()
        sizes = self.micro_batch, self.recipe.batch.length
        ids = torch.zeros(sizes, dtype=torch.long, device=self.device.torch)
        with torch.no_grad(), self.device.autocast():
            self.forward(ids, ids.clone())  # Dynamo would remember that both are one tensor
        self.device.synchronize()
        return time.perf_counter() - began

    def _check_stop(self) -> None:
        if self.stop_requested():
            raise InterruptedEvaluationError

    def _progress(self, unit: str, label: str, *, can_stop: bool) -> Callable[[int, float], None]:
        """Shows progress; if `can_stop`, also ends the evaluation once a signal asked to."""
        progress = Progress(self.console, unit, label)

        def report(count: int, part: float) -> None:
            progress.update(count, part)
            if can_stop:
                self._check_stop()

        return report

    def validate(self, step: int) -> float:
        """Log the validation loss and return it, in nats per token."""
        began = time.perf_counter()
        loss = validation_loss(
            self.forward,
            self.validation,
            self.token_bytes,
            T=self.recipe.batch.length,
            tokens=self.recipe.eval_tokens,
            rows=self.micro_batch,
            device=self.device,
            world=self.world,
            progress=self._progress("tokens", "validation", can_stop=True),
        )
        seconds = time.perf_counter() - began
        values = {"loss": loss.nats, "bits_per_byte": loss.bits_per_byte, "tokens": loss.tokens}
        passage = self.passage_losses()
        self.logger.record("validation", step, **values, seconds=seconds, passage=passage)
        self.console.print(
            f"step {step:>5} | validation loss {loss.nats:.4f} nats/token, "
            f"{loss.bits_per_byte:.4f} bits/byte over {loss.tokens:,} tokens ({seconds:.1f} s)"
        )
        return loss.nats

    @torch.no_grad()
    def passage_losses(self) -> list[float]:
        """Loss in nats of each token of the recipe's passage, preceded by an end-of-text token.

        Computed on the main rank, or on all ranks if the model is sharded; empty on the others.
        """
        if not (self.world.is_main or is_sharded(self.model)):
            return []
        tokens = self.tokenizer.encode(self.recipe.passage)[: self.model.config.block_size]
        if not tokens:
            return []
        ids = torch.tensor([self.tokenizer.end_of_text, *tokens], device=self.device.torch)
        with unsharded_root(self.model), self.device.autocast():
            hidden = self.model.body(ids[None, :-1])
            return self.model.losses(hidden[0], ids[1:]).tolist()

    def score(self, packed: Packed, step: int) -> None:
        """Log a task's metrics."""
        began = time.perf_counter()
        # Ranks may have different numbers of batches, so only one alone can stop between them.
        alone = self.world.size == 1
        progress = self._progress("candidates", packed.task.title, can_stop=alone)
        # Eager: compiling for each row length takes longer than it saves in a run.
        scores = scoring.evaluate(self.model, packed, self.device, progress=progress)
        seconds = time.perf_counter() - began
        task, total = packed.task, len(packed.items)
        metrics = metrics_of(task, scores)
        self.logger.record(task.name, step, **metrics, total=total, seconds=seconds)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        correct = round(metrics[task.metric] * total)
        self.console.print(
            f"step {step:>5} | {task.title} {shown} ({correct}/{total}, {seconds:.1f} s)"
        )

    def sample(self, step: int) -> None:
        """Log two continuations of the recipe's prompt, generated by the main rank."""
        if not (self.world.is_main or is_sharded(self.model)):
            return
        prompt = self.tokenizer.encode(self.recipe.prompt)
        wanted = 96 if self.tokenizer.name == "bytes" else 32  # about as much text
        room = min(wanted, self.model.config.block_size - len(prompt))
        if not prompt or room < 1:
            return
        try:
            with self.device.autocast():
                ids = generate(self.model, prompt, room, num=2, seed=42)
        except UserError as error:  # the training loop handles broken weights
            self.console.print(f"step {step:>5} | no samples: {error}")
            return
        end = self.tokenizer.end_of_text
        texts = [self.tokenizer.decode(cut_at_end(row, end)) for row in ids.tolist()]
        self.logger.record("samples", step, texts=texts)
        for text in texts:
            self.console.print(f"step {step:>5} | {text!r}")


def metrics_of(task: Task, scores: Mapping[str, float]) -> dict[str, float]:
    """`scores` without counts, the task's main metric first."""
    metrics = {name: value for name, value in scores.items() if isinstance(value, float)}
    return {task.metric: metrics.pop(task.metric), **metrics}


def load_for_training(
    wanted: Sequence[tuple[Task, str]],
    tokenizer: Tokenizer,
    device: Device,
    world: World,
    report: Callable[[str], None],
) -> list[tuple[Task, list[Item]]]:
    """The tasks that a training run evaluates, with their items; the same on every rank.

    `wanted` pairs each task with the source of its items: a file, `hub`, `none`, or `auto`, which
    means the hub on a GPU and none on a CPU, where scoring would take longer than training.
    `report` is called with one line for each task that is skipped.
    """
    found = []
    for task, where in wanted:
        items = _load_or_skip(task, where, tokenizer, device, report)
        if not world.min(len(items), device.torch):
            if items:
                report(f"{task.title} is skipped: another rank has no items")
            continue
        meaning = f"{task.title} has the checksum"
        advice = f"give every host the same --{task.name}"
        world.agree(_checksum(items), meaning, advice, device.torch)
        found.append((task, items))
    return found


def _checksum(items: Sequence[Item]) -> int:
    """A checksum of what the sums over ranks depend on: labels and text lengths."""
    shapes = [(item.label, len(item.context), *map(len, item.candidates)) for item in items]
    return zlib.crc32(repr(shapes).encode())


def _load_or_skip(
    task: Task, where: str, tokenizer: Tokenizer, device: Device, report: Callable[[str], None]
) -> list[Item]:
    """A task's items, or an empty list. With `auto`, a failed download is only reported."""
    if where == "none" or (where == "auto" and device.torch.type == "cpu"):
        return []
    try:
        return task.load("hub" if where == "auto" else where, tokenizer)
    except UserError as error:
        if where != "auto":
            raise
        report(f"{task.title} is skipped: {error}")
        return []
