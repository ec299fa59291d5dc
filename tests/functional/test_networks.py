"""Networks of comparisons against every possible order of a group."""

import itertools

import pytest
import torch

from lightning_step.functional.networks import keep_largest


def every_group(m, values):
    return torch.tensor(list(itertools.product(range(values), repeat=m))).T  # (m, groups)


@pytest.mark.parametrize("m", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.float32, torch.bfloat16], ids=str)
def test_every_order_with_every_tie(m, dtype):
    groups = every_group(m, m)
    for n in range(1, m):
        kept = torch.stack(keep_largest(groups.to(dtype).unbind(), n)).T.tolist()
        for scores, places in zip(groups.T.tolist(), kept, strict=True):
            best = sorted(range(m), key=lambda i, scores=scores: -scores[i])[:n]  # stable: of equal ones the earlier
            assert [i for i in range(m) if places[i]] == sorted(best), (scores, n)


@pytest.mark.parametrize(("n", "m"), [(1, 12), (2, 12), (6, 12), (11, 12)])
def test_zeros_and_ones_decide_for_all_numbers(n, m):
    groups = every_group(m, 2)
    kept = torch.stack(keep_largest(groups.unbind(), n))
    ranks = groups.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    assert torch.equal(kept, ranks < n)


def test_what_is_compared_is_left_as_it_is():
    parts = list(torch.tensor([[3, 1], [1, 1], [2, 5], [0, 1]]).unbind())
    before = [part.clone() for part in parts]
    for n in (1, 2, 3):
        keep_largest(parts, n)
    assert all(map(torch.equal, parts, before))
