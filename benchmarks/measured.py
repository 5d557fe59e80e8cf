"""A measured step of the GPU's table: as the ladder measures it, and what the card was doing.

python -m benchmarks.measured '{"work": {...}, "levers": {...}}'
"""

import dataclasses
import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.card import Load
from rekindle.ladder import Levers, Work
from rekindle.ladder.measure import make_trainer, time_steps
from rekindle.trainer import Trainer

KERNELS = 40  # rows of the profiler's table


def measure(work: Work, levers: Levers) -> dict[str, Any]:
    """What `rekindle.ladder.measure` returns, and besides `card`, its clocks and power under load,
    and `kernel_table`, the kernels of one more step by their time."""
    one_more = dataclasses.replace(work, steps=work.steps + 1)
    with make_trainer(one_more, levers) as trainer:
        with Load(trainer.device) as load:
            figures = time_steps(trainer, work, levers)
        return {**figures, "card": load.medians(), "kernel_table": kernel_table(trainer)}


def kernel_table(trainer: Trainer) -> str:
    """The kernels of a step (on a CPU its operators), those first that take longest."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = trainer.device.torch.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        trainer.train_step()
        trainer.device.synchronize()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return seen.key_averages().table(order, row_limit=KERNELS, max_name_column_width=90)


def measure_what_fits(work: Work, levers: Levers) -> dict[str, Any]:
    """Halve the micro-batch until it fits into memory; `out_of_memory` if not one row does."""
    while True:
        figures = in_fresh_process(work, levers)
        if not figures.get("out_of_memory") or levers.micro == 1:
            return figures
        levers = dataclasses.replace(levers, micro=levers.micro // 2)


def in_fresh_process(work: Work, levers: Levers) -> dict[str, Any]:
    """`measure` where nothing before it left a cache, a setting or memory in use. What it writes to
    stderr goes to this process' own. Raises `SystemExit` if it fails."""
    question = json.dumps({"work": asdict(work), "levers": asdict(levers)})
    command = [sys.executable, "-m", "benchmarks.measured", question]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    *others, answer = process.stdout.strip().split("\n")
    print(*others, sep="\n", flush=True)
    if process.returncode:
        raise SystemExit(f"{levers} failed with status {process.returncode}")
    return json.loads(answer)


def main() -> None:
    asked = json.loads(sys.argv[1])
    try:
        found = measure(Work(**asked["work"]), Levers(**asked["levers"]))
    except torch.OutOfMemoryError as error:
        print(error, file=sys.stderr)
        found = {"out_of_memory": True}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
