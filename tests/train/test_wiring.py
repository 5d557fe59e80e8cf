"""Every value of a recipe has its effect: a run in which each value differs from its default,
started from the command line, is compared with a plain training loop written out here."""

import dataclasses
import math
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from rekindle import storage
from rekindle.data.batches import permute
from rekindle.data.shards import Manifest, write_shard
from rekindle.data.tokenizer import ByteTokenizer
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.recipes import Recipe

NUMBERS: dict[str, Any] = {
    "model.n_layer": 3, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 24,
    "batch.tokens": 96, "batch.length": 16, "batch.order": "lecture",
    "batch.lecture_micro_tokens": 48,
    "optim.lr": 0.02, "optim.beta1": 0.8, "optim.beta2": 0.9, "optim.eps": 1e-3,
    "optim.weight_decay": 0.4, "grad_clip": 0.6, "spike": 2.0,
    "schedule.kind": "linear", "schedule.warmup": 5, "schedule.final": 0.25,
    "schedule.cooldown": 0.5, "steps": 46, "seed": 7, "eval_every": 6,
    "eval_tokens": 210, "checkpoint_every": 4, "keep_checkpoints": 2, "keep_best": 2,
    "keep_every": 20, "tokenizer": "bytes", "prompt": "b c", "passage": "b c d",
}  # fmt: skip
# Not chosen here: descriptive text, or decided by the data.
EXCLUDED = {"name", "about", "model.vocab_size", "model.padded_vocab_size"}
PEAK = 1e9  # the FLOP/s to report for the CPU
T, ROWS = 16, 6

pytestmark = pytest.mark.usefixtures("one_thread")


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", inner


def test_every_recipe_value_differs_from_its_default() -> None:
    """A new field needs a value in `NUMBERS`, and the plain loop below must use it."""
    defaults = dict(leaves(Recipe(name="", about="")))
    assert set(defaults) - EXCLUDED == set(NUMBERS)
    for name, value in NUMBERS.items():
        assert value != defaults[name], name


# What the run must do


def make_data(folder: Path) -> dict[str, list[np.ndarray]]:
    """Training data: text that is easy to learn for 37.5 steps, then 3 steps of noise, on which the
    loss jumps; after that the second epoch starts. Two validation shards, of which the run uses
    only a part."""
    random = np.random.default_rng(5)
    easy = (np.cumsum(random.integers(0, 2, 3640)) % 6 + 97).astype(np.uint16)
    split = {
        "train": [easy, random.integers(0, 256, 300).astype(np.uint16)],
        "val": [easy[100:241].copy(), easy[500:701].copy()],
    }
    folder.mkdir()
    entries = [
        write_shard(folder / f"{name}-{i}.bin", [tokens], name, 1)
        for name, shards in split.items()
        for i, tokens in enumerate(shards)
    ]
    Manifest(ByteTokenizer.name, ByteTokenizer.sha256, 257, {"name": "made"}, tuple(entries)).write(
        folder
    )
    return split


def windows_of(shards: list[np.ndarray], order: str) -> np.ndarray:
    """All windows of T + 1 tokens. In the lecture's order, a shard yields only complete
    micro-batches of 48 tokens."""
    unit = 48 if order == "lecture" else T
    cut = [
        tokens[first + i : first + i + T + 1]
        for tokens in shards
        for first in range(0, len(tokens) - unit, unit)
        for i in range(0, unit, T)
    ]
    return np.stack(cut).astype(np.int64)


def batch_of(windows: np.ndarray, step: int, order: str) -> Tensor:
    """(ROWS, T + 1) tokens."""
    n, rows = len(windows), []
    for position in range(step * ROWS, (step + 1) * ROWS):
        epoch, index = divmod(position, n)
        if order == "shuffled":
            index = permute(np.array([index]), n, f"{NUMBERS['seed']} {epoch}".encode())[0]
        rows.append(windows[index])
    return torch.from_numpy(np.stack(rows))


