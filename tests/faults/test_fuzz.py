"""Whatever a file contains, reading it succeeds or fails with one clear line, and never runs code.

    REKINDLE_FUZZ=5000 python -m pytest tests/faults/test_fuzz.py -m slow

tries that many inputs of each kind. Inputs in corpus/ are tried first. A failure prints the line to
add there, and the seed that reproduces it with REKINDLE_SEED.
"""

import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle import checkpoint, loading, resume, storage
from rekindle.checkpoint import format
from rekindle.data import shards
from rekindle.data.earlier import saved_state
from rekindle.errors import UserError
from rekindle.evaluate.tasks.hellaswag import read_questions
from rekindle.interop import huggingface
from rekindle.model.gpt2 import GPT2
from rekindle.observe.report import draw_loss
from rekindle.optim.adamw import AdamW
from rekindle.optim.adamw_config import AdamWConfig

FEW, MANY = 10, int(os.environ.get("REKINDLE_FUZZ", 400))  # inputs of each kind
CORPUS = Path(__file__).parent / "corpus"
SEED = int(os.environ.get("REKINDLE_SEED", 0)) or time.time_ns() % 10**6
Mutate = Callable[[bytes, random.Random], bytes]

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = [
    None, True, False, 0, -1, 1, 2, 3, 17, 2**16, 2**31, 2**53, 2**63, 10**18, 10**40, -(10**40),
    0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "x", "..", ".", "../../x", "/etc/passwd", "a/b", "a\\b",
    "a\0b", "\ud800", "x" * 5000, "gpt2", "bytes", "F64", "C64", "F8_E4M3", "BOOL",
    [], {}, [[]], [None], [0, 0],
    [-1, 1], [2**62, 4], {"": {}}, ["../x"] * 3,
]  # fmt: skip


def damage(content: bytes, chance: random.Random) -> bytes:
    """Flip, delete, repeat, cut, or insert some bytes."""
    out = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        at = chance.randrange(len(out) + 1)
        size = min(chance.choice([1, 1, 2, 4, 16, 200]), len(out) - at)
        match chance.randrange(5):
            case 0 if size:
                out[at] ^= 1 << chance.randrange(8)
            case 1:
                del out[at : at + size]
            case 2:
                out[at:at] = out[at : at + size]
            case 3:
                del out[at:]
            case _:
                out[at : at + size] = chance.randbytes(size)
    return bytes(out)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to all parts of a JSON value, as keys and indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, inner in items:
            found += (
                places(inner, (*path, key)) if isinstance(inner, dict | list) else [(*path, key)]
            )
    return found


def hostile(chance: random.Random) -> Any:
    """A hostile value; a copy, because later edits may modify it."""
    return deepcopy(chance.choice(HOSTILE))


def edit(value: Any, chance: random.Random) -> Any:
    """A copy of a JSON value with one to three changes."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice([1, 1, 1, 3])):
        found = places(value) if isinstance(value, dict | list) else []
        if not found or chance.random() < 0.02:
            return hostile(chance)
        *outer, key = chance.choice(found)
        holder: Any = value
        for step in outer:
            holder = holder[step]
        kind = chance.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.append(deepcopy(holder[key]))
        elif kind == 1 and isinstance(holder, dict):
            holder[f"{key}x"] = deepcopy(holder[key])
        elif kind == 2:
            holder[key] = [holder[key]]
        elif kind == 3 and isinstance(holder[key], int):
            holder[key] = holder[key] * chance.choice([-1, 2, 10**6, 10**15]) + chance.choice(
                [-1, 0, 1]
            )
        else:
            holder[key] = hostile(chance)
    return value


def edit_json(content: bytes, chance: random.Random) -> bytes:
    return json.dumps(edit(json.loads(content), chance)).encode()


def edit_lines(content: bytes, chance: random.Random) -> bytes:
    """Edit or damage one line of JSON lines."""
    lines = content.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = chance.choice([edit_json, damage])(lines[at], chance)
    return b"\n".join(lines) + b"\n"


def edit_header(content: bytes, chance: random.Random) -> bytes:
    """Edit the header of a safetensors file, but not its tensors."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(edit(json.loads(content[8 : 8 + size]), chance)).encode()
    claimed = (
        len(header) if chance.random() < 0.9 else chance.choice([0, 1, 2**31, 2**63, 2**64 - 1])
    )
    return claimed.to_bytes(8, "little") + header + content[8 + size :]


