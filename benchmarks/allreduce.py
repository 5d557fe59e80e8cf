"""Check the all-reduce formula of `benchmarks.scaling` with gloo on this machine:

    python -m benchmarks.allreduce   # 2 and 4 ranks; writes results/allreduce-gloo.json

Compares the bytes that pass through the loopback interface, and the seconds that 4 ranks take, with
latency and bandwidth fitted to 2 ranks. The bytes show whether the formula is right. The seconds
are meaningful only in order of magnitude, because the ranks share two cores.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import environment, write_result
from benchmarks.scaling import ring_bytes

OUT = Path(__file__).parent / "results" / "allreduce-gloo.json"
SIZES = (1 << 20, 1 << 23, 1 << 26)  # bytes of float32
RANKS = (2, 4)
REPEATS = 5


def loopback_bytes() -> int:
    """Bytes that this machine has sent over its loopback interface (Linux)."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    raise RuntimeError("/proc/net/dev lists no loopback interface")


def rank(number: int, size: int, port: int) -> None:
    """Run one rank. Rank 0 prints a line per size: tensor bytes, seconds, bytes sent."""
    rendezvous = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=number, world_size=size)
    torch.set_num_threads(1)
    for length in SIZES:
        tensor = torch.ones(length // 4)
        dist.all_reduce(tensor)
        seconds, sent = [], []
        for _ in range(REPEATS):
            dist.barrier()
            before, began = loopback_bytes(), time.perf_counter()
            dist.all_reduce(tensor)
            seconds.append(time.perf_counter() - began)
            dist.barrier()
            sent.append(loopback_bytes() - before)
        if number == 0:
            print(length, min(seconds), min(sent), flush=True)
    dist.destroy_process_group()


def measure(size: int) -> dict[str, dict[str, float]]:
    """The fewest seconds and bytes over the repeats with `size` ranks, for each tensor size."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.allreduce", "--size", str(size)]
    ranks = [
        subprocess.Popen(
            [*command, "--rank", str(i), "--port", str(port)],
            stdout=subprocess.PIPE if i == 0 else subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for i in range(size)
    ]
    printed, _ = ranks[0].communicate(timeout=300)
    for process in ranks:
        if process.wait(timeout=60):
            raise RuntimeError(f"a rank exited with status {process.returncode}")
    rows = [line.split() for line in printed.splitlines()]
    return {length: {"seconds": float(s), "sent_bytes": int(n)} for length, s, n in rows}


def compare(found: dict[int, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """The measurements next to the formula's values, with latency and bandwidth fitted to 2
    ranks."""
    small, large = str(SIZES[0]), str(SIZES[-1])
    two = found[2]
    bandwidth = (ring_bytes(SIZES[-1], 2) - ring_bytes(SIZES[0], 2)) / (
        two[large]["seconds"] - two[small]["seconds"]
    )
    latency = max(0.0, two[small]["seconds"] - ring_bytes(SIZES[0], 2) / bandwidth)
    rows = []
    for size, lengths in found.items():
        for length, x in lengths.items():
            own = ring_bytes(int(length), size)
            rows.append(
                {
                    "ranks": size,
                    "bytes": int(length),
                    "sent": x["sent_bytes"],
                    "sent_by_formula": round(size * own),
                    "seconds": round(x["seconds"], 5),
                    "seconds_by_formula": round(latency * (size - 1) + own / bandwidth, 5),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="check the all-reduce formula with gloo")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.size:
        return rank(o.rank, o.size, o.port)
    rows = compare({size: measure(size) for size in RANKS})
    write_result(o.out, {**environment("torch"), "all_reduces": rows})
    for x in rows:
        print(x)
    return None


if __name__ == "__main__":
    main()
