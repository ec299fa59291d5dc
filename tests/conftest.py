"""Same numbers every time, and nothing left behind by one test for the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.examples.tiny_files import write_all


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled() == grad, "a test left autograd switched"
    assert torch.get_default_dtype() == torch.float32, "a test left another default dtype"
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all data and weights that the files in ``examples/configs`` name, a few lines of each."""
    return write_all(tmp_path_factory.mktemp("tiny_files"))
