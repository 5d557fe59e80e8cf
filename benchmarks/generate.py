"""Compare text generation with `transformers`' `generate`: greedy, with the same weights.

    python -m benchmarks.generate [--device cpu] [--out benchmarks/results/generate-cpu.json]

GPT-2 124M with random weights, one prompt of 64 tokens. Each round runs all arms in turn, so that
other load on the machine slows them equally. `tokens_per_s` covers the entire call, including the
prompt (which `rekindle` processes once for all rows); `ms_per_step` covers only the steps from
token to token.
"""

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment, quantiles, write_result
from rekindle.model.compute import Compute
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.sampling import generate, predict

PROMPT = 64
PACKAGES = ("torch", "transformers") if find_spec("transformers") else ("torch",)
ROWS = (1, 32)
REFERENCE = "transformers fp32"
CONFIG = GPT2Config(padded_vocab_size=50257)

Arm = Callable[[int], Any]  # takes the number of new tokens


def make_model() -> GPT2:
    torch.manual_seed(1337)
    return GPT2(CONFIG).requires_grad_(False)


def our_arms(model: GPT2, prompt: list[int], B: int, device: torch.device) -> dict[str, Arm]:
    def arm(model: GPT2, compile: bool = False) -> Arm:
        return lambda n: generate(model, prompt, n, num=B, temperature=0, compile=compile)

    arms: dict[str, Arm] = {}
    for name, dtype, stream in (
        ("fp32", torch.float32, torch.float32),
        ("autocast", torch.bfloat16, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
    ):
        cast = copy.deepcopy(model).use(Compute(dtype=stream)).cast(dtype, rows=B)
        arms[f"rekindle {name}"] = arm(cast)
        if device.type == "cuda":
            arms[f"rekindle {name} compiled"] = arm(cast, compile=True)
    return arms


def their_arms(model: GPT2, prompt: list[int], B: int, device: torch.device) -> dict[str, Arm]:
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: only rekindle is timed")
        return {}
    transformers.logging.set_verbosity_error()
    weights = {
        name: w.t() if is_conv1d(name) else w for name, w in model.state_dict().items()
    }  # transformers' Conv1D stores (in, out)
    arms: dict[str, Arm] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        theirs: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        theirs.load_state_dict(weights)
        theirs.to(device=device, dtype=dtype).eval()
        idx = torch.tensor([prompt] * B, device=device)

        def arm(n: int, theirs: Any = theirs, idx: Any = idx, cache: str | None = None) -> Any:
            return theirs.generate(
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, min_new_tokens=n,
                do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None,
                cache_implementation=cache,
            ).cpu()  # fmt: skip

        arms[f"transformers {name}"] = arm
        if device.type == "cuda":  # transformers compiles its steps if the cache is static
            arms[f"transformers {name} static"] = functools.partial(arm, cache="static")
    return arms


def is_conv1d(name: str) -> bool:
    return name.endswith(".weight") and any(part in name for part in ("c_attn", "c_proj", "c_fc"))


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(arms: dict[str, Arm], B: int, tokens: int, rounds: int, device: torch.device) -> Any:
    """Time the generation of one token and of `tokens` tokens, in turn; the difference is the time
    of the steps."""
    first: dict[str, list[float]] = {name: [] for name in arms}
    full: dict[str, list[float]] = {name: [] for name in arms}
    texts = {name: arm(tokens) for name, arm in arms.items()}  # warm up and compile
    for _ in range(rounds):
        for name, arm in arms.items():
            first[name].append(timed(lambda arm=arm: arm(1), device))
            full[name].append(timed(lambda arm=arm: arm(tokens), device))
    rows: dict[str, Any] = {}
    for name in arms:
        steps = [
            1000 * (w - f) / (tokens - 1) for w, f in zip(full[name], first[name], strict=True)
        ]
        rows[name] = {
            "tokens_per_s": quantiles([B * tokens / s for s in full[name]]),
            "ms_per_step": quantiles(steps),
        }
    if REFERENCE in rows:
        same = torch.equal(texts["rekindle fp32"], texts[REFERENCE])
        for row in rows.values():
            row["times_reference"] = {
                "tokens_per_s": ratio(row, rows[REFERENCE], "tokens_per_s"),
                "ms_per_step": round(1 / ratio(row, rows[REFERENCE], "ms_per_step"), 3),
            }
        return {"batch": B, "new_tokens": tokens, "same_fp32_text": same, "arms": rows}
    return {"batch": B, "new_tokens": tokens, "arms": rows}


def ratio(row: Any, reference: Any, key: str) -> float:
    return round(row[key]["median"] / reference[key]["median"], 3)


@torch.no_grad()
def by_length(model: GPT2, repeats: int, device: torch.device) -> dict[str, Any]:
    """The cost of a token after 64 and after 1,000 tokens, in turn; batch 1, eager, growing
    cache."""
    result: dict[str, Any] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        cast = copy.deepcopy(model).use(Compute(dtype=dtype)).cast(dtype, rows=1)
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        caches, times = {}, {64: [], 1000: []}
        for length in times:
            caches[length] = cache = cast.new_cache(1, length + 1)
            predict(cast, token.expand(1, length), cache)
            cache.advance(length)  # only once, so that every repeat writes to the same position
        for i in range(repeats + 3):
            for length, cache in caches.items():
                seconds = timed(functools.partial(predict, cast, token, cache), device)
                if i >= 3:
                    times[length].append(1000 * seconds)
        rows = {length: quantiles(values) for length, values in times.items()}
        result[name] = {
            "ms_per_token_at_64": rows[64],
            "ms_per_token_at_1000": rows[1000],
            "ratio": round(rows[1000]["median"] / rows[64]["median"], 3),
        }
    return result


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), **environment(*PACKAGES)}


def main() -> None:
    parser = argparse.ArgumentParser(description="compare text generation with transformers")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tokens", type=int, default=32, help="new tokens; half as many at batch 32"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if min(arguments.rounds, arguments.tokens // 2) < 2:
        parser.error("--rounds must be at least 2, --tokens at least 4")
    result: dict[str, Any] = machine(device)
    model = make_model().to(device)
    prompt = torch.randint(50257, (PROMPT,)).tolist()
    result["batches"] = []
    for B in ROWS:
        arms = our_arms(model, prompt, B, device) | their_arms(model, prompt, B, device)
        tokens = arguments.tokens if B == 1 else arguments.tokens // 2
        result["batches"].append(compare(arms, B, tokens, arguments.rounds, device))
        print(json.dumps(result["batches"][-1], indent=2), flush=True)
    result["by_length"] = by_length(model, 5 * arguments.rounds, device)
    print(json.dumps(result["by_length"], indent=2))
    if arguments.out:
        write_result(arguments.out, result)
        print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
