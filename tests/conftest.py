"""Shared fixtures: tokens on disk, a model of a few thousand weights, and the command line called
in this process, because importing torch takes seconds."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Set before NumPy and torch read them. Tiny models gain nothing from threads, and `make test` runs
# two of these processes; a test that needs two threads sets them.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
# Inductor compiles in this process, because the processes of a pool would have to import torch.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import numpy as np
import pytest

from rekindle import storage
from rekindle.cli import main
from rekindle.data.shards import Manifest, write_shard
from rekindle.data.tokenizer import ByteTokenizer
from rekindle.flags import flags_of
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.recipes import Batch, Recipe, Schedule

ROOT = Path(__file__).parents[1]
# Not the user's cache but one of this checkout: kernels are specific to a version of torch.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "compiled"))

# What differs between two equal runs.
CLOCKS = {"time", "seconds", "tokens_per_s", "mfu", "data_wait_s", "stall_s"}

# The slowest test files, slowest first: short ones remain for the end, so that both processes
# finish at about the same time.
LONGEST = (
    "distributed/test_lost.py",
    "distributed/test_sharding.py",
    "faults/test_bad_numbers.py",
    "model/test_kernels.py",
    "test_cli.py",
    "faults/test_operations.py",
    "distributed/test_two_processes.py",
    "train/test_wiring.py",
    "parity/test_verify.py",
    "model/test_compile.py",
    "sampling/test_cache.py",
    "train/test_resume.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slowest files, and give slow tests ten minutes each."""
    order = {ROOT / "tests" / file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))


class Outcome(NamedTuple):
    """A command's exit status and output."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _restore_torch_settings() -> Iterator[None]:
    """Undo the thread count and determinism that a run sets: tests share one process."""
    torch = sys.modules.get("torch")
    before = torch and (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    yield
    if torch and before:
        if torch.get_num_threads() != before[0]:
            torch.set_num_threads(before[0])
        if torch.are_deterministic_algorithms_enabled() != before[1]:
            torch.use_deterministic_algorithms(before[1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: a tiny model gains nothing from more, and is slow if other cores are busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tokens(count: int, seed: int) -> np.ndarray:
    """Tokens of documents of about 60 bytes that a model can learn to predict: (count,) uint16."""
    random = np.random.default_rng(seed)
    tokens = (np.cumsum(random.integers(0, 4, count)) % 96 + 32).astype(np.uint16)
    tokens[0] = ByteTokenizer.end_of_text
    tokens[random.random(count) < 1 / 60] = ByteTokenizer.end_of_text
    return tokens


def write_shards(
    folder: Path, train: Sequence[int], val: Sequence[int], *, seed: int = 0, **manifest: Any
) -> Manifest:
    """Write shards with these numbers of tokens, and their manifest, by default for bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for split, sizes in (("train", train), ("val", val)):
        for i, size in enumerate(sizes):
            tokens = make_tokens(size, seed + len(entries))
            name = f"{split}-{i:04d}.bin"
            documents = int((tokens == ByteTokenizer.end_of_text).sum())
            entries.append(write_shard(folder / name, [tokens], split, documents))
    described: dict[str, Any] = {
        "tokenizer": ByteTokenizer.name,
        "tokenizer_sha256": ByteTokenizer.sha256,
        "vocab_size": ByteTokenizer.vocab_size,
        "source": {"name": "generated"},
        **manifest,
    }
    result = Manifest(**described, shards=tuple(entries))
    result.write(folder)
    return result


@pytest.fixture(name="write_shards")
def _write_shards() -> Callable[..., Manifest]:
    """`write_shards(folder, [tokens of a training shard, ...], [of a validation shard, ...])`."""
    return write_shards


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that tests must not change: 75 training windows of 16 (an epoch ends inside the 10th
    batch of 8) and 300 validation targets."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [700, 520], [201, 101])
    return folder


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    """A recipe with steps of milliseconds: 8 windows of 16 tokens, two layers, 16 wide."""
    from rekindle.model.gpt2_config import GPT2Config

    return Recipe(
        name="demo",
        about="tiny",
        model=GPT2Config(
            n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=257, padded_vocab_size=384
        ),
        batch=Batch(tokens=128, length=16),
        optim=AdamWConfig(lr=1e-2),
        schedule=Schedule(warmup=3),
        steps=12,
        eval_every=4,
        checkpoint_every=4,
        keep_checkpoints=0,
        tokenizer="bytes",
        prompt="abc",
    )


