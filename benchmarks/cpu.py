"""The CPU's table: every benchmark that needs no GPU, one after the other, then the page.

    python -m benchmarks.cpu [--parquet DIR] [--hellaswag FILE]

About half an hour on two cores, which should have nothing else to do.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
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
    for name, *flags in commands:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], check=True)
    climb_ladder()
    subprocess.run([sys.executable, "-m", "benchmarks.tables"], check=True)


def climb_ladder() -> None:
    """The ladder of the README: its figures among the results, its picture in docs/."""
    print("== ladder", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = ["rekindle", "ladder", "--device", "cpu", "--steps", "6", "--out", folder]
        subprocess.run([sys.executable, "-m", *command], check=True)
        shutil.copy(f"{folder}/ladder.json", RESULTS / "ladder-cpu.json")
        shutil.copy(f"{folder}/ladder.png", RESULTS.parent.parent / "docs" / "ladder-cpu.png")


if __name__ == "__main__":
    main()
