"""The second half of the gate: how lower precision changes the loss after a full schedule.

Each arm trains the same recipe on the same tokens through the full schedule, from warm-up to the
end of the cosine, with the command line that a user would run. The losses of two arms are then
compared document by document on held-out text. A repeat of the reference arm shows the noise.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from rekindle.data import shards
from rekindle.data.batches import IGNORED
from rekindle.data.tokenizer import get_tokenizer
from rekindle.loading import load
from rekindle.model.gpt2 import GPT2
from rekindle.runtime.device import Device, get_device

ARMS = {
    "autocast": ["--precision", "autocast"],
    "autocast, again": ["--precision", "autocast"],
    "bf16": ["--precision", "bf16"],
    "bf16 + kernels": ["--precision", "bf16", "--kernels", "all"],
}
EQUIVALENT = 0.004  # nats: less than the difference between seeds
SHORTEST, ROWS = 32, 16  # tokens per document; documents per batch


def cool_down(o: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Train and score every arm. `save` is called with the losses and differences so far."""
    found: dict[str, np.ndarray] = {}
    for name, flags in ARMS.items():
        if "--kernels" in flags and o.device == "cpu":
            continue
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder, "run")
            command = [
                sys.executable, "-m", "rekindle", "train", o.recipe, "--data", o.data, "--out", run,
                "--device", o.device, "--hellaswag", "none", "--eval-every", 0,
                "--checkpoint-every", 0, "--steps", o.cool_down_steps,
                "--schedule.warmup", max(1, o.cool_down_steps // 10),
                "--batch.tokens", o.cool_down_tokens, "--batch.order", "shuffled", *flags,
            ]  # fmt: skip
            if o.device == "cpu":  # only a trial of the command
                command.append("--no-compile")
            subprocess.run([str(word) for word in command], check=True)
            found[name] = document_losses(run, o.data, get_device(o.device), o.documents)
        save({
            "steps": o.cool_down_steps,
            "tokens_per_step": o.cool_down_tokens,
            "documents": len(found[name]),
            "loss": {arm: round(float(losses.mean()), 5) for arm, losses in found.items()},
            "against_autocast": {
                arm: paired(losses, found["autocast"])
                for arm, losses in found.items()
                if arm != "autocast"
            },
        })  # fmt: skip


def paired(losses: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Mean difference per document, its standard error, and whether the arms are equivalent: the
    mean plus two standard errors stays within `EQUIVALENT`."""
    gaps = losses - reference
    mean, error = float(gaps.mean()), statistics.stdev(gaps.tolist()) / len(gaps) ** 0.5
    return {
        "difference_nats": round(mean, 5),
        "standard_error": round(error, 5),
        "equivalent": abs(mean) + 2 * error <= EQUIVALENT,
    }


@torch.no_grad()
def document_losses(run: Path, data: Path, device: Device, most: int) -> np.ndarray:
    """Mean loss in nats per token of each of the first `most` held-out documents: (documents,)."""
    loaded = load(str(run), device)
    manifest = shards.read_manifest(data)
    end = get_tokenizer(manifest.tokenizer).end_of_text
    T = loaded.model.config.block_size
    documents: list[np.ndarray] = []
    for shard in shards.open_split(data, manifest, "val"):
        starts = np.flatnonzero(shard[:] == end)
        for first, last in zip(starts, [*starts[1:], len(shard)], strict=True):
            if last - first > SHORTEST and len(documents) < most:
                documents.append(np.asarray(shard[first : min(last, first + T + 1)], np.int64))
    losses = [
        _losses(loaded.model, documents[i : i + ROWS], device)  # type: ignore
        for i in range(0, len(documents), ROWS)
    ]
    return np.concatenate(losses)


def _losses(model: GPT2, documents: list[np.ndarray], device: Device) -> np.ndarray:
    longest = max(map(len, documents))
    x = torch.zeros(len(documents), longest, dtype=torch.long)
    y = torch.full((len(documents), longest), IGNORED)
    for row, tokens in enumerate(documents):
        x[row, : len(tokens) - 1] = torch.from_numpy(tokens[:-1])
        y[row, : len(tokens) - 1] = torch.from_numpy(tokens[1:])
    x, y = x[:, :-1].to(device.torch), y[:, :-1].to(device.torch)
    with device.autocast():
        logits, _ = model(x)
    losses = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")  # (B, T)
    return (losses.double().sum(1) / (y != IGNORED).sum(1)).cpu().numpy()