@pytest.fixture(scope="session")
def tiny_flags(tiny: Recipe) -> list[str]:
    """The flags that turn the recipe `demo` into the tiny one."""
    pairs = [(flag.spelling, str(flag.default)) for flag in flags_of(tiny)]
    return [text for pair in pairs for text in pair]


@pytest.fixture
def rekindle(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`rekindle("train", "demo", ...)` in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    return call


@pytest.fixture
def train(
    rekindle: Callable[..., Outcome], shard_set: Path, tiny_flags: list[str], one_thread: None
) -> Callable[..., Outcome]:
    """`train(out, "--steps", 4, ...)`: the tiny recipe on the CPU, eager; must succeed."""

    def call(out: Path, *flags: object, data: Path = shard_set) -> Outcome:
        outcome = rekindle(*train_command(data, out, tiny_flags), *flags)
        assert outcome.status == 0, outcome.err
        return outcome

    return call


def updates(checkpoint: Path) -> int:
    """The number of updates (steps that were not skipped) in a checkpoint."""
    from safetensors import safe_open

    with safe_open(checkpoint / "optimizer.safetensors", "np") as file:
        [count] = set(file.get_tensor("updates").tolist())
        return int(count)


def train_command(data: Path, out: Path, flags: Sequence[str]) -> list[str]:
    fixed = ["train", "demo", "--data", str(data), "--out", str(out), "--device", "cpu"]
    return [*fixed, "--no-compile", "--precision", "fp32", *flags]


@pytest.fixture
def command(shard_set: Path, tiny_flags: list[str]) -> Callable[[Path], list[str]]:
    """`command(out)`: the arguments that `train` uses, for a separate process."""
    return lambda out: train_command(shard_set, out, tiny_flags)


@pytest.fixture
def refuses(rekindle: Callable[..., Outcome], tmp_path: Path) -> Callable[..., str]:
    """`refuses(arguments, "words", ...)`: check that the command fails as a user's mistake should.

    It prints one line that contains the words, exits with status 2, and writes or changes nothing
    under `tmp_path`.
    """

    def call(arguments: Sequence[object], *words: str) -> str:
        before = snapshot(tmp_path)
        outcome = rekindle(*arguments)
        assert outcome.status == 2
        assert outcome.err.startswith("rekindle: error: ")
        assert outcome.err.count("\n") == 1
        assert outcome.err.endswith("\n")
        for word in words:
            assert word in outcome.err
        assert snapshot(tmp_path) == before
        return outcome.err

    return call


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder under `folder`, with a hash of its content."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else ""
        for p in folder.rglob("*")
    }


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python("-m", "rekindle", ...)`: run a separate process with one thread."""

    def call(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.terminate()  # not kill(), so that torchrun can end its processes too
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return call


def describe(step: int, model: Any) -> Any:
    """A minimal description for a checkpoint of `model` (a GPT2Config)."""
    from rekindle.checkpoint import Description
    from rekindle.machine import Machine

    return Description(
        step=step,
        recipe={"batch.length": 16, "eval_tokens": 300},
        model=dataclasses.asdict(model),
        model_class="gpt2",
        optimizer_class="adamw",
        data_position={"windows": 0},
        guard={"losses": [], "skipped": 0},
        machine=Machine("cpu", "fp32", False, "none", False, False, 1, False, 1),
        ranks=1,
        versions={},
        data={"path": "data", "fingerprint": ""},
        tokenizer={"name": "bytes", "sha256": ""},
    )


@pytest.fixture(name="describe")
def _describe() -> Callable[..., Any]:
    """`describe(step, model)`: a minimal checkpoint description."""
    return describe


@pytest.fixture
def records() -> Callable[..., list[dict[str, Any]]]:
    """`records(run, "train")`: a run's log records of these kinds (or all), without times."""

    def call(run: Path, *kinds: str) -> list[dict[str, Any]]:
        logged = storage.read_json_lines(run / "metrics.jsonl")
        return [
            {key: value for key, value in record.items() if key not in CLOCKS}
            for record in logged
            if not kinds or record["kind"] in kinds
        ]

    return call
