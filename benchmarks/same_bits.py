"""Check that two versions of the code train to the same bits, as a refactoring should.

    python -m benchmarks.same_bits BEFORE AFTER [--only NAME ...]

BEFORE and AFTER are checkouts (folders) or revisions of this repository. Each version prepares the
same text and trains the same small models through its own command line, on the CPU, with one thread
per process. Every checkpoint and every logged step is then compared: tensors byte by byte, numbers
exactly. The exit status is 1 if anything differs. The tables below list names that have changed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PATIENCE = 600  # seconds for one command

# Older name -> newer name.
FLAGS = {
    "--batch.micro": "--micro-batch",
    "--optim.spike": "--spike",
}  # which one a version has, is read from its --help
TENSORS: dict[str, str] = {}  # prefixes in *.safetensors
KINDS = {"return": "rollback"}  # of records in metrics.jsonl
KEYS = {"norm": "grad_norm"}  # of records and of checkpoint.json
# Compared keys: of each kind of record, besides its step, and of checkpoint.json.
LOGGED = {
    "train": ("loss", "lr", "grad_norm", "skipped"),
    "validation": ("loss", "bits_per_byte"),
    "rollback": ("next_batch",),
}
DESCRIBED = ("step", "data_position", "updates")

BATCH, EVERY = 512, 4  # tokens of one step; steps between checkpoints
TINY = f"""demo --device cpu --no-compile --precision fp32 --hellaswag none --model.n-layer 2
    --model.n-head 2 --model.n-embd 32 --model.block-size 64 --batch.length 64 --batch.micro 2
    --batch.tokens {BATCH} --optim.lr 3e-3 --schedule.warmup 4 --eval-every 8 --eval-tokens 1024
    --checkpoint-every {EVERY} --keep-checkpoints 0"""


@dataclass(frozen=True)
class Kind:
    """A training run that both versions execute."""

    flags: str
    ranks: int = 1
    stop: bool = False  # stop it with SIGTERM, then resume
    lose: bool = False  # delete the newest checkpoint before it resumes
    fork: bool = False  # fork the run "float32"


RUNS = {
    "float32": Kind("--steps 16"),
    "compiled": Kind("--steps 16 --compile"),
    "autocast": Kind("--steps 16 --precision autocast"),
    "two ranks": Kind("--steps 16", ranks=2),
    "sharded": Kind("--steps 16 --shard", ranks=2),
    "resumed": Kind("--steps 60", stop=True),
    "checkpoint lost": Kind("--steps 60", stop=True, lose=True),
    "forked": Kind("--steps 24 --optim.lr 1e-3 --seed 7", fork=True),
    "guard": Kind("--steps 64 --batch.order sequential --optim.spike 1"),
}
USUAL, OTHER = "aeinorst ", "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # characters of the text
STRANGE = (*range(40, 43), *range(47, 60))  # batches of unusual text: few, then enough to roll back


class FailedError(Exception):
    """A version failed, or uses a name that is in none of the tables above."""


@dataclass
class Side:
    """One version of the code and the folder it works in."""

    checkout: Path
    folder: Path
    flags: dict[str, str] = field(default_factory=dict)  # old name -> the name in this version

    def call(self, *arguments: object, log: Path | None = None) -> str:
        """Run Python; return its output. With `log`, the log of a run, send SIGTERM once the run
        has logged some steps."""
        env = {**os.environ, **THREADS, "PYTHONPATH": str(self.checkout)}
        env["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / "compiled")
        command, output = [sys.executable, *map(str, arguments)], self.folder / "printed.txt"
        with open(output, "w") as file:
            process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=file, stderr=file)
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            if log and log.exists() and log.read_bytes().count(b'"train"') > 2 * EVERY:
                break
            time.sleep(0.01)
        process.terminate()  # torchrun ends its ranks
        if process.wait() != (128 + signal.SIGTERM if log else 0):
            raise FailedError(f"{' '.join(command)}: {process.returncode}\n{output.read_text()}")
        return output.read_text()

    def prepare(self, text: Path) -> None:
        self.folder.mkdir()
        imported = Path(self.call("-c", "import rekindle; print(rekindle.__file__)").strip())
        if not imported.is_relative_to(self.checkout):
            raise FailedError(f"{self.checkout} is not a checkout: Python imports {imported}")
        flags = "--tokenizer bytes --val-tokens 2000 --shard-tokens 20000 --out data"
        self.call("-m", "rekindle", "prepare", "--jsonl", text, *flags.split())
        usage = self.call("-m", "rekindle", "train", "--help")
        self.flags = {old: new for old, new in FLAGS.items() if new in usage}

    def train(self, name: str) -> Path:
        """Execute the run `name` of `RUNS` from start to end; return its folder."""
        kind, out = RUNS[name], self.folder / name.replace(" ", "-")
        words = f"-m rekindle train {TINY} {kind.flags} --data data --out".split()
        if kind.ranks > 1:
            launcher = f"-m torch.distributed.run --standalone --nproc-per-node {kind.ranks}"
            words = [*launcher.split(), *words]
        command = [*(self.flags.get(word, word) for word in words), out]
        if kind.fork:
            command += ["--fork", self.folder / "float32"]
        if kind.stop:
            self.call(*command, log=out / "metrics.jsonl")
        if kind.lose:
            shutil.rmtree(max(out.glob("checkpoints/step-*")))
        self.call(*command)
        return out


def write_text(path: Path) -> None:
    """Write documents of 200 tokens for `prepare`, with unusual characters in the batches of
    `STRANGE`."""
    made = random.Random(1)
    with open(path, "w") as file:
        for start in range(0, 80 * BATCH, 200):
            characters = OTHER if start // BATCH in STRANGE else USUAL
            file.write(json.dumps({"text": "".join(made.choices(characters, k=199))}) + "\n")


def read_run(run: Path) -> dict[str, Any]:
    """Every compared value of a run, in order of time, under its newer name."""
    facts: dict[str, Any] = {"records logged": 0}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        kind = KINDS.get(str(record["kind"]), str(record["kind"]))
        record.setdefault("skipped", not record.get("accepted"))
        facts |= _chosen(record, LOGGED.get(kind, ()), f"{kind} {record['step']}")
        facts["records logged"] += kind in LOGGED
    for path in sorted(run.glob("checkpoints/step-*")):
        if (
            int(path.name.removeprefix("step-")) % EVERY == 0
        ):  # others depend on when the signal arrived
            facts |= read_checkpoint(path)
    return facts


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint and the compared numbers of its checkpoint.json."""
    tensors = {}
    for file in ("model", "optimizer"):
        for name, tensor in load_file(path / f"{file}.safetensors").items():
            new = next((TENSORS[p] + name[len(p) :] for p in TENSORS if name.startswith(p)), name)
            tensors[f"{path.name}: {file}: {new}"] = tensor
    described = json.loads((path / "checkpoint.json").read_text())
    if (counted := tensors.pop(f"{path.name}: optimizer: updates", None)) is not None:
        described["updates"] = int(counted.flatten()[0])
    return tensors | _chosen(described, DESCRIBED, path.name)


