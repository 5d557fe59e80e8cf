"""Run every benchmark that needs no GPU, one after the other, then write the page.

    python -m benchmarks.cpu [--parquet DIR] [--hellaswag FILE]

Takes about half an hour on two cores, which should otherwise be idle.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description="run all CPU benchmarks, then write the page")
    parser.add_argument(
        "--parquet", type=Path, help="folder of text to prepare (default: skip that benchmark)"
    )
    parser.add_argument(
        "--hellaswag", type=Path, help="HellaSwag file (default: skip that benchmark)"
    )
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
    """The ladder of the README: its JSON goes to results/, its chart to docs/."""
    print("== ladder", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = ["rekindle", "ladder", "--device", "cpu", "--steps", "6", "--out", folder]
        subprocess.run([sys.executable, "-m", *command], check=True)
        shutil.copy(f"{folder}/ladder.json", RESULTS / "ladder-cpu.json")
        shutil.copy(f"{folder}/ladder.png", RESULTS.parent.parent / "docs" / "ladder-cpu.png")


if __name__ == "__main__":
    main()
