"""What can be read off masks, weights and second moments between two optimizer steps, in one transfer to the host.

Note [Second moments to look at]
    Until it is frozen, v is what the optimizer holds. From the switch on the optimizer holds the preconditioner D in its
    place; then the v that D was made of is shown, so that a curve goes on level where the v before ended, and does not jump
    to the scale of its root. Coordinates without a gradient to speak of were given the mean of their tensor at the switch:
    how many there were can no longer be told, and is not shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_step.errors import OptimizerError
from lightning_step.optim import SecondMomentAdapter, adapter_for
from lightning_step.sharding import any_sharded, local, shards
from lightning_step.sparsifier import Sparsifier

__all__ = ["Look", "Reading", "looks", "measure", "sum_over_parts"]

_V_L1, _V_SQUARED, _NEAR_ZERO, _COUNT, _KEPT, _MAGNITUDE = range(6)


@dataclass(frozen=True)
class Reading:
    """The numbers of one optimizer at one step.

    Example:
        >>> Reading({"phase": 1.0}, {"fc.weight": {"v_l1": 0.5}}).scalars["phase"]
        1.0
    """

    scalars: dict[str, float]  # by the last part of their tag, in the order of the table
    layers: dict[str, dict[str, float]]  # the same for every masked tensor


class Look(NamedTuple):
    """What one process holds of a masked tensor.

    Example:
        >>> Look("fc.weight", torch.ones(2), None, None, 1).shards
        1
    """

    name: str
    weight: Tensor  # the latent weight
    v: Tensor | None  # see Note [Second moments to look at]; None if nobody can tell
    near_zero: float | None  # where v ends to be about 0; None once frozen
    shards: int  # over how many processes the tensor is spread


def looks(sparsifier: Sparsifier) -> Iterator[Look]:
    """Look at every masked tensor of one optimizer.

    Args:
        sparsifier: Its driver.

    Yields:
        One after the other, so that what is computed for one is gone before the next.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> sparsifier = Sparsifier(model, torch.optim.AdamW(model.parameters()), total_steps=10)
        >>> [look.name for look in looks(sparsifier)]
        ['weight']
    """
    adapter = _adapter(sparsifier.optimizer)
    groups = {parameter: group for group in sparsifier.optimizer.param_groups for parameter in group["params"]}
    frozen = set(sparsifier.frozen)
    for name, parameter in sparsifier.masks.parameters.items():
        v, bound = None, None
        if adapter is not None:
            v, bound = _second_moment(sparsifier, adapter, groups[parameter], parameter, name in frozen)
        yield Look(name, local(parameter.detach()), v, bound, shards(parameter))


@torch.no_grad()
def measure(sparsifiers: Sequence[Sparsifier]) -> list[Reading]:
    """Measure all optimizers at once. Under FSDP2 every process has to call this.

    Args:
        sparsifiers: One per optimizer that holds masked tensors.

    Returns:
        One reading for each, the same on every process that holds the same weights.

    Example:
        >>> from lightning_step import Dense
        >>> model = torch.nn.Linear(8, 4)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe=Dense())
        >>> measure([sparsifier])[0].scalars
        {'phase': 1.0, 'density': 1.0, 'kept_magnitude': 0.5, 'lr': 0.1}
    """
    tables = [_table(sparsifier) for sparsifier in sparsifiers]
    rates = [_rate(sparsifier) for sparsifier in sparsifiers]
    device = tables[0].device
    flat = torch.cat([each.flatten().to(device) for each in [*tables, *rates]]).tolist()  # the only wait for the device
    rest = iter(flat)
    rows = [[[next(rest) for _ in range(table.shape[1])] for _ in range(len(table))] for table in tables]
    return [_reading(s, table, next(rest)) for s, table in zip(sparsifiers, rows, strict=True)]


def sum_over_parts(sparsifier: Sparsifier, table: Tensor, spread: Sequence[int]) -> Tensor:
    """Add rows up over the processes that hold a part of a tensor each. Under FSDP2 every process has to call this.

    Args:
        sparsifier: The driver of the tensors.
        table: Sums over the local parts, one row per masked tensor.
        spread: Over how many processes each tensor is spread.

    Returns:
        Sums over the whole tensors.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> sparsifier = Sparsifier(model, torch.optim.AdamW(model.parameters()), total_steps=10)
        >>> sum_over_parts(sparsifier, torch.ones(1, 2), [1])
        tensor([[1., 1.]])
    """
    if not any_sharded(sparsifier.masks.parameters.values()):
        return table
    # All processes add their part, or their copy of it: a shard counts as often as a replica does.
    weighted = table * torch.tensor(spread, dtype=table.dtype, device=table.device)[:, None]
    counted = sparsifier.reduce(torch.cat([weighted, weighted.new_ones(1, table.shape[1])]))
    return counted[:-1] / counted[-1]


def _table(sparsifier: Sparsifier) -> Tensor:
    rows, spread = [], []
    for look in looks(sparsifier):
        kept = sparsifier.masks.kept_magnitude(look.name)
        rows.append(torch.cat([_sums(look).to(kept.device), kept]))
        spread.append(look.shards)
    return sum_over_parts(sparsifier, torch.stack([row.to(rows[0].device) for row in rows]), spread)


def _sums(look: Look) -> Tensor:
    v, wide = look.v, torch.float64  # the square of a small v is no float32
    if v is None:
        return torch.zeros(4, dtype=wide)
    near_zero = v.new_zeros((), dtype=wide) if look.near_zero is None else (v <= look.near_zero).sum(dtype=wide)
    squared = torch.linalg.vector_norm(v, dtype=wide).square()
    return torch.stack([v.sum(dtype=wide), squared, near_zero, v.new_full((), v.numel(), dtype=wide)])


def _reading(sparsifier: Sparsifier, table: list[list[float]], lr: float) -> Reading:
    totals = [sum(column) for column in zip(*table, strict=True)]
    flips = sparsifier.masks.flip_rates
    gauges = sparsifier.gauges()
    seen = _adapter(sparsifier.optimizer) is not None
    frozen = set(sparsifier.frozen) & set(sparsifier.masks.parameters)
    values: dict[str, float] = {
        **{name: gauges[name] for name in ("phase", "variance_change", "window_mean", "threshold") if name in gauges},
        **_ratio(gauges),
        **(_norms(totals) if seen else {}),
        **({"v_near_zero": totals[_NEAR_ZERO] / totals[_COUNT]} if seen and not frozen else {}),
        **({"flip_rate": gauges["flip_rate"]} if "flip_rate" in gauges else {}),
        "density": sparsifier.masks.density,
        "kept_magnitude": _share(totals),
        "lr": lr,
    }
    layers: dict[str, dict[str, float]] = {
        name: {
            **({"flip_rate": flips[name]} if name in flips else {}),
            "kept_magnitude": _share(row),
            **(_norms(row) if seen else {}),
        }
        for name, row in zip(sparsifier.masks.parameters, table, strict=True)
    }
    return Reading(values, layers)


def _ratio(gauges: dict[str, float]) -> dict[str, float]:
    mean, threshold = gauges.get("window_mean"), gauges.get("threshold")
    return {"ratio": mean / threshold} if mean is not None and threshold else {}


def _norms(row: Sequence[float]) -> dict[str, float]:
    return {"v_l1": row[_V_L1], "v_l2": row[_V_SQUARED] ** 0.5}


def _share(row: Sequence[float]) -> float:
    return row[_KEPT] / row[_MAGNITUDE] if row[_MAGNITUDE] else 0.0


def _rate(sparsifier: Sparsifier) -> Tensor:
    """The learning rate of the first group that holds a masked tensor; it may be a tensor on the device."""
    masked = set(sparsifier.masks.parameters.values())
    group = next(g for g in sparsifier.optimizer.param_groups if masked & set(g["params"]))
    return torch.as_tensor(group.get("lr", torch.nan), dtype=torch.float64)


def _adapter(optimizer: Optimizer) -> SecondMomentAdapter | None:
    try:
        return adapter_for(optimizer)
    except OptimizerError:
        return None  # a recipe that needs none trains it; its second moment is its own affair


def _second_moment(
    sparsifier: Sparsifier, adapter: SecondMomentAdapter, group: dict[str, Any], parameter: Tensor, frozen: bool
) -> tuple[Tensor, float | None]:
    v = adapter.second_moment(sparsifier.optimizer, parameter)
    if v is None:  # no gradient yet
        return torch.zeros_like(local(parameter)), 0.0
    if frozen:
        freeze = sparsifier.recipe.plan().freeze
        t = next((event.step for event in sparsifier.events if event.freeze), sparsifier.t)
        assert freeze is not None  # something is frozen
        return adapter.moment_behind(group, local(v), max(t, 1), freeze.form), None
    moments = adapter.moments(group)
    return local(v), moments.eps**2 * (1 - moments.beta2 ** max(sparsifier.t, 1))
