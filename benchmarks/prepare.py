"""Parquet → shards: compare `rekindle prepare` with the lecture's script on the same files.

    python -m benchmarks.prepare --parquet DIR [--out benchmarks/results/prepare.json]

Both are timed as complete commands in fresh processes, in turn, and must give the same tokens.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import environment, write_result

SHARD_TOKENS = 100_000_000
RESULT = Path(__file__).parent / "results" / "prepare.json"


# A reimplementation of the lecture's script (fineweb.py in build-nanogpt): a pool of half the
# cores, one document per task, tiktoken, a buffer of one shard. It reads local Parquet files.


def documents(paths: list[Path]) -> Iterator[str]:
    import pyarrow.parquet as pq

    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(1000, columns=["text"]):
            yield from batch.column(0).to_pylist()


def tokenize(text: str) -> np.ndarray:
    from rekindle.data.tokenizer import get_tokenizer

    tokenizer = get_tokenizer("gpt2")  # cached per process; `encode` is tiktoken's encode_ordinary
    tokens = np.array([tokenizer.end_of_text, *tokenizer.encode(text)])
    assert (tokens >= 0).all()
    assert (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def lecture(folder: Path, out: Path) -> None:
    """Write shards of exactly 100M tokens, one split after the other."""
    out.mkdir(parents=True)
    with multiprocessing.Pool(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for split, paths in split_files(folder).items():
            buffer, filled, shard = np.empty(SHARD_TOKENS, np.uint16), 0, 0
            for tokens in pool.imap(tokenize, documents(paths), chunksize=16):
                room = SHARD_TOKENS - filled
                buffer[filled : filled + len(tokens)] = tokens[:room]
                filled += len(tokens)
                if filled >= SHARD_TOKENS:
                    np.save(out / f"{split}_{shard:06d}.npy", buffer)
                    rest = tokens[room:]
                    buffer[: len(rest)], filled, shard = rest, len(rest), shard + 1
            if filled:
                np.save(out / f"{split}_{shard:06d}.npy", buffer[:filled])


def split_files(folder: Path) -> dict[str, list[Path]]:
    paths = sorted(folder.glob("*.parquet"))
    return {
        "train": [path for path in paths if not path.name.startswith("val")],
        "val": [path for path in paths if path.name.startswith("val")],
    }


# The comparison.


def timed(command: list[str]) -> dict[str, float]:
    """Run a command: wall-clock seconds, CPU seconds, and the peak RSS of its largest process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_rss_mb": round(usage.ru_maxrss * unit / 1e6, 1),
    }


def split_tokens(out: Path, split: str) -> np.ndarray:
    """All tokens of one split, from shards of either format: (count,) uint16."""
    from rekindle.data import shards

    files = sorted(out.glob(f"{split}_*"))
    parts = [np.load(f) if f.suffix == ".npy" else shards.open_shard(f) for f in files]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint16)


def compare(folder: Path, rounds: int, reference_rounds: int) -> dict[str, Any]:
    """Time both commands in turn and check that they give the same tokens."""
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    module = [sys.executable, "-m"]
    with tempfile.TemporaryDirectory() as temporary:
        for i in range(rounds):
            out = Path(temporary, f"ours-{i}")
            arguments = ["rekindle", "prepare", "--parquet", str(folder), "--out", str(out)]
            ours.append(timed([*module, *arguments]))
            print(f"rekindle: {ours[-1]}", flush=True)
            if i < reference_rounds:
                reference = Path(temporary, f"lecture-{i}")
                arguments = ["benchmarks.prepare", "--parquet", str(folder), "--lecture"]
                theirs.append(timed([*module, *arguments, str(reference)]))
                print(f"lecture:  {theirs[-1]}", flush=True)
        counts = {}
        for split in ("train", "val"):
            tokens = split_tokens(Path(temporary, "ours-0"), split)
            if not np.array_equal(tokens, split_tokens(Path(temporary, "lecture-0"), split)):
                raise SystemExit(f"the tokens of the split {split} differ")
            counts[split] = len(tokens)
    return summary(ours, theirs, counts)


def summary(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], counts: dict[str, int]
) -> dict[str, Any]:
    def row(runs: list[dict[str, float]]) -> dict[str, Any]:
        seconds = statistics.median(run["seconds"] for run in runs)
        return {
            "median_seconds": seconds,
            "tokens_per_second": round(sum(counts.values()) / seconds),
            "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
            "runs": runs,
        }

    result = {"rekindle": row(ours), "lecture": row(theirs)}
    ratio = result["lecture"]["median_seconds"] / result["rekindle"]["median_seconds"]
    return {"tokens": counts, "identical_tokens": True, "times_faster": round(ratio, 1), **result}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="compare rekindle prepare with the lecture's script"
    )
    parser.add_argument("--parquet", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5, help="runs of rekindle")
    parser.add_argument(
        "--reference-rounds", type=int, default=2, help="runs of the lecture's script"
    )
    parser.add_argument(
        "--lecture", type=Path, metavar="DIR", help="only run the lecture's script, into DIR"
    )
    arguments = parser.parse_args()
    if arguments.lecture:
        lecture(arguments.parquet, arguments.lecture)
        return
    rounds = max(1, min(arguments.reference_rounds, arguments.rounds))
    machine = environment("numpy", "pyarrow", "tiktoken", "gigatoken", "awkward")
    figures = compare(arguments.parquet, max(1, arguments.rounds), rounds)
    write_result(arguments.out, {**machine, **figures})
    print(
        f"{figures['times_faster']} x faster, "
        f"{figures['rekindle']['tokens_per_second']:,} tokens/s, written to {arguments.out}"
    )


if __name__ == "__main__":
    main()