def edit_shard(content: bytes, chance: random.Random) -> bytes:
    """Change a number in the header of a shard, and perhaps its length."""
    out = bytearray(content)
    number = chance.choice([0, 1, -1, 2**31 - 1, -(2**31), len(out), chance.randrange(2000)])
    at = 4 * chance.choice([0, 1, 2, 2, 2, 3])
    out[at : at + 4] = number.to_bytes(4, "little", signed=True)
    return bytes(out[: chance.choice([len(out), len(out), chance.randrange(len(out))])])


def seal(changed: Path) -> None:
    """Update the hashes of a checkpoint to its current content, as an attacker would."""
    folder = changed.parent
    file = folder / format.DESCRIPTION
    description = json.loads(file.read_bytes())
    if not isinstance(description, dict):
        return
    files = description.get("files")
    for name in checkpoint.FILES:
        entry = files.get(name) if isinstance(files, dict) else None
        if isinstance(entry, dict) and file != changed:
            entry["bytes"] = (folder / name).stat().st_size
            entry["sha256"] = storage.file_sha256(folder / name)
    description.pop("sha256", None)
    description["sha256"] = format.description_sha256(description)
    file.write_text(json.dumps(description))


# -- the corpus: changes of a file that once failed, or that should be tried every time ------------


def change(content: bytes, entry: dict[str, Any]) -> bytes:
    """Apply an entry of the corpus to the content of a file.

    `put` is a path into JSON (of one `line` of JSON lines, or of a safetensors `header`) and the
    new value; `splice` is an offset, the number of bytes to drop there (-1: all), and the bytes to
    insert, in hexadecimal.
    """
    if "splice" in entry:
        at, dropped, inserted = entry["splice"]
        rest = content[at + dropped :] if dropped >= 0 else b""
        return content[:at] + bytes.fromhex(inserted) + rest
    before, text, after = part_of_json(content, entry)
    value = put(json.loads(text), *entry["put"])
    text = json.dumps(value).encode()
    if entry.get("header"):
        before = len(text).to_bytes(8, "little")
    return before + text + after


