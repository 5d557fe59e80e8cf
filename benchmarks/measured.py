"""Measures one arm of `benchmarks.gpu step`: the figures of the ladder, and the state of the GPU.

python -m benchmarks.measured '{"work": {...}, "levers": {...}}'
"""

import dataclasses
import gc
import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.card import Load
from benchmarks.parts import by_part
from rekindle.ladder import Levers, Work
from rekindle.ladder.measure import make_trainer, time_steps
from rekindle.trainer import Trainer

KERNELS = 40  # rows of the profiler's table


def measure(work: Work, levers: Levers) -> dict[str, Any]:
    """What `rekindle.ladder.measure` returns, and in addition `card` (clocks and power under load),
    `kernel_table` (the kernels of one more step, sorted by time) and, on a GPU, `parts_ms` (their
    milliseconds per micro-batch, by part)."""
    one_more = dataclasses.replace(work, steps=work.steps + 1)
    with make_trainer(one_more, levers) as trainer:
        with Load(trainer.device) as load:
            figures = time_steps(trainer, work, levers)
        return {**figures, "card": load.medians(), **profiled(trainer)}


def profiled(trainer: Trainer) -> dict[str, Any]:
    """Take a step; return `kernel_table` and `parts_ms`. On a CPU these are its operators."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = trainer.device.torch.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        trainer.train_step()
        trainer.device.synchronize()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = seen.key_averages()
    table = rows.table(order, row_limit=KERNELS, max_name_column_width=90)
    if not on_gpu:
        return {"kernel_table": table}
    micro_batches = trainer.partition.accumulation
    kernels = ((r.key, r.self_device_time_total / 1e3 / micro_batches) for r in rows)
    return {"kernel_table": table, "parts_ms": by_part(kernels)}


def measure_what_fits(work: Work, levers: Levers, *, here: bool) -> dict[str, Any]:
    """Halve the micro-batch until it fits in memory. If one row does not fit, the result contains
    `out_of_memory`. `here`: make the first attempt in this process, which measures nothing else."""
    figures = _try(work, levers) if here else in_fresh_process(work, levers)
    while figures.get("out_of_memory") and levers.micro > 1:
        levers = dataclasses.replace(levers, micro=levers.micro // 2)
        figures = in_fresh_process(work, levers)
    return figures


def _try(work: Work, levers: Levers) -> dict[str, Any]:
    """`measure`; `out_of_memory` if that is what happened, with the memory freed again."""
    try:
        return measure(work, levers)
    except torch.OutOfMemoryError as error:
        print(error, file=sys.stderr)
    gc.collect()  # the exception above has kept the model alive until here
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"out_of_memory": True}


def in_fresh_process(work: Work, levers: Levers) -> dict[str, Any]:
    """Run `measure` in a new process, without caches, settings or memory of earlier measurements.
    Its stderr is that of this process. Raises `SystemExit` if it fails."""
    request = json.dumps({"work": asdict(work), "levers": asdict(levers)})
    command = [sys.executable, "-m", "benchmarks.measured", request]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    *others, figures = process.stdout.strip().split("\n")
    print(*others, sep="\n", flush=True)
    if process.returncode:
        raise SystemExit(f"{levers} failed with status {process.returncode}")
    return json.loads(figures)


def main() -> None:
    request = json.loads(sys.argv[1])
    print(json.dumps(_try(Work(**request["work"]), Levers(**request["levers"]))))


if __name__ == "__main__":
    main()
