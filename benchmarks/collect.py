"""Turn the output of `python -m benchmarks.gpu all` into result files for the benchmark page:

python -m benchmarks.collect DIR   # writes results/gpu-*.json
python -m benchmarks.tables        # generates the page from them
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.common import write_result
from benchmarks.cool_down import summary
from benchmarks.gpu import RESULTS, compare

Entries = dict[str, dict[str, Any]]  # an arm's last line of results


def collect(folder: Path) -> dict[str, dict[str, Any]]:
    """The content of gpu-NAME.json for each NAME that has a result."""
    entries = record.results(folder)
    found = {}
    for name, (begins, merge) in MERGED.items():
        own = {arm: e for arm, e in entries.items() if arm.startswith(begins)}
        if own and (merged := merge({arm: e["result"] for arm, e in own.items()})):
            machine = next(iter(own.values()))
            about = {k: v for k, v in machine.items() if k not in ("arm", "event", "result", "at")}
            found[name] = {**about, "command": "python -m benchmarks.gpu all", **merged}
    return found


def _steps(results: Entries) -> dict[str, Any]:
    runs = [run for result in results.values() for run in result["runs"]]
    first = next(iter(results.values()))
    return {"recipe": first["recipe"], "rows": first["rows"], "runs": runs, "arms": compare(runs)}


def _gate(results: Entries) -> dict[str, Any]:
    cooled = {
        arm.removeprefix("cool-down: "): result
        for arm, result in results.items()
        if arm.startswith("cool-down")
    }
    if "gate" not in results:
        return {}
    if "autocast" not in cooled:
        return results["gate"]
    losses = {name: np.array(result["losses"]) for name, result in cooled.items()}
    steps, tokens = (cooled["autocast"][key] for key in ("steps", "tokens_per_step"))
    return {**results["gate"], "cool_down": summary(steps, tokens, losses)}


def _sizes(results: Entries) -> dict[str, Any]:
    return {"runs": [run for result in results.values() for run in result["runs"]]}


def _only(results: Entries) -> dict[str, Any]:
    (result,) = results.values()
    return result


# For each NAME: prefixes of the arms' names, and the function that merges their results.
MERGED: dict[str, tuple[tuple[str, ...], Callable[[Entries], dict[str, Any]]]] = {
    "versions": (("versions",), _only),
    "kernels": (("kernels",), _only),
    "train": (("train",), _only),
    "step": (("bf16", "lecture", "autocast"), _steps),
    "gate": (("gate", "cool-down"), _gate),
    "hellaswag": (("hellaswag",), _only),
    "generate": (("generate",), _only),
    "rehearsal": (("rehearsal",), _only),
    "sizes": (("sizes",), _sizes),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="write benchmarks/results/gpu-*.json from the output of all"
    )
    parser.add_argument("folder", type=Path, help="the --out folder of benchmarks.gpu all")
    o = parser.parse_args()
    for name, result in collect(o.folder).items():
        write_result(RESULTS / f"gpu-{name}.json", result)
        print(f"gpu-{name}.json")


if __name__ == "__main__":
    main()