def part_of_json(content: bytes, entry: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
    """The bytes before the JSON that an entry changes, the JSON, and the bytes after it."""
    if entry.get("header"):
        end = 8 + int.from_bytes(content[:8], "little")
        return content[:8], content[8:end], content[end:]
    if (number := entry.get("line")) is not None:
        lines = content.splitlines(keepends=True)
        text = lines[number].rstrip(b"\n")
        return b"".join(lines[:number]), text, b"\n" + b"".join(lines[number + 1 :])
    return b"", content, b""


def put(value: Any, path: list[Any], new: Any) -> Any:
    if not path:
        return new
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = new
    return value


def entry_for(before: bytes, after: bytes) -> dict[str, Any]:
    """The corpus entry that changes `before` to `after` (or to JSON with the same value)."""
    spots: list[dict[str, Any]] = [{}, {"header": True}]
    spots += [{"line": n} for n in range(before.count(b"\n"))]
    for spot in spots:
        with suppress(ValueError, IndexError, OverflowError, RecursionError):
            outer, old, rest = part_of_json(before, spot)
            now, new, still = part_of_json(after, spot)
            same = rest == still and (outer == now or spot.get("header"))
            found = {**spot, "put": [*difference(json.loads(old), json.loads(new))]}
            if same and change(before, found) == change(
                after, {**spot, "put": [[], json.loads(new)]}
            ):
                return found
    start = common(before, after)
    end = common(before[start:][::-1], after[start:][::-1])
    if len(after) == start:  # truncated
        return {"splice": [start, -1, ""]}
    return {"splice": [start, len(before) - start - end, after[start : len(after) - end].hex()]}


def common(a: bytes, b: bytes) -> int:
    """The length of the common prefix."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


def difference(old: Any, new: Any, path: tuple = ()) -> tuple[list[Any], Any]:
    """Path and new value of the smallest part of a JSON value that contains all changes."""
    if isinstance(old, dict) and isinstance(new, dict) and [*old] == [*new]:
        keys = [key for key in old if repr(old[key]) != repr(new[key])]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        keys = [n for n in range(len(old)) if repr(old[n]) != repr(new[n])]
    else:
        keys = []
    if len(keys) != 1:
        return [*path], new
    return difference(old[keys[0]], new[keys[0]], (*path, keys[0]))


def corpus(test: str, file: str) -> list[dict[str, Any]]:
    """The corpus entries of a test for one file."""
    lines = (CORPUS / f"{test.removeprefix('test_')}.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["file"] == file]


def peak_memory() -> float:
    """The peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass
class Fuzz:
    """Reads a file with many changes. Each read must succeed or raise a `UserError` of one line, in
    limited time and memory."""

    test: str
    inputs: int  # of each kind

    def __call__(
        self, file: Path, mutations: list[Mutate], read: Callable[[], Any], *,
        sealed: bool = False, share: float = 1.0,
    ) -> None:  # fmt: skip
        content = file.read_bytes()
        description = file.parent / format.DESCRIPTION
        before = description.read_bytes() if sealed else b""
        accepted = 0
        for changed, name in self._changed(file, content, mutations, share):
            file.write_bytes(changed)
            if sealed:
                seal(file)
            try:
                accepted += self._read(read)
            except BaseException as error:
                entry = {"file": file.name, "why": str(error)[:80], **entry_for(content, changed)}
                line = json.dumps(entry)
                error.add_note(f"{name}; for corpus/{self.test.removeprefix('test_')}.jsonl:")
                error.add_note(line if len(line) < 20_000 else "(the change is too long to keep)")
                raise
            if sealed:
                description.write_bytes(before)
        file.write_bytes(content)
        read()  # the original file can be read
        print(f"{file.name}: {accepted} read")

    def _changed(
        self, file: Path, content: bytes, mutations: list[Mutate], share: float
    ) -> Iterator[tuple[bytes, str]]:
        for entry in corpus(self.test, file.name):
            yield change(content, entry), str(entry)
        for n in range(round(self.inputs * share)):
            chance = random.Random(SEED + n)
            yield chance.choice(mutations)(content, chance), f"REKINDLE_SEED={SEED + n}"

    def _read(self, read: Callable[[], Any]) -> bool:
        """Whether the file was accepted."""
        began, memory, message = time.monotonic(), peak_memory(), ""
        try:
            read()
        except UserError as error:
            message = str(error)
        assert "\n" not in message, message
        assert len(message) < 1000, message
        assert time.monotonic() - began < 60, message
        assert peak_memory() < memory + 512, message
        return not message


@pytest.mark.parametrize(
    ("content", "mutations"),
    [
        (b'{"a": {"b": [1, 2], "c": "x"}, "d": 0.5}', [damage, edit_json]),
        (b'{"a": 1}\n{"b": [2]}\n{"c": {}}\n', [damage, edit_lines]),
        (b"\x10" + bytes(7) + b'{"a":{"b":[3]}} ' + bytes(range(40)), [damage, edit_header]),
    ],
)
def test_corpus_entry_reproduces_a_change(content: bytes, mutations: list[Mutate]) -> None:
    for n in range(50):
        chance = random.Random(n)
        changed = chance.choice(mutations)(content, chance)
        entry = json.loads(json.dumps(entry_for(content, changed)))
        assert same_up_to_spaces(change(content, entry), changed), (n, entry)


def same_up_to_spaces(a: bytes, b: bytes) -> bool:
    """Compares JSON lines by the text of their values, because NaN differs from itself."""
    if a == b:
        return True
    pairs = zip(a.splitlines(), b.splitlines(), strict=True)
    return all(x == y or repr(json.loads(x)) == repr(json.loads(y)) for x, y in pairs)


def test_every_corpus_entry_is_used() -> None:
    """Each corpus file belongs to a test, and each entry is complete."""
    for file in CORPUS.iterdir():
        assert f"test_{file.stem}" in globals(), file
        for entry in map(json.loads, file.read_text().splitlines()):
            assert {"put", "splice"} & {*entry}
            assert entry["file"]
            assert entry["why"]


@pytest.fixture(params=["few", pytest.param("many", marks=pytest.mark.slow)])
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    """`fuzz(file, mutations, read)`; see `Fuzz`."""
    return Fuzz(request.node.originalname, FEW if request.param == "few" else MANY)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("original") / "run"


@pytest.fixture
def trained(original: Path, train: Callable, tmp_path: Path) -> Path:
    """A run of four steps that the test may change."""
    if not original.exists():
        train(original, "--steps", 4)
    return shutil.copytree(original, tmp_path / "run")


@pytest.fixture
def data(tmp_path: Path, shard_set: Path) -> Path:
    """Shards with a manifest as version 0.1 wrote it, without a hash that any edit would break."""
    folder = shutil.copytree(shard_set, tmp_path / "data")
    manifest = storage.read_json(folder / "manifest.json")
    del manifest["sha256"]
    storage.write_json(folder / "manifest.json", manifest)
    return folder


@pytest.fixture
def again(command: Callable, rekindle: Callable, trained: Path) -> Callable[..., None]:
    """Run the command that trained the run again, which reads all files."""

    def call(*flags: Any) -> None:
        outcome = rekindle(*command(trained), "--steps", 4, *flags)
        if outcome.status:
            assert outcome.status == 2
            assert outcome.err.startswith("rekindle: error: ")
            raise UserError(outcome.err.rstrip("\n"))

    return call


# -- data ------------------------------------------------------------------------------------------


def read_data(folder: Path) -> None:
    """Read the data as a run does before its first step."""
    manifest = shards.read_manifest(folder)
    shards.verify(folder, manifest)
    for split in ("train", "val"):
        for tokens in shards.open_split(folder, manifest, split):
            tokens[:10].sum()
    manifest.summary()


def test_shards(fuzz: Fuzz, data: Path) -> None:
    def read() -> None:
        assert len(shards.open_shard(data / "train-0000.bin")) >= 0

    fuzz(data / "train-0000.bin", [edit_shard, damage], read)


def test_manifests(fuzz: Fuzz, data: Path) -> None:
    fuzz(data / "manifest.json", [damage, edit_json, edit_json], lambda: read_data(data))


def test_training_on_hostile_data(
    fuzz: Fuzz, data: Path, command: Callable, rekindle: Callable, tmp_path: Path
) -> None:
    def read() -> None:
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        outcome = rekindle(*command(tmp_path / "new"), "--steps", 1, "--data", data)
        if outcome.status:
            assert outcome.status == 2
            raise UserError(outcome.err.rstrip("\n"))

    fuzz(data / "manifest.json", [edit_json], read, share=1 / 3)


@pytest.mark.parametrize(
    "name", ["../x.bin", "..", ".", "", "/etc/passwd", "a/b.bin", ".hidden", "a\0"]
)
def test_names_cannot_leave_the_folder(data: Path, name: str) -> None:
    manifest = storage.read_json(data / "manifest.json")
    manifest["shards"][0]["name"] = name
    storage.write_json(data / "manifest.json", manifest)
    with pytest.raises(UserError, match="which is not a shard in this folder"):
        shards.read_manifest(data)


def test_names_of_an_unfinished_preparation_cannot_leave_the_folder(tmp_path: Path) -> None:
    """The named files would be removed."""
    state = {
        "source": {},
        "cursor": [0, 0],
        "shards": [],
        "pending": {"val": {"documents": 0, "pieces": ["../../x"]}},
    }
    (tmp_path / shards.UNFINISHED).mkdir()
    storage.write_json(tmp_path / shards.UNFINISHED / shards.STATE, state)
    with pytest.raises(UserError, match="names files in other folders"):
        saved_state(None, tmp_path, {})  # type: ignore[arg-type]


# -- runs ------------------------------------------------------------------------------------------


def last(run: Path) -> Path:
    return checkpoint.list_checkpoints(run / "checkpoints")[-1]


def use(folder: Path) -> None:
    """Load a checkpoint for inference and for training."""
    loading._load(str(folder)).model(torch.zeros(1, 4, dtype=torch.long))
    loaded = checkpoint.load(folder)
    model = loading._load(str(folder)).model
    loaded.restore_optimizer(AdamW(model, AdamWConfig()))  # type: ignore


@pytest.mark.parametrize("name", [format.DESCRIPTION, *checkpoint.FILES])
def test_damaged_checkpoints(fuzz: Fuzz, trained: Path, name: str) -> None:
    """Random damage, which the hashes detect: only the original file is accepted."""
    mutations = [damage, edit_json] if name == format.DESCRIPTION else [damage, edit_header]
    fuzz(last(trained) / name, mutations, lambda: use(last(trained)), share=1 / 2)


@pytest.mark.parametrize("name", [format.DESCRIPTION, *checkpoint.FILES])
def test_hostile_checkpoints(fuzz: Fuzz, trained: Path, name: str) -> None:
    """Hostile content with valid hashes."""
    mutations = [edit_json] if name == format.DESCRIPTION else [damage, edit_header, edit_header]
    fuzz(last(trained) / name, mutations, lambda: use(last(trained)), sealed=True)


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_tensors_of_another_type_are_rejected(trained: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    file = last(trained) / name
    save_file({key: tensor.double() for key, tensor in load_file(file).items()}, file)
    seal(file)
    with pytest.raises(UserError, match=r"F64, not torch\.float32"):
        use(last(trained))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"n_layer": 10**9}, "n_layer is 1000000000, but there are only"),
        ({"n_embd": 2**40}, "a model of these sizes cannot be built"),
    ],
)
def test_oversized_model_is_rejected_before_it_is_built(
    trained: Path, sizes: dict[str, int], reason: str
) -> None:
    file = last(trained) / format.DESCRIPTION
    description = json.loads(file.read_bytes())
    description["model"].update(sizes)
    file.write_text(json.dumps(description))
    seal(file)
    with pytest.raises(checkpoint.DamagedError, match=reason) as caught:
        checkpoint.load(last(trained))
    assert "\n" not in str(caught.value)


