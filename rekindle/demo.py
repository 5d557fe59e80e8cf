"""The whole road in a few minutes: text, tokens, training, loss, samples, and what comes next."""

import time
from pathlib import Path

from rekindle import recipes, storage
from rekindle.data.prepare import prepare
from rekindle.data.shards import read_manifest
from rekindle.data.sources import from_arguments
from rekindle.machine import MachineOptions
from rekindle.observe.console import duration
from rekindle.run import RunOptions
from rekindle.runtime.device import get_device
from rekindle.start import train_run


def demo(data: Path, out: Path, device: str, steps: int | None) -> None:
    """Prepare Python's own manual, train a small GPT-2 on it, and tell what happened."""
    began = time.perf_counter()
    on_gpu = get_device(device).torch.type != "cpu"
    recipe = recipes.get_recipe("demo-gpu" if on_gpu else "demo-fast")
    recipe = recipes.with_steps(recipe, steps or recipe.steps)
    print("1. Text → tokens: the manual and docstrings that every Python carries")
    source = from_arguments(embedded=True)
    prepare(source, data, tokenizer="bytes", val_tokens=recipe.eval_tokens)
    print(f"\n2. Tokens → a model: the recipe `{recipe.name}`, {recipe.about}")
    run = train_run(recipe, data, out, RunOptions(machine=MachineOptions(device=device)))
    print(_summary(recipe.name, data, run.folder, time.perf_counter() - began))


def _summary(recipe: str, data: Path, out: Path, seconds: float) -> str:
    records = storage.read_json_lines(out / "metrics.jsonl")
    validation = [r for r in records if r["kind"] == "validation"]
    steps = [r for r in records if r["kind"] == "train"]
    samples = next((r["texts"] for r in reversed(records) if r["kind"] == "samples"), [])
    manifest = read_manifest(data)
    first, last = validation[0], validation[-1]
    rate = sorted(r["tokens_per_s"] for r in steps)[len(steps) // 2]
    quoted = "\n".join(f"     {text!r}" for text in samples)
    return f"""
3. What happened, in {duration(seconds)}
   {manifest.tokens("train"):,} tokens of text; {len(steps):,} steps at {rate:,.0f} tokens/s
   validation loss {first["loss"]:.3f} → {last["loss"]:.3f} nats per byte \
({first["bits_per_byte"]:.2f} → {last["bits_per_byte"]:.2f} bits)
   it now writes:
{quoted}

   {f"{data}/":<28} the tokens: manifest.json and shards
   {f"{out}/checkpoints/":<28} the weights, as safetensors
   {f"{out}/metrics.jsonl":<28} every step, for machines

4. What next (each command has --help)
   more text:         rekindle sample {out} --prompt "The " --tokens 80
   train it further:  rekindle train {recipe} --data {data} --out {out} --steps 2000
   the real thing:    rekindle prepare fineweb-edu-10bt --layout lecture --out data/fineweb-edu
                      rekindle train gpt2-124m --data data/fineweb-edu --out runs/gpt2
   The commands are in .venv/bin (or: source .venv/bin/activate)."""
