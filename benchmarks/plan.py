"""Runs all GPU benchmarks within a time limit:

    python -m benchmarks.gpu all --minutes 9.5 --out DIR
    python -m benchmarks.gpu all --minutes 4 --out DIR2 --done DIR   # the remaining arms

Each arm runs in its own process, the most important first. `benchmarks.record` describes the files
in DIR, and `python -m benchmarks.collect DIR` turns them into results for the benchmark page.
`benchmarks.pack` creates a folder with everything this needs, for a machine without a network.
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

STEPS = (
    "bf16 + kernels", "lecture", "bf16 + loss kernel", "autocast + kernels",
    "bf16 + kernels, 128 rows", "bf16",
)  # fmt: skip
REPEATED = STEPS[:2]  # the repeats show the noise of the comparison that decides the defaults
FORWARDED = ("device", "recipe", "data", "file", "kill_seed", "dollars_per_hour", "limit")


def run(o: argparse.Namespace) -> None:
    """Run the remaining arms. Raises `UserError` if a folder is missing."""
    if not o.out:
        raise UserError("all needs a folder for its three files: set --out")
    if o.done and not o.done.is_dir():
        raise UserError(f"--done {o.done} is not a folder")
    kept = Record(o.out)
    if o.done:
        kept.copy_results(o.done)
    with tempfile.TemporaryDirectory() as cache:
        # One cache for all arms, so that a repeat does not compile the same model again.
        env = {} if "TORCHINDUCTOR_CACHE_DIR" in os.environ else {"TORCHINDUCTOR_CACHE_DIR": cache}
        left = in_order(arms(o), record.statuses(o.out))
        visit(left, kept, 60 * o.minutes, env)
    for line in summary(record.results(o.out)):
        print(line)


def summary(results: dict[str, dict[str, Any]]) -> list[str]:
    """One line per measured rate, with its prediction, and one per failed check."""
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
    """The parts of a result in which `passed` is false."""
    if not isinstance(found, dict):
        return []
    own = [where or "all"] if found.get("passed") is False else []
    return own + [at for key, inner in found.items() for at in _not_passed(inner, key)]


def arms(o: argparse.Namespace) -> list[Arm]:
    """The arms, the most important first. Times are for a GPU with an empty compile cache."""

    def arm(name: str, least: float, most: float, *command: Any) -> Arm:
        words = [sys.executable, "-m", "benchmarks.gpu", *command, "--record", o.out, name]
        return Arm(name, tuple(str(word) for word in [*words, *_forwarded(o)]), least, most)

    def step(name: str, label: str, least: float) -> Arm:
        return arm(label, least, 200, "step", "--arms", name, "--steps", min(o.steps, 12))

    rehearsed = o.rehearsal_minutes
    return [
        arm("versions", 5, 90, "versions"),
        arm("kernels", 15, 180, "kernels"),
        arm("train", 30 + o.seconds, 210 + o.seconds, "train", "--seconds", o.seconds),
        *(step(name, name, 45) for name in STEPS),
        *(step(name, f"{name}, again", 25) for name in REPEATED),
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


def _forwarded(o: argparse.Namespace) -> list[object]:
    """Arguments for every arm; an arm ignores those that it does not use."""
    given = [
        word
        for name in FORWARDED
        if (value := getattr(o, name)) is not None
        for word in (f"--{name.replace('_', '-')}", _absolute(value))
    ]
    return [*given, *(["--no-compile"] if o.no_compile else [])]


def _absolute(value: object) -> object:
    return value.absolute() if isinstance(value, Path) else value