def _chosen(record: dict[str, Any], keys: tuple[str, ...], where: str) -> dict[str, Any]:
    record = {KEYS.get(key, key): value for key, value in record.items()}
    if missing := [key for key in keys if key not in record]:
        raise FailedError(f"{where} has no {missing[0]}, only {list(record)}: add it to KEYS")
    return {f"{where}: {key}": record[key] for key in keys}


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """A line for each difference, in order of time; for tensors, with the largest difference."""
    for name in before | after:
        a, b = before.get(name), after.get(name)
        if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
            if a != b:
                yield f"{name}: {a}, now {b}"
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{name}: {a.dtype} {tuple(a.shape)}, now {b.dtype} {tuple(b.shape)}"
        elif not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b))):
            yield f"{name}: by up to {(a.double() - b.double()).abs().max():.3g}"


@contextmanager
def checkout(what: str, folder: Path) -> Iterator[Path]:
    """The checkout that `what` names: a folder, or a temporary worktree of a revision in
    `folder`."""
    if Path(what).is_dir():
        yield Path(what).resolve()
        return
    git = ["git", "-C", str(Path(__file__).parent), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), what], check=True)
    try:
        yield folder.resolve()
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def compare(sides: tuple[Side, Side], names: list[str], text: Path) -> bool:
    """Print a line for each run; return whether all runs are equal."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda side: side.prepare(text), sides))
        data = [sorted((side.folder / "data").glob("*.bin")) for side in sides]
        same = [[p.read_bytes() for p in data[0]] == [p.read_bytes() for p in data[1]]]
        print(f"{'data':16} {len(data[0]):4} shards   {'equal' if same[0] else 'DIFFERENT'}")
        for name in names:
            before, after = pool.map(lambda side: read_run(side.train(name)), sides)  # noqa: B023
            if name == "guard" and not any("rollback" in fact for fact in before):
                raise FailedError("guard: the run did not roll back, so it tests nothing")
            found = list(differences(before, after))
            tensors = sum(isinstance(value, torch.Tensor) for value in before.values())
            outcome = (
                f"{len(found)} of {len(before)} differ, first {found[0]}" if found else "equal"
            )
            print(f"{name:16} {tensors:4} tensors  {outcome}", flush=True)
            same.append(not found)
    return all(same)


def main() -> int:
    parser = argparse.ArgumentParser(description="check that two versions train to the same bits")
    parser.add_argument("before", help="a checkout or a revision")
    parser.add_argument("after", help="another checkout or revision")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN")
    o = parser.parse_args()
    names = [name for name in RUNS if name in ("float32", *o.only)]  # the others may fork from it
    print(f"torch {torch.__version__}, CPU, {THREADS}", flush=True)
    with (
        tempfile.TemporaryDirectory() as temporary,
        checkout(o.before, Path(temporary, "old")) as old,
        checkout(o.after, Path(temporary, "new")) as new,
    ):
        write_text(text := Path(temporary, "text.jsonl"))
        sides = (Side(old, Path(temporary, "before")), Side(new, Path(temporary, "after")))
        try:
            return 0 if compare(sides, names, text) else 1
        except FailedError as error:
            sys.exit(f"same_bits: {error}")


if __name__ == "__main__":
    sys.exit(main())
