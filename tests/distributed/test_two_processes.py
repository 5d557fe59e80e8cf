"""Two processes give the results of one: gloo on the CPU, one thread each.

Starting two processes takes seconds, so there are few starts, and each does a lot.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle import storage
from tests.distributed.conftest import FLAGS, assert_close, last

Records = Callable[..., list[dict[str, Any]]]
Train = Callable[..., Any]

WORK = """
import json, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from rekindle import storage, train
from rekindle.cli import main

commands, out = json.loads(sys.argv[1]), sys.argv[2]
gradients = {}
original = train.grad_norm

def remembered(parameters):  # the averaged gradient on each rank
    gradients.setdefault("gradient", torch.cat([p.grad.flatten() for p in parameters]))
    return original(parameters)

train.grad_norm = remembered
train.World.close = lambda self: None  # gloo cannot connect twice under one torchrun
write = storage.write_file

def slow(path, chunks):
    time.sleep(0.2)
    return write(path, chunks)

storage.write_file = slow
for command in commands:
    status = main(command)
    assert status == 0, status
    if command[0] == "train":  # whichever rank returns first
        run = Path(command[command.index("--out") + 1])
        assert (run / "checkpoints" / "step-000012").is_dir()
from rekindle.runtime.distributed import get_world
torch.save(gradients, f"{out}-{get_world().rank}.pt")
dist.barrier()  # gloo's threads end a process whose peer is gone
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture
def one(folder: Path, train: Train) -> Path:
    """The run of one process."""
    if not (folder / "one").exists():
        train(folder / "one", *FLAGS)
    return folder / "one"


@pytest.fixture
def torchrun(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`torchrun("-m", "rekindle", ...)`: run in two processes."""
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return lambda *arguments: python(*start, *arguments)


@pytest.fixture
def two(folder: Path, torchrun: Callable, command: Callable) -> Path:
    """The same run with two processes."""
    if not (folder / "two").exists():
        done = torchrun("-m", "rekindle", *command(folder / "two"), *FLAGS)
        assert done.returncode == 0, done.stderr
        (folder / "printed").write_text(done.stdout)
    return folder / "two"


def test_two_processes_train_like_one(one: Path, two: Path, folder: Path, records: Records) -> None:
    assert_close(two, one, records)
    printed = (folder / "printed").read_text()
    assert "8 rows" not in printed
    assert "4 rows × 16 tokens × 1 accumulation step × 2 ranks" in printed
    assert printed.count("step     0/12") == 1  # only one of them prints
    split = storage.read_json(last(two) / "checkpoint.json")
    machine = split["machine"]
    assert (split["ranks"], machine["micro_batch"], machine["threads"]) == (2, 4, 1)


def test_one_process_resumes_the_run_of_two(
    one: Path, two: Path, tmp_path: Path, train: Train, records: Records
) -> None:
    out = tmp_path / "run"
    shutil.copytree(two, out)
    for step in ("000008", "000012"):
        shutil.rmtree(out / "checkpoints" / f"step-{step}")
    outcome = train(out, *FLAGS)
    assert "resumes at step 4 of 12 (on 1 ranks instead of 2)" in outcome.out
    assert_close(out, one, records)


def questions(file: Path) -> Path:
    """A small HellaSwag: endings of different lengths, and correct ones at all positions."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "away"]
    with open(file, "w") as lines:
        for n in range(21):
            endings = [" ".join(words[(n + i) % 7 :][: 1 + (n * i) % 4]) for i in range(4)]
            row = {"ctx": " ".join(words[: n % 5 + 1]), "endings": endings, "label": n * n % 4}
            lines.write(json.dumps(row) + "\n")
    return file


def test_two_processes_resume_evaluate_and_average_gradients_like_one(
    one: Path, tmp_path: Path, train: Train, records: Records, rekindle: Callable,
    command: Callable, torchrun: Callable, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    shutil.copytree(one, out)
    for step in ("000008", "000012"):
        shutil.rmtree(out / "checkpoints" / f"step-{step}")
    evaluate = ["eval", str(one), "--hellaswag", str(questions(tmp_path / "questions.jsonl"))]
    evaluate += ["--data", str(storage.read_json(one / "run.json")["data"]["path"]), "--json"]
    evaluate += ["--device", "cpu"]
    commands = [[str(a) for a in (*command(out), *FLAGS)], evaluate]
    script = tmp_path / "work.py"
    script.write_text(WORK)
    done = torchrun(script, json.dumps(commands), tmp_path / "gradients")
    assert done.returncode == 0, done.stderr

    assert "resumes at step 4 of 12 (on 2 ranks instead of 1)" in done.stdout
    assert_close(out, one, records)

    alone = json.loads(rekindle(*evaluate).out)
    together = json.loads(done.stdout.splitlines()[-1])
    assert together["hellaswag"] == alone["hellaswag"]
    assert alone["hellaswag"]["total"] == 21
    assert 0 < alone["hellaswag"]["correct"] < 21
    assert together["validation"]["loss"] == pytest.approx(alone["validation"]["loss"], rel=1e-6)
    assert together["validation"]["tokens"] == alone["validation"]["tokens"] == 300

    gradients = [torch.load(tmp_path / f"gradients-{rank}.pt")["gradient"] for rank in (0, 1)]
    assert torch.equal(*gradients)
    again = tmp_path / "again"
    shutil.copytree(one, again)
    for step in ("000008", "000012"):
        shutil.rmtree(again / "checkpoints" / f"step-{step}")
    seen: list[torch.Tensor] = []
    from rekindle import train as module

    original = module.grad_norm

    def remembered(parameters: Any) -> torch.Tensor:
        seen.append(torch.cat([p.grad.flatten() for p in parameters]))
        return original(parameters)

    monkeypatch.setattr(module, "grad_norm", remembered)
    train(again, *FLAGS)
    torch.testing.assert_close(gradients[0], seen[0], rtol=1e-4, atol=1e-7)
