"""What adapters say of a frozen second moment, for every optimizer that has one."""

import pytest
import torch

from lightning_step.optim import adapter_for

KINDS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam]


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("form", ["adam", "paper"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_moment_behind_a_preconditioner_is_the_one_it_was_made_of(kind, form, eps):
    weight = torch.nn.Parameter(torch.randn(4, 6))
    optimizer = kind([weight], lr=0.01, eps=eps)
    for _ in range(12):
        weight.grad = torch.randn(4, 6)
        optimizer.step()
    adapter, v = adapter_for(optimizer), optimizer.state[weight]["exp_avg_sq"].clone()
    assert adapter.freeze(optimizer, [weight], form) == [weight]
    made = adapter.second_moment(optimizer, weight).clone()
    torch.testing.assert_close(adapter.moment_behind(optimizer.param_groups[0], made, 12, form), v, rtol=2e-5, atol=1e-12)
    assert torch.equal(adapter.second_moment(optimizer, weight), made), "it is only looked at"
