"""A run sharded over two processes matches a run on one: gloo on the CPU, one thread each.

Starting two processes takes seconds, so one start does everything that needs two processes.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from rekindle import storage

Train = Callable[..., Any]
Records = Callable[..., list[dict[str, Any]]]

# Two micro-batches on each of two ranks; gradients clipped at every step; an odd width; one
# rank has more validation rows. For eps see conftest.py.
FLAGS = (
    "--micro-batch", 2, "--grad-clip", 0.05, "--optim.eps", 1e-4, "--model.n-embd", 17,
    "--model.n-head", 1, "--eval-tokens", 280,
)  # fmt: skip

WORK = """
import json, sys, torch
from rekindle import start, train, trainer
from rekindle.runtime import distributed
from rekindle.cli import main
from rekindle.evaluate import scoring

distributed.World.close = lambda self: None  # gloo cannot connect twice under one torchrun
scoring.CPU_TOKENS = 1  # one batch per question: one rank has two, the other one
facts = []
begin, clip, step = start.start, train.clip_gradients, trainer.train_step

def measured(*arguments):
    session = begin(*arguments)
    parameters = session.trainer.parameters
    parts = sum(getattr(p, "_local_tensor", p).numel() for p in parameters)
    facts.append({"held": parts, "all": sum(p.numel() for p in parameters), "norms": []})
    return session

def full_norm(parameters):  # of the gradients gathered from all ranks
    wholes = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in parameters]
    return torch.linalg.vector_norm(torch.cat([w.flatten() for w in wholes])).item()

def clipped(parameters, limit, norm):
    before = full_norm(parameters)
    clip(parameters, limit, norm)
    facts[-1]["norms"].append((norm.item(), before, full_norm(parameters)))

def recorded(forward, *rest, world, **named):
    def call(x, y):
        result = forward(x, y)
        facts[-1]["location"] = world.location.now()
        return result

    return step(call, *rest, world=world, **named)

trainer.train_step = recorded
start.start, train.clip_gradients = measured, clipped
for command in json.loads(sys.argv[1]):
    assert main(command) == 0, command
open(f"{sys.argv[2]}-{distributed.get_world().rank}.json", "w").write(json.dumps(facts))
"""


class Runs(NamedTuple):
    """Run folders: of one process; of two, data parallel; of two, sharded."""

    one: Path
    parallel: Path
    sharded: Path
    resumed: Path  # resumes a sharded run, sharded
    begun_by_one: Path  # resumes the run of one process, sharded and recomputing
    facts: list[list[dict[str, Any]]]  # by rank and run
    printed: str


def questions(file: Path) -> Path:
    """Three questions in HellaSwag's format, of different lengths."""
    rows = [
        {"ctx": "the cat" * n, "endings": ["a", "sat on", "mat", "ran away"], "label": n}
        for n in (1, 2, 3)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def copy_from_step_4(run: Path, out: Path) -> Path:
    """A copy of `run` with its checkpoint of step 4 only."""
    shutil.copytree(run, out)
    for step in ("000008", "000012"):
        shutil.rmtree(out / "checkpoints" / f"step-{step}")
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture
def flags(folder: Path) -> tuple[object, ...]:
    return (*FLAGS, "--hellaswag", questions(folder / "questions.jsonl"))


@pytest.fixture
def runs(
    folder: Path, flags: tuple[object, ...], train: Train, command: Callable,
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> Runs:  # fmt: skip
    out = [folder / name for name in ("one", "parallel", "sharded", "resumed", "begun by one")]
    if not out[0].exists():
        train(out[0], *flags)
        script = folder / "work.py"
        script.write_text(WORK)
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)

        def two(facts: str, *commands: Sequence[object]) -> str:
            texts = json.dumps([[str(a) for a in command] for command in commands])
            done = python(*torchrun, texts, folder / facts)
            assert done.returncode == 0, done.stderr
            return done.stdout

        copy_from_step_4(out[0], out[4])
        printed = two(
            "facts",
            [*command(out[1]), *flags],
            [*command(out[2]), *flags, "--shard"],
            [*command(out[4]), *flags, "--shard", "--recompute"],
        )
        (folder / "printed").write_text(printed)
        copy_from_step_4(out[2], out[3])
        two("facts of the resumed", [*command(out[3]), *flags])
    facts = [storage.read_json(folder / f"facts-{rank}.json") for rank in (0, 1)]
    return Runs(*out, facts=facts, printed=(folder / "printed").read_text())


def tensors(run: Path) -> dict[str, torch.Tensor]:
    last = run / "checkpoints" / "step-000012"
    return {**load_file(last / "model.safetensors"), **load_file(last / "optimizer.safetensors")}


def assert_close(run: Path, other: Path, records: Records) -> None:
    """Equal up to rounding: losses, norms, validation, HellaSwag, weights and optimizer state."""
    kinds = ("train", "validation", "hellaswag")
    logged, expected = records(run, *kinds), records(other, *kinds)
    assert len(logged) == len(expected) == 12 + 4 + 4
    for record, like in zip(logged, expected, strict=True):
        assert record.pop("kind") == like.pop("kind")
        assert record.pop("passage", []) == pytest.approx(like.pop("passage", []), rel=2e-5)
        assert record == pytest.approx(like, rel=2e-5)
    mine, theirs = tensors(run), tensors(other)
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=2e-6, msg=name)


