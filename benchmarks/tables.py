"""benchmarks/README.md, made from the JSON in benchmarks/results/.

    python -m benchmarks.tables           # writes it
    python -m benchmarks.tables --check   # exit status 1 if it is not what the results say

What has no result yet is listed with the command that measures it.
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

Each has a command, a reference run beside it in turn where there is one, and a JSON result under
`results/` with hardware, versions and date. This page is made from those files by
`python -m benchmarks.tables`. What was tried, and what it gave: [LOG.md](LOG.md).

One command measures all of a GPU's tables, the most precious first, within the minutes given:

```sh
python -m benchmarks.pack --data DIR --hellaswag FILE --out build/visit  # 40 MiB, here
cd build/visit                                                           # there, without a network
python -m benchmarks.gpu all --minutes 9.5 --out FOUND                   # again with --done FOUND
python -m benchmarks.collect FOUND                                       # here: FOUND → results/
```
"""


@dataclass(frozen=True)
class Table:
    """One benchmark: its file, its command, and how its result reads."""

    title: str
    file: str
    command: str
    about: str
    rows: Callable[[dict[str, Any]], list[list[str]]]  # the first is the header


def page() -> str:
    """The whole of README.md."""
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
        [f"{tokens:.1f}M tokens of English Wikipedia", "seconds, median", "tokens/s", "memory"],
        row("`rekindle prepare --parquet`", "rekindle"),
        row("the lecture's way, the same tokens", "lecture"),
        [f"**{r['times_faster']} × faster** (target: 10)", "", "", ""],
    ]


def _small(r: dict[str, Any]) -> list[list[str]]:
    rows = [["model: 4 layers, 128 wide", "arm", "tokens/s", "against the plain loop (p10, p90)"]]
    for shape in r["shapes"].values():
        for name, arm in shape["arms"].items():
            rate, times = arm["tokens_per_s"], arm["times_plain"]
            size = f"{shape['rows']} × {shape['length']} tokens a step"
            gain = f"{times['median']:.2f} × ({times['p10']:.2f}, {times['p90']:.2f})"
            rows.append([size, name, f"{rate:,}", gain])
    return rows


def _hellaswag(r: dict[str, Any]) -> list[list[str]]:
    def row(name: str, key: str, times: float | None = None) -> list[str]:
        return [name, f"{r[key]['rows_per_s']:.1f}", f"{times:.2f} ×" if times else ""]

    lecture, batched = r["times_faster_than_lecture"], r["times_faster_than_row_by_row"]
    return [
        [f"{r['questions']} questions of four endings", "rows/s", "packed is faster"],
        row("a question at a time, as the lecture", "lecture", lecture),
        row("row by row in batches, head on endings only", "row_by_row", batched),
        row("packed: the context once for its four endings", "packed"),
    ]


def _generate(r: dict[str, Any]) -> list[list[str]]:
    rows = [["GPT-2 124M, a prompt of 64 tokens", "batch", "tokens/s", "against transformers"]]
    for batch in r["batches"]:
        for name, arm in batch["arms"].items():
            times = arm.get("times_reference", {}).get("tokens_per_s")
            rate = arm["tokens_per_s"]["median"]
            gain = f"{times:.2f} ×" if times else ""
            rows.append([name, str(batch["batch"]), f"{rate:,.1f}", gain])
    for name, x in r.get("by_length", {}).items():  # a visit may have ended before
        text = f"{name}: a token's cost at length 1,000 against that at 64"
        rows.append([text, "1", "", f"{x['ratio']:.2f} ×"])
    return rows


def _checkpoint(r: dict[str, Any]) -> list[list[str]]:
    times = r["checkpoint"]["times_plain_write"]
    return [
        [f"{r['bytes'] / 1e9:.2f} GB: 124M parameters and AdamW's moments", "median", "p10", "p90"],
        _three("plain write and flush, s", r["plain_write"]["seconds"]),
        _three("checkpoint in the background, hashed, s", r["checkpoint"]["seconds"]),
        _three("against the plain write (target: 1.5 at most)", times),
        _three("how long training stands still, s", r["stall_s"]),
        _three(f"a training step beside it, {r['step']['rows']} × {r['step']['T']} tokens, s",
               r["step"]["seconds"]),
    ]  # fmt: skip


def _three(name: str, q: dict[str, float]) -> list[str]:
    return [name, *(f"{q[key]:.3g}" for key in ("median", "p10", "p90"))]


def _startup(r: dict[str, Any]) -> list[list[str]]:
    rows = [_three(name, x["seconds"]) for name, x in r["figures"].items()]
    return [["seconds until it is done", "median", "p10", "p90"], *rows]


