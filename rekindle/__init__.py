"""Rekindle: GPT-2 reproduced from scratch in PyTorch, then surpassed."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["GPT2", "GPT2Config", "__version__"]

if TYPE_CHECKING:
    from rekindle.model.gpt2 import GPT2
    from rekindle.model.gpt2_config import GPT2Config


def __getattr__(name: str) -> Any:
    """Import torch only when somebody asks for the model: `rekindle --help` answers at once."""
    if name == "GPT2":
        from rekindle.load import GPT2  # which gives it `from_pretrained`

        return GPT2
    if name == "GPT2Config":
        from rekindle.model.gpt2_config import GPT2Config

        return GPT2Config
    raise AttributeError(f"module 'rekindle' has no attribute {name!r}")
