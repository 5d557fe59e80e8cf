"""Compare our GPT-2 with the one in `transformers`: logits, loss, generated text and gradients."""

import math
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rekindle import storage
from rekindle.errors import UserError
from rekindle.interop import huggingface, names
from rekindle.interop.huggingface import EMBEDDING
from rekindle.model.finite import why_not_finite
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import SIZES
from rekindle.sampling import generate

# Tolerances for float32 on a CPU. Gradients are relative to the largest one in their tensor.
LOGITS, LOSS, GRADIENTS = 1e-4, 1e-5, 1e-3
ROWS, LENGTH, PROMPT, GREEDY = 2, 64, 8, 24  # tokens compared, limited by the context length


@dataclass(frozen=True)
class Row:
    """One comparison: the largest difference and its location."""

    what: str
    difference: float
    tolerance: float
    where: str

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # also false for nan


@dataclass(frozen=True)
class Report:
    """All comparisons of one model."""

    model: str
    rows: tuple[Row, ...]
    note: str = ""  # if the model's name is ambiguous: what else it matches, and which one is used

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values: a difference that is not finite becomes None."""
        rows = [{**asdict(row), "passed": row.passed} for row in self.rows]
        for row in rows:
            if not math.isfinite(row["difference"]):
                row["difference"] = None
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
    """Compare `model` (a run, a checkpoint, a model on the hub, or a folder in Hugging Face's
    layout) with `transformers`. It loads published models itself; for a run or checkpoint, our
    weights are copied into its model.

    With `random_weights` no network is needed: a random `transformers` model of that size (with
    `layers` blocks, if given) is saved in its own format, which we then read.
    Raises `UserError` if `transformers` is missing, the model is not available, or its weights are
    not finite.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            "rekindle verify needs transformers: pip install 'rekindle[verify]'"
        ) from None
    if layers is not None and not random_weights:
        raise UserError("--layers needs --random-weights")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if random_weights:
        with tempfile.TemporaryDirectory() as folder:
            _save_random(model, layers, Path(folder))
            ours, theirs = huggingface.from_pretrained(Path(folder)), _load_theirs(Path(folder))
            return Report(f"{model} with random weights", tuple(_compare(ours, theirs)))
    named = names.find(model)
    ours = names.read(named)
    if not isinstance(ours, GPT2):
        raise UserError(f"{model} is a {type(ours).__name__}: verify supports only GPT-2")
    if any(not p.isfinite().all() for p in ours.parameters()):
        raise UserError(f"{model} cannot be compared: {why_not_finite(ours)}")
    if named.ours:
        theirs = _copy_to_theirs(ours)
    else:
        config, _ = (
            huggingface.folder_files(named.folder) if named.folder
            else huggingface.hub_files(named.name)
        )  # fmt: skip
        theirs = _load_theirs(config.parent)
    return Report(storage.printable(model), tuple(_compare(ours, theirs)), named.note)


def _load_theirs(folder: Path) -> Any:
    """Load the model in `folder` with `transformers`, in float32 and without dropout."""
    import transformers

    if storage.printable(folder) != str(folder):  # its libraries need a UTF-8 path
        with tempfile.TemporaryDirectory() as copy:
            for name in huggingface.FILES:
                shutil.copy(folder / name, copy)
            return _load_theirs(Path(copy))
    # A relative path could be mistaken for a model on the hub.
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        str(folder.absolute()), attn_implementation="eager"
    )
    theirs.generation_config = transformers.GenerationConfig()  # ignore the folder's own settings
    return theirs.float().eval()


def _copy_to_theirs(ours: GPT2) -> Any:
    """A `transformers` model with the weights of `ours`, including padding rows, transposed for
    its Conv1D."""
    import transformers

    c = ours.config
    described: dict[str, Any] = {
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.block_size,
        "vocab_size": c.padded_vocab_size, "attn_implementation": "eager",
    }  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**described))
    weights = {
        name: p.detach().t() if _is_conv1d(name) else p.detach()
        for name, p in ours.named_parameters()
    }
    # strict=False: the head and the embedding are one parameter.
    result = theirs.load_state_dict({**weights, "lm_head.weight": weights[EMBEDDING]}, strict=False)
    assert not result.unexpected_keys
    theirs.tie_weights()
    return theirs.eval()


