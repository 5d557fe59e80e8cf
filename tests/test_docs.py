"""The documentation matches the code: file formats, quoted messages and links."""

import ast
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import rekindle.trainer
from rekindle import storage
from rekindle.data.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]
FORMATS = (ROOT / "docs" / "formats.md").read_text()
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
# Keys whose value is documented as a unit: its own keys depend on the recipe.
UNITS = ("recipe", "model")
# Beginnings of what our messages quote: texts of the system and of torch, lists of settings.
QUOTED = (
    "No space left on device", " (tried to allocate", "CUDA error: ", "--optim.lr was ",
    "micro-batch 16 instead of ",
)  # fmt: skip
PAGES = [
    *ROOT.glob("*.md"),
    *(p for d in ("docs", "benchmarks", "tests") for p in ROOT.glob(f"{d}/*.md")),
]


def documented(heading: str) -> set[str]:
    """The keys in the table under this heading of docs/formats.md."""
    section = re.split(r"^#+ ", FORMATS.split(f"# {heading}\n")[1], maxsplit=1, flags=re.M)[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.M))


def keys(value: Any, path: str = "") -> set[str]:
    """The keys of a JSON value as the page writes them: `a.b`, `a[].b`, `files.NAME.b`."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(keys(item, f"{path}[]") for item in value))
    if not isinstance(value, dict) or path in UNITS:
        return {path}
    if path == "files":
        value = {"NAME": {key: 0 for file in value.values() for key in file}}
    return set().union(*(keys(v, f"{path}.{k}" if path else k) for k, v in value.items()))


@pytest.fixture
def run(train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with HellaSwag that rolls back once, because the loss of ten steps is NaN."""
    questions = tmp_path / "questions.jsonl"
    row = {"ctx": "a b", "endings": ["c", "d", "e f", "g"], "label": 1}
    questions.write_text(json.dumps(row) + "\n")
    out = tmp_path / "run"
    train(out, "--steps", 4, "--hellaswag", questions)
    train_step, calls = rekindle.trainer.train_step, 0

    def step(forward: Callable, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1

        def broken(x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
            logits, loss = forward(x, y)
            return logits, loss * math.nan

        return train_step(broken if calls <= 10 else forward, *arguments, **options)

    monkeypatch.setattr(rekindle.trainer, "train_step", step)
    train(out, "--steps", 16, "--hellaswag", questions)
    return out


def test_every_key_of_a_run_folder_is_documented(run: Path) -> None:
    found: dict[str, set[str]] = {}
    for record in storage.read_json_lines(run / "metrics.jsonl"):
        found.setdefault(record["kind"], set()).update(record)
    assert set(found) == {
        "train", "validation", "hellaswag", "samples", "checkpoint", "rollback"
    }  # fmt: skip
    for kind, logged in found.items():
        assert documented(kind) == logged, kind
    assert documented("run.json") == keys(storage.read_json(run / "run.json"))
    checkpoint = run / "checkpoints" / "step-000016"
    assert documented("checkpoint.json") == keys(storage.read_json(checkpoint / "checkpoint.json"))
    for path in (run / "run.json", run / "metrics.jsonl", *checkpoint.iterdir()):
        assert path.name in FORMATS


def test_every_key_of_a_manifest_and_the_layout_of_shards_are_documented(
    rekindle: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50)))
    out = tmp_path / "data" / "fineweb-edu"
    flags = ["--tokenizer", "bytes", "--val-tokens", 100, "--out", out]
    assert rekindle("prepare", "--jsonl", text, *flags).status == 0
    manifest = storage.read_json(out / "manifest.json")
    assert documented("manifest.json") == keys(manifest)
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"```python\n(import numpy.*?)```", FORMATS, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    [train] = [shard for shard in manifest["shards"] if shard["split"] == "train"]
    assert len(names["tokens"]) == train["tokens"]
    assert (names["tokens"] == ByteTokenizer.end_of_text).sum() == train["documents"]
    header = np.fromfile(out / train["name"], "<i4", 256)
    rows = re.findall(r"^\| (?:first|second) number \| (\d+)", FORMATS, re.M)
    assert header[:3].tolist() == [*map(int, rows), train["tokens"]]
    assert not header[3:].any()


def templates() -> Iterator[re.Pattern[str]]:
    """A pattern for every text in the package; each value that is filled in is a group."""
    for path in (ROOT / "rekindle").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Constant | ast.JoinedStr):
                continue
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            fixed = [p.value if isinstance(p, ast.Constant) else None for p in parts]
            words = "".join(text for text in fixed if isinstance(text, str)).split()
            if sum(map(len, words)) < 10:  # too few: it would match any message
                continue
            for group in ("(.+)", "(.+?)"):
                pattern = "".join(
                    re.escape(text) if isinstance(text, str) else group for text in fixed
                )
                yield re.compile(pattern.removeprefix(rf"rekindle:\ error\ \(rank\ {group}"))


def is_known(message: str, known: list[re.Pattern[str]]) -> bool:
    """Whether a text of the package makes this message, and others what is filled into it."""
    for pattern in known:
        match = pattern.fullmatch(message) or pattern.fullmatch(f"{message}\n")
        if match and all(
            len(inner.split()) < 5 or inner.startswith(QUOTED) or is_known(inner, known)
            for inner in match.groups()
        ):
            return True
    return False


def test_quoted_messages_are_those_of_the_code() -> None:
    known = list(templates())
    blocks = re.findall(r"```text\n(.*?)```", TROUBLESHOOTING, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 30
    assert not is_known("this message is in no module of the package", known)
    unknown = []
    for line in lines:
        message = re.sub(r"^(?:SKIPPED|rekindle: error(?: \(rank \d+\))?): ", "", line)
        waited = message.replace("waited", "): waited", 1)  # printed with its own prefix
        if not (is_known(message, known) or is_known(waited, known)):
            unknown.append(line)
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []
