"""Generate benchmarks/README.md from the JSON in benchmarks/results/.

    python -m benchmarks.tables           # write the page
    python -m benchmarks.tables --check   # exit status 1 if the page is out of date

A benchmark without a result is listed with the command that measures it.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_tables, predicted

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
INTRO = """# Benchmarks

Each benchmark is one command. Where there is a reference implementation, both run in turn. Results
are JSON files under `results/`, with hardware, versions and date; `python -m benchmarks.tables`
generates this page from them. Experiments and their results: [LOG.md](LOG.md).

One command runs all GPU benchmarks, the most important first, within a time limit:

```sh
python -m benchmarks.pack --data DIR --hellaswag FILE --out build/visit  # here; 40 MiB
cd build/visit                                                           # on the GPU machine
python -m benchmarks.gpu all --minutes 9.5 --out FOUND                   # no network needed
python -m benchmarks.gpu all --minutes 9.5 --out MORE --done FOUND       # the remaining arms
python -m benchmarks.collect MORE                                        # here; MORE includes FOUND
```
"""


@dataclass(frozen=True)
class Table:
    """One benchmark: its result file, its command, and the rows that show the result."""

    title: str
    file: str
    command: str
    about: str
    rows: Callable[[dict[str, Any]], list[list[str]]]  # the first is the header


def page() -> str:
    """The text of README.md."""
    return "\n".join([INTRO, *(f"## {t.title}\n\n{_section(t)}" for t in TABLES)])


def _section(table: Table) -> str:
    path = RESULTS / table.file
    if not path.exists():
        return f"{table.about}\n\n**Not measured** yet: `{table.command}`\n"
    result = json.loads(path.read_text())
    header, *rows = table.rows(result)
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table.about}\n\n{text}\n\n{_source(result, table)}\n"


def _source(result: dict[str, Any], table: Table) -> str:
    device = result.get("device") or result.get("cpu", "")
    if not result.get("device") or "CPU" in device or device == "cpu":
        device = f"{result['cores']} cores of {result.get('cpu', device)}"
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    link = f"[results/{table.file}](results/{table.file})"
    command = result.get("command", table.command)
    return f"`{command}`: {device}, {versions}, {result['date']}: {link}"


def _prepare(r: dict[str, Any]) -> list[list[str]]:
    def row(name: str, key: str) -> list[str]:
        x = r[key]
        return [
            name, f"{x['median_seconds']:.2f}", f"{x['tokens_per_second'] / 1e6:.1f}M",
            f"{x['peak_rss_mb'] / 1e3:.2f} GB",
        ]  # fmt: skip

    tokens = sum(r["tokens"].values()) / 1e6
    return [
        [
            f"{tokens:.1f}M tokens of English Wikipedia",
            "seconds (median)",
            "tokens/s",
            "peak memory",
        ],
        row("`rekindle prepare --parquet`", "rekindle"),
        row("the lecture's script, the same tokens", "lecture"),
        [f"**{r['times_faster']} × faster** (target: 10)", "", "", ""],
    ]


def _small(r: dict[str, Any]) -> list[list[str]]:
    rows = [
        ["model: 4 layers, 128 wide", "arm", "tokens/s", "speed-up over the plain loop (p10, p90)"]
    ]
    for shape in r["shapes"].values():
        for name, arm in shape["arms"].items():
            rate, times = arm["tokens_per_s"], arm["times_plain"]
            size = f"{shape['rows']} × {shape['length']} tokens per step"
            gain = f"{times['median']:.2f} × ({times['p10']:.2f}, {times['p90']:.2f})"
            rows.append([size, name, f"{rate:,}", gain])
    return rows


def _hellaswag(r: dict[str, Any]) -> list[list[str]]:
    def row(name: str, key: str, times: float | None = None) -> list[str]:
        return [name, f"{r[key]['rows_per_s']:.1f}", f"{times:.2f} ×" if times else ""]

    lecture, batched = r["times_faster_than_lecture"], r["times_faster_than_row_by_row"]
    return [
        [f"{r['questions']} questions with four endings", "rows/s", "speed-up of packed"],
        row("one question at a time, as in the lecture", "lecture", lecture),
        row("batches of rows, logits of the endings only", "row_by_row", batched),
        row("packed: the context computed once per question", "packed"),
    ]


def _generate(r: dict[str, Any]) -> list[list[str]]:
    rows = [["GPT-2 124M, a prompt of 64 tokens", "batch", "tokens/s", "relative to transformers"]]
    for batch in r["batches"]:
        for name, arm in batch["arms"].items():
            times = arm.get("times_reference", {}).get("tokens_per_s")
            rate = arm["tokens_per_s"]["median"]
            gain = f"{times:.2f} ×" if times else ""
            rows.append([name, str(batch["batch"]), f"{rate:,.1f}", gain])
    for name, x in r.get("by_length", {}).items():  # missing if the time ran out before
        text = f"{name}: cost of a token at length 1,000 relative to length 64"
        rows.append([text, "1", "", f"{x['ratio']:.2f} ×"])
    return rows


def _checkpoint(r: dict[str, Any]) -> list[list[str]]:
    times = r["checkpoint"]["times_plain_write"]
    return [
        [f"{r['bytes'] / 1e9:.2f} GB: 124M parameters with AdamW's state", "median", "p10", "p90"],
        _three("plain write and flush, s", r["plain_write"]["seconds"]),
        _three("checkpoint in the background, with hashes, s", r["checkpoint"]["seconds"]),
        _three("relative to the plain write (target: at most 1.5)", times),
        _three("pause of training, s", r["stall_s"]),
        _three(f"step without a checkpoint, {r['step']['rows']} × {r['step']['T']} tokens, s",
               r["step"]["seconds"]),
    ]  # fmt: skip


def _three(name: str, q: dict[str, float]) -> list[str]:
    return [name, *(f"{q[key]:.3g}" for key in ("median", "p10", "p90"))]


def _startup(r: dict[str, Any]) -> list[list[str]]:
    rows = [_three(name, x["seconds"]) for name, x in r["figures"].items()]
    return [["seconds to completion", "median", "p10", "p90"], *rows]


def _batches(r: dict[str, Any]) -> list[list[str]]:
    header = [
        f"{r['tokens_per_step']:,} tokens",
        "ms (median)",
        "fraction of a step at 700,000 tokens/s",
    ]
    rows = [
        [name, f"{x['ms_per_step']['median']:.2f}", f"{x['share_of_step']:.2%}"]
        for name, x in r["orders"].items()
    ]
    return [header, *rows]


def _ladder(r: dict[str, Any]) -> list[list[str]]:
    first = r["rungs"][0]["tokens_per_s"]
    header = ["rung", "ms/step", "tokens/s", "gain", "memory", f"loss after {r['steps']} steps"]
    rows = [
        [
            x["rung"], f"{x['ms_per_step']:,.1f}", f"{x['tokens_per_s']:,.0f}",
            f"{x['tokens_per_s'] / first:.2f} ×", f"{x['peak_memory_gib']:.1f} GiB",
            f"{x['loss']:.4f}",
        ]
        for x in r["rungs"]
    ]  # fmt: skip
    return [header, *rows]


GPU = "python -m benchmarks.gpu"
TABLES = (
    Table("Preparing: Parquet → shards", "prepare.json",
          "python -m benchmarks.prepare --parquet DIR",
          "Complete commands, from process start to the last byte on disk, compared with a "
          "reimplementation of the lecture's script (a pool of processes, tiktoken, one document "
          "at a time).", _prepare),
    Table("Batches", "batches.json", "python -m benchmarks.batches --data DIR",
          "Reading, permuting and converting the batch of the lecture's step. In training a "
          "thread does this while the previous step runs (target: less than 1 % of a step).",
          _batches),
    Table("Small models on a CPU", "small.json", "python -m benchmarks.small",
          "The training step of `rekindle train` and `make demo`, compared with a plain eager "
          "loop in float32 (target: 1.5 ×). All arms run in fresh processes, in turn.", _small),
    Table("HellaSwag on a CPU", "hellaswag-cpu.json", "python -m benchmarks.hellaswag --file FILE",
          "GPT-2 124M, float32 (target: 1.8 × the lecture's evaluation).", _hellaswag),
    Table("Generation on a CPU", "generate-cpu.json", "python -m benchmarks.generate",
          "Greedy generation with the KV cache, compared with `transformers` in float32 (targets "
          "at batch 1 and 32: float32 1.05 and 1.15 ×, bf16 1.8 and 2.5 ×; at length 1,000: 1.25 "
          "×).", _generate),
    Table("Checkpoints", "checkpoint.json", "python -m benchmarks.checkpoint",
          "Every file is hashed (SHA-256), flushed and renamed, while training continues.",
          _checkpoint),
    Table("Start time", "startup.json", "python -m benchmarks.startup",
          "Complete commands (targets: 0.5 s for import and help, 15 s for the first step of a "
          "resumed run).", _startup),
    Table("The ladder on a CPU", "ladder-cpu.json", "rekindle ladder --device cpu --steps 6",
          "The same model, weights and tokens on every rung.", _ladder),
    Table("Memory traffic of a training step on an H200", "traffic.json",
          "python -m benchmarks.traffic",
          "Counted in the code that Inductor generates for an H200 on a machine without a GPU, "
          "for a micro-batch of 64 × 1,024 tokens: GB of all kernels except matmuls and "
          "attention, each reading and writing its buffers once. The traffic of our own loss "
          "kernel is not included.", predicted.traffic),
    Table("Predicted training step", "predictions.json", "python -m benchmarks.roofline",
          "**Predictions**, computed from the table above and assumed rates before any "
          "measurement. Only the rate of the MLP kernel was then measured, on an H200.",
          predicted.steps),
    Table("Predicted gains of optimizations that are not built", "predictions.json",
          "python -m benchmarks.roofline",
          "**Hand estimates** for an H200, from the profile of a step ([LOG](LOG.md)). The second "
          "and the third overlap.", predicted.levers),
    Table("Kernels on a GPU", "gpu-kernels.json", f"{GPU} kernels",
          "The Triton kernels and the plain PyTorch that defines them, both compared with float64: "
          "the largest error of a value or gradient, and milliseconds of a forward and backward "
          "pass, eager.", gpu_tables.kernels),
    Table("First minute on a GPU", "gpu-train.json", f"{GPU} train --data DIR",
          "Losses of the first steps compared with a CPU in float32, then one minute of training.",
          gpu_tables.train),
    Table("Training step on a GPU", "gpu-step.json", f"{GPU} step --data DIR",
          "GPT-2 124M, 524,288 tokens per step, compared with the lecture's final configuration "
          "(targets on one H200: 600,000 tokens/s and 1.06 × `lecture`). Measured before the loss "
          "kernel became faster ([LOG](LOG.md)).", gpu_tables.step),
    Table("Parts of a training step on a GPU", "gpu-step.json", f"{GPU} step --data DIR",
          "Milliseconds of the kernels of one micro-batch of 65,536 tokens, from a profile of one "
          "step, and the predictions. Gaps between kernels are only in the predictions.",
          predicted.parts),
    Table("Correctness gate on a GPU", "gpu-gate.json", f"{GPU} gate --data DIR",
          "Ten steps compared with float64, and with ten planted bugs; losses after full "
          "schedules, compared document by document (equivalent: within 0.004).",
          gpu_tables.gate),
    Table("Sizes on a GPU", "gpu-sizes.json", f"{GPU} sizes --data DIR",
          "The largest micro-batches that fit, with and without recomputing activations.",
          gpu_tables.sizes),
    Table("HellaSwag on a GPU", "gpu-hellaswag.json", f"{GPU} hellaswag --file FILE",
          "All questions, GPT-2 124M, compiled.", gpu_tables.hellaswag),
    Table("Generation on a GPU", "gpu-generate.json", f"{GPU} generate",
          "One compiled step over a cache of fixed length, compared with `transformers`.",
          _generate),
    Table("Several GPUs", "gpu-scaling.json",
          "torchrun --nproc-per-node 8 -m benchmarks.gpu scaling",
          "One step of the recipe on 1, 2, 4 and 8 ranks, with gradients averaged by DDP and by "
          "one flat all-reduce, and the part of the all-reduce that overlaps with computation.",
          gpu_tables.scaling),
    Table("Dress rehearsal on a GPU", "gpu-rehearsal.json", f"{GPU} rehearsal --data DIR",
          "The 10-billion-token command for 7.5 minutes, killed once at a random second.",
          gpu_tables.rehearsal),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="generate benchmarks/README.md from the results")
    parser.add_argument("--check", action="store_true", help="only check whether it is up to date")
    o = parser.parse_args()
    readme = FOLDER / "README.md"
    if o.check:
        if readme.read_text() != page():
            sys.exit("benchmarks/README.md is out of date: run python -m benchmarks.tables")
        return
    readme.write_text(page())


if __name__ == "__main__":
    main()
