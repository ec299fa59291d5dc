"""2:4 inference by the sparse tensor cores of a GPU, over sizes and batches, against dense and the limit of 2."""

from __future__ import annotations

import torch
from side_by_side import Row, Settings, medians
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

from lightning_step import NMPattern
from lightning_step.functional import nm_mask


def inference(settings: Settings) -> list[Row]:
    """Speed-up of one linear layer in bfloat16."""
    rows = []
    sizes = [(1024, 1024), (4096, 1024), (4096, 4096), (11008, 4096)]
    for out, width in sizes[:1] if settings.quick else sizes:
        weight = torch.randn(out, width, device=settings.device, dtype=torch.bfloat16)
        weight *= nm_mask(weight, NMPattern(2, 4))
        packed = to_sparse_semi_structured(weight)
        for batch in (1, 16, 256, 4096):
            x = torch.randn(batch, width, device=settings.device, dtype=torch.bfloat16)
            works = {
                "dense": lambda x=x, w=weight: [F.linear(x, w) for _ in range(20)],
                "2:4": lambda x=x, w=packed: [F.linear(x, w) for _ in range(20)],
            }
            seconds = medians(works, settings)
            what = f"{out} x {width}, batch {batch}, speed-up"
            rows.append(Row("2:4 inference", what, "dense", seconds["dense"] / seconds["2:4"], seconds["2:4"] / 20))
    return rows
