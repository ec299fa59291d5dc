import copy
import math

import pytest
import torch

from lightning_step.functional import make_sketch, sketch
from lightning_step.hooks import StepHooks
from lightning_step.optim import adapter_for
from lightning_step.sampling import SecondMomentSampler

STATISTICS = ["arithmetic", "geometric", "l1", "l2", "drift"]
SETTINGS = {
    "Adam with coupled decay": (torch.optim.Adam, {"weight_decay": 0.3}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.3}),
    "Adam with coupled decay, maximize": (torch.optim.Adam, {"weight_decay": 0.3, "maximize": True}),
    "amsgrad, foreach": (torch.optim.Adam, {"amsgrad": True, "foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "low beta2": (torch.optim.Adam, {"betas": (0.9, 0.9)}),
    "two groups": (torch.optim.Adam, {"group": {"betas": (0.8, 0.9), "weight_decay": 0.5}}),
}


def make(settings="AdamW", shapes=((8, 6), (7,), (3, 5)), dtype=torch.float64):
    """Three tensors in two groups; the samples are about the first and the last."""
    kind, arguments = SETTINGS[settings]
    arguments = dict(arguments)
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], **arguments.pop("group", {})}]
    return kind(groups, lr=0.1, **arguments), parameters


def sampler_of(optimizer, parameters, statistic="arithmetic", **arguments):
    return SecondMomentSampler(optimizer, adapter_for(optimizer), parameters, statistic, **arguments)


def give_gradients(parameters, scale=1.0):
    for p in parameters:
        p.grad = torch.randn_like(p) * scale


def second_moments(optimizer, scope):
    """A copy of v, zeros before the first step: what the sampler does without."""
    return torch.cat([optimizer.state[p].get("exp_avg_sq", torch.zeros_like(p)).flatten().clone() for p in scope])


def brute_force(v, before, statistic):
    change = (v - before).abs()
    return {
        "arithmetic": lambda: change.mean(),
        "geometric": lambda: change[change > 0].log().mean().exp(),
        "l1": lambda: v.abs().mean(),
        "l2": lambda: v.square().mean().sqrt(),
    }[statistic]().item()


