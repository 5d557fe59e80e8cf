"""Invalid numbers are user errors that name the number; nan at any token is an error."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rekindle.errors import UserError
from rekindle.model.cache import KVCache
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.sampling import generate

CONFIG = GPT2Config(
    n_layer=2, n_head=2, n_embd=16, block_size=64, vocab_size=257, padded_vocab_size=384
)
PROMPT = [72, 101, 108]


@pytest.fixture
def model() -> GPT2:
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"top_k": 0}, {"temperature": 0.0}])
@pytest.mark.parametrize("token", [2, 3, 9])
def test_nan_at_any_token_is_an_error(model: GPT2, token: int, how: dict[str, Any]) -> None:
    """Only the position that predicts this token has a nan weight."""
    with torch.no_grad():
        model.transformer.wpe.weight[len(PROMPT) + token - 2, 5] = math.nan
    assert generate(model, PROMPT, token - 1, num=2, **how).shape == (2, 2 + token)
    words = rf"token {token} .*transformer\.wpe\.weight is nan at \[{len(PROMPT) + token - 2}, 5\]"
    with pytest.raises(UserError, match=words):
        generate(model, PROMPT, 12, num=2, **how)


def test_nan_in_one_of_many_texts_is_an_error(model: GPT2) -> None:
    """Only a text that contains the id with nan weights is affected."""
    torch.manual_seed(1)
    drawn = generate(model, PROMPT, 8, num=16, top_k=0)[:, len(PROMPT) : -1]
    ids, counts = drawn.unique(return_counts=True)
    rare = int(ids[counts == 1][0])
    with torch.no_grad():
        embedding = model.lm_head.weight.clone()  # untied: nan in the head would affect all texts
        embedding[rare] = math.nan
        model.transformer.wte.weight = torch.nn.Parameter(embedding)
    with pytest.raises(UserError, match="its weights are broken"):
        generate(model, PROMPT, 8, num=16, top_k=0)


def test_overflow_is_not_blamed_on_finite_weights(model: GPT2) -> None:
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(3e38)
    with pytest.raises(UserError, match="every weight is finite") as caught:
        generate(model, PROMPT, 3)
    assert "broken" not in str(caught.value)


@pytest.mark.parametrize("temperature", [math.nan, math.inf, 1e-40, 1e-45, 1e-320, 1e39, 1e300])
@pytest.mark.parametrize("top_k", [0, 5])
def test_temperature_without_a_valid_distribution_is_rejected(
    model: GPT2, temperature: float, top_k: int
) -> None:
    with pytest.raises(UserError, match="--temperature") as caught:
        generate(model, PROMPT, 3, temperature=temperature, top_k=top_k)
    assert str(temperature) in str(caught.value)
    assert "broken" not in str(caught.value)


def test_failed_cpu_allocation_is_a_user_error(
    model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other errors are not mistaken for it."""
    for text, kind in (("DefaultCPUAllocator: can't allocate memory", UserError),
                       ("shapes do not match", RuntimeError)):  # fmt: skip

        def body(*arguments: Any, text: str = text) -> Tensor:
            raise RuntimeError(text)

        monkeypatch.setattr(model, "body", body)
        with pytest.raises(kind, match=text):
            generate(model, PROMPT, 3)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 0.7, 30.0, 1e6])
