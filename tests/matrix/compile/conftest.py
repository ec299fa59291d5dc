"""Counting what torch.compile does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters


class Counter:
    """A backend that counts the graphs it is given and hands them to another backend."""

    def __init__(self, inner: str) -> None:
        self.inner, self.graphs = inner, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.inner)(graph, inputs)

    @property
    def breaks(self) -> dict[str, int]:
        """Reasons for graph breaks, a hit recompile limit among them."""
        return dict(counters["graph_break"]) | dict(counters["unimplemented"])

    @property
    def skipped(self) -> int:
        """Frames that Dynamo looked at and left to eager."""
        return counters["frames"]["total"] - counters["frames"]["ok"]


@pytest.fixture
def counter() -> Iterator[type[Counter]]:
    """Makes counting backends, on a compiler that remembers nothing of other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield Counter
    torch._dynamo.reset()
    counters.clear()
