"""What torchmetrics users expect of every metric: one suite over a list, against the functions each is the twin of."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_step import STEP, AtStep, NMPattern, Sparsifier, nm_masks, strip
from lightning_step.functional import (
    density_update,
    flip_rate_update,
    kept_magnitude_update,
    magnitude_mask,
    violation_update,
)
from lightning_step.metrics import Density, FlipRate, KeptMagnitude, NMCompliance, metric_inputs
from lightning_step.metrics.share import Share

PATTERN = NMPattern(2, 4)
Inputs = dict[str, Tensor]


def tensors(seed: int, rows: int = 5, dtype: torch.dtype = torch.float32) -> Inputs:
    """Everything a metric may ask for; about one half of the weights is zero, at random."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, 8, generator=generator).to(dtype)
    weight = latent * (torch.rand(rows, 8, generator=generator) < 0.5)
    mask, before = (magnitude_mask(t.float(), PATTERN, 1) for t in (latent, weight))
    return {"latent": latent, "weight": weight, "mask": mask, "before": before}


def nonzero(weight: Tensor) -> Tensor:
    return density_update(weight)


def holding(weight: Tensor) -> Tensor:
    violations, groups = violation_update(weight, PATTERN, 1)
    return torch.stack([groups - violations, groups])


# The metric, its twin, and the arguments both take.
CASES: list[Any] = [
    pytest.param(Density, nonzero, ["weight"], id="Density"),
    pytest.param(NMCompliance, holding, ["weight"], id="NMCompliance"),
    pytest.param(FlipRate, flip_rate_update, ["before", "mask"], id="FlipRate"),
    pytest.param(KeptMagnitude, kept_magnitude_update, ["latent", "mask"], id="KeptMagnitude"),
]
every_metric = pytest.mark.parametrize(("metric_class", "twin", "names"), CASES)
Twin = Callable[..., Tensor]
MetricClass = Callable[..., Share]


def chosen(inputs: Inputs, names: list[str]) -> Inputs:
    return {name: inputs[name] for name in names}


def expected(twin: Twin, names: list[str], *batches: Inputs) -> float:
    part, whole = sum(twin(*chosen(batch, names).values()) for batch in batches)  # type: ignore[misc]
    return float(part / whole)


@every_metric
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_updates_add_up_to_the_twin_of_all(metric_class: MetricClass, twin: Twin, names: list[str], dtype: Any) -> None:
    metric, batches = metric_class(), [tensors(seed, rows, dtype) for seed, rows in ((0, 5), (1, 2), (2, 9))]
    for batch in batches:
        metric.update(**chosen(batch, names))
    assert metric.compute().item() == pytest.approx(expected(twin, names, *batches), rel=1e-12)
    assert 0 < metric.compute().item() < 1


@every_metric
def test_forward_gives_the_value_of_its_own_batch_and_counts_it(
    metric_class: MetricClass, twin: Twin, names: list[str]
) -> None:
    metric, batches = metric_class(), [tensors(0), tensors(1, 3)]
    given = [metric(**chosen(batch, names)).item() for batch in batches]
    assert given == pytest.approx([expected(twin, names, batch) for batch in batches], rel=1e-12)
    assert metric.compute().item() == pytest.approx(expected(twin, names, *batches), rel=1e-12)


@every_metric
def test_reset_forgets(metric_class: MetricClass, twin: Twin, names: list[str]) -> None:
    metric = metric_class()
    metric.update(**chosen(tensors(0), names))
    metric.compute()
    metric.reset()
    metric.update(**chosen(tensors(1), names))
    assert metric.compute().item() == pytest.approx(expected(twin, names, tensors(1)), rel=1e-12)


@every_metric
def test_without_an_update_there_is_a_warning_and_no_number(metric_class: MetricClass, twin: Twin, names: list[str]) -> None:
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert metric_class().compute().isnan()


@every_metric
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_counts_on_for_itself(metric_class: MetricClass, twin: Twin, names: list[str], duplicate: Any) -> None:
    metric = metric_class()
    metric.update(**chosen(tensors(0), names))
    other = duplicate(metric)
    other.update(**chosen(tensors(1), names))
    assert other.compute().item() == pytest.approx(expected(twin, names, tensors(0), tensors(1)), rel=1e-12)
    assert metric.compute().item() == pytest.approx(expected(twin, names, tensors(0)), rel=1e-12)


@every_metric
def test_a_state_dict_is_empty_until_asked_for_and_then_restores(
    metric_class: MetricClass, twin: Twin, names: list[str]
) -> None:
    metric, fresh = metric_class(), metric_class()
    assert metric.state_dict() == {}
    metric.persistent(True)
    fresh.persistent(True)
    metric.update(**chosen(tensors(0), names))
    fresh.load_state_dict(metric.state_dict(), strict=True)
    fresh.update(**chosen(tensors(1), names))
    assert fresh.compute().item() == pytest.approx(expected(twin, names, tensors(0), tensors(1)), rel=1e-12)


@every_metric
@pytest.mark.parametrize("cast", ["half", "bfloat16", "to", "set_dtype"])
def test_casting_a_module_to_half_precision_leaves_the_counts_exact(
    metric_class: MetricClass, twin: Twin, names: list[str], cast: str
) -> None:
    """A trainer with true half precision casts the whole module, metrics included; 2049 is no number of float16."""
    module = nn.ModuleDict({"metric": metric_class()})
    module["metric"].update(**chosen(tensors(0, 2049), names))
    if cast in ("half", "bfloat16"):
        getattr(module, cast)()
    elif cast == "to":
        module.to(torch.float16)
    else:
        module["metric"].set_dtype(torch.float16)
    module["metric"].update(**chosen(tensors(1), names))
    want = expected(twin, names, tensors(0, 2049), tensors(1))
    assert module["metric"].compute().item() == pytest.approx(want, rel=1e-12)
    module["metric"].reset()
    module["metric"].update(**chosen(tensors(0, 2049), names))
    assert module["metric"].compute().item() == pytest.approx(expected(twin, names, tensors(0, 2049)), rel=1e-12)


