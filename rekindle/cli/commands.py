"""One short function for each subcommand, which calls the package."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from rekindle import recipes
from rekindle.cli import options
from rekindle.cli.arguments import given, options_of
from rekindle.data.sources import SOURCES
from rekindle.errors import UserError
from rekindle.evaluate.tasks import TASKS
from rekindle.flags import flags_of
from rekindle.machine import MachineOptions


def _print(text: str) -> None:
    """Print a result. A reader that closes the pipe early, as `head` does, is not an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # else flushing the buffer at exit fails again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _note(text: str) -> None:
    """Print a note to stderr, since a program may read the result from stdout."""
    if text:
        print(f"rekindle: {text}", file=sys.stderr, flush=True)


def _sources(arguments: Namespace) -> dict[str, Any]:
    """The sources of text that were given."""
    return {name: value for name in SOURCES if (value := getattr(arguments, name))}


def _tasks(arguments: Namespace) -> dict[str, str]:
    """The tasks that were given, with the source of their items."""
    return {name: where for name in TASKS if (where := getattr(arguments, name))}


def prepare(arguments: Namespace) -> None:
    from rekindle.data.prepare import prepare
    from rekindle.data.sources import from_arguments

    o, given_sources = options_of(options.Prepare, arguments), _sources(arguments)
    source = from_arguments(o.dataset, **given_sources)
    out = o.out or given_sources.get("shards")  # existing shards are used in place
    if out is None:
        raise UserError("--out DIR is missing: choose a folder for the shards")
    prepare(
        source,
        out,
        tokenizer=o.tokenizer,
        val_tokens=o.val_tokens,
        shard_tokens=o.shard_tokens,
        layout=o.layout,
    )


def train(arguments: Namespace) -> None:
    o = options_of(options.Train, arguments)
    recipe, changes = recipes.find_recipe(o.recipe)
    changes |= given(arguments, flags_of(recipe))
    recipe = recipes.customized(recipe, changes, recipes.steps_at_start(o.out))
    recipes.check(recipe)
    for name, value in (("timeout", o.timeout), ("log-every", o.log_every)):
        if not value >= 0:  # also rejects nan
            raise UserError(f"--{name} must be at least 0, but is {value}")
    machine = MachineOptions(**given(arguments, flags_of(MachineOptions())))
    data = _data_of(o, recipe, _sources(arguments))

    from rekindle.run import RunOptions
    from rekindle.start import dry_run, train_run

    run_options = RunOptions(
        machine=machine,
        tasks=_tasks(arguments),
        timeout=o.timeout,
        fork=o.fork,
        log_every=o.log_every,
    )
    (dry_run if o.dry_run else train_run)(recipe, data, o.out, run_options)


def _data_of(o: options.Train, recipe: recipes.Recipe, sources: dict[str, Any]) -> Path:
    """The folder of shards to train on, prepared first if a source of text was given."""
    if not sources:
        if o.data is None:
            raise UserError("--data DIR is missing: give prepared shards, or text with --text FILE")
        return o.data
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("several ranks cannot prepare text: run `rekindle prepare` first")
    if o.dry_run:
        raise UserError("--dry-run writes nothing: run `rekindle prepare` first, then give --data")

    from rekindle.data.prepare import prepare
    from rekindle.data.sources import from_arguments

    data = o.data or o.out / "data"
    source = from_arguments(**sources)
    prepare(source, data, tokenizer=recipe.tokenizer, val_tokens=recipe.eval_tokens)
    return data


