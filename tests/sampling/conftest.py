"""Tiny models are fastest on one thread, all the more where other work shares the cores."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tests/conftest.py puts back what was
