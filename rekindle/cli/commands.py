"""What each subcommand does: a few lines that call the package."""

import argparse
import json
import os
import sys

from rekindle import recipes
from rekindle.cli.arguments import given
from rekindle.errors import UserError
from rekindle.evaluate.tasks import TASKS
from rekindle.flags import flags_of
from rekindle.machine import MachineOptions


def _answer(text: str) -> None:
    """Print what was asked for. A reader that has gone, as `head` does, wants no more of it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # what is left in its buffer would fail once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _note(text: str) -> None:
    """Say something beside the answer, which a program may read."""
    if text:
        print(f"rekindle: {text}", file=sys.stderr, flush=True)


def prepare(o: argparse.Namespace) -> None:
    from rekindle.data.prepare import prepare
    from rekindle.data.sources import SOURCES, from_arguments

    flags = {name: getattr(o, name) for name in SOURCES}
    source = from_arguments(o.dataset, **flags)
    out = o.out or (o.shards if o.shards else None)
    if out is None:
        raise UserError("say where the shards go: --out DIR")
    prepare(
        source, out, tokenizer=o.tokenizer, val_tokens=o.val_tokens, shard_tokens=o.shard_tokens,
        layout=o.layout,
    )  # fmt: skip


def train(o: argparse.Namespace) -> None:
    recipe = recipes.get_recipe(o.recipe)
    changes = given(o, flags_of(recipe))
    recipe = recipes.override(recipes.with_rules(recipe, o.out, changes.get("steps")), changes)
    recipes.check(recipe)
    if not o.timeout >= 0:  # nor is nan
        raise UserError(f"--timeout must be at least 0 seconds, but is {o.timeout}")
    machine = MachineOptions(**given(o, flags_of(MachineOptions())))

    from rekindle.run import RunOptions
    from rekindle.start import train_run

    tasks = {name: where for name in TASKS if (where := getattr(o, name))}
    options = RunOptions(machine=machine, tasks=tasks, timeout=o.timeout, fork=o.fork)
    train_run(recipe, o.data, o.out, options)


def evaluate(o: argparse.Namespace) -> None:
    from rekindle.evaluate.command import evaluate_model
    from rekindle.observe.console import Console
    from rekindle.runtime.distributed import get_world

    for flag, value in (("--tokens", o.tokens), ("--limit", o.limit)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, but is {value}")
    console = Console(quiet=o.json or not get_world().is_main)
    tasks = {name: where for name in TASKS if (where := getattr(o, name))}
    results = evaluate_model(
        o.model, data=o.data, tasks=tasks, tokens=o.tokens, limit=o.limit,
        device=o.device, precision=o.precision, console=console, note=_note,
    )  # fmt: skip
    if o.json and get_world().is_main:
        _answer(json.dumps(results, allow_nan=False))


def sample(o: argparse.Namespace) -> None:
    from rekindle.loading import load
    from rekindle.runtime.device import get_device, why_not_compile
    from rekindle.sampling import check_numbers, check_prompt, cut_at_end, generate

    numbers = {name: getattr(o, name) for name in ("tokens", "num", "seed", "temperature", "top_k")}
    check_numbers(**numbers)
    check_prompt(o.prompt)
    device = get_device(o.device, o.precision)
    if o.compile and (reason := why_not_compile(device.torch)):
        raise UserError(f"--compile cannot be done here: {reason}")
    loaded = load(o.model, device)
    _note(loaded.note)
    loaded.model.cast(device.product_dtype, rows=o.num)
    prompt = loaded.tokenizer.encode(o.prompt)
    with device.autocast():
        ids = generate(
            loaded.model, prompt or [loaded.tokenizer.end_of_text], **numbers, compile=o.compile
        )
    end = loaded.tokenizer.end_of_text
    rows = [cut_at_end(row, end, start=len(prompt) or 1) for row in ids.tolist()]
    texts = [loaded.tokenizer.decode([t for t in row if t != end]) for row in rows]
    if o.json:
        _answer(json.dumps({"model": loaded.name, "prompt": o.prompt, "samples": texts}))
        return
    _answer("\n".join(f"--- {i} of {o.num} ---\n{text}" for i, text in enumerate(texts, 1)))


def verify(o: argparse.Namespace) -> int:
    from rekindle.interop.verify import verify

    report = verify(o.model, random_weights=o.random_weights, layers=o.layers)
    _note(report.note)
    _answer(json.dumps(report.as_dict(), allow_nan=False) if o.json else report.table())
    return 0 if report.passed else 1


def check(o: argparse.Namespace) -> int:
    from rekindle.check import check
    from rekindle.observe.console import Console

    report = check(
        o.runs, data=o.data, hellaswag=o.hellaswag, device=o.device, price=o.price_per_hour,
        console=Console(quiet=o.json),
    )  # fmt: skip
    _answer(json.dumps(report.as_dict(), allow_nan=False) if o.json else report.table())
    return 0 if report.passed else 1


def demo(o: argparse.Namespace) -> None:
    from rekindle.demo import demo

    demo(data=o.data, out=o.out, device=o.device, steps=o.steps)


def ladder(o: argparse.Namespace) -> None:
    import time

    from rekindle.data import sources
    from rekindle.data.prepare import prepare
    from rekindle.ladder import climb, summary
    from rekindle.observe.report import draw_ladder

    if o.steps < 2:
        raise UserError(f"--steps must be at least 2, but is {o.steps}")
    began = time.perf_counter()
    data = o.data or o.out / "data"
    if o.data is None:
        prepare(sources.from_arguments(embedded=True), data, tokenizer="gpt2", val_tokens=0)
    result = climb(data, o.out, o.device, o.recipe, o.steps)
    print(summary(result, time.perf_counter() - began))
    print(f"wrote {o.out / 'ladder.json'}")
    try:
        print(f"wrote {draw_ladder(result, o.out / 'ladder.png')}")
    except UserError as error:  # the figures are there
        print(f"no picture: {error}")


def report(o: argparse.Namespace) -> None:
    from rekindle.observe.report import draw_loss

    _answer(f"wrote {draw_loss(o.run, o.picture or o.run / 'loss.png')}")