def test_resuming_from_a_hostile_checkpoint(fuzz: Fuzz, trained: Path, again: Callable) -> None:
    """A checkpoint that cannot be used is set aside; here it is the only one."""
    file, checkpoints = last(trained) / format.DESCRIPTION, trained / "checkpoints"
    backup = shutil.copytree(checkpoints, trained.parent / "backup")

    def read() -> None:
        try:
            again("--steps", 5)
        finally:
            shutil.rmtree(checkpoints)
            shutil.copytree(backup, checkpoints)

    fuzz(file, [edit_json], read, sealed=True, share=1 / 2)


def test_run_json(fuzz: Fuzz, trained: Path, again: Callable) -> None:
    fuzz(trained / "run.json", [damage, edit_json], again, share=1 / 3)
    fuzz(trained / "run.json", [damage, edit_json], lambda: resume._identity_of(trained, GPT2))


def test_metrics(fuzz: Fuzz, trained: Path, again: Callable) -> None:
    log = trained / "metrics.jsonl"
    content = log.read_bytes()

    def read() -> None:
        try:
            again()
        finally:
            log.write_bytes(content)

    fuzz(log, [damage, edit_lines], read, share=1 / 3)


def test_reports(fuzz: Fuzz, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fuzz(
        trained / "metrics.jsonl", [damage, edit_lines, edit_lines],
        lambda: draw_loss(trained, tmp_path / "loss.svg"), share=1 / 10,
    )  # fmt: skip
    fuzz(
        trained / "run.json",
        [damage, edit_json],
        lambda: draw_loss(trained, tmp_path / "loss.svg"),
        share=1 / 10,
    )


# -- files from elsewhere --------------------------------------------------------------------------

ROWS = [
    {
        "ctx": f"A man number {n}",
        "endings": ["walks.", "talks.", "flies.", "é"],
        "label": str(n % 4),
        "ind": n,
    }
    for n in range(4)
]


def test_hellaswag_lines(fuzz: Fuzz, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fuzz(file, [damage, edit_lines, edit_lines], lambda: read_questions(file), share=4)


def test_hellaswag_parquet(fuzz: Fuzz, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "questions.parquet"

    def write_rows(content: bytes, chance: random.Random) -> bytes:
        buffer = io.BytesIO()
        try:
            pq.write_table(pa.Table.from_pylist(edit(ROWS, chance)), buffer)
        except (pa.ArrowException, TypeError, AttributeError, OverflowError, ValueError, KeyError):
            return content  # not a valid table
        return buffer.getvalue()

    pq.write_table(pa.Table.from_pylist(ROWS), file)
    fuzz(file, [damage, write_rows], lambda: read_questions(file), share=2)


@pytest.mark.parametrize(
    ("name", "mutations"),
    [
        ("config.json", [damage, edit_json, edit_json]),
        ("model.safetensors", [damage, edit_header, edit_header]),
    ],
)
def test_hugging_face_folders(
    fuzz: Fuzz, tmp_path: Path, trained: Path, name: str, mutations: list[Mutate]
) -> None:
    from safetensors.torch import save_file

    loaded = checkpoint.load(last(trained))
    c = loaded.config
    config = {
        "model_type": "gpt2", "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,  # type: ignore
        "n_positions": c.block_size, "vocab_size": c.padded_vocab_size, "n_inner": None,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    }  # fmt: skip
    folder = tmp_path / "folder"
    folder.mkdir()
    storage.write_json(folder / "config.json", config)
    transposed = (
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    )
    weights = {
        n: t.t().contiguous() if n.endswith(transposed) else t for n, t in loaded.model.items()
    }
    save_file(weights, folder / "model.safetensors")
    fuzz(
        folder / name, mutations,
        lambda: huggingface.from_pretrained(folder)(torch.zeros(1, 4, dtype=torch.long)),
        share=2,
    )  # fmt: skip


# -- code ------------------------------------------------------------------------------------------


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_loading_a_file_never_runs_code(
    tmp_path: Path, trained: Path, data: Path, again: Callable
) -> None:
    """If any file is replaced by a pickle, it is rejected and not run."""
    mark = tmp_path / "it ran"
    pickled = pickle.dumps(Harmful(mark))
    pickle.loads(pickled)
    assert mark.exists()
    mark.unlink()
    with_torch = io.BytesIO()
    torch.save({"model": Harmful(mark)}, with_torch)
    files = [p for folder in (trained, data) for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 8
    for file in files:
        for content in (pickled, with_torch.getvalue()):
            before = file.read_bytes()
            file.write_bytes(content)
            if file.parent == last(trained) and file.name != format.DESCRIPTION:
                seal(file)
            for read in (
                lambda: use(last(trained)),
                lambda: read_data(data),
                lambda: again("--data", data),
            ):
                with suppress(UserError):
                    read()
            assert not mark.exists(), file
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(before)


def test_no_module_unpickles_or_evaluates() -> None:
    """The package does not use `torch.load`, `numpy.load` of objects, `eval` or the like."""
    forbidden = re.compile(
        r"\b(import|from) (pickle|marshal|yaml)\b|(torch|np)\.load\b|allow_pickle"
        r"|(?<![\w.])(eval|exec)\("
    )
    for file in Path(storage.__file__).parents[1].rglob("*.py"):
        for line in file.read_text().splitlines():
            assert not forbidden.search(line.split("#")[0]), file
