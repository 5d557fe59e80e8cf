"""Describes the GPU machine: versions, attention kernels, and the load of the GPU."""

import argparse
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl
from torch.nn import functional as F

from benchmarks.common import environment
from benchmarks.predicted import prediction
from benchmarks.ways import ARMS
from rekindle.runtime.device import Device, get_device

FIELDS = ("driver_version", "clocks.max.sm", "clocks.sm", "power.limit", "temperature.gpu")
UNDER_LOAD = ("clocks.sm", "power.draw", "temperature.gpu", "utilization.gpu")
RELEVANT = r"(torch|triton|numpy|safetensors|tiktoken|nvidia-.*)$"  # installed packages to record
BUSY = 50.0  # percent utilization; below that, the GPU waits or a model is being compiled


def describe(device: Device) -> dict[str, Any]:
    """What every figure depends on: the GPU, the machine, and versions."""
    on_gpu = device.torch.type == "cuda"
    found = {
        "device": device.name,
        **environment("torch", *(["triton"] if on_gpu else [])),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
    }
    return {**found, "card": _query()} if on_gpu else found


def _query() -> dict[str, str]:
    """The driver's description of the GPU; empty without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(FIELDS, printed.splitlines()[0].split(", "), strict=False))


class Load:
    """A context that samples clocks, power and temperature of a GPU. On a CPU it does nothing."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._process: subprocess.Popen[str] | None = None
        self._lines: list[str] = []

    def __enter__(self) -> "Load":
        command = [
            "nvidia-smi", f"--query-gpu={','.join(UNDER_LOAD)}", "--format=csv,noheader,nounits",
            "--loop-ms=500", f"--id={self._device.torch.index or 0}",
        ]  # fmt: skip
        if self._device.torch.type == "cuda":
            try:
                self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            except OSError as error:
                print(f"clocks are not recorded, nvidia-smi does not start: {error}", flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.terminate()
            self._lines = self._process.communicate()[0].splitlines()

    def medians(self) -> dict[str, float]:
        """The medians of the samples in which the GPU was busy; empty if there are none."""
        return medians(self._lines)


def medians(lines: list[str]) -> dict[str, float]:
    """The medians of nvidia-smi's lines, each with the values of `UNDER_LOAD`, for a busy GPU."""
    samples = []
    for line in lines:
        try:
            samples.append([float(value) for value in line.split(", ")])
        except ValueError:  # "[N/A]", or an incomplete last line
            continue
    busy = [s for s in samples if len(s) == len(UNDER_LOAD) and s[-1] >= BUSY]
    columns = zip(*busy, strict=True) if busy else ()
    return {
        name: statistics.median(values) for name, values in zip(UNDER_LOAD, columns, strict=False)
    }


def versions(o: argparse.Namespace, save: Callable[..., None]) -> None:
    """The first arm: installed packages, loaded libraries, attention kernels, and the predictions
    for this GPU."""
    device = get_device(o.device)
    kernels, table = attention_kernels(device)
    found: dict[str, Any] = {
        "packages": {
            d.metadata["Name"]: d.version
            for d in distributions()
            if re.match(RELEVANT, d.metadata["Name"])
        },
        "attention_kernels": kernels,
        "loaded": loaded("cudnn", "cublas", "nccl"),
        "library_path": bool(os.environ.get("LD_LIBRARY_PATH")),
        "compiler": platform.python_compiler(),
        "predicted": {arm: p for arm in ARMS if (p := prediction(arm, device.name))},
    }
    if device.torch.type == "cuda":
        properties = torch.cuda.get_device_properties(device.torch)
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["sms"] = properties.multi_processor_count
        found["nccl"] = nccl.version()
    save(found, table)


def attention_kernels(device: Device) -> tuple[list[str], str]:
    """The names of the kernels of causal attention in one layer, forward and backward pass, at the
    shape of training, and the profiler's table. On Hopper cuDNN's kernels are expected."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.torch.type == "cuda"
    shape = (64, 12, 1024, 64) if on_gpu else (1, 2, 64, 16)
    q, k, v = (
        torch.randn(shape, device=device.torch, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )

    def once() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        device.synchronize()

    once()  # builds the execution plans
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        once()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = seen.key_averages()
    marks = ("flash", "cudnn", "fmha", "sdpa", "attention")
    names = [e.key for e in averages if any(mark in e.key.lower() for mark in marks)]
    return names, averages.table(order, row_limit=20, max_name_column_width=90)


def loaded(*libraries: str) -> list[str]:
    """The files of these libraries that this process has loaded (Linux only): the system's cuDNN
    may shadow the one that is installed with torch."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    files = {line.split()[-1] for line in lines if "/" in line}
    found = {f for f in files if any(name in Path(f).name for name in libraries)}
    return sorted("/".join(Path(f).parts[-4:]) for f in found)
