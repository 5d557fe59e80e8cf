"""The ladder: measures the lecture's optimizations one after another, then ours, on this machine.

Every rung trains the same model from the same weights on the same tokens in a fresh process; only
how the step is computed changes.
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

    def __init__(self, message: str, stderr: str = "") -> None:
        super().__init__(message)
        self.stderr = stderr or message  # the full stderr of its process


def climb(data: Path, out: Path, device: str, recipe: str | None, steps: int) -> dict[str, Any]:
    """Measure all rungs, print each result, and write `out`/ladder.json; return its contents.

    A rung that fails is left out, and the next rungs build on those that worked. Raises `UserError`
    if the data cannot be used, or if every rung fails.
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
        raise UserError(f"cannot create {out} ({error.strerror}): choose another --out") from None
    print(
        f"{model.name} on {chosen.name}: {steps} steps of {rows} × {model.batch.length} tokens "
        f"per rung, each rung in a fresh process\n\n"
        + _COLUMNS.format("rung", "ms/step", "tokens/s", "gain", "MFU", "memory", "loss")
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
        if unavailable := _unavailable(levers, chosen):
            lever, reason = unavailable
            print(f"{rung.name:<20} skipped: {reason}")
            levers = dataclasses.replace(levers, **{lever: False})
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
        raise UserError(f"no rung could be measured: see the errors in {out / 'ladder.json'}")
    return result


def _unavailable(levers: Levers, device: Device) -> tuple[str, str] | None:
    """A lever that is on but not available on this device, and why; None if there is none."""
    from rekindle.model import kernels

    if levers.compile and (reason := why_not_compile(device.torch)):
        return "compile", reason
    if levers.mlp_kernel and (reason := kernels.why_not_mlp(device.torch)):
        return "mlp_kernel", reason
    return None


def environment(device: Device) -> dict[str, Any]:
    """The hardware and versions that the measurements depend on."""
    import torch

    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": device.name,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "versions": {"rekindle": __version__, "torch": torch.__version__},
    }


def measure_what_fits(work: Work, levers: Levers) -> tuple[Levers, dict[str, Any]]:
    """Measure with the micro-batch size halved until it fits into memory.

    Returns the levers that were used and their figures. Raises `RungError` if one row is too large.
    """
    while True:
        figures = measure_in_fresh_process(work, levers)
        if not figures.get("out_of_memory"):
            return levers, figures
        if levers.micro == 1:
            raise RungError(
                f"not even one row of {work.recipe} fits into memory: choose a smaller recipe"
            )
        levers = dataclasses.replace(levers, micro=levers.micro // 2)


def measure_in_fresh_process(work: Work, levers: Levers) -> dict[str, Any]:
    """Run `measure.measure` in a process without caches, settings or memory of earlier rungs.

    Raises `RungError` with the process's stderr.
    """
    request = json.dumps({"work": asdict(work), "levers": asdict(levers)})
    command = [sys.executable, "-m", "rekindle.ladder.measure", request]
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
    """The last line that is printed: the total speedup."""
    first, last = result["rungs"][0], result["rungs"][-1]
    failed = ", ".join(rung["rung"] for rung in result["failed"])
    return (
        f"\n{last['tokens_per_s'] / first['tokens_per_s']:.1f} times faster than `{first['rung']}`,"
        f" measured in {duration(seconds)}"
        + (f"; failed (see the errors in ladder.json): {failed}" if failed else "")
    )