def test_extreme_but_valid_temperatures(model: GPT2, temperature: float) -> None:
    assert generate(model, PROMPT, 5, temperature=temperature).max() < CONFIG.vocab_size
    if temperature < 1e-2:
        greedy = generate(model, PROMPT, 5, temperature=0)
        assert torch.equal(generate(model, PROMPT, 5, temperature=temperature), greedy)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"num": 0}, "--num must be a whole number of at least 1, but is 0"),
        ({"num": 1.5}, "--num must be a whole number of at least 1, but is 1.5"),
        ({"tokens": -1}, "--tokens must be a whole number of at least 0, but is -1"),
        ({"temperature": -0.5}, "--temperature must be a number of at least 0, but is -0.5"),
        ({"top_k": -2}, "--top-k must be a whole number of at least 0, but is -2"),
        ({"top_k": 2.5}, "--top-k must be a whole number of at least 0, but is 2.5"),
        ({"seed": -1}, "--seed must be a whole number from 0 to 2^63 - 1, but is -1"),
        ({"seed": 10**22}, "--seed must be a whole number from 0 to 2^63 - 1, but is 100000"),
        ({"seed": 2**63}, "--seed must be a whole number from 0 to 2^63 - 1, but is 922337"),
    ],
    ids=str,
)
def test_error_names_only_the_invalid_number(model: GPT2, odd: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        generate(model, PROMPT, **{"tokens": 3, **odd})
    assert str(caught.value).startswith(words)
    assert sum(flag in str(caught.value) for flag in ("--num", "--tokens", "--temp", "--top")) <= 1


def test_largest_numbers_are_accepted(model: GPT2) -> None:
    assert generate(model, PROMPT, 2, seed=2**63 - 1, top_k=10**30).shape == (1, 5)


@pytest.mark.parametrize(
    ("num", "tokens"), [(100_000_000, 3), (10**12, 0), (10**30, 60), (40_000_000, 61)]
)
def test_texts_too_large_for_memory_are_rejected(model: GPT2, num: int, tokens: int) -> None:
    with pytest.raises(UserError, match=r"--num \d+ .*GiB.*lower --num"):
        generate(model, PROMPT, tokens, num=num)


def test_texts_that_fit_into_memory_are_generated(model: GPT2) -> None:
    assert generate(model, PROMPT, 3, num=2000).shape == (2000, 6)


def test_running_out_of_memory_is_a_user_error(
    model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's allocator may fail although enough memory is free, because of fragmentation."""

    def body(*arguments: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(model, "body", body)
    with pytest.raises(UserError, match=r"out of memory.*lower --num"):
        generate(model, PROMPT, 3, num=4)


def test_memory_estimate_matches_memory_use(model: GPT2) -> None:
    """For a long text, the cache is the largest part."""
    from rekindle.sampling.room import bytes_for

    caches: list[KVCache] = []
    new_cache = model.new_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "new_cache", lambda B, n: caches.append(new_cache(B, n)) or caches[-1])
        generate(model, PROMPT, 61, num=7)
    used = sum(t.nbytes for layer in caches[0]._layers for t in (layer.k, layer.v))
    estimated = bytes_for(model, 7, 64, top_k=50)
    logits = 7 * CONFIG.padded_vocab_size * 4
    assert used + logits <= estimated <= used + 8 * logits


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", 99999999999999999999999], "--seed must be a whole number from 0 to 2^63 - 1"),
        (["--num", 100_000_000, "--tokens", 3], "--num 100000000 "),
        (["--temperature", "nan"], "--temperature must be"),
        (["--temperature", "1e-40"], "--temperature 1e-40"),
        (["--top-k", -1], "--top-k must be a whole number of at least 0, but is -1"),
    ],
)
def test_invalid_numbers_on_the_command_line(
    tmp_path: Path, train: Callable[..., Any], refuses: Callable[..., str], flags: list[Any],
    words: str,
) -> None:  # fmt: skip
    train(tmp_path / "run", "--steps", 1)
    given = ["sample", tmp_path / "run", "--device", "cpu", "--prompt", "a", "--tokens", 5]
    refuses([*given, *flags], words)


@pytest.mark.parametrize("flags", [["--num", 0], ["--seed", -1], ["--temperature", "inf"]])
def test_numbers_are_checked_before_anything_is_loaded(
    refuses: Callable[..., str], flags: list[Any]
) -> None:
    refuses(["sample", "there/is/no/such/run", "--device", "cpu", *flags], flags[0])


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
@pytest.mark.parametrize("prompt", [b"caf\xe9", b"\xff", b"a\xc3"])
def test_prompt_that_is_not_utf8_is_rejected(
    tmp_path: Path, refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
    prompt: bytes, tokenizer: str,
) -> None:  # fmt: skip
    """For any tokenizer; tiktoken would replace the stray bytes."""
    import os

    from rekindle import loading as module
    from rekindle.data.tokenizer import get_tokenizer

    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=2, block_size=64))
    monkeypatch.setattr(
        module, "load", lambda *_: module.Loaded(model, get_tokenizer(tokenizer), "x")
    )
    flags = ["--device", "cpu", "--json", "--prompt", os.fsdecode(prompt)]
    error = refuses(["sample", "x", *flags], "--prompt is not UTF-8")
    json.dumps(error).encode()


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"max": "1000", "current": "900", "stat": "anon 300\nactive_file 200\n"}, 300),
        ({"max": "1000", "current": "900", "stat": "active_file 200\ninactive_file 400"}, 700),
        ({"max": "1000", "current": "1001", "stat": "anon 1"}, 0),
        ({"max": "max", "current": "900", "stat": "anon 1"}, 2**63),
        ({}, 2**63),
    ],
)
def test_cached_files_of_a_container_count_as_free(
    tmp_path: Path, files: dict[str, str], free: int
) -> None:
    """The page cache of shards is released when memory is needed."""
    from rekindle.sampling.room import _of_container

    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert _of_container(tmp_path) == free
