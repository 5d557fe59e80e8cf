"""Is our GPT-2 the same function as `transformers`' GPT-2? Logits, loss, text and gradients."""

import contextlib
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rekindle.errors import UserError
from rekindle.interop import huggingface
from rekindle.interop.huggingface import HUB
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import SIZES
from rekindle.sampling import generate

# Float32 on a CPU. Gradients are compared relative to the largest of their tensor.
LOGITS, LOSS, GRADIENTS = 1e-4, 1e-5, 1e-3
ROWS, LENGTH, GREEDY = 2, 64, 24  # tokens compared


@dataclass(frozen=True)
class Row:
    """One comparison: the largest difference, and where it was."""

    what: str
    difference: float
    tolerance: float
    where: str

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # false for NaN, too


@dataclass(frozen=True)
class Report:
    """All comparisons of one model."""

    model: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "passed": row.passed} for row in self.rows]
        return {"model": self.model, "passed": self.passed, "rows": rows}

    def table(self) -> str:
        lines = [f"{self.model} against transformers, float32 on the CPU", ""]
        lines += [f"  {'compared':<10} {'largest difference':>19} {'tolerance':>10}   where"]
        for row in self.rows:
            mark = "" if row.passed else "  <- differs"
            lines.append(
                f"  {row.what:<10} {row.difference:>19.2e} {row.tolerance:>10.0e}   "
                f"{row.where}{mark}"
            )
        verdict = "the same function" if self.passed else "NOT the same function"
        return "\n".join([*lines, "", f"verdict: {verdict}"])


def verify(model: str, *, random_weights: bool = False, layers: int | None = None) -> Report:
    """Compare `model` (of the hub, or a folder in Hugging Face's layout) with `transformers`.

    With `random_weights` no network is needed: a random `transformers` model of that size (of
    `layers` blocks, if given) is saved in its own format and read by us.
    Raises `UserError` if `transformers` is missing or the model cannot be had.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            "rekindle verify compares with transformers: pip install 'rekindle[verify]'"
        ) from None
    if layers and not random_weights:
        raise UserError("--layers goes with --random-weights")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        source = model
        if random_weights:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            source = _save_random(model, layers, Path(folder))
        ours = huggingface.from_pretrained(source)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(
            HUB.get(source, source), attn_implementation="eager"
        ).float()
        theirs.eval()  # no dropout
        name = f"{model} with random weights" if random_weights else model
        return Report(name, tuple(_compare(ours, theirs)))


def _save_random(size: str, layers: int | None, folder: Path) -> str:
    """Save a random `transformers` GPT-2. Biases and norms are random, too: at their usual zeros
    and ones they could be exchanged without a trace."""
    import transformers

    if size not in SIZES:
        raise UserError(f"--random-weights takes a size, {' '.join(SIZES)}, not {size!r}")
    c = SIZES[size]
    torch.manual_seed(1337)
    config = transformers.GPT2Config(
        n_layer=layers or c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_positions=c.block_size,
        vocab_size=c.vocab_size,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    model.save_pretrained(folder)
    return str(folder)


def _compare(ours: GPT2, theirs: Any) -> list[Row]:
    random = torch.Generator().manual_seed(1337)
    idx = torch.randint(ours.config.vocab_size, (ROWS, LENGTH + 1), generator=random)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    with torch.no_grad():
        logits, _ = ours(x)
        expected = theirs(x).logits
    _, loss = ours(x, y)
    loss.backward()
    their_loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
    their_loss.backward()
    difference = (logits - expected).abs()
    row, position = divmod(int(difference.max(-1).values.argmax()), LENGTH)
    return [
        Row("logits", difference.max().item(), LOGITS, f"row {row}, position {position}"),
        Row("loss", abs(loss.item() - their_loss.item()), LOSS, f"{loss.item():.6f} nats"),
        _compare_text(ours, theirs, x[:1, :8]),
        _compare_gradients(ours, theirs),
    ]


def _compare_text(ours: GPT2, theirs: Any, prompt: Tensor) -> Row:
    """Greedy continuations; the difference is the number of tokens that differ."""
    mine = generate(ours, prompt[0].tolist(), GREEDY, temperature=0)[0]
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=GREEDY,
        min_new_tokens=GREEDY, do_sample=False, pad_token_id=0, eos_token_id=None,
    )[0]  # fmt: skip
    differing = (mine != expected).nonzero().flatten()
    where = f"token {int(differing[0])}" if len(differing) else f"{GREEDY} tokens alike"
    return Row("text", float(len(differing)), 0.0, where)


def _compare_gradients(ours: GPT2, theirs: Any) -> Row:
    mine = dict(ours.named_parameters())
    worst, where = -1.0, ""
    for name, p in theirs.named_parameters():
        name = "transformer.wte.weight" if name == "lm_head.weight" else name
        own, expected = mine.pop(name).grad, p.grad
        assert own is not None
        assert expected is not None
        expected = expected.t() if _is_conv1d(name) else expected
        relative = ((own - expected).abs().max() / expected.abs().max()).item()
        if not relative <= worst:
            worst, where = relative, name
    if mine:
        raise UserError(f"transformers' model has no gradient for {next(iter(mine))}")
    return Row("gradients", worst, GRADIENTS, where)


def _is_conv1d(name: str) -> bool:
    return name.endswith(".weight") and any(part in name for part in ("c_attn", "c_proj", "c_fc"))
