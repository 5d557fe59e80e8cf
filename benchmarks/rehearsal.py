"""The dress rehearsal: the README's command for the 10-billion-token run, for a few minutes, with
evaluation, checkpoints, and one SIGKILL at a random second.

It measures goodput (tokens of completed steps per second of the entire time), and forecasts the
duration of the full run from the times of steps, evaluations and starts.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import quantiles
from benchmarks.running import Running, train_command
from rekindle import checkpoint, recipes, storage

SETTLED = 5  # first steps, which may include compilation or warm-up
LATEST = 0.8  # fraction of the time after which the run is killed even without a checkpoint


def rehearse(o: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Run, kill and resume until the time is up. `save` is called with goodput and forecast."""
    recipe = recipes.get_recipe(o.recipe)
    seconds = 60 * o.minutes
    kill_at = random.Random(o.kill_seed).uniform(0.25, 0.6) * seconds
    folder = Path(tempfile.mkdtemp())
    run = folder / "run"
    flags: list[object] = ["--checkpoint-every", o.checkpoint_every]
    flags += ["--hellaswag", o.file] if o.file else []
    flags += ["--no-compile"] if o.no_compile else []
    command = train_command(o.recipe, o.data, run, o.device, *flags)
    try:
        began = time.monotonic()
        with Running(command) as first:
            first.let_run(kill_at)
            while not _saved(run) and time.monotonic() - began < LATEST * seconds:
                first.let_run(0.5)  # without a checkpoint there is nothing to resume
            kill_at = time.monotonic() - began
        before = _steps(run)
        with Running(command) as second:
            second.let_run(began + seconds - time.monotonic())
        starts = [first.first_step_s, second.first_step_s]
        wall = time.monotonic() - began
        save(_figures(recipe, run, wall, kill_at, before, starts, o.dollars_per_hour))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _saved(run: Path) -> list[Path]:
    return checkpoint.list_checkpoints(run / "checkpoints")


def _steps(run: Path) -> int:
    """Steps logged so far. A kill loses those after the newest checkpoint."""
    log = run / "metrics.jsonl"
    records = storage.read_json_lines(log) if log.exists() else []
    return sum(r["kind"] == "train" for r in records)


def _figures(
    recipe: recipes.Recipe, run: Path, wall: float, kill_at: float, before: int,
    starts: list[float | None], dollars_per_hour: float | None,
) -> dict[str, Any]:  # fmt: skip
    records = storage.read_json_lines(run / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "train"]
    saved = _saved(run)
    banked = int(saved[-1].name.removeprefix("step-")) if saved else 0
    settled = [r["seconds"] for r in steps[SETTLED:]] or [r["seconds"] for r in steps]
    parts = {
        kind: [r["seconds"] for r in records if r["kind"] == kind and r["step"]]
        for kind in ("validation", "hellaswag")
    }
    stalls = [r["stall_s"] for r in records if "stall_s" in r]  # a kill can lose some
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "wall_s": round(wall, 1),
        "killed_after_s": round(kill_at, 1),
        "steps_before_the_kill": before,
        "steps": len(steps),  # without the lost steps of the killed process
        "banked_steps": banked,
        "goodput_tokens_per_s": round(len(steps) * recipe.batch.tokens / wall),
        "step_seconds": quantiles(settled) if len(settled) > 1 else None,
        "first_step_s": starts,
        "validation_s": parts["validation"],
        "hellaswag_s": parts["hellaswag"],
        "checkpoint_stall_s": stalls,
    }
    if len(settled) > 1:
        result["forecast"] = forecast(recipe, result, dollars_per_hour)
    return result


def forecast(
    recipe: recipes.Recipe, seen: dict[str, Any], dollars_per_hour: float | None
) -> dict[str, Any]:
    """Hours and cost of the full run: all steps at the median, p10 and p90, plus evaluations,
    checkpoints and one start with their measured times."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    evaluations = 1 + (recipe.steps // recipe.eval_every if recipe.eval_every else 0)
    saves = recipe.steps // recipe.checkpoint_every if recipe.checkpoint_every else 1
    extra = (
        evaluations * (mean(seen["validation_s"]) + mean(seen["hellaswag_s"]))
        + saves * mean(seen["checkpoint_stall_s"])
        + mean([s for s in seen["first_step_s"] if s])
    )
    hours = {
        name: round((recipe.steps * seen["step_seconds"][name] + extra) / 3600, 3)
        for name in ("p10", "median", "p90")
    }
    rate = dollars_per_hour
    cost = {name: round(h * rate, 2) for name, h in hours.items()} if rate else None
    return {"steps": recipe.steps, "hours": hours, "dollars": cost}
