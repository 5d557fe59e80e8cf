"""The tables of `benchmarks.tables` for measurements on GPUs."""

from typing import Any


def kernels(r: dict[str, Any]) -> list[list[str]]:
    header = [
        f"kernels: {r['kernels']}",
        "error",
        "error of PyTorch",
        "ms",
        "ms of PyTorch",
        "passed",
    ]
    rows = [header]
    for name, x in r["cases"].items():
        ms = [f"{x['ms'][way]:.3f}" if "ms" in x else "" for way in ("kernel", "plain")]
        errors = [f"{x[way]:.1e}" for way in ("kernel", "plain")]
        rows.append([name, *errors, *ms, "yes" if x["passed"] else "**no**"])
    return rows


def train(r: dict[str, Any]) -> list[list[str]]:
    rows = [["", ""]]
    for way, x in r["against_cpu"].items():
        if isinstance(x, dict):
            steps, apart = len(x["losses"]), x["largest_difference_nats"]
            text = f"{way}: largest difference from the CPU in the first {steps} losses"
            rows.append([text, f"{apart} nats, {'passed' if x['passed'] else '**not passed**'}"])
    if minute := r.get("minute"):
        losses = minute["losses"]
        rows += [
            ["first step done, with compilation, after", f"{minute['first_step_s']} s"],
            [f"loss after {len(losses)} steps", f"{losses[-1]:.4f} (first: {losses[0]:.4f})"],
        ]
    return rows


def scaling(r: dict[str, Any]) -> list[list[str]]:
    header = [
        "ranks",
        "gradients",
        "tokens/s",
        "predicted for H100s",
        "all-reduce alone",
        "overlap",
    ]
    rows = [header]
    for ranks, x in r["ranks"].items():
        expected = _prediction(x["predicted"])
        for way, rate in x["tokens_per_s"].items():
            name = {"none": "not averaged", "ddp": "DDP", "flat": "one flat all-reduce"}[way]
            reduced = "overlap" in x and way in x["overlap"]
            alone = f"{1e3 * x['all_reduce_s']:.2f} ms" if reduced else ""
            overlap = f"{x['overlap'][way]:.0%}" if reduced else ""
            beside = expected if way == "ddp" or ranks == "1" else ""
            rows.append([ranks, name, f"{rate:,}", beside, alone, overlap])
    return rows


def _prediction(predicted: dict[str, Any] | None) -> str:
    """The predicted tokens/s, as a range if the all-reduce can overlap; empty without one."""
    if not predicted:
        return ""
    ends = [f"{predicted[k]:,.0f}" for k in ("tokens_per_s", "tokens_per_s_overlapped")]
    return " to ".join(dict.fromkeys(ends))


def step(r: dict[str, Any]) -> list[list[str]]:
    header = ["arm", "tokens/s", "spread of repeats", "relative to `lecture`"]
    rows = [
        [
            name,
            f"{x['tokens_per_s']:,}",
            "one run" if x["spread"] is None else f"{x['spread']:.1%}",
            f"{x['times_lecture'] or 0:.3f} ×",
        ]
        for name, x in r["arms"].items()
    ]
    return [header, *rows]


def gate(r: dict[str, Any]) -> list[list[str]]:
    u = r["updates"]
    rows = [[name, f"{x['error']:.1e}", x["worst"]] for name, x in u["ways"].items()]
    rows += [[f"bug: {n}", f"{x['error']:.1e}", x["worst"]] for n, x in u["bugs"].items()]
    for arm, x in r.get("cool_down", {}).get("against_autocast", {}).items():
        text = f"{x['difference_nats']:+.4f} ± {x['standard_error']:.4f} nats"
        rows.append([f"loss after a cool-down: {arm} − autocast", text, str(x["equivalent"])])
    return [["", f"error of updates (limit {u['limit']:.0e})", "worst parameter"], *rows]


def sizes(r: dict[str, Any]) -> list[list[str]]:
    rows = [
        [
            x["recipe"], "yes" if x["recompute"] else "no", str(x["levers"]["micro"]),
            f"{x['tokens_per_s']:,.0f}", f"{x['peak_memory_gib']:.1f} GiB",
        ]
        for x in r["runs"]
        if not x.get("out_of_memory")
    ]  # fmt: skip
    return [["recipe", "recompute", "micro-batch", "tokens/s", "memory"], *rows]


def hellaswag(r: dict[str, Any]) -> list[list[str]]:
    return [
        [f"{r['questions']:,} questions", "seconds"],
        ["after warm-up (target: 2)", f"{r['seconds']['median']:.2f}"],
        ["first pass, with compilation", f"{r['first_pass_s']:.1f}"],
        ["tokenizing and packing, once per run", f"{r['packing_s']:.1f}"],
    ]


def rehearsal(r: dict[str, Any]) -> list[list[str]]:
    rows = [
        [f"{r['recipe']}, {r['wall_s']:.0f} s, killed after {r['killed_after_s']:.0f} s", ""],
        ["goodput, tokens/s", f"{r['goodput_tokens_per_s']:,}"],
    ]
    if forecast := r.get("forecast"):  # missing after fewer than two steps
        f = forecast["hours"]
        rows += [
            ["forecast of the full run, hours", f"{f['median']} (p10 {f['p10']}, p90 {f['p90']})"],
            ["cost of the full run, dollars", str(forecast["dollars"] or "set --dollars-per-hour")],
        ]
    return rows
