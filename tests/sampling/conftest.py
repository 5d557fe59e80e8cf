"""Tiny models are fastest on one thread, especially on a busy machine."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tests/conftest.py restores the setting
