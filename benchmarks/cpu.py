"""The CPU's table: every benchmark that needs no GPU, one after the other, then the page.

    python -m benchmarks.cpu [--parquet DIR] [--hellaswag FILE]

About half an hour on two cores, which should have nothing else to do.
"""

import argparse
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description="all benchmarks of a CPU, then the page")
    parser.add_argument("--parquet", type=Path, help="text to prepare (else that one is left out)")
    parser.add_argument("--hellaswag", type=Path, help="HellaSwag's file (else it is left out)")
    o = parser.parse_args()
    commands = [["batches"], ["small"], ["generate", "--out", str(RESULTS / "generate-cpu.json")]]
    commands += [["checkpoint"], ["startup"]]
    if o.parquet:
        commands.insert(0, ["prepare", "--parquet", str(o.parquet)])
    if o.hellaswag:
        commands.append(["hellaswag", "--file", str(o.hellaswag)])
    for name, *flags in [*commands, ["tables"]]:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], check=True)


if __name__ == "__main__":
    main()
