"""The ladder: the lecture's optimisations one after the other, then ours, on this machine.

Every rung trains the same model from the same weights on the same tokens, in a process of its own;
only how the step is computed changes.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rekindle import __version__, recipes, storage
from rekindle.data import shards
from rekindle.errors import UserError
from rekindle.ladder.measure import Work
from rekindle.ladder.rungs import CPU_RUNGS, GPU_RUNGS, Levers
from rekindle.observe.console import duration
from rekindle.runtime.device import Device, cpu_model, get_device, why_not_compile


class RungError(UserError):
    """A rung that could not be measured."""

    def __init__(self, said: str, stderr: str = "") -> None:
        super().__init__(said)
        self.stderr = stderr or said  # all that its process said


def climb(data: Path, out: Path, device: str, recipe: str | None, steps: int) -> dict[str, Any]:
    """Measure all rungs, telling of each, and write `out`/ladder.json; return what is in it.

    A rung that fails is left out, and the next ones build on what worked. Raises `UserError` if the
    data cannot be used, or if no rung can be measured.
    """
    chosen = get_device(device)
    on_gpu = chosen.torch.type == "cuda"
    name = recipe or ("gpt2-124m" if on_gpu else "gpt2-10m")
    rungs, rows = (GPU_RUNGS, 64) if on_gpu else (CPU_RUNGS, 8)
    if chosen.torch.type == "mps":
        rungs = tuple(r for r in GPU_RUNGS if r.name in ("fp32", "flash attention"))
    work = Work(name, str(data), chosen.torch.type, rows, steps)
    model = recipes.get_recipe(name)
    shards.read_manifest(data)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): give another --out") from None
    print(
        f"{model.name} on {chosen.name}: {steps} steps of {rows} × {model.batch.length} tokens a "
        f"rung, each in a fresh process\n\n"
        + _COLUMNS.format("rung", "ms/step", "tokens/s", "gain", "util", "memory", "loss")
    )
    levers = Levers(micro=min(rows, Levers.micro))
    result = {
        "recipe": name, "rows": rows, "length": model.batch.length,
        "steps": work.warmup + work.steps, **environment(chosen),
    }  # fmt: skip
    measured: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for rung in rungs:
        before, levers = levers, dataclasses.replace(levers, **rung.change)
        if levers.compile and (reason := why_not_compile(chosen.torch)):
            print(f"{rung.name:<20} left out: {reason}")
            levers = dataclasses.replace(levers, compile=False)
            continue
        try:
            levers, figures = measure_what_fits(work, levers)
        except RungError as error:
            levers = before
            failed.append({"rung": rung.name, "stderr": error.stderr})
            print(f"{rung.name:<20} failed: {error}", flush=True)
        else:
            measured.append({"rung": rung.name, "why": rung.why, **figures})
            print(_line(measured[-1], measured[0]), flush=True)
        result |= {"rungs": measured, "failed": failed}
        storage.write_json(out / "ladder.json", result)
    if not measured:
        raise UserError(f"no rung could be measured: {out / 'ladder.json'} has what each said")
    return result


def environment(device: Device) -> dict[str, Any]:
    """What a figure depends on."""
    import torch

    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": device.name,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "versions": {"rekindle": __version__, "torch": torch.__version__},
    }


def measure_what_fits(work: Work, levers: Levers) -> tuple[Levers, dict[str, Any]]:
    """Halve the micro-batch until it fits into memory."""
    while True:
        figures = measure_in_fresh_process(work, levers)
        if not figures.get("out_of_memory"):
            return levers, figures
        if levers.micro == 1:
            raise RungError(f"not one row of {work.recipe} fits into memory: name a smaller recipe")
        levers = dataclasses.replace(levers, micro=levers.micro // 2)


def measure_in_fresh_process(work: Work, levers: Levers) -> dict[str, Any]:
    """`measure.measure` where nothing before it left a cache, a setting or memory in use. Raises
    `RungError` with what the process said."""
    question = json.dumps({"work": asdict(work), "levers": asdict(levers)})
    command = [sys.executable, "-m", "rekindle.ladder.measure", question]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip() or "no message").split("\n")[-1]
        raise RungError(
            f"its process ended with status {process.returncode}: {last}", process.stderr
        )
    return json.loads(process.stdout.strip().split("\n")[-1])


_COLUMNS = "{:<20} {:>9} {:>11} {:>7} {:>6} {:>9} {:>8}"


def _line(rung: dict[str, Any], first: dict[str, Any]) -> str:
    rate, used = rung["tokens_per_s"], rung["utilisation"]
    row = _COLUMNS.format(
        rung["rung"], f"{rung['ms_per_step']:,.1f}", f"{rate:,.0f}",
        f"{rate / first['tokens_per_s']:.2f}×", "" if used is None else f"{used:.1%}",
        f"{rung['peak_memory_gib']:.1f} GiB", f"{rung['loss']:.4f}",
    )  # fmt: skip
    return f"{row}   {rung['why']}"


def summary(result: dict[str, Any], seconds: float) -> str:
    """What a person takes home."""
    first, last = result["rungs"][0], result["rungs"][-1]
    failed = ", ".join(rung["rung"] for rung in result["failed"])
    return (
        f"\n{last['tokens_per_s'] / first['tokens_per_s']:.1f} times faster than `{first['rung']}`,"
        f" measured in {duration(seconds)}"
        + (f"; failed, with what they said in ladder.json: {failed}" if failed else "")
    )
