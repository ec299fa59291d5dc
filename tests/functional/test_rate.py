"""The factor of the rate, against what it is for: steps that change the output as much as dense ones do."""

import pytest
import torch

from lightning_step import NMPattern
from lightning_step.functional import nm_mask, rate_factor


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 8), (4, 16)])
def test_a_step_of_one_sign_changes_the_output_as_much_as_a_dense_one(n, m):
    inputs = torch.ones(1, 64)
    mask = nm_mask(torch.rand(5, 64), NMPattern(n, m))
    step = torch.full((5, 64), 1e-3)  # what Adam takes where the gradient keeps its sign
    dense, masked = inputs @ step.T, inputs @ (step * mask * rate_factor(NMPattern(n, m))).T
    torch.testing.assert_close(masked, dense)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8)])
def test_half_a_power_is_for_steps_of_random_sign(n, m):
    torch.manual_seed(0)
    signs = torch.randint(0, 2, (4000, 64)) * 2.0 - 1
    mask = nm_mask(torch.rand(4000, 64), NMPattern(n, m))
    dense, masked = signs.sum(1).std(), (signs * mask).sum(1).std() * rate_factor(NMPattern(n, m), power=0.5)
    assert float(masked) == pytest.approx(float(dense), rel=0.05)


def test_pruned_weights_that_still_count_lower_it():
    pattern = NMPattern(1, 4)
    factors = [rate_factor(pattern, leak) for leak in (0.0, 0.25, 0.5, 1.0)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == 4.0
    assert factors[-1] == 1.0


def test_without_a_power_or_without_pruning_there_is_nothing_to_scale():
    assert rate_factor(NMPattern(1, 8), power=0) == 1.0
    assert rate_factor(NMPattern(4, 4), power=2) == 1.0