def evaluate(arguments: Namespace) -> None:
    from rekindle.evaluate.command import evaluate_model
    from rekindle.observe.console import Console
    from rekindle.runtime.distributed import get_world

    o = options_of(options.Eval, arguments)
    for flag, value in (("--tokens", o.tokens), ("--limit", o.limit)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, but is {value}")
    main = get_world().is_main
    results = evaluate_model(
        o.model,
        data=o.data,
        tasks=_tasks(arguments),
        tokens=o.tokens,
        limit=o.limit,
        device=o.device,
        precision=o.precision,
        console=Console(quiet=o.json or not main),
        note=_note,
    )
    if o.json and main:
        _print(json.dumps(results, allow_nan=False))


def sample(arguments: Namespace) -> None:
    from rekindle.loading import load
    from rekindle.runtime.compiling import repair_cache
    from rekindle.runtime.device import get_device, why_not_compile
    from rekindle.sampling import check_numbers, check_prompt, cut_at_end, generate

    o = options_of(options.Sample, arguments)
    numbers = {name: getattr(o, name) for name in ("tokens", "num", "seed", "temperature", "top_k")}
    check_numbers(**numbers)
    check_prompt(o.prompt)
    device = get_device(o.device, o.precision)
    if o.compile and (reason := why_not_compile(device.torch)):
        raise UserError(f"--compile is not possible here: {reason}")
    loaded = load(o.model, device)
    _note(loaded.note)
    loaded.model.cast(device.product_dtype, rows=o.num)
    prompt = loaded.tokenizer.encode(o.prompt)
    repair_cache()
    start = prompt or [loaded.tokenizer.end_of_text]
    with device.autocast():
        ids = generate(loaded.model, start, **numbers, compile=o.compile)
    end = loaded.tokenizer.end_of_text
    rows = [cut_at_end(row, end, start=len(start)) for row in ids.tolist()]
    texts = [loaded.tokenizer.decode([t for t in row if t != end]) for row in rows]
    if o.json:
        _print(json.dumps({"model": loaded.name, "prompt": o.prompt, "samples": texts}))
        return
    _print("\n".join(f"--- {i} of {o.num} ---\n{text}" for i, text in enumerate(texts, 1)))


def verify(arguments: Namespace) -> int:
    from rekindle.interop.verify import verify

    o = options_of(options.Verify, arguments)
    report = verify(o.model, random_weights=o.random_weights, layers=o.layers)
    _note(report.note)
    _print(json.dumps(report.as_dict(), allow_nan=False) if o.json else report.table())
    return 0 if report.passed else 1


def check(arguments: Namespace) -> int:
    from rekindle.check import check
    from rekindle.observe.console import Console

    o = options_of(options.Check, arguments)
    report = check(
        o.runs,
        data=o.data,
        hellaswag=o.hellaswag,
        device=o.device,
        price=o.price_per_hour,
        console=Console(quiet=o.json),
    )
    _print(json.dumps(report.as_dict(), allow_nan=False) if o.json else report.table())
    return 0 if report.passed else 1


def demo(arguments: Namespace) -> None:
    from rekindle.demo import demo

    o = options_of(options.Demo, arguments)
    demo(data=o.data, out=o.out, device=o.device, steps=o.steps)


def ladder(arguments: Namespace) -> None:
    import time

    from rekindle.data import sources
    from rekindle.data.prepare import prepare
    from rekindle.ladder import climb, summary
    from rekindle.observe.report import draw_ladder

    o = options_of(options.Ladder, arguments)
    if o.steps < 2:
        raise UserError(f"--steps must be at least 2, but is {o.steps}")
    if o.recipe is not None:
        recipes.get_recipe(o.recipe)  # fail before preparing the data
    began = time.perf_counter()
    data = o.data or o.out / "data"
    if o.data is None:
        prepare(sources.from_arguments(embedded=True), data, tokenizer="gpt2", val_tokens=0)
    result = climb(data, o.out, o.device, o.recipe, o.steps)
    print(summary(result, time.perf_counter() - began))
    print(f"wrote {o.out / 'ladder.json'}")
    try:
        print(f"wrote {draw_ladder(result, o.out / 'ladder.png')}")
    except UserError as error:  # the measurements are complete
        print(f"ladder.png was not drawn: {error}")


def report(arguments: Namespace) -> None:
    from rekindle.observe.report import draw_loss

    o = options_of(options.Report, arguments)
    _print(f"wrote {draw_loss(o.run, o.picture or o.run / 'loss.png')}")
