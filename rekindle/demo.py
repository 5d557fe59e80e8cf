"""The demo: tokenization, training, evaluation and samples in a few minutes."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rekindle import recipes, storage
from rekindle.data import shards
from rekindle.data.prepare import prepare
from rekindle.data.sources import from_arguments
from rekindle.errors import UserError
from rekindle.machine import MachineOptions, resolve
from rekindle.observe.console import Console, duration
from rekindle.observe.report import draw_loss
from rekindle.recipes import Recipe
from rekindle.run import RunOptions
from rekindle.start import train_run
from rekindle.trainer import build

TRAINING_SECONDS = 100.0  # about two minutes with compilation, validation and samples
TIMED_STEPS = 5
FEWEST_STEPS = 40
MOST_EPOCHS = 4  # more epochs gain little (Muennighoff et al. 2023)


def demo(data: Path, out: Path, device: str, steps: int | None) -> None:
    """Prepare Python's documentation, train a small model on it, and print results and samples.
    `steps`: None for as many as fit in about two minutes."""
    began = time.perf_counter()
    console = Console()
    options = RunOptions(machine=MachineOptions(device=device))
    name = "demo-fast" if resolve(options.machine).device == "cpu" else "demo-gpu"
    recipe = recipes.get_recipe(name)
    console.print("1. Text → tokens: the manual and docstrings that come with Python")
    source = from_arguments(embedded=True)
    prepare(source, data, tokenizer=recipe.tokenizer, val_tokens=recipe.eval_tokens)
    console.print(f"\n2. Tokens → a model: the recipe `{name}`, {recipe.about}")
    steps_before = recipes.steps_at_start(out)
    if steps is None:
        steps = steps_before or _choose_steps(recipe, data, options, console)
    recipe = recipes.customized(recipe, _numbers_for(steps), steps_before)
    run = train_run(recipe, data, out, options)
    console.print(_summary(name, data, run.folder, time.perf_counter() - began))


def _numbers_for(steps: int) -> dict[str, Any]:
    """The recipe's settings that depend on the number of steps."""
    return {
        "steps": steps,
        "eval_every": max(1, steps // 3),
        "checkpoint_every": max(1, steps // 3),
    }


def _choose_steps(recipe: Recipe, data: Path, options: RunOptions, console: Console) -> int:
    """The number of steps that take TRAINING_SECONDS on this machine, but at most MOST_EPOCHS of
    the data. A separate trainer is built to time a few steps."""
    manifest = shards.read_manifest(data)
    recipe = recipes.with_vocabulary(recipe, manifest.vocab_size)
    machine = resolve(options.machine, rows=recipe.batch.rows)
    console.progress("compiling and timing a few steps", passing=True)
    train = shards.open_split(data, manifest, "train")
    with build(recipe, train, machine) as trainer:
        trainer.warm_up()
        step = median(_seconds(lambda: trainer.train_step().loss) for _ in range(TIMED_STEPS))
    enough = MOST_EPOCHS * manifest.tokens("train") // recipe.batch.tokens
    steps = max(FEWEST_STEPS, min(round(TRAINING_SECONDS / step), enough))
    console.print(
        f"a step takes {duration(step)} on this machine: training for {steps} steps, about "
        f"{duration(steps * step)}"
    )
    return steps


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _summary(recipe: str, data: Path, out: Path, seconds: float) -> str:
    records = storage.read_json_lines(out / "metrics.jsonl")
    validation = [r for r in records if r["kind"] == "validation"]
    steps = [r for r in records if r["kind"] == "train"]
    samples = next((r["texts"] for r in reversed(records) if r["kind"] == "samples"), [])
    manifest = shards.read_manifest(data)
    first, last = validation[0], validation[-1]
    rate = median(r["tokens_per_s"] for r in steps)
    quoted = "\n".join(f"     {text!r}" for text in samples)
    return f"""
3. Results, after {duration(seconds)}
   {manifest.tokens("train"):,} tokens of text; {len(steps):,} steps at {rate:,.0f} tokens/s
   validation loss {first["loss"]:.3f} → {last["loss"]:.3f} nats per byte \
({first["bits_per_byte"]:.2f} → {last["bits_per_byte"]:.2f} bits)
   the model now writes:
{quoted}

   {f"{data}/":<28} the tokens: manifest.json and shards
   {f"{out}/checkpoints/":<28} the weights, as safetensors
   {f"{out}/metrics.jsonl":<28} every step, as JSON lines
   {_picture(out)}

4. Next steps (each command has --help)
   more text:         rekindle sample {out} --prompt "The " --tokens 80
   your own text:     rekindle train {recipe} --text FILE --out runs/mine
   GPT-2 124M:        rekindle prepare fineweb-edu-10bt --layout lecture --out data/fineweb-edu
                      rekindle train gpt2-124m --data data/fineweb-edu --out runs/gpt2
   The commands are in .venv/bin (or: source .venv/bin/activate)."""


def _picture(out: Path) -> str:
    """Draw the loss curve; return a line with its path, or why it was not drawn."""
    try:
        return f"{draw_loss(out, out / 'loss.png')!s:<28} the loss curve"
    except UserError as error:
        return f"the loss curve was not drawn: {error}"