def _batches(r: dict[str, Any]) -> list[list[str]]:
    header = [f"{r['tokens_per_step']:,} tokens", "ms, median", "of a step at 700,000 tokens/s"]
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
          "Whole commands, from process start to the last byte on disk, against the lecture's way "
          "(a pool of processes, tiktoken, a document at a time), written anew.", _prepare),
    Table("Batches", "batches.json", "python -m benchmarks.batches --data DIR",
          "Reading, permuting and converting the lecture's step, which happens in a thread while "
          "the step before is computed (target: below 1 % of it).", _batches),
    Table("Small models on a CPU", "small.json", "python -m benchmarks.small",
          "What `rekindle train` and `make demo` do against a plain eager loop in float32 (target: "
          "1.5 ×). Every arm in fresh processes, in turn.", _small),
    Table("HellaSwag on a CPU", "hellaswag-cpu.json", "python -m benchmarks.hellaswag --file FILE",
          "GPT-2 124M, float32 (target: 1.8 × the lecture's way).", _hellaswag),
    Table("Generation on a CPU", "generate-cpu.json", "python -m benchmarks.generate",
          "Greedy text with the key-value cache, against `transformers` in float32 (targets at "
          "batch 1 and 32: float32 1.05 and 1.15 ×, bf16 1.8 and 2.5 ×; length 1,000: 1.25 ×).",
          _generate),
    Table("Checkpoints", "checkpoint.json", "python -m benchmarks.checkpoint",
          "SHA-256 of every file, flushed, renamed; written while training goes on.", _checkpoint),
    Table("Starting", "startup.json", "python -m benchmarks.startup",
          "Whole commands (targets: 0.5 s for import and help, 15 s for a resumed run's first "
          "step).", _startup),
    Table("The ladder on a CPU", "ladder-cpu.json", "rekindle ladder --device cpu --steps 6",
          "The same model, weights and tokens on every rung.", _ladder),
    Table("What a training step moves on an H200", "traffic.json",
          "python -m benchmarks.traffic",
          "Counted in the code that Inductor generates for a card that is not there, a micro-batch "
          "of 64 × 1,024 tokens: GB of all kernels but matmuls and attention, each reading and "
          "writing its buffers once. What our own loss kernel moves is not in it.",
          predicted.traffic),
    Table("Predicted training step", "predictions.json", "python -m benchmarks.roofline",
          "**Predictions**, made before any measurement, from the table above and assumed rates.",
          predicted.steps),
    Table("Predicted gains of what is not built", "predictions.json",
          "python -m benchmarks.roofline",
          "**Hand estimates** on an H200, before any measurement; to be built after a profile on a "
          "card.", predicted.levers),
    Table("Kernels on a GPU", "gpu-kernels.json", f"{GPU} kernels",
          "The Triton kernels and the plain PyTorch that defines them, each against float64: the "
          "largest error of a value or gradient, and milliseconds forward and backward, eager.",
          gpu_tables.kernels),
    Table("First minute on a GPU", "gpu-train.json", f"{GPU} train --data DIR",
          "Losses of the first steps beside a CPU's in float32, then a minute of training.",
          gpu_tables.train),
    Table("Training step on a GPU", "gpu-step.json", f"{GPU} step --data DIR",
          "GPT-2 124M, 524,288 tokens a step, beside the lecture's final configuration (targets on "
          "one H200: 600,000 tokens/s and 1.06 × `lecture`).", gpu_tables.step),
    Table("Correctness gate on a GPU", "gpu-gate.json", f"{GPU} gate --data DIR",
          "Ten steps against float64 with ten planted bugs; losses after whole cool-downs, paired "
          "by document (equivalent: within 0.004).", gpu_tables.gate),
    Table("Sizes on a GPU", "gpu-sizes.json", f"{GPU} sizes --data DIR",
          "Micro-batches that fit, with and without recomputing activations.", gpu_tables.sizes),
    Table("HellaSwag on a GPU", "gpu-hellaswag.json", f"{GPU} hellaswag --file FILE",
          "All questions, GPT-2 124M, compiled.", gpu_tables.hellaswag),
    Table("Generation on a GPU", "gpu-generate.json", f"{GPU} generate",
          "One compiled step over a cache of fixed length, against `transformers`.", _generate),
    Table("Several GPUs", "gpu-scaling.json",
          "torchrun --nproc-per-node 8 -m benchmarks.gpu scaling",
          "The recipe's step on more and more ranks, with the gradients averaged by DDP and by one "
          "flat all-reduce; how much of the all-reduce overlaps with arithmetic.",
          gpu_tables.scaling),
    Table("Dress rehearsal on a GPU", "gpu-rehearsal.json", f"{GPU} rehearsal --data DIR",
          "The 10-billion-token command for 7.5 minutes, killed once at a random second.",
          gpu_tables.rehearsal),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="make benchmarks/README.md from the results")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    o = parser.parse_args()
    readme = FOLDER / "README.md"
    if o.check:
        if readme.read_text() != page():
            sys.exit(
                "benchmarks/README.md is not what the results say: python -m benchmarks.tables"
            )
        return
    readme.write_text(page())


if __name__ == "__main__":
    main()
