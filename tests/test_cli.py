"""The command line: fast help, and one line for each mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rekindle import cli, recipes, storage
from rekindle.data.shards import read_manifest, write_shard

Refuses = Callable[..., str]

HELP = """
import sys
from rekindle.cli import main
commands = "demo prepare train eval sample verify check ladder report"
for command in ["", *commands.split()]:
    try:
        main([*command.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0
heavy = {"torch", "numpy", "tiktoken", "pyarrow", "transformers", "huggingface_hub"}
print("LOADED", sorted(heavy & set(sys.modules)))
"""

IMPORTS = """
import os, pkgutil, sys, threading, importlib
import torch
before = torch.get_num_threads(), torch.get_float32_matmul_precision(), dict(os.environ)
random = torch.random.get_rng_state()
import rekindle
names = [m.name for m in pkgutil.walk_packages(rekindle.__path__, "rekindle.")]
for name in names:
    if name != "rekindle.__main__":
        importlib.import_module(name)
assert len(names) > 25, names
after = torch.get_num_threads(), torch.get_float32_matmul_precision(), dict(os.environ)
assert after == before
assert torch.equal(torch.random.get_rng_state(), random)
assert not torch.are_deterministic_algorithms_enabled()
assert not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
assert threading.active_count() == 1, threading.enumerate()
assert not {"matplotlib", "transformers"} & set(sys.modules)
"""


@pytest.fixture
def data(shard_set: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test can damage."""
    return Path(shutil.copytree(shard_set, tmp_path / "data"))


@pytest.fixture
def begin(data: Path, tiny_flags: list[str], tmp_path: Path) -> list[str]:
    """Arguments that train on `data` into a new folder."""
    out = ["--out", str(tmp_path / "run"), "--device", "cpu", "--no-compile"]
    return ["train", "demo", "--data", str(data), *out, *tiny_flags]


@pytest.fixture
def run(begin: list[str], tmp_path: Path, rekindle: Callable, one_thread: None) -> Path:
    """A run of four steps on `data`."""
    assert rekindle(*begin, "--steps", 4).status == 0
    return tmp_path / "run"


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_wait_briefly_unless_the_user_chose_otherwise(
    python: Callable, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code = (
        "import os, sys\nfrom rekindle.cli import main\nassert main([]) == 2\n"
        "assert 'torch' not in sys.modules\nprint(os.environ.get('GOMP_SPINCOUNT'))"
    )
    assert python("-c", code).stdout == f"{expected}\n"


def test_help_imports_nothing_heavy(python: Callable, tmp_path: Path) -> None:
    done = python("-c", HELP, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("LOADED []\n")
    assert done.stdout.count("usage: rekindle") == 10
    assert list(tmp_path.iterdir()) == []


def test_train_help_lists_recipes_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for name in [*recipes.RECIPES, "--micro-batch", "--device", "--precision", "--no-compile"]:
        assert name in text


def test_run_without_run_json_resumes_from_an_undamaged_checkpoint(
    begin: list[str], tmp_path: Path, rekindle: Callable
) -> None:
    """The newest checkpoint is damaged, and run.json is missing."""
    run = tmp_path / "run"
    assert rekindle(*begin, "--steps", 4, "--checkpoint-every", 1).status == 0
    (run / "run.json").unlink()
    newest = max((run / "checkpoints").iterdir())
    (newest / "model.safetensors").write_bytes(b"")
    outcome = rekindle(*begin, "--steps", 4, "--checkpoint-every", 1)
    assert outcome.status == 0, outcome.err
    assert f"moved to {newest.with_name(f'damaged-{newest.name}')}" in outcome.out
    assert (run / "run.json").is_file()


def test_folder_name_that_is_not_utf8_works(
    tmp_path: Path, data: Path, begin: list[str], rekindle: Callable
) -> None:
    strange = tmp_path / os.fsdecode(b"W\xe9") / "data"
    shutil.copytree(data, strange)
    for steps in (2, 4):
        outcome = rekindle(*begin, "--data", strange, "--steps", steps)
        assert outcome.status == 0, outcome.err
    assert storage.read_json(tmp_path / "run" / "run.json")["data"]["path"].endswith("/W\\xe9/data")


def test_prompt_that_is_not_utf8_is_an_error(run: Path, rekindle: Callable) -> None:
    outcome = rekindle("sample", run, "--prompt", os.fsdecode(b"a\xff"), "--device", "cpu")
    assert outcome.status == 2
    assert outcome.err.startswith(
        "rekindle: error: --prompt is not UTF-8 (its character 2 is a stray"
    )


@pytest.mark.parametrize("reader", ["closed", "full", "ascii"])
def test_training_continues_when_its_output_cannot_be_written(
    tmp_path: Path, begin: list[str], reader: str
) -> None:
    """stdout is a closed pipe, a file on a full disk, or cannot encode the text."""
    if reader == "full" and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    out = (
        subprocess.PIPE
        if reader == "closed"
        else open(  # noqa: SIM115
            "/dev/full" if reader == "full" else tmp_path / "log", "w"
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "rekindle", *map(str, begin), "--prompt", "é"],
        stdout=out, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    if process.stdout:
        process.stdout.close()
    assert process.stderr
    err = process.stderr.read().decode()
    assert (process.wait(), err) == (0, "")
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("home", ["/dev/null", "", "/nowhere"])
def test_without_a_home_folder_compiled_code_is_cached_in_the_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str
) -> None:
    from rekindle import cli

    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: str(path).startswith(str(tmp_path)))
    for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    cli._keep_compiled()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == tmp_path


def test_disk_error_is_one_line(tmp_path: Path, run: Path, rekindle: Callable) -> None:
    outcome = rekindle("report", run, "--picture", tmp_path / "no folder" / "x.png")
    assert outcome.status == 2
    assert outcome.err == (
        f"rekindle: error: {tmp_path}/no folder/x.png: No such file or directory: fix that and "
        "run the same command again\n"
    )


def test_importing_has_no_side_effects(python: Callable, tmp_path: Path) -> None:
    """Spawned processes import every module again, so imports must not start anything."""
    done = python("-c", IMPORTS, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_flags_reach_the_recipe(run: Path) -> None:
    recipe = storage.read_json(run / "run.json")["recipe"]
    assert recipe["optim.lr"] == 0.01
    assert recipe["model.n_embd"] == 16
    assert recipe["steps"] == 4
    assert recipe["model.vocab_size"] == 257  # the shards'


# -- data -----------------------------------------------------------------------------------------


def test_missing_data_folder(begin: list[str], data: Path, refuses: Refuses) -> None:
    shutil.rmtree(data)
    refuses(begin, f"there is no data folder {data}", "rekindle prepare")


def test_data_folder_without_manifest(begin: list[str], data: Path, refuses: Refuses) -> None:
    (data / "manifest.json").unlink()
    refuses(begin, f"{data} has no manifest.json")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "shards": [{"a": 1}]}'])
def test_damaged_manifest(begin: list[str], data: Path, refuses: Refuses, content: str) -> None:
    (data / "manifest.json").write_text(content)
    refuses(begin, "manifest.json")


def spoil_header(shard: Path) -> None:
    shard.write_bytes(b"\0\0\0\0" + shard.read_bytes()[4:])


def spoil_version(shard: Path) -> None:
    content = shard.read_bytes()
    shard.write_bytes(content[:4] + b"\7" + content[5:])


def cut_short(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-10])


def cut_header(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:100])


def lengthen(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + b"\0\0")


def flip_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1  # a token's lower byte
    shard.write_bytes(content)


def foreign_id(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[1024:1026] = np.uint16(257).tobytes()
    shard.write_bytes(content)


def shorter_shard(shard: Path) -> None:
    write_shard(shard, [np.zeros(50, np.uint16)])


@pytest.mark.parametrize("name", ["train-0001.bin", "val-0000.bin"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_header, "does not start with the header of a token shard"),
        (spoil_version, "does not start with the header of a token shard"),
        (cut_header, "does not start with the header of a token shard"),
        (cut_short, "damaged or truncated"),
        (lengthen, "damaged or truncated"),
        (flip_bit, "its SHA-256 differs"),
        (foreign_id, "contains the id 257, outside the vocabulary of 257 (first at token 0)"),
        (shorter_shard, "has 50 tokens, but its manifest says"),
        (Path.unlink, "is missing"),
    ],
)
def test_damaged_shard(
    begin: list[str], data: Path, refuses: Refuses, name: str,
    spoil: Callable[[Path], None], words: str,
) -> None:  # fmt: skip
    spoil(data / name)
    refuses(begin, str(data / name), words)


def test_fewer_tokens_than_one_step(begin: list[str], refuses: Refuses) -> None:
    words = "one step needs 1,600 tokens, but the training split has 1,200 in whole windows of 16"
    refuses([*begin, "--batch.tokens", 1600], words)


# -- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-1, "nan"])
def test_invalid_timeout(begin: list[str], refuses: Refuses, seconds: object) -> None:
    refuses([*begin, "--timeout", seconds], "--timeout must be at least 0")


def test_unknown_recipe(begin: list[str], refuses: Refuses) -> None:
    refuses([begin[0], "gpt2-124", *begin[2:]], "no recipe 'gpt2-124'", "gpt2-124m")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch.tokens", 130], "not a whole number of windows of --batch.length 16"),
        (["--micro-batch", 3], "8 rows does not divide into micro-batches of 3 rows on 1 ranks"),
        (["--batch.length", 64], "--batch.length 64 is longer than --model.block-size 32"),
        (["--model.n-head", 3], "--model.n-embd 16 is not a multiple of --model.n-head 3"),
        (["--optim.lr", "nan"], "--optim.lr must be at least 0"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or mps, not 'tpu'"),
        (["--precision", "fp8"], "not 'fp8'"),
        (["--precision", "tf32"], "--precision tf32 needs an NVIDIA GPU"),
        (["--hellaswag", "nowhere.jsonl"], "HellaSwag file not found: nowhere.jsonl"),
        (["--fork", "nowhere"], "there is no nowhere"),
        (["--seed", 2**63], "--seed must be below 2^63"),
    ],
)
def test_invalid_flags(begin: list[str], refuses: Refuses, flags: list[Any], words: str) -> None:
    refuses([*begin, *flags], words)


