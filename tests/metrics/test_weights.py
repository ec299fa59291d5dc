"""Density, compliance and kept magnitude, counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_step import NMPattern
from lightning_step.errors import ArgumentTypeError, ConfigurationError, PatternError
from lightning_step.metrics import Density, KeptMagnitude, NMCompliance


def test_density_counts_what_is_not_zero() -> None:
    metric = Density()
    metric.update(torch.tensor([[1.0, -0.0], [math.nan, 0.0]]))
    metric.update(torch.tensor([True, True]))
    assert metric.compute().item() == 4 / 6


def test_compliance_is_of_groups_and_fewer_than_n_hold_too() -> None:
    metric = NMCompliance(2, 4)
    metric.update(torch.tensor([[1, 2, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 2, 3, 0]]))
    assert metric.compute().item() == 3 / 4


def test_one_bad_group_among_a_hundred_million_is_not_rounded_away() -> None:
    metric = NMCompliance(2, 4)
    metric.update(torch.tensor([[1, 1, 1, 0]]))
    metric.add(torch.tensor([1e8, 1e8], dtype=torch.float64))
    assert 0 < 1 - metric.compute().item() < 2e-8


def test_compliance_groups_convolutions_along_their_input_channels() -> None:
    kernel = torch.ones(3, 8, 3, 3)
    kernel[:, 2:4] = kernel[:, 6:8] = 0
    metric = NMCompliance(2, 4)
    metric.update(kernel)
    assert metric.compute().item() == 1
    kernel[0, 2, 1, 1] = 1
    metric.update(kernel)
    assert metric.compute().item() == 1 - 1 / (2 * 3 * 2 * 9)


def test_a_tensor_may_have_a_pattern_and_a_dimension_of_its_own() -> None:
    weight = torch.zeros(4, 8)
    weight[0] = 1  # 1:4 along dim 0; along dim 1 the first row holds neither
    metric = NMCompliance(2, 4)
    metric.update(weight)
    assert metric.compute().item() == 6 / 8
    metric.reset()
    metric.update(weight, pattern=NMPattern(1, 4), dim=0)
    assert metric.compute().item() == 1


def test_kept_magnitude_of_nothing_is_no_number() -> None:
    metric = KeptMagnitude()
    metric.update(torch.zeros(2), torch.tensor([True, False]))
    assert metric.compute().isnan()
    metric.update(torch.tensor([1.0, -3.0]), torch.tensor([False, True]))
    assert metric.compute().item() == 0.75


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(PatternError, match=r"Expected 1 <= n <= m, but got n=5 and m=4"):
        NMCompliance(5, 4)
    with pytest.raises(PatternError, match="6"):
        NMCompliance(2, 4).update(torch.ones(2, 6))
    with pytest.raises(ArgumentTypeError, match=r"Expected `mask` to be a boolean mask, but got torch.float32"):
        KeptMagnitude().update(torch.ones(2), torch.ones(2))
    with pytest.raises(ConfigurationError, match=r"Expected `latent` and `mask` of one shape, but got \(2, 2\) and \(2,\)"):
        KeptMagnitude().update(torch.ones(2, 2), torch.tensor([True, False]))


def test_no_gradient_is_kept() -> None:
    weight = torch.ones(2, 4, requires_grad=True)
    metric = KeptMagnitude()
    metric.update(weight, torch.ones(2, 4, dtype=torch.bool))
    assert not metric.compute().requires_grad
