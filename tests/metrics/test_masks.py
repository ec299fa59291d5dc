"""The flip rate by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.metrics import FlipRate


def test_the_order_of_the_masks_does_not_matter() -> None:
    one, other = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, True])
    for mask, before in ((one, other), (other, one)):
        metric = FlipRate()
        metric.update(mask, before)
        assert metric.compute().item() == 0.5


def test_what_is_no_pair_of_masks_is_refused() -> None:
    mask = torch.tensor([True, False])
    with pytest.raises(ArgumentTypeError, match=r"Expected `before` to be a boolean mask, but got torch.int64"):
        FlipRate().update(mask, torch.tensor([1, 0]))
    with pytest.raises(ConfigurationError, match=r"`mask` and `before` of one shape, but got \(2,\) and \(1, 2\)"):
        FlipRate().update(mask, mask[None])
