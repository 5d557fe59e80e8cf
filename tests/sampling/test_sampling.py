"""Text generation: the cache does not change the text, padding ids are never drawn, and a seed
reproduces its text."""

from contextlib import nullcontext

import pytest
import torch

from rekindle.errors import UserError
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.sampling import cut_at_end, generate

CONFIG = GPT2Config(
    n_layer=3, n_head=4, n_embd=48, block_size=64, vocab_size=257, padded_vocab_size=384
)
PROMPT = [72, 101, 108, 108, 111]


@pytest.fixture(scope="module")
def model() -> GPT2:
    """A model with weights so large that greedy text varies and no two logits are nearly equal."""
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("num", [1, 3])
def test_cached_and_uncached_greedy_text_are_equal(model: GPT2, num: int, autocast: bool) -> None:
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with context:
        cached = generate(model, PROMPT, 40, num=num, temperature=0)
        plain = generate(model, PROMPT, 40, num=num, temperature=0, use_cache=False)
    assert torch.equal(cached, plain)
    assert cached.shape == (num, len(PROMPT) + 40)
    assert len(set(cached[0, len(PROMPT) :].tolist())) > 10  # not one token repeated


def test_cached_and_uncached_samples_are_equal(model: GPT2) -> None:
    """The rows of the batch differ, so a cache that mixes them up is noticed."""
    cached = generate(model, PROMPT, 40, num=4, seed=7)
    assert torch.equal(cached, generate(model, PROMPT, 40, num=4, seed=7, use_cache=False))
    assert len({tuple(row) for row in cached.tolist()}) == 4


def test_cached_logits_match_a_full_pass(model: GPT2) -> None:
    idx = torch.randint(CONFIG.vocab_size, (2, 20), generator=torch.Generator().manual_seed(3))
    cache = model.new_cache(2, 20)
    parts = []
    with torch.no_grad():
        for part in (idx[:, :7], *idx[:, 7:].split(1, 1)):
            logits, _ = model(part, cache=cache)
            cache.advance(part.shape[1])
            parts.append(logits)
        full, _ = model(idx)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)


def test_cache_rejects_a_second_prompt(model: GPT2) -> None:
    cache = model.new_cache(1, 20)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
        cache.advance(4)
        with pytest.raises(ValueError, match="one token at a time"):
            model(torch.zeros(1, 2, dtype=torch.long), cache=cache)


def test_full_cache_rejects_another_token(model: GPT2) -> None:
    cache = model.new_cache(1, CONFIG.block_size)
    with torch.no_grad():
        model(torch.zeros(1, CONFIG.block_size, dtype=torch.long), cache=cache)
        cache.advance(CONFIG.block_size)
        with pytest.raises(ValueError, match="block_size"):
            model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (1.0, 50), (100.0, 300), (0, 50)])
def test_padded_ids_are_never_drawn(temperature: float, top_k: int) -> None:
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    with torch.no_grad():  # ln_f gives every row of the head the same, huge logit for padding
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[CONFIG.vocab_size :] = 10.0
        hidden = model.transformer(torch.tensor([PROMPT]))
        assert (model.lm_head(hidden).argmax(-1) >= CONFIG.vocab_size).all()
    ids = generate(model, PROMPT, 50, num=8, temperature=temperature, top_k=top_k)
    assert ids.max() < CONFIG.vocab_size


def test_same_seed_gives_the_same_text(model: GPT2) -> None:
    first = generate(model, PROMPT, 30, num=2, seed=42)
    torch.manual_seed(99)  # the global random state does not matter
    assert torch.equal(first, generate(model, PROMPT, 30, num=2, seed=42))
    assert not torch.equal(first, generate(model, PROMPT, 30, num=2, seed=43))


def test_top_k_of_one_is_greedy(model: GPT2) -> None:
    greedy = generate(model, PROMPT, 30, num=2, temperature=0)
    assert torch.equal(greedy, generate(model, PROMPT, 30, num=2, top_k=1))
    assert torch.equal(greedy, generate(model, PROMPT, 30, num=2, temperature=1e-6, top_k=0))


def test_top_k_samples_follow_the_distribution(model: GPT2) -> None:
    """The frequencies of 4,000 draws match the softmax of the top 3 logits at temperature 2."""
    with torch.no_grad():
        logits, _ = model(torch.tensor([PROMPT]))
    values, ids = logits[0, -1].topk(3)
    expected = (values / 2).softmax(-1)
    drawn = generate(model, PROMPT, 1, num=4000, temperature=2.0, top_k=3)[:, -1]
    frequency = torch.stack([(drawn == i).float().mean() for i in ids])
    assert torch.isin(drawn, ids).all()
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.04)  # 5 standard deviations


def test_prompt_is_kept_and_no_gradients_are_computed(model: GPT2) -> None:
    ids = generate(model, PROMPT, 3, num=2)
    assert ids[:, : len(PROMPT)].tolist() == [PROMPT, PROMPT]
    assert ids.device.type == "cpu"
    assert generate(model, PROMPT, 0).tolist() == [PROMPT]
    assert all(p.grad is None for p in model.parameters())


def test_prompt_too_long_is_a_user_error(model: GPT2) -> None:
    full = [1] * (CONFIG.block_size - 4)
    assert generate(model, full, 4).shape == (1, CONFIG.block_size)
    with pytest.raises(UserError, match=r"60 tokens and 5 more .* context of 64"):
        generate(model, full, 5)
    with pytest.raises(UserError, match="empty"):
        generate(model, [], 5)


@pytest.mark.parametrize("odd", [{"num": 0}, {"tokens": -1}, {"temperature": -1.0}, {"top_k": -2}])
def test_invalid_numbers_are_user_errors(model: GPT2, odd: dict[str, float]) -> None:
    arguments: dict[str, float] = {"tokens": 3, **odd}
    with pytest.raises(UserError, match="at least"):
        generate(model, PROMPT, **arguments)  # type: ignore[arg-type]
    least = {"num": 1, "tokens": 0, "temperature": 0.0, "top_k": 0}
    arguments = {"tokens": 3, **{name: least[name] for name in odd}}
    assert generate(model, PROMPT, **arguments).shape[0] == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_non_finite_weights_are_a_user_error(temperature: float) -> None:
    model = GPT2(CONFIG)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="its weights are broken"):
        generate(model, PROMPT, 3, temperature=temperature)


def test_text_is_cut_at_the_end_of_the_document() -> None:
    assert cut_at_end([9, 1, 2, 9, 3], 9, start=1) == [9, 1, 2]
    assert cut_at_end([9, 1, 2], 9) == []
    assert cut_at_end([1, 2, 3], 9) == [1, 2, 3]
