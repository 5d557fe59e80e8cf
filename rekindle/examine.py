"""What a model has learnt: during a run, and of any model that can be named."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rekindle.data import shards
from rekindle.data.tokenizer import Tokenizer
from rekindle.errors import UserError
from rekindle.evaluate import hellaswag
from rekindle.evaluate.loss import Forward, validation_loss
from rekindle.evaluate.questions import locate, read_questions
from rekindle.generate.sampling import cut_at_end, generate
from rekindle.load import Loaded, load
from rekindle.model.gpt2 import GPT2
from rekindle.observe.console import Console
from rekindle.observe.metrics import Metrics
from rekindle.recipes import Recipe
from rekindle.run import Run
from rekindle.runtime import distributed
from rekindle.runtime.device import Device, get_device, keep_freed_memory
from rekindle.runtime.distributed import World
from rekindle.runtime.fit import rows_for
from rekindle.runtime.sharding import is_sharded, parts_callable


class Examiner:
    """Looks at a model in training: validation loss, HellaSwag, samples."""

    def __init__(
        self, run: Run, model: GPT2, forward: Forward, transformer: Callable[..., Tensor],
        validation: list[np.ndarray], questions: hellaswag.Packed, tokenizer: Tokenizer,
        rows: int, device: Device, world: World, metrics: Metrics,
    ) -> None:  # fmt: skip
        self.run, self.model, self.forward, self.transformer = run, model, forward, transformer
        self.validation, self.questions = validation, questions
        self.tokenizer, self.rows = tokenizer, rows
        self.device, self.world, self.metrics = device, world, metrics
        self.token_bytes = tokenizer.token_bytes()

    def __call__(self, step: int) -> float | None:
        """Look at everything; return the validation loss in nats per token, if there is one."""
        loss = self.validate(step)
        with parts_callable(self.model):
            if self.questions.total:
                self.answer(step)
            if step:  # before the first step there is only noise to hear
                self.speak(step)
        return loss

    def validate(self, step: int) -> float | None:
        if not self.validation:
            return None
        began = time.perf_counter()
        loss = validation_loss(
            self.forward, self.validation, self.token_bytes, T=self.run.recipe.batch.length,
            tokens=self.run.recipe.eval_tokens, rows=self.rows, device=self.device,
            world=self.world,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        self.metrics.record(
            "validation", step, loss=loss.nats, bits_per_byte=loss.bits_per_byte,
            tokens=loss.tokens, seconds=seconds,
        )  # fmt: skip
        self.metrics.console.say(
            f"step {step:>5} | validation loss {loss.nats:.4f} nats/token, "
            f"{loss.bits_per_byte:.4f} bits/byte over {loss.tokens:,} tokens ({seconds:.1f} s)"
        )
        return loss.nats

    def answer(self, step: int) -> None:
        began = time.perf_counter()
        score = hellaswag.evaluate(
            self.model, self.questions, self.device, transformer=self.transformer
        )
        seconds = time.perf_counter() - began
        self.metrics.record(
            "hellaswag", step, acc=score.acc, acc_norm=score.acc_norm, total=score.total,
            seconds=seconds,
        )  # fmt: skip
        self.metrics.console.say(
            f"step {step:>5} | HellaSwag acc_norm {score.acc_norm:.4f}, acc {score.acc:.4f} "
            f"({score.correct_norm}/{score.total}, {seconds:.1f} s)"
        )

    def speak(self, step: int) -> None:
        if not (self.world.is_main or is_sharded(self.model)):
            return
        prompt = self.tokenizer.encode(self.run.recipe.prompt)
        wanted = 96 if self.tokenizer.name == "bytes" else 32  # about as much text
        room = min(wanted, self.model.config.block_size - len(prompt))
        if not prompt or room < 1:
            return
        try:
            with self.device.autocast():
                ids = generate(self.model, prompt, room, num=2, seed=42)
        except UserError as error:  # what to do about broken weights, the training loop tells
            self.metrics.console.say(f"step {step:>5} | no samples: {error}")
            return
        end = self.tokenizer.end_of_text
        texts = [self.tokenizer.decode(cut_at_end(row, end)) for row in ids.tolist()]
        self.metrics.record("samples", step, texts=texts)
        for text in texts:
            self.metrics.console.say(f"step {step:>5} | {text!r}")


def examine_model(
    name: str, *, data: Path | None, questions: str | None, tokens: int | None, limit: int | None,
    device: str, precision: str, console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Validation loss and HellaSwag of a run or model, also under torchrun.

    Without `data` a run is scored on its own. Raises `UserError` if there is nothing to score.
    """
    world = distributed.place()
    chosen = get_device(device, precision, world.local_rank)
    keep_freed_memory(chosen)
    loaded = load(name, chosen)
    if data is None and loaded.run and questions is None:
        data = Path(loaded.run["data"]["path"])
    if data is None and questions is None:
        raise UserError("nothing to evaluate: give --data DIR, --hellaswag FILE, or both")
    distributed.connect(world, chosen.torch)
    results: dict[str, Any] = {"model": loaded.name}
    if data is not None:
        results["validation"] = _score_data(loaded, data, tokens, chosen, world, console)
    if questions is not None:
        results["hellaswag"] = _score_questions(loaded, questions, limit, chosen, world, console)
    world.close()
    return results


def _score_data(
    loaded: Loaded, data: Path, tokens: int | None, device: Device, world: World, console: Console
) -> dict[str, Any]:
    manifest = shards.read_manifest(data)
    if manifest.tokenizer_sha256 != loaded.tokenizer.sha256:
        raise UserError(
            f"{data} was prepared with the tokenizer {manifest.tokenizer}, {loaded.name} knows "
            f"{loaded.tokenizer.name}: prepare the text with --tokenizer {loaded.tokenizer.name}"
        )
    if world.local_rank == 0:
        shards.verify(data, manifest)
    recipe = loaded.run["recipe"] if loaded.run else {}
    T = recipe.get("batch.length", loaded.model.config.block_size)
    loss = validation_loss(
        loaded.model, shards.open_split(data, manifest, "val"), loaded.tokenizer.token_bytes(), T=T,
        tokens=tokens or recipe.get("eval_tokens", Recipe.eval_tokens),
        rows=rows_for(loaded.model.config, T, device), device=device, world=world,
    )  # fmt: skip
    console.say(
        f"validation loss {loss.nats:.4f} nats/token, {loss.bits_per_byte:.4f} bits/byte "
        f"over {loss.tokens:,} tokens of {data}"
    )
    return {
        "data": str(data), "loss": loss.nats, "bits_per_byte": loss.bits_per_byte,
        "tokens": loss.tokens,
    }  # fmt: skip


def _score_questions(
    loaded: Loaded, wanted: str, limit: int | None, device: Device, world: World, console: Console
) -> dict[str, Any]:
    questions = read_questions(locate(wanted))[:limit]
    packed = hellaswag.pack(
        questions, loaded.tokenizer, loaded.model.config.block_size, device, world
    )
    score = hellaswag.evaluate(loaded.model, packed, device, say=console.progress)
    console.say(
        f"HellaSwag acc_norm {score.acc_norm:.4f} ({score.correct_norm}/{score.total}), "
        f"acc {score.acc:.4f} ({score.correct}/{score.total})"
    )
    return {**asdict(score), "acc": score.acc, "acc_norm": score.acc_norm}