def effective(optimizer, parameter):
    """What the optimizer is about to square."""
    (group,) = [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
    sign = -1 if group["maximize"] else 1
    coupled = 0 if isinstance(optimizer, torch.optim.AdamW) else group["weight_decay"]
    return (sign * parameter.grad + coupled * parameter).detach()


def drift_by_copies(squares, v):
    """All sums of the definition; the sketch is that of the whole vector at once."""
    sums = sketch(v.sqrt(), make_sketch(torch.arange(len(v)))).tolist()
    return [float((squares**2 / v).sum()), float(squares.sum()), float(v.sum()), *sums]


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_samples_equal_brute_force_on_copies_of_v(settings, statistic):
    optimizer, parameters = make(settings)
    scope = [parameters[0], parameters[2]]
    sampler, expected = sampler_of(optimizer, scope, statistic), []
    StepHooks(optimizer, sampler.observe, lambda: None)
    for _ in range(6):
        before = second_moments(optimizer, scope)
        give_gradients(parameters)
        squares = torch.cat([effective(optimizer, p).square().flatten() for p in scope])
        optimizer.step()
        v = second_moments(optimizer, scope)
        expected += drift_by_copies(squares, v) if statistic == "drift" else [brute_force(v, before, statistic)]
    read = sampler.read()
    read = [part for sample in read for part in sample] if statistic == "drift" else read
    assert read == pytest.approx(expected, rel=1e-4, abs=1e-4 if statistic == "drift" else None)
    assert sampler.read() == []
    assert sampler.non_finite == 0


@pytest.mark.parametrize("settings", SETTINGS)
def test_watching_changes_nothing(settings):
    watched, plain = make(settings, dtype=torch.float32), make(settings, dtype=torch.float32)
    samplers = [sampler_of(*watched, statistic) for statistic in STATISTICS]
    for i in range(5):
        for optimizer, parameters in (watched, plain):
            torch.manual_seed(i)
            give_gradients(parameters)
            if optimizer is watched[0]:
                for sampler in samplers:
                    sampler.observe()
            optimizer.step()
        assert all(len(sampler.read()) == 1 for sampler in samplers)
    for ours, theirs in zip(watched[1], plain[1], strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours.grad, theirs.grad)
        assert watched[0].state[ours].keys() == plain[0].state[theirs].keys()
        assert all(torch.equal(watched[0].state[ours][key], value) for key, value in plain[0].state[theirs].items())


def test_parameters_without_a_gradient_are_left_out_and_a_step_without_any_gives_no_sample():
    optimizer, parameters = make()
    sampler = sampler_of(optimizer, parameters)
    sampler.observe()
    assert sampler.read() == []
    give_gradients(parameters[:1])
    sampler.observe()
    expected = brute_force(parameters[0].grad.square() * (1 - 0.999), 0, "arithmetic")
    assert sampler.read() == pytest.approx([expected], rel=1e-5)


def test_a_coordinate_that_does_not_change_is_left_out_of_the_geometric_mean_only():
    optimizer, parameters = make()
    parameters[0].grad = torch.zeros(8, 6, dtype=torch.float64)
    parameters[0].grad[0, 0] = 2.0
    samplers = {statistic: sampler_of(optimizer, parameters, statistic) for statistic in ("geometric", "arithmetic")}
    for sampler in samplers.values():
        sampler.observe()
    assert samplers["geometric"].read() == pytest.approx([0.004], rel=1e-5)
    assert samplers["arithmetic"].read() == pytest.approx([0.004 / 48], rel=1e-5)


def test_a_step_in_which_nothing_changed_gives_no_geometric_sample():
    optimizer, parameters = make()
    sampler = sampler_of(optimizer, parameters, "geometric")
    for p in parameters:
        p.grad = torch.zeros_like(p)
    sampler.observe()
    assert (sampler.read(), sampler.non_finite) == ([], 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_step_with_a_non_finite_gradient_gives_no_sample_and_is_counted(statistic, bad):
    optimizer, parameters = make()
    sampler = sampler_of(optimizer, parameters, statistic)
    for i in range(4):
        give_gradients(parameters)
        if i in (1, 2):
            parameters[2].grad[1, 1] = bad
        sampler.observe()
    assert len(sampler.read()) == 2
    assert sampler.non_finite == 2
    sampler.observe()
    assert (len(sampler.read()), sampler.non_finite) == (1, 2)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("settings", ["fused", "Adam with coupled decay"])
def test_under_a_loss_scaler_samples_are_those_of_the_unscaled_run_and_skipped_steps_give_none(settings, statistic):
    (optimizer, parameters), (plain, twins) = make(settings, dtype=torch.float32), make(settings, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    sampler, expected = sampler_of(optimizer, parameters, statistic), sampler_of(plain, twins, statistic)
    said = ("found_inf", "grad_scale")  # by the scaler, to a fused optimizer
    StepHooks(optimizer, lambda: sampler.observe(*(getattr(optimizer, key, None) for key in said)), lambda: None)
    StepHooks(plain, expected.observe, lambda: None)
    for i in range(6):
        optimizer.zero_grad()
        give_gradients(twins)
        loss = sum((p * twin.grad).sum() for p, twin in zip(parameters, twins, strict=True))
        scaler.scale(loss * (float("inf") if i == 3 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        if i != 3:
            plain.step()
    assert scaler.get_scale() == 512.0
    assert sampler.read() == expected.read()
    assert sampler.non_finite == 0


def test_found_inf_drops_the_sample_and_grad_scale_divides():
    optimizer, parameters = make()
    sampler = sampler_of(optimizer, parameters)
    give_gradients(parameters)
    sampler.observe()
    (unscaled,) = sampler.read()
    for p in parameters:
        p.grad *= 64
    sampler.observe(found_inf=torch.tensor(1.0), grad_scale=torch.tensor(64.0))
    assert (sampler.read(), sampler.non_finite) == ([], 0)
    sampler.observe(found_inf=torch.tensor(0.0), grad_scale=torch.tensor(64.0))
    assert sampler.read() == [unscaled]


def test_a_subset_of_the_coordinates_is_close_to_all_and_no_larger_than_asked():
    optimizer, parameters = make(shapes=((300, 64), (5000,), (100, 100)))
    counted = []

    def look(pair):
        counted.append(pair[1].item())
        return pair

    subset = sampler_of(optimizer, parameters, max_coordinates=2000, reduce=look)
    full = sampler_of(optimizer, parameters, max_coordinates=34_200, reduce=look)
    for _ in range(3):
        give_gradients(parameters)
        subset.observe()
        full.observe()
        optimizer.step()
    assert subset.read() == pytest.approx(full.read(), rel=0.15)
    (few,), (all_of_them,) = set(counted[::2]), set(counted[1::2])
    assert all_of_them == 34_200
    assert 1500 < few <= 2000


@pytest.mark.parametrize("max_coordinates", [100, 250, 500, 512])
@pytest.mark.parametrize("size", [1000, 1001, 4096])
def test_a_subset_meets_every_place_of_a_group(size, max_coordinates):
    # Change lives in one place of every four only: an even stride would see all of it or none.
    seen = []
    for place in range(4):
        optimizer, parameters = make(shapes=((size,), (1,), (1,)))
        parameters[0].grad = torch.zeros(size, dtype=torch.float64)
        parameters[0].grad[place::4] = 1.0
        sampler = sampler_of(optimizer, parameters[:1], max_coordinates=max_coordinates)
        sampler.observe()
        seen += sampler.read()
    assert seen == pytest.approx([0.001 / 4] * 4, rel=0.1)


def test_every_observed_step_is_added_up_over_processes_at_once_and_reading_needs_nobody():
    optimizer, parameters = make()
    calls = []

    def add_the_other_process(pair):
        calls.append(copy.deepcopy(pair))
        return pair + torch.tensor([3.0, 7.0]).to(pair)

    sampler = sampler_of(optimizer, parameters, reduce=add_the_other_process)
    alone = sampler_of(optimizer, parameters)
    for _ in range(3):
        give_gradients(parameters)
        sampler.observe()
        alone.observe()
    assert len(calls) == 3
    count = sum(p.numel() for p in parameters)
    assert sampler.read() == pytest.approx([(z * count + 3) / (count + 7) for z in alone.read()], rel=1e-5)
    assert math.isclose(calls[0][1], count)
    assert sampler.read() == []
    assert len(calls) == 3


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_replicas_do_not_make_drift_any_larger(processes):
    """Sums over replicas are multiples of one's own; what is read is not."""
    optimizer, parameters = make()
    alone = sampler_of(optimizer, parameters, "drift", max_coordinates=30)
    together = sampler_of(optimizer, parameters, "drift", max_coordinates=30, reduce=lambda sums: processes * sums)
    give_gradients(parameters)
    for sampler in (alone, together):
        sampler.observe()
    (one,), (many,) = alone.read(), together.read()
    assert many == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_a_process_without_a_gradient_or_with_a_skipped_step_adds_zeros_instead_of_staying_away(found_inf):
    optimizer, parameters = make()
    calls = []
    sampler = sampler_of(optimizer, parameters, reduce=lambda pair: calls.append(pair.tolist()) or pair + 1)
    if found_inf is not None:
        give_gradients(parameters[: 3 if found_inf else 0])
        sampler.observe(torch.tensor(found_inf))
    else:
        sampler.observe()
    assert calls == [[0.0, 0.0]]
    assert sampler.read() == [1.0]  # what the others have seen
