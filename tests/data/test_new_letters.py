"""Letters newer than one library's Unicode tables are encoded like the reference does."""

import random

import numpy as np
import pyarrow as pa
import pytest

from rekindle.data import tokenizer as module
from rekindle.data.tokenizer import GPT2Tokenizer, get_tokenizer

# New in Unicode 15, 15.1, 16 and 17 (including a mark and a symbol), and unassigned code points.
NEW = "\U00011f04\U0001e4d0\U00031350\U0002ebf0\u1c89\U00010d4a\ua7ce\U00016ea0\U000323b0\u0c5c"
NEW += "\U00010ec5\U0001fac8\u1acf\u20c1\U00011b60\U000334ff\U0003fffd\u0378\U00011dff"
FORMS = ["{0}'ll", "a{0}'s", "'{0}ve", "1{0}2 {0}'d", " {0}{0}'re", "{0}", "x {0}\n", "don{0}'t"]


def encoded(texts: list[str]) -> list[list[int]]:
    tokens, starts = get_tokenizer("gpt2").encode_documents(pa.array(texts))
    return [part[1:].tolist() for part in np.split(tokens, starts[1:-1])]


@pytest.mark.parametrize("form", FORMS)
def test_new_letters(form: str) -> None:
    if form in ("{0}", "x {0}\n", "1{0}2 {0}'d", "'{0}ve"):  # hardly differ between encoders
        form += " {0}'ll"
    texts = ["before", *(form.format(letter) for letter in NEW), "after"]
    assert encoded(texts) == [get_tokenizer("gpt2").encode(text) for text in texts]


def test_new_letters_in_a_long_document() -> None:
    """It is encoded in parts, because the reference cannot encode the whole text at once."""
    text = "A new script spells \U00016ea0'll here. " * 9000
    assert encoded([text, "x"])[0] == get_tokenizer("gpt2").encode(text)
    spaces = " " * 999_999  # one more space belongs to the next word
    expected = encoded([spaces])[0] + get_tokenizer("gpt2").encode(f" {text[:400]}")
    assert encoded([f"{spaces} {text[:400]}"])[0] == expected


def test_every_code_point_next_to_an_apostrophe() -> None:
    """Each run tests a different random tenth of all code points."""
    points = random.Random().sample(range(0x30000), 0x30000 // 10)
    texts = [f"{chr(c)}'ll {chr(c)}'s" for c in points if not 0xD800 <= c < 0xE000]
    slow = get_tokenizer("gpt2").encode
    assert [(t, e) for t, e in zip(texts, encoded(texts), strict=True) if e != slow(t)] == []


@pytest.mark.parametrize(
    "text", ["plain", "é東京🙂 'll", "ఋ's తెలుగు", "\U000109a0", "\ue000\ufffe"]
)
def test_text_without_new_letters_uses_the_fast_encoder(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPT2Tokenizer, "_encode_slowly", None)
    assert encoded([text] * 2)[1] == get_tokenizer("gpt2").encode(text)
    assert module.SEPARATOR not in text