def test_error_under_torchrun_names_the_rank(
    begin: list[str], rekindle: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    outcome = rekindle(begin[0], "gtp2", *begin[2:])
    assert outcome.status == 2
    assert re.fullmatch(r"rekindle: error \(rank 1\): there is no recipe 'gtp2'.*\n", outcome.err)


# -- folders --------------------------------------------------------------------------------------


def test_out_that_is_not_a_run_folder(begin: list[str], tmp_path: Path, refuses: Refuses) -> None:
    out = tmp_path / "run"
    out.write_text("a file")
    refuses(begin, f"{out} exists but is not a run folder")
    beneath = [str(out / "below") if a == str(out) else a for a in begin]
    refuses(beneath, str(out))
    out.unlink()
    out.mkdir()
    (out / "thesis.txt").write_text("not ours")
    refuses(begin, f"{out} exists but is not a run folder")


def test_out_may_be_an_empty_folder(begin: list[str], tmp_path: Path, rekindle: Callable) -> None:
    (tmp_path / "run").mkdir()
    assert rekindle(*begin, "--steps", 0).status == 0


def test_resuming_with_a_different_recipe(begin: list[str], run: Path, refuses: Refuses) -> None:
    line = refuses([*begin, "--optim.lr", 0.5, "--seed", 3, "--batch.order", "sequential"])
    for words in (
        "was started with a different recipe",
        "--optim.lr was 0.01, now 0.5",
        "--seed was 1337, now 3",
        "--batch.order was shuffled, now sequential",
        "--fork",
    ):
        assert words in line
    refuses([begin[0], "gpt2-10m", *begin[2:]], "--name was demo, now gpt2-10m")


def test_run_from_before_the_lecture_order_resumes(
    data: Path, tmp_path: Path, tiny_flags: list[str], rekindle: Callable, refuses: Refuses,
    records: Callable, one_thread: None,
) -> None:  # fmt: skip
    """Back then `gpt2-124m` was sequential and recorded no micro-batch size."""
    at = tiny_flags.index("--batch.order")
    flags = [*tiny_flags[:at], *tiny_flags[at + 2 :], "--device", "cpu", "--no-compile"]

    def begin(name: str) -> list[str]:
        return ["train", "gpt2-124m", "--data", str(data), "--out", str(tmp_path / name), *flags]

    sequential = ["--batch.order", "sequential"]
    assert rekindle(*begin("whole"), *sequential).status == 0
    assert rekindle(*begin("old"), *sequential, "--steps", 4).status == 0
    refuses(begin("old"), "--batch.order was sequential, now lecture")
    path = tmp_path / "old" / "run.json"
    record = storage.read_json(path)
    del record["recipe"]["batch.lecture_micro_tokens"]
    storage.write_json(path, record)
    outcome = rekindle(*begin("old"), *sequential)
    assert outcome.status == 0, outcome.err
    kinds = ("train", "validation")
    assert records(tmp_path / "old", *kinds) == records(tmp_path / "whole", *kinds)


def test_run_in_lecture_order_resumes(
    begin: list[str], tmp_path: Path, rekindle: Callable, refuses: Refuses, records: Callable,
    one_thread: None,
) -> None:  # fmt: skip
    refuses([*begin, "--batch.order", "lecture"], "0 in whole micro-batches of 65536")
    lecture = ["--batch.order", "lecture", "--batch.lecture-micro-tokens", 64]
    whole = [*begin, "--out", tmp_path / "whole"]
    assert rekindle(*whole, *lecture, "--micro-batch", 4).status == 0
    assert rekindle(*begin, *lecture, "--micro-batch", 4, "--steps", 4).status == 0
    refuses([*begin, *lecture[:3], 32], "--batch.lecture-micro-tokens was 64, now 32")
    assert rekindle(*begin, *lecture).status == 0
    kinds = ("train", "validation")
    assert records(tmp_path / "run", *kinds) == records(tmp_path / "whole", *kinds)


def test_resuming_with_different_data(
    begin: list[str], run: Path, data: Path, refuses: Refuses, write_shards: Callable
) -> None:
    other = data.with_name("other")
    write_shards(other, [700, 520], [201, 101], seed=5)
    arguments = [str(other) if a == str(data) else a for a in begin]
    refuses(
        arguments, "was started on different data", str(data), read_manifest(other).fingerprint[:12]
    )


def test_data_folder_can_be_moved(
    begin: list[str], run: Path, data: Path, rekindle: Callable
) -> None:
    moved = data.rename(data.with_name("moved"))
    arguments = [str(moved) if a == str(data) else a for a in begin]
    assert rekindle(*arguments, "--steps", 4).status == 0


def fork(begin: list[str], run: Path) -> list[Any]:
    return [str(run.with_name("fork")) if a == str(run) else a for a in begin] + ["--fork", run]


def test_fork_with_a_different_model(begin: list[str], run: Path, refuses: Refuses) -> None:
    arguments = [*fork(begin, run), "--model.n-layer", 3, "--model.n-embd", 32]
    refuses(arguments, "holds a different model (n_layer is 2, not 3; n_embd is 16, not 32)")


def test_fork_with_a_different_tokenizer(
    begin: list[str], run: Path, data: Path, refuses: Refuses, write_shards: Callable
) -> None:
    other = data.with_name("other")
    write_shards(other, [700], [201], tokenizer_sha256="0" * 64)
    arguments = [str(other) if a == str(data) else a for a in fork(begin, run)]
    refuses(arguments, "was trained with the tokenizer bytes", "the data was prepared with bytes")
    write_shards(other, [700], [201], tokenizer="gpt2", vocab_size=50257)
    refuses(arguments, "holds a different model (vocab_size is 257, not 50257")


def test_fork_of_a_folder_that_is_not_a_run(begin: list[str], data: Path, refuses: Refuses) -> None:
    refuses([*begin, "--fork", data], f"{data} is not a run or a checkpoint")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("spoil", [Path.unlink, cut_short])
def test_damaged_only_checkpoint_is_an_error(
    begin: list[str], run: Path, refuses: Refuses, name: str, spoil: Callable[[Path], None]
) -> None:
    """It is the only one, so the run cannot resume."""
    saved = run / "checkpoints" / "step-000004"
    spoil(saved / name)
    refuses(begin, "all checkpoints in", str(saved), name, "restore one from a copy")
    for command in ("sample", "eval"):
        refuses([command, run], str(saved), name, "another checkpoint")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("spoil", [Path.unlink, cut_short, flip_bit])
def test_damaged_checkpoint_is_set_aside_and_the_previous_one_is_used(
    begin: list[str], run: Path, rekindle: Callable, name: str, spoil: Callable[[Path], None]
) -> None:
    whole = (run / "checkpoints" / "step-000004" / "model.safetensors").read_bytes()
    assert rekindle(*begin, "--steps", 8).status == 0
    saved = run / "checkpoints" / "step-000008"
    before = (saved / "model.safetensors").read_bytes()
    spoil(saved / name)
    outcome = rekindle(*begin, "--steps", 8)
    assert outcome.status == 0, outcome.err
    aside = saved.with_name("damaged-step-000008")
    assert f"moved to {aside}" in outcome.out
    assert str(saved / name) in outcome.out
    assert "resumes at step 4 of 8" in outcome.out
    assert aside.is_dir()
    assert (saved.with_name("step-000004") / "model.safetensors").read_bytes() == whole
    assert (saved / "model.safetensors").read_bytes() == before


# -- eval and sample ------------------------------------------------------------------------------


def test_eval_of_a_run(run: Path, rekindle: Callable, data: Path) -> None:
    outcome = rekindle("eval", run, "--device", "cpu", "--json")
    assert outcome.status == 0
    results = json.loads(outcome.out)
    logged = storage.read_json_lines(run / "metrics.jsonl")
    last = [r for r in logged if r["kind"] == "validation"][-1]
    assert results["validation"]["tokens"] == last["tokens"] == 300
    assert results["validation"]["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert results["validation"]["data"] == str(data)
    fewer = rekindle("eval", run, "--device", "cpu", "--tokens", 100)
    assert "over 100 tokens" in fewer.out


def test_eval_with_shards_of_another_tokenizer(
    run: Path, data: Path, refuses: Refuses, write_shards: Callable
) -> None:
    other = data.with_name("other")
    write_shards(other, [700], [201], tokenizer="gpt2", tokenizer_sha256="1" * 64)
    arguments = ["eval", run, "--data", other, "--device", "cpu"]
    refuses(arguments, f"{other} was prepared with the tokenizer gpt2", "uses bytes")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "nowhere"], "there is no data folder nowhere"),
        (["--hellaswag", "nowhere.jsonl"], "HellaSwag file not found: nowhere.jsonl"),
        (["--tokens", -5], "--tokens"),
        (["--limit", 0, "--hellaswag", "nowhere.jsonl"], "--limit"),
        (["--device", "tpu"], "not 'tpu'"),
    ],
)
def test_invalid_flags_of_eval(run: Path, refuses: Refuses, flags: list[Any], words: str) -> None:
    refuses(["eval", run, "--device", "cpu", *flags], words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "x" * 40], "the prompt of 40 tokens and 32 more do not fit"),
        (["--prompt", "x", "--tokens", 32], "do not fit"),
        (["--tokens", -1], "--tokens"),
        (["--num", 0], "--num"),
        (["--temperature", -1], "--temperature"),
        (["--top-k", -1], "--top-k"),
    ],
)  # fmt: skip
def test_invalid_flags_of_sample(run: Path, refuses: Refuses, flags: list[Any], words: str) -> None:
    refuses(["sample", run, "--device", "cpu", *flags], words)


