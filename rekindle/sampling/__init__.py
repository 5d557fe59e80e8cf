"""Text generation, one token at a time."""

from rekindle.sampling.decoding import (
    check_numbers,
    check_prompt,
    cut_at_end,
    draw,
    generate,
    predict,
)

__all__ = ["check_numbers", "check_prompt", "cut_at_end", "draw", "generate", "predict"]