def _save_random(size: str, layers: int | None, folder: Path) -> None:
    """Save a random `transformers` GPT-2. Biases and norms are random as well: with their usual
    zeros and ones, swapped tensors would go unnoticed."""
    import transformers

    if size not in SIZES:
        raise UserError(f"--random-weights needs a size ({', '.join(SIZES)}), not {size!r}")
    c = SIZES[size]
    layers = c.n_layer if layers is None else layers
    if not 1 <= layers <= c.n_layer:
        raise UserError(f"--layers must be from 1 to {c.n_layer}, but is {layers}")
    torch.manual_seed(1337)
    config = transformers.GPT2Config(
        n_layer=layers, n_head=c.n_head, n_embd=c.n_embd, n_positions=c.block_size,
        vocab_size=c.vocab_size,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    model.save_pretrained(folder)


def _compare(ours: GPT2, theirs: Any) -> list[Row]:
    ids, T = ours.config.vocab_size, min(LENGTH, ours.config.block_size)
    random = torch.Generator().manual_seed(1337)
    idx = torch.randint(ids, (ROWS, T + 1), generator=random)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    with torch.no_grad():
        logits, _ = ours(x)
        expected = theirs(x).logits[..., :ids]
    if not logits.isfinite().all() and not expected.isfinite().all():
        raise UserError(f"there is nothing to compare, because the logits are nan or inf: "
                        f"{why_not_finite(ours)}")  # fmt: skip
    _, loss = ours(x, y)
    loss.backward()
    their_loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
    their_loss.backward()
    difference = (logits - expected).abs()
    row, position = divmod(int(difference.max(-1).values.argmax()), T)
    rows = [
        Row("logits", difference.max().item(), LOGITS, f"row {row}, position {position}"),
        Row("loss", abs(loss.item() - their_loss.item()), LOSS, f"{loss.item():.6f} nats"),
    ]
    if T > 1:  # a context of one token has no room for a continuation
        rows.append(_compare_text(ours, theirs, x[:1, : min(PROMPT, T // 2)]))
    return [*rows, _compare_gradients(ours, theirs)]


def _compare_text(ours: GPT2, theirs: Any, prompt: Tensor) -> Row:
    """Compare greedy continuations; the difference is the number of tokens that differ."""
    c = ours.config
    tokens = min(GREEDY, c.block_size - prompt.shape[1])
    mine = generate(ours, prompt[0].tolist(), tokens, temperature=0)[0]
    padding = list(range(c.vocab_size, c.padded_vocab_size))
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens,
        min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None,
        suppress_tokens=padding or None,
    )[0]  # fmt: skip
    differing = (mine != expected).nonzero().flatten()
    where = f"token {int(differing[0])}" if len(differing) else f"{tokens} equal tokens"
    return Row("text", float(len(differing)), 0.0, where)


def _compare_gradients(ours: GPT2, theirs: Any) -> Row:
    mine = {name: p.grad for name, p in ours.named_parameters()}
    expected: dict[str, Tensor] = {}
    for name, p in theirs.named_parameters():
        gradient = p.grad.t() if _is_conv1d(name) else p.grad
        name = EMBEDDING if name == "lm_head.weight" else name
        expected[name] = expected[name] + gradient if name in expected else gradient
    if apart := sorted(mine.keys() ^ expected.keys()):
        whose = "transformers' model" if apart[0] in mine else "ours"
        raise UserError(f"{whose} has no gradient for {apart[0]}")
    worst, where = -1.0, ""
    for name, own in mine.items():
        assert own is not None
        largest = expected[name].abs().max().clamp(min=torch.finfo(own.dtype).tiny)
        relative = ((own - expected[name]).abs().max() / largest).item()
        if not relative <= worst:
            worst, where = relative, name
    return Row("gradients", worst, GRADIENTS, where)


def _is_conv1d(name: str) -> bool:
    return name.endswith(".weight") and any(part in name for part in ("c_attn", "c_proj", "c_fc"))
