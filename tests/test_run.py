"""Complete runs from the command line: the files they write, what they print, and how they end."""

import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rekindle.start
import rekindle.trainer
from rekindle import checkpoint, storage
from rekindle.checkpoint import writer
from rekindle.data.batches import permute
from rekindle.data.shards import Manifest, open_split, read_manifest, write_shard
from rekindle.data.tokenizer import ByteTokenizer
from rekindle.model.gpt2 import GPT2
from rekindle.recipes import Recipe
from rekindle.runtime.device import Device, make_deterministic
from rekindle.train import due
from tests.conftest import updates

Train = Callable[..., Any]
Records = Callable[..., list[dict[str, Any]]]
LAST = Path("checkpoints", "step-000004", "model.safetensors")


def test_due() -> None:
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if due(step, 0, 10)] == [10]
    assert [step for step in range(1, 11) if due(step, 1, 10)] == list(range(1, 11))


def test_files_of_a_run(tmp_path: Path, train: Train) -> None:
    """No temporary files are left."""
    train(tmp_path / "run", "--steps", 4)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == [
        "run/.lock",
        "run/checkpoints/step-000004/checkpoint.json",
        "run/checkpoints/step-000004/model.safetensors",
        "run/checkpoints/step-000004/optimizer.safetensors",
        "run/metrics.jsonl",
        "run/run.json",
    ]


def test_printed_lines_of_a_run(tmp_path: Path, train: Train) -> None:
    """Data, model and device first, then a line per step with its speed and data wait."""
    lines = train(tmp_path / "run", "--steps", 4).out.splitlines()
    assert "1,220 training and 302 validation tokens, every hash checked" in lines[0]
    assert lines[1] == "not compiled: --no-compile was given"
    assert lines[2].startswith("model: 11,216 parameters (n_layer 2, n_head 2, n_embd 16")
    assert "128 tokens per step = 8 rows × 16 tokens × 1 accumulation step × 1 rank" in lines[3]
    assert lines[4].startswith(f"run: {tmp_path / 'run'} starts at step 0 of 4")
    assert lines[5].startswith("warmed up in ")
    assert lines[6].startswith("step     0 | validation loss")
    first = next(line for line in lines if line.startswith("step     0/4"))
    assert "grad norm " in first
    assert "mfu" not in first  # the peak of a CPU is unknown
    assert "| data " in first
    assert not any("\r" in line or "\033" in line for line in lines)


def test_loss_starts_at_chance_and_falls(tmp_path: Path, train: Train, records: Records) -> None:
    train(tmp_path / "run", "--steps", 60, "--eval-every", 0)
    first, last = records(tmp_path / "run", "validation")
    assert first["loss"] == pytest.approx(math.log(384), abs=0.1)
    assert last["loss"] < first["loss"] - 1
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / math.log(2), rel=0.1)


