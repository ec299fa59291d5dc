"""torchmetrics on two processes, what `metrics_worker.py` checks."""

from __future__ import annotations

from typing import Any


def test_copies_shards_and_batches_that_differ_count_as_on_one_process(launch: Any) -> None:
    assert launch("metrics_worker.py") == [0, 0]