def test_sharded_run_matches_one_process(runs: Runs, records: Records) -> None:
    assert_close(runs.sharded, runs.one, records)
    assert_close(runs.sharded, runs.parallel, records)
    assert min(r["grad_norm"] for r in records(runs.one, "train")) > 0.05  # all were clipped
    assert records(runs.sharded, "samples") == records(runs.one, "samples")
    assert len(records(runs.one, "samples")) == 3
    assert "2 rows × 16 tokens × 2 accumulation steps × 2 ranks" in runs.printed
    assert runs.printed.count(", sharded; ") == 2
    assert runs.printed.count(", recomputing, sharded; ") == 1
    split = storage.read_json(runs.sharded / "checkpoints" / "step-000012" / "checkpoint.json")
    assert split["machine"]["shard"]


def test_each_rank_holds_a_part_and_norms_agree(runs: Runs) -> None:
    for _, sharded, begun_by_one in runs.facts:
        assert sharded["held"] < 0.52 * sharded["all"]
        assert (len(sharded["norms"]), len(begun_by_one["norms"])) == (12, 8)
        for norm, full_norm, clipped in sharded["norms"]:
            assert norm == pytest.approx(full_norm, rel=1e-6)
            assert clipped == pytest.approx(0.05, rel=1e-4)
    parallel, sharded, _ = zip(*runs.facts, strict=True)
    assert [facts["held"] for facts in parallel] == [parallel[0]["all"]] * 2
    assert sum(facts["held"] for facts in sharded) == sharded[0]["all"]
    assert sharded[0]["norms"] == sharded[1]["norms"]


def test_watchdog_reports_a_sharded_forward_pass_as_waiting(runs: Runs) -> None:
    for parallel, sharded, _ in runs.facts:
        assert (parallel["location"], sharded["location"]) == ("step 11", "waiting in step 11")


def test_run_resumes_from_one_process_to_shards_and_back(
    runs: Runs, tmp_path: Path, flags: tuple[object, ...], train: Train, records: Records
) -> None:
    assert_close(runs.begun_by_one, runs.one, records)
    begun_sharded = copy_from_step_4(runs.sharded, tmp_path / "run")
    outcome = train(begun_sharded, *flags)
    assert "resumes at step 4 of 12 (on 1 ranks instead of 2)" in outcome.out
    assert "sharded" not in outcome.out
    assert_close(begun_sharded, runs.one, records)


def test_sharded_run_resumes_with_the_same_bits(runs: Runs, records: Records) -> None:
    for kind in ("train", "validation", "hellaswag", "samples", "checkpoint"):
        assert records(runs.resumed, kind) == records(runs.sharded, kind)
    resumed, uninterrupted = tensors(runs.resumed), tensors(runs.sharded)
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