@every_metric
def test_states_move_with_the_module(metric_class: MetricClass, twin: Twin, names: list[str]) -> None:
    module = nn.ModuleDict({"metric": metric_class()})
    module["metric"].update(**chosen(tensors(0), names))
    metric = module.to("meta")["metric"]
    states = [getattr(metric, name) for name in metric._defaults]
    assert {state.device.type for state in (*states, *metric._defaults.values())} == {"meta"}
    assert metric.device.type == "meta"


def collection(**arguments: Any) -> MetricCollection:
    return MetricCollection([Density(), NMCompliance(), FlipRate(), KeptMagnitude()], **arguments)


def test_one_update_by_name_feeds_a_whole_collection() -> None:
    metrics, batches = collection(prefix="sparse/"), [tensors(0), tensors(1, 3)]
    for batch in batches:
        metrics.update(**batch)
    values = metrics.compute()
    assert sorted(values) == ["sparse/Density", "sparse/FlipRate", "sparse/KeptMagnitude", "sparse/NMCompliance"]
    for metric_class, twin, names in (case.values for case in CASES):
        want = expected(twin, names, *batches)
        assert values[f"sparse/{metric_class.__name__}"].item() == pytest.approx(want, rel=1e-12)


def test_no_two_metrics_of_a_collection_share_a_state_that_happens_to_be_the_same() -> None:
    """After the first update 2:4 and 3:4 count the same; a collection would let them share one state from then on."""
    half = torch.tensor([[1.0, 2.0, 0.0, 0.0, 3.0, 4.0, 0.0, 0.0]] * 4)
    metrics = MetricCollection(
        {
            "2:4": NMCompliance(2, 4),
            "1:4": NMCompliance(1, 4),
            "3:4": NMCompliance(3, 4),
            "along rows": NMCompliance(2, 4, dim=0),
            "density": Density(),
            "flips": FlipRate(),
            "kept": KeptMagnitude(),
        }
    )
    ones = torch.ones(4, 8)
    metrics.update(weight=half[:, :4], latent=ones, mask=half > 0, before=ones > 0)
    three = torch.tensor([[1.0, 1.0, 1.0, 0.0] * 2] * 4)
    metrics.update(weight=three, latent=ones, mask=ones > 0, before=ones > 0)
    values = {name: value.item() for name, value in metrics.compute().items()}
    by_hand = {"2:4": 4 / 12, "1:4": 0, "3:4": 1, "along rows": 4 / 12, "density": 32 / 48, "flips": 16 / 64}
    assert values == {**by_hand, "kept": 48 / 64}


@every_metric
def test_plot_takes_one_value_several_values_and_axes(metric_class: MetricClass, twin: Twin, names: list[str]) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    metric = metric_class()
    values = [metric(**chosen(tensors(seed), names)) for seed in range(3)]
    _, axes = metric.plot()
    assert axes.lines[0].get_ydata()[0] == pytest.approx(metric.compute().item())
    assert axes.get_ylabel() == metric_class.__name__
    _, axes = metric.plot(values)
    assert list(axes.lines[0].get_ydata()) == pytest.approx([value.item() for value in values])
    assert axes.get_ylim() == pytest.approx((-0.1, 1.1)), "a share lies between 0 and 1"
    _, own = pyplot.subplots()
    nothing, same = metric.plot(values[0], ax=own)
    assert nothing is None
    assert same is own
    assert metric.plot(ax=own)[1] is own
    pyplot.close("all")


def test_without_matplotlib_plot_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmetrics.utilities.plot._MATPLOTLIB_AVAILABLE", False)
    metric = Density()
    metric.update(torch.ones(2))
    with pytest.raises(ModuleNotFoundError, match="expects `matplotlib` to be installed"):
        metric.plot()


def test_a_model_in_training_feeds_a_collection() -> None:
    """The same numbers from the masks of a sparsifier as from the weights it leaves."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, 2, 4, recipe=STEP(AtStep(3)), overrides={"1": (1, 4)}, measure_every=1)
    seen = []
    for _ in range(6):
        before = {name: inputs["mask"] for name, inputs in metric_inputs(model)}
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = collection()
        for name, inputs in metric_inputs(model):
            metrics.update(**inputs, before=before[name])
        seen.append({name: value.item() for name, value in metrics.compute().items()})
    weights = 8 * 16 + 16 * 8 + 8 * 3
    assert [values["Density"] for values in seen] == [1.0] * 2 + [(128 / 2 + 128 / 4 + 24 / 2) / weights] * 4
    assert [values["NMCompliance"] for values in seen] == [0.0] * 2 + [1.0] * 4
    assert seen[-1]["FlipRate"] == pytest.approx(sparsifier.gauges()["flip_rate"])
    assert 0.5 < seen[-1]["KeptMagnitude"] < 1
    latent = {name: inputs["latent"].clone() for name, inputs in metric_inputs(model)}
    masks = nm_masks(model)
    strip(model)
    kept, total = (
        sum(w.detach().abs().sum().item() for w in ws) for ws in (map(model.get_parameter, masks), latent.values())
    )
    assert seen[-1]["KeptMagnitude"] == pytest.approx(kept / total, rel=1e-6)


def test_a_shared_tensor_is_counted_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    Sparsifier(model, torch.optim.AdamW(model.parameters()), 2, 4, recipe=STEP(AtStep(1)))
    assert [name for name, _ in metric_inputs(model)] == ["0.weight"]
