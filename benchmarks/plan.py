"""All of the GPU's table within the minutes that a card is rented for:

    python -m benchmarks.gpu all --minutes 9.5 --out DIR
    python -m benchmarks.gpu all --minutes 4 --out DIR2 --done DIR   # what is left

Every arm runs in a fresh process, the most precious first; `benchmarks.record` describes what they
leave in DIR, `python -m benchmarks.collect DIR` makes the page's results of it.
`benchmarks.pack` makes a folder with all that this needs, for a machine without a network.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.record import Record
from benchmarks.visit import Arm, in_order, visit
from benchmarks.ways import FLAGS, NEED_A_GPU
from rekindle.errors import UserError

# Twice: the repeats show the noise.
STEPS = ("bf16 + kernels", "bf16", "lecture")
PASSED_ON = ("device", "recipe", "data", "file", "kill_seed", "dollars_per_hour", "limit")


def run(o: argparse.Namespace) -> None:
    """Run what is left to do. Raises `UserError` if there is no folder for it."""
    if not o.out:
        raise UserError("all needs --out DIR, a folder for its three files")
    if o.done and not o.done.is_dir():
        raise UserError(f"--done {o.done} is no folder")
    kept = Record(o.out)
    if o.done:
        kept.copy_results(o.done)
    with tempfile.TemporaryDirectory() as cache:
        # One cache for all: a repeat, or the same model in another arm, is not compiled again.
        env = {} if "TORCHINDUCTOR_CACHE_DIR" in os.environ else {"TORCHINDUCTOR_CACHE_DIR": cache}
        left = in_order(arms(o), record.statuses(o.out))
        visit(left, kept, 60 * o.minutes, env)
    for line in summary(record.results(o.out)):
        print(line)


def summary(results: dict[str, dict[str, Any]]) -> list[str]:
    """What to look at first: each arm's tokens/s beside its prediction, and checks that failed."""
    lines = []
    for name, entry in results.items():
        result = entry["result"]
        if (runs := result.get("runs")) and (rate := runs[-1].get("tokens_per_s")):
            expected = (runs[-1].get("predicted") or {}).get("tokens_per_s")
            beside = f", predicted {expected:,}" if expected else ""
            lines.append(f"{name}: {rate:,.0f} tokens/s{beside}")
        lines += [f"{name}: NOT PASSED: {where}" for where in _not_passed(result)]
    return lines


def _not_passed(found: Any, where: str = "") -> list[str]:
    """Where in a result `passed` is false."""
    if not isinstance(found, dict):
        return []
    own = [where or "all of it"] if found.get("passed") is False else []
    return own + [at for key, inner in found.items() for at in _not_passed(inner, key)]


def arms(o: argparse.Namespace) -> list[Arm]:
    """In the order of their worth. Seconds are those of a GPU with nothing compiled yet."""

    def arm(name: str, least: float, most: float, *command: Any) -> Arm:
        words = [sys.executable, "-m", "benchmarks.gpu", *command, "--record", o.out, name]
        return Arm(name, tuple(str(word) for word in [*words, *_passed_on(o)]), least, most)

    def step(name: str, label: str, least: float) -> Arm:
        return arm(label, least, 200, "step", "--arms", name, "--steps", min(o.steps, 12))

    rehearsed = o.rehearsal_minutes
    return [
        arm("versions", 5, 90, "versions"),
        arm("kernels", 15, 180, "kernels"),
        arm("train", 30 + o.seconds, 210 + o.seconds, "train", "--seconds", o.seconds),
        *(step(name, name, 45) for name in STEPS),
        *(step(name, f"{name}, again", 25) for name in STEPS),
        arm("gate", 40, 240, "gate", "--cool-down-steps", 0),
        *(
            arm(
                f"cool-down: {name}", 50, 240, "cool-down", "--arms", name,
                "--cool-down-steps", min(o.cool_down_steps, 60),
                "--cool-down-tokens", o.cool_down_tokens, "--documents", min(o.documents, 500),
            )
            for name in FLAGS
            if name not in NEED_A_GPU or o.device != "cpu"
        ),
        *([arm("hellaswag", 30, 150, "hellaswag")] if o.file else []),
        arm("generate", 40, 240, "generate", "--rounds", o.rounds, "--new-tokens", o.new_tokens),
        arm(
            "rehearsal", 60 * rehearsed + 15, 60 * rehearsed + 60, "rehearsal",
            "--minutes", rehearsed, "--checkpoint-every", o.checkpoint_every,
        ),
        *(
            arm(f"sizes: {name}{', recomputing' * recompute}", 45, 240, "sizes", "--sizes", name,
                "--recompute" if recompute else "--no-recompute")
            for recompute in (False, True)
            for name in o.sizes.split(";")
        ),
    ]  # fmt: skip


def _passed_on(o: argparse.Namespace) -> list[object]:
    """What every arm is given; those that have no use for it ignore it."""
    given = [
        word
        for name in PASSED_ON
        if (value := getattr(o, name)) is not None
        for word in (f"--{name.replace('_', '-')}", _absolute(value))
    ]
    return [*given, *(["--no-compile"] if o.no_compile else [])]


def _absolute(value: object) -> object:
    return value.absolute() if isinstance(value, Path) else value