def loss_of(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """GPT-2's mean loss in nats per token, computed from the weights by name."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    C, H, length = NUMBERS["model.n_embd"], NUMBERS["model.n_head"], x.shape[1]
    h = w["transformer.wte.weight"][x] + w["transformer.wpe.weight"][:length]
    for i in range(NUMBERS["model.n_layer"]):
        name = f"transformer.h.{i}"
        qkv = linear(f"{name}.attn.c_attn", norm(f"{name}.ln_1", h)).split(C, 2)
        q, k, v = (t.view(len(x), length, H, C // H).transpose(1, 2) for t in qkv)
        scores = q @ k.transpose(2, 3) / math.sqrt(C // H)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(3) @ v).transpose(1, 2).reshape(h.shape)
        h = h + linear(f"{name}.attn.c_proj", mixed)
        inner = F.gelu(linear(f"{name}.mlp.c_fc", norm(f"{name}.ln_2", h)), approximate="tanh")
        h = h + linear(f"{name}.mlp.c_proj", inner)
    logits = norm("transformer.ln_f", h) @ w["transformer.wte.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def lr_of(step: int, steps: int) -> float:
    warmup = min(1, (step + 1) / 5)
    return 0.02 * min(warmup, 0.25 + 0.75 * min(1, (steps - step) / (0.5 * steps)))


def is_spike(loss: float, losses: list[float]) -> bool:
    if len(losses) < 32:
        return False
    median = statistics.median(losses[-128:])
    deviation = 1.4826 * statistics.median(abs(seen - median) for seen in losses[-128:])
    return loss > median + max(2.0 * deviation, 0.2 * median)


@torch.no_grad()
def validation(w: dict[str, Tensor], shards: list[np.ndarray]) -> tuple[float, float]:
    """Nats per token and bits per byte of the first 210 targets. No window crosses a shard
    boundary. The data has no end of text, so each token is a byte."""
    total = 0.0
    for tokens, targets in zip(shards, (140, 70), strict=True):
        for start in range(0, targets, T):
            part = torch.from_numpy(tokens[start : min(start + T, targets) + 1].astype(np.int64))
            total += loss_of(w, part[None, :-1], part[None, 1:]).item() * (len(part) - 1)
    return total / 210, total / 210 / math.log(2)


@dataclasses.dataclass
class Expected:
    """The expected results of a run."""

    weights: dict[str, Tensor]
    steps: list[dict[str, Any]]
    validation: dict[int, tuple[float, float]]
    kept: list[int]


def plain_run(split: dict[str, list[np.ndarray]], order: str, steps: int) -> Expected:
    torch.manual_seed(7)
    config = GPT2Config(3, 2, 16, 24, vocab_size=257, padded_vocab_size=384)
    w = {name: p.detach().clone() for name, p in GPT2(config).named_parameters()}
    for p in w.values():
        p.requires_grad_()
    matrices = [p for p in w.values() if p.dim() > 1]
    vectors = [p for p in w.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.4}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.9), eps=1e-3, foreach=False)
    windows = windows_of(split["train"], order)
    losses: list[float] = []
    done = Expected(w, [], {0: validation(w, split["val"])}, [])
    saved: list[int] = []
    for step in range(steps):
        tokens = batch_of(windows, step, order)
        adamw.zero_grad()
        loss = loss_of(w, tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(w.values(), 0.6).item()
        for group in adamw.param_groups:
            group["lr"] = lr_of(step, steps)
        applied = not is_spike(loss.item(), losses)
        if applied:
            losses.append(loss.item())
            adamw.step()
        lr = lr_of(step, steps)
        done.steps.append(
            {"loss": loss.item(), "grad_norm": norm, "lr": lr, "skipped": not applied}
        )
        after = step + 1
        if after % 6 == 0 or after == steps:
            done.validation[after] = validation(w, split["val"])
        if (after % 4 == 0 and applied) or after == steps:
            saved.append(after)
            best = sorted(set(saved) & set(done.validation), key=lambda s: done.validation[s])[:2]
            saved = [s for s in saved if s in saved[-2:] or s in best or s % 20 == 0]
    done.kept = saved
    return done


# What the run did


def assert_same(run: Path, expected: Expected, ranks: int = 1) -> None:
    records = storage.read_json_lines(run / "metrics.jsonl")
    assert_steps([r for r in records if r["kind"] == "train"], expected, ranks)
    seen = {r["step"]: r for r in records if r["kind"] == "validation"}
    assert seen.keys() == expected.validation.keys()
    for step, (loss, bits) in expected.validation.items():
        assert seen[step]["tokens"] == 210
        assert seen[step]["loss"] == pytest.approx(loss, rel=1e-5)
        assert seen[step]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    samples = [r for r in records if r["kind"] == "samples"]
    assert [r["step"] for r in samples] == list(seen)[1:]
    for text in [text for record in samples for text in record["texts"]]:
        assert text.startswith("b c")
    folders = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert folders == [f"step-{step:06d}" for step in expected.kept]
    assert_weights(run / "checkpoints" / folders[-1], expected)


def assert_steps(records: list[dict[str, Any]], expected: Expected, ranks: int) -> None:
    # 6 FLOPs per weight of the matrices and the head, and 12 x layers x width x length.
    flops = 6 * (3 * 12 * 16**2 + 384 * 16) + 12 * 3 * 16 * T
    assert [r["step"] for r in records] == list(range(len(expected.steps)))
    for step, (record, like) in enumerate(zip(records, expected.steps, strict=True)):
        assert record["lr"] == pytest.approx(like["lr"], rel=1e-12)
        assert record["skipped"] == like["skipped"], step
        assert record["loss"] == pytest.approx(like["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(like["grad_norm"], rel=1e-4)
        assert record["tokens_per_s"] == pytest.approx(96 / record["seconds"])
        mfu = record["tokens_per_s"] * flops / (PEAK * ranks)
        assert record["mfu"] == pytest.approx(mfu)


def assert_weights(checkpoint: Path, expected: Expected) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    assert weights.keys() == expected.weights.keys()
    assert len(weights) == 2 + 3 * 12 + 2
    assert weights["transformer.wpe.weight"].shape == (24, 16)
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, expected.weights[name].detach(), rtol=1e-3, atol=1e-5, msg=name
        )
    described = storage.read_json(checkpoint / "checkpoint.json")
    assert described["machine"]["micro_batch"] == 3
    assert described["data_position"] == {"windows": len(expected.steps) * ROWS}
    for name in NUMBERS.keys() - {"batch.order", "batch.lecture_micro_tokens", "steps"}:
        assert described["recipe"][name] == NUMBERS[name]


def flags(order: str) -> list[str]:
    numbers = {**NUMBERS, "batch.order": order}
    if order != "lecture":
        del numbers["batch.lecture_micro_tokens"]
    return [t for n, v in numbers.items() for t in (f"--{n.replace('_', '-')}", str(v))]


def command(data: Path, out: Path, order: str) -> list[str]:
    fixed = ["train", "demo", "--data", str(data), "--out", str(out), "--device", "cpu"]
    return [*fixed, "--no-compile", "--precision", "fp32", "--micro-batch", "3", *flags(order)]


@pytest.mark.parametrize("order", ["lecture", "shuffled"])
def test_run_matches_the_plain_loop(
    tmp_path: Path, rekindle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    split = make_data(tmp_path / "data")
    expected = plain_run(split, order, NUMBERS["steps"])
    skipped = [step for step, seen in enumerate(expected.steps) if seen["skipped"]]
    norms = [seen["grad_norm"] for seen in expected.steps]
    if order == "lecture":  # with this data, every rule of the recipe has an effect
        assert 0 < len(skipped) < 10
        assert 39 in skipped  # so there is no checkpoint at step 40
        assert min(norms) < NUMBERS["grad_clip"] < 1 < max(norms)
        assert expected.kept == [20, 36, 44, 46]
    monkeypatch.setattr("rekindle.runtime.device.Device.peak_flops", PEAK)
    outcome = rekindle(*command(tmp_path / "data", tmp_path / "run", order))
    assert outcome.status == 0, outcome.err
    assert_same(tmp_path / "run", expected)


RANK = f"""
import sys
from rekindle.cli import main
from rekindle.runtime.device import Device
Device.peak_flops = {PEAK}
sys.exit(main(sys.argv[1:]))
"""


def test_two_ranks_match_the_plain_loop(tmp_path: Path) -> None:
    """Also checks that MFU counts the peak of two devices."""
    split = make_data(tmp_path / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parents[2])
    train = [*command(tmp_path / "data", tmp_path / "run", "shuffled"), "--steps", "8"]
    ranks = []
    for rank in ("0", "1"):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, *train],
                env={**os.environ, **where, "PYTHONPATH": root},
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
        )
    expected = plain_run(split, "shuffled", 8)
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert_same(tmp_path / "run", expected, ranks=2)
