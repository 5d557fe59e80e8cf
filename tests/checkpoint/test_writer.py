"""Checkpoints are written in the background and hold the state at the time of the save."""

import dataclasses
import io
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rekindle import checkpoint, storage
from rekindle.checkpoint import Keep, Saver, writer
from rekindle.errors import UserError
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.observe.console import Console
from rekindle.observe.json_lines import JsonLinesLogger
from rekindle.observe.metrics import Metrics
from rekindle.optim.adamw import AdamW
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.recipes import Recipe
from rekindle.runtime.distributed import World
from rekindle.storage import files as storage_files
from tests.conftest import updates

pytestmark = pytest.mark.usefixtures("one_thread")


class Training:
    """A tiny model in training that saves its checkpoints in `folder`."""

    def __init__(
        self, recipe: Recipe, folder: Path, describe: Callable, *, keep: int = 0,
        is_main: bool = True,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.folder, self.describe = folder, describe
        self.model = GPT2(recipe.model)
        self.optimizer = AdamW(self.model, AdamWConfig(lr=1e-2))
        self.steps, self.printed = 0, io.StringIO()
        log = JsonLinesLogger(storage.JsonLines(folder / "metrics.jsonl"), pytest.fail)
        metrics = Metrics(
            [log], Console(stream=self.printed), steps=9, tokens_per_step=1, flops_per_token=1,
            peak_flops=None,
        )  # fmt: skip
        self.saver = Saver(
            folder / "checkpoints", Keep(keep), self.model, self.optimizer, metrics,
            World(rank=0 if is_main else 1),
        )  # fmt: skip

    def step(self) -> None:
        idx = torch.arange(32).view(2, 16)
        self.model.zero_grad()
        _, loss = self.model(idx, idx)
        assert loss is not None
        loss.backward()
        self.optimizer.step(torch.tensor(False))
        self.steps += 1

    def save(self) -> dict[str, Tensor]:
        """Take a step, start a checkpoint, and return the state that it must hold."""
        self.step()
        self.saver.save(self.describe(self.steps, self.model.config))
        return self.state()

    def state(self) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        return {name: p.detach().clone() for name, p in parameters.items()} | {
            name: tensor.clone() for name, tensor in self.optimizer.state_tensors().items()
        }

    def written(self, step: int) -> dict[str, Tensor]:
        """The tensors in the checkpoint of `step`, after checking its hashes."""
        from safetensors.torch import load_file

        loaded = checkpoint.load(self.folder / "checkpoints" / f"step-{step:06d}")
        assert updates(loaded.path) == step
        return {**loaded.model, **load_file(loaded.path / "optimizer.safetensors")}

    def names(self) -> list[str]:
        return sorted(p.name for p in (self.folder / "checkpoints").glob("*"))

    def records(self) -> list[dict[str, Any]]:
        return storage.read_json_lines(self.folder / "metrics.jsonl")


@pytest.fixture
def training(tiny: Recipe, tmp_path: Path, describe: Callable) -> Training:
    return Training(tiny, tmp_path, describe)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Blocks writing until it is set."""
    opened, original = threading.Event(), storage.write_file

    def write(path: Path, chunks: Any) -> str:
        assert opened.wait(30)
        return original(path, chunks)

    monkeypatch.setattr(storage_files, "write_file", write)
    return opened


def assert_equal(written: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name


def test_training_during_a_save_does_not_change_the_checkpoint(
    training: Training, gate: threading.Event
) -> None:
    """Also checks that a checkpoint is logged only once it is complete."""
    state = training.save()
    training.step()
    training.step()
    assert "step-000001" not in training.names()
    assert (training.records(), training.printed.getvalue()) == ([], "")
    gate.set()
    training.saver.finish()
    assert_equal(training.written(1), state)
    assert training.names() == ["step-000001"]
    (record,) = training.records()
    assert (record["kind"], record["step"]) == ("checkpoint", 1)
    assert record["seconds"] > 0
    assert record["stall_s"] > 0
    path = training.folder / "checkpoints" / "step-000001"
    assert training.printed.getvalue().startswith(f"step     1 | saved {path} (")


def test_save_waits_for_the_previous_one(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, in_progress = checkpoint.write, []
    next_save = threading.Semaphore(0)  # released just before the next call of `save`

    def slow(*arguments: Any) -> Path:
        in_progress.append(1)
        assert len(in_progress) == 1
        assert next_save.acquire(timeout=60)
        time.sleep(0.3)
        path = write(*arguments)
        in_progress.pop()
        return path

    monkeypatch.setattr(writer, "write", slow)
    states = [training.save()]
    for _ in range(2):
        training.step()
        next_save.release()
        training.saver.save(training.describe(training.steps, training.model.config))
        states.append(training.state())
    next_save.release()
    training.saver.finish()
    for step, state in enumerate(states, 1):
        assert_equal(training.written(step), state)
    _, second, third = (r["stall_s"] for r in training.records())
    assert min(second, third) > 0.1  # the wait is part of the stall


def test_close_waits_for_the_checkpoint(training: Training, gate: threading.Event) -> None:
    state = training.save()
    threading.Timer(0.2, gate.set).start()
    training.saver.close()
    assert_equal(training.written(1), state)
    assert training.printed.getvalue().startswith("finishing the checkpoint in progress\n")


UNCLOSED = """
import json, sys, time
from pathlib import Path
from rekindle import storage
from rekindle.model.gpt2_config import GPT2Config
from rekindle.model.gpt2 import GPT2
from rekindle.optim.adamw import AdamW
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.observe.console import Console
from rekindle.observe.metrics import Metrics
from rekindle.checkpoint import Keep
from rekindle.runtime.distributed import World
from rekindle.checkpoint import Description, Saver
from rekindle.schema import parse

write = storage.write_file

def slow(path, chunks):
    time.sleep(0.3)
    return write(path, chunks)

storage.write_file = slow
model = GPT2(
    GPT2Config(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9, padded_vocab_size=9)
)
optimizer = AdamW(model, AdamWConfig(lr=1e-2))
metrics = Metrics([], Console(), steps=1, tokens_per_step=1, flops_per_token=1, peak_flops=None)
Saver(Path(sys.argv[1]), Keep(), model, optimizer, metrics, World()).save(
    parse(Description, json.loads(sys.argv[2]))
)
raise SystemExit(3)
"""


def test_process_does_not_exit_before_the_checkpoint_is_complete(
    tmp_path: Path, describe: Callable, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Even if the saver is never closed."""
    config = GPT2Config(
        n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9, padded_vocab_size=9
    )
    done = python("-c", UNCLOSED, tmp_path, json.dumps(dataclasses.asdict(describe(1, config))))
    assert done.returncode == 3, done.stderr
    (path,) = tmp_path.iterdir()
    assert checkpoint.load(path).step == 1


def disk_full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("then", ["save", "finish"])
def test_disk_error_is_printed_at_once_and_raised_by_finish(
    tiny: Recipe, tmp_path: Path, describe: Callable, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """The previous checkpoint is untouched, and no partial file is left."""
    monkeypatch.setattr(writer, "RETRY_DELAYS", (0.01, 0.02))
    training = Training(tiny, tmp_path, describe, keep=1)
    state = training.save()
    training.saver.finish()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", disk_full)
        training.save()
        training.saver.close()  # does not raise
    assert "step     2 | saving failed: No space left on device\n" in training.printed.getvalue()
    folder = re.escape(str(tmp_path / "checkpoints"))
    expected = rf"step 2 in {folder} failed \(No space left on device\): free some space"
    assert training.names() == ["step-000001"]
    assert_equal(training.written(1), state)
    assert [r["step"] for r in training.records()] == [1]
    if then == "finish":
        with pytest.raises(UserError, match=expected):
            training.saver.finish()
        return
    state = training.save()
    training.saver.finish()
    assert training.names() == ["step-000003"]
    assert_equal(training.written(3), state)


def test_other_exceptions_are_raised_unchanged(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise KeyError("oh")

    monkeypatch.setattr(writer, "write", broken)
    training.save()
    with pytest.raises(KeyError, match="oh"):
        training.saver.finish()
    assert "saving failed: KeyError('oh')" in training.printed.getvalue()


def test_old_checkpoints_are_removed_after_the_new_one_is_complete(
    tiny: Recipe, tmp_path: Path, describe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tiny, tmp_path, describe, keep=2)
    remove, seen = storage.remove_folder, []

    def record(path: Path) -> None:
        seen.append((path.name, training.names()))
        remove(path)

    monkeypatch.setattr(storage, "remove_folder", record)
    for _ in range(3):
        training.save()
    training.saver.finish()
    assert seen == [("step-000001", ["step-000001", "step-000002", "step-000003"])]
    assert training.names() == ["step-000002", "step-000003"]


def test_failing_to_remove_an_old_checkpoint_is_only_printed(
    tiny: Recipe, tmp_path: Path, describe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where an open file cannot be removed completely."""

    def remove(path: Path) -> None:
        raise OSError(39, "Directory not empty")

    training = Training(tiny, tmp_path, describe, keep=1)
    monkeypatch.setattr(storage, "remove_folder", remove)
    for _ in range(2):
        training.save()
    training.saver.finish()
    printed = training.printed.getvalue()
    assert "an old checkpoint cannot be removed: Directory not empty\n" in printed
    assert f"step     2 | saved {tmp_path}" in printed
    assert [r["step"] for r in training.records()] == [1, 2]


def test_other_ranks_do_not_write(tiny: Recipe, tmp_path: Path, describe: Callable) -> None:
    training = Training(tiny, tmp_path, describe, is_main=False)
    before = threading.active_count()
    training.save()
    assert threading.active_count() == before
    training.saver.finish()
    training.saver.close()
    assert training.names() == []