def test_seed_decides_weights_and_data_order(
    tmp_path: Path, train: Train, records: Records, shard_set: Path, tiny: Recipe
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, "--steps", 4, "--seed", seed)
    assert records(tmp_path / "a") == records(tmp_path / "b")
    assert (tmp_path / "a" / LAST).read_bytes() == (tmp_path / "b" / LAST).read_bytes()
    a, c = (records(tmp_path / name, "train") for name in "ac")
    assert all(x["loss"] != y["loss"] for x, y in zip(a, c, strict=True))
    # The seed decides weights and data order: compute the first loss independently of the run.
    shards = open_split(shard_set, read_manifest(shard_set), "train")
    windows = np.stack([s[i : i + 17] for s in shards for i in range(0, len(s) - 16, 16)])
    for logged, seed in ((a, 1), (c, 2)):
        torch.manual_seed(seed)
        order = permute(np.arange(8), len(windows), f"{seed} 0".encode())
        tokens = torch.from_numpy(windows[order].astype(np.int64))
        _, loss = GPT2(tiny.model)(tokens[:, :-1], tokens[:, 1:])
        assert loss is not None
        assert logged[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batch_size_changes_only_rounding(
    tmp_path: Path, train: Train, records: Records, micro_batch: int
) -> None:
    runs = []
    for rows in (8, micro_batch):
        out = tmp_path / str(rows)
        train(out, "--micro-batch", rows, "--steps", 6, "--optim.eps", 1e-6)
        runs.append(records(out, "train", "validation"))
    for one, other in zip(*runs, strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        if one["kind"] == "train":
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_trains_without_a_compiler(
    tmp_path: Path, command: Callable, rekindle: Callable, monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> None:  # fmt: skip
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("tried to compile")

    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(shutil, "which", lambda *arguments, **options: None)
    monkeypatch.setattr(torch, "compile", never)
    arguments = [a for a in command(tmp_path / "run") if a != "--no-compile"]
    outcome = rekindle(*arguments, "--steps", 2)
    assert outcome.status == 0
    assert "not compiled: there is no C++ compiler" in outcome.out.splitlines()


def make_loss_infinite(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Make the loss of the n-th training step infinite if `bad(n)`."""
    original, calls = rekindle.trainer.train_step, []

    def train_step(forward: Any, *arguments: Any, **options: Any) -> Any:
        number = len(calls)
        calls.append(number)

        def infinite(x: Any, y: Any) -> Any:
            logits, loss = forward(x, y)
            return logits, loss * (float("inf") if bad(number) else 1.0)

        return original(infinite, *arguments, **options)

    monkeypatch.setattr(rekindle.trainer, "train_step", train_step)


def test_skipped_step_is_printed_and_logged(
    tmp_path: Path, train: Train, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_loss_infinite(monkeypatch, lambda step: step in (3, 4))
    outcome = train(tmp_path / "run", "--steps", 8)
    shown = [line for line in outcome.out.splitlines() if "SKIPPED" in line]
    assert [line.split("/")[0].split()[1] for line in shown] == ["3", "4"]
    steps = records(tmp_path / "run", "train")
    assert [r["skipped"] for r in steps] == [False] * 3 + [True] * 2 + [False] * 3
    saved = tmp_path / "run" / "checkpoints" / "step-000008" / "checkpoint.json"
    assert updates(saved.parent) == 6


def test_run_ends_after_three_rollbacks(
    tmp_path: Path, command: Callable, rekindle: Callable, records: Records,
    monkeypatch: pytest.MonkeyPatch, one_thread: None,
) -> None:  # fmt: skip
    """Nine skipped steps followed by an applied one cause no rollback, and the checkpoint before
    the rollbacks stays."""
    make_loss_infinite(monkeypatch, lambda step: 5 <= step < 14 or step >= 15)
    outcome = rekindle(*command(tmp_path / "run"), "--steps", 100, "--checkpoint-every", 5)
    assert outcome.status == 2
    assert outcome.err == (
        "rekindle: error: the 10 steps before step 25 were skipped in a row after 3 rollbacks to "
        "step 15: lower --optim.lr and start from scratch, or --fork an earlier checkpoint\n"
    )
    assert outcome.out.count(": rolled back to step 15, continuing with batch ") == 3
    assert "with batch 45 (batches 15 to 44 are skipped)" in outcome.out
    assert [r["step"] for r in records(tmp_path / "run", "train")] == list(range(25))
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000005", "step-000015"]


def test_rollback_past_a_checkpoint_that_could_not_be_saved(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk does not prevent a rollback."""
    write, failed = checkpoint.write, []

    def disk_full_once(folder: Path, description: Any, snapshot: Any) -> Path:
        if description.step == 15 and not failed:
            failed.append(15)
            raise OSError(28, "No space left on device")
        return write(folder, description, snapshot)

    monkeypatch.setattr(writer, "write", disk_full_once)
    monkeypatch.setattr(writer, "RETRY_DELAYS", ())
    make_loss_infinite(monkeypatch, lambda step: 5 <= step < 14 or 15 <= step < 25)
    outcome = train(tmp_path / "run", "--steps", 30, "--checkpoint-every", 5)
    assert failed
    assert ": rolled back to step 5, continuing with batch 25" in outcome.out


def test_run_ends_if_there_is_no_checkpoint_to_roll_back_to(
    tmp_path: Path, command: Callable, rekindle: Callable, monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> None:  # fmt: skip
    make_loss_infinite(monkeypatch, lambda step: True)
    outcome = rekindle(*command(tmp_path / "run"), "--steps", 20)
    assert outcome.status == 2
    assert "the 10 steps before step 10 were skipped in a row and there is no" in outcome.err


def test_diverging_run_ends_with_one_line(
    tmp_path: Path, command: Callable, rekindle: Callable, one_thread: None
) -> None:
    outcome = rekindle(*command(tmp_path / "run"), "--optim.lr", 1e38, "--steps", 50)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "were skipped in a row and there is no checkpoint to roll back to" in outcome.err


@pytest.mark.parametrize("on_gpu", [True, False])
def test_gpu_is_deterministic_only_on_request(on_gpu: bool) -> None:
    torch.use_deterministic_algorithms(False)
    device = Device(torch.device("cuda"), "a GPU", "autocast")
    make_deterministic(device, on_gpu=on_gpu)
    assert torch.are_deterministic_algorithms_enabled() == on_gpu


def test_deterministic_is_reused_on_resume(tmp_path: Path, train: Train) -> None:
    """A resumed run stays deterministic without repeating the flag."""
    for flags in (["--deterministic"], []):
        train(tmp_path / "run", "--steps", 4 if flags else 8, *flags)
    for step in (4, 8):
        saved = tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "checkpoint.json"
        assert storage.read_json(saved)["machine"]["deterministic"]


def test_validation_does_not_affect_training(
    tmp_path: Path, train: Train, records: Records
) -> None:
    train(tmp_path / "often", "--eval-every", 1)
    train(tmp_path / "seldom", "--eval-every", 0)
    assert records(tmp_path / "often", "train") == records(tmp_path / "seldom", "train")


def test_data_without_a_validation_split(
    tmp_path: Path, train: Train, records: Records, write_shards: Callable
) -> None:
    write_shards(tmp_path / "data", [700], [])
    train(tmp_path / "run", "--steps", 2, data=tmp_path / "data")
    assert records(tmp_path / "run", "validation") == []


def test_vocabulary_size_comes_from_the_shards(tmp_path: Path, train: Train) -> None:
    tokens = np.arange(600, dtype=np.uint16) % 1000 + 49_000
    (tmp_path / "data").mkdir()
    entries = []
    for split in ("train", "val"):
        entries.append(write_shard(tmp_path / "data" / f"{split}.bin", [tokens], split, 1))
    manifest = Manifest("gpt2", "0" * 64, 50_257, {}, tuple(entries))
    manifest.write(tmp_path / "data")
    outcome = train(tmp_path / "run", "--steps", 1, "--eval-tokens", 16, data=tmp_path / "data")
    assert "vocabulary 50,257" in outcome.out
    assert storage.read_json(tmp_path / "run" / "run.json")["recipe"][
        "model.padded_vocab_size"
    ] == 50_304  # fmt: skip
    assert ByteTokenizer.vocab_size != 50_257


def test_runs_as_a_module(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = python("-m", "rekindle", "train", "nothing", "--data", "a", "--out", "b")
    assert done.returncode == 2
    assert done.stderr.startswith("rekindle: error: there is no recipe 'nothing'")
