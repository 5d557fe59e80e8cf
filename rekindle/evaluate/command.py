"""`rekindle eval`: validation loss and task scores of a run or model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekindle import storage
from rekindle.data import shards
from rekindle.errors import UserError
from rekindle.evaluate import scoring
from rekindle.evaluate.evaluator import metrics_of
from rekindle.evaluate.loss import validation_loss
from rekindle.evaluate.tasks import Task, get_task
from rekindle.loading import Loaded, load
from rekindle.observe.console import Console
from rekindle.observe.progress import Progress
from rekindle.recipes import Recipe
from rekindle.runtime import distributed
from rekindle.runtime.device import Device, get_device, keep_freed_memory
from rekindle.runtime.distributed import World
from rekindle.runtime.micro_batch import rows_for


@dataclass(frozen=True)
class _Evaluation:
    """A loaded model, and the device and ranks that evaluate it."""

    loaded: Loaded
    device: Device
    world: World
    console: Console

    def validate(self, data: Path, tokens: int | None) -> dict[str, Any]:
        """Validation loss on `data`, over at most `tokens` tokens."""
        loaded, device = self.loaded, self.device
        manifest = shards.read_manifest(data)
        if manifest.tokenizer_sha256 != loaded.tokenizer.sha256:
            expected = loaded.tokenizer.name
            raise UserError(
                f"{data} was prepared with the tokenizer {manifest.tokenizer}, but {loaded.name} "
                f"uses {expected}: prepare the text with --tokenizer {expected}"
            )
        if self.world.local_rank == 0:
            shards.verify(data, manifest)
        recipe = loaded.run.recipe if loaded.run else {}
        T = recipe.get("batch.length", loaded.model.config.block_size)
        loss = validation_loss(
            loaded.model,
            shards.open_split(data, manifest, "val"),
            loaded.tokenizer.token_bytes(),
            T=T,
            tokens=tokens or recipe.get("eval_tokens", Recipe.eval_tokens),
            rows=rows_for(loaded.model.config, T, device),
            device=device,
            world=self.world,
            progress=Progress(self.console, "tokens", "validation").update,
        )
        loss.check_finite(loaded.model)
        bits = loss.bits_per_byte if math.isfinite(loss.bits_per_byte) else None
        shown = "" if bits is None else f", {bits:.4f} bits/byte"
        self.console.print(
            f"validation loss {loss.nats:.4f} nats/token{shown} over {loss.tokens:,} tokens of "
            f"{data}"
        )
        values = {"loss": loss.nats, "bits_per_byte": bits, "tokens": loss.tokens}
        return {"data": storage.printable(data), **values}

    def score(self, task: Task, where: str, limit: int | None) -> dict[str, float]:
        """Scores of the first `limit` items of a task."""
        loaded, device = self.loaded, self.device
        items = task.load(where, loaded.tokenizer)[:limit]
        block_size = loaded.model.config.block_size
        (packed,) = scoring.pack([(task, items)], block_size, device, self.world)
        progress = Progress(self.console, "candidates", task.title).update
        scores = scoring.evaluate(loaded.model, packed, device, progress=progress)
        shown = [
            f"{name} {value:.4f}"
            + (f" ({round(value * len(items))}/{len(items)})" if name.startswith("acc") else "")
            for name, value in metrics_of(task, scores).items()
        ]
        self.console.print(f"{task.title} {', '.join(shown)}")
        return scores


def evaluate_model(
    name: str,
    *,
    data: Path | None,
    tasks: Mapping[str, str],
    tokens: int | None,
    limit: int | None,
    device: str,
    precision: str,
    console: Console,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Validation loss and task scores of a run or model; also works under torchrun.

    `tasks` maps a task's name to the file that holds its items, or to "hub". With neither `data`
    nor tasks, a run is evaluated on the data it was trained on. `note` is called with a line of
    text if `name` is ambiguous. Raises `UserError` if there is nothing to evaluate.
    """
    world = distributed.get_world()
    chosen = get_device(device, precision, world.local_rank)
    keep_freed_memory(chosen)
    loaded = load(name, chosen)
    if data is None and loaded.run and loaded.run.data and not tasks:
        data = Path(loaded.run.data["path"])
        if not data.is_dir():
            raise UserError(
                f"the training data of {loaded.name} is no longer at {data}: give --data DIR"
            )
    if data is None and not tasks:
        raise UserError("nothing to evaluate: give --data DIR, --hellaswag FILE, or both")
    distributed.connect(world, chosen.torch)
    evaluation = _Evaluation(loaded, chosen, world, console)
    if world.is_main and loaded.note:
        note(loaded.note)
    results: dict[str, Any] = {"model": loaded.name}
    if data is not None:
        results["validation"] = evaluation.validate(data, tokens)
    for task, where in tasks.items():
        results[task] = evaluation.score(get_task(task), where, limit)
    world.close()
    return results