def test_sample_of_something_that_is_not_a_model(tmp_path: Path, refuses: Refuses) -> None:
    refuses(["sample", tmp_path], "is not a run or a checkpoint")
    refuses(
        ["sample", "gpt-2"], "gpt-2 is neither a folder nor one of the models", "did you mean gpt2"
    )


def test_sample_with_compile_where_it_is_not_possible(
    run: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rekindle.runtime.device.why_not_compile", lambda device: "no compiler")
    refuses(["sample", run, "--device", "cpu", "--compile"], "--compile", "no compiler")


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_sample_in_every_precision(run: Path, rekindle: Callable, precision: str) -> None:
    flags = ["--device", "cpu", "--prompt", "ab", "--tokens", 9, "--precision", precision, "--json"]
    outcome = rekindle("sample", run, *flags)
    assert outcome.status == 0, outcome.err
    assert len(json.loads(outcome.out)["samples"]) == 4


def test_sample_is_reproducible(run: Path, rekindle: Callable) -> None:
    flags = ["--device", "cpu", "--prompt", "ab", "--tokens", 5, "--num", 2, "--json"]
    outcome = rekindle("sample", run, *flags)
    assert outcome.status == 0
    result = json.loads(outcome.out)
    assert len(result["samples"]) == 2
    assert all(text.startswith("ab") for text in result["samples"])
    assert rekindle("sample", run, *flags).out == outcome.out


def test_every_flag_of_sample_has_its_effect(run: Path, rekindle: Callable) -> None:
    """Every value differs from its default. The expected text is sampled here without a cache: from
    the five most likely tokens, at a temperature."""
    import torch

    from rekindle.loading import load
    from rekindle.runtime.device import get_device

    numbers = {"--tokens": 7, "--num": 3, "--seed": 5, "--temperature": 0.1, "--top-k": 5}
    flags = ["--precision", "fp32", *(text for pair in numbers.items() for text in pair)]
    outcome = rekindle("sample", run, "--device", "cpu", "--prompt", "ab", "--json", *flags)
    assert outcome.status == 0, outcome.err
    loaded = load(str(run), get_device("cpu", "fp32"))
    ids = torch.tensor([[97, 98]] * 3)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _ in range(7):
            logits, _ = loaded.model(ids)
            values, likeliest = logits[:, -1].topk(5)  # type: ignore
            p = (values / 0.1).softmax(-1)
            drawn = (p / torch.empty_like(p).exponential_(generator=random)).argmax(-1)
            ids = torch.cat([ids, likeliest.gather(1, drawn[:, None])], 1)
    rows = [row[: row.index(256)] if 256 in row else row for row in ids.tolist()]
    samples = json.loads(outcome.out)["samples"]
    assert samples == [loaded.tokenizer.decode(row) for row in rows]
    assert len(set(samples)) == 3
    least = ["--tokens", 0, "--num", 1, "--temperature", 0, "--top-k", 0]
    outcome = rekindle("sample", run, "--device", "cpu", "--prompt", "ab", "--json", *least)
    assert json.loads(outcome.out)["samples"] == ["ab"]


def test_control_c_before_the_first_step_prints_one_line(
    begin: list[str], rekindle: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rekindle import lookup as module

    def interrupt(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # another thread may receive the signal first
            time.sleep(0.01)

    monkeypatch.setattr(module, "model_for", interrupt)
    # A process that a shell starts in the background ignores Control-C, and so would this test.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        outcome = rekindle(*begin)
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.status == 130
    assert outcome.err == "\nrekindle: interrupted; run the same command again to continue\n"
