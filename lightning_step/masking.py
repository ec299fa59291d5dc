"""All masks of one optimizer's tensors, and what a recipe does with them around an optimizer step.

Note [Kept zeros]
    A fixed mask is read off the weights like any other: what was pruned is zero, so what is not zero was kept, and nothing
    is stored that could be lost on resume. A kept weight that a step brings to exactly zero would tie with the pruned ones
    and could lose its place to one of a lower index. So it is held at the smallest normal number instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_step.functional import (
    Layer,
    flip_rate_update,
    kept_magnitude_update,
    order_statistics,
    ratio_compute,
)
from lightning_step.functional.bits import keep_
from lightning_step.functional.mask import is_small
from lightning_step.naming import submodule
from lightning_step.parametrization import NMMask
from lightning_step.pattern import NMPattern
from lightning_step.recipes import Moment, Recipe
from lightning_step.sharding import Reduce, all_reduce, any_sharded, local, shards
from lightning_step.targets import Target
from lightning_step.together import add_pruned_parts, prepare_masks

__all__ = ["MaskSet", "parameter_of", "restore_masks"]


class MaskSet:
    """The masks under one recipe.

    Args:
        model: The model the targets were found in.
        targets: The masked tensors.
        masks: Target name to its mask.
        recipe: What to do with them.
        reduce: Adds a tensor up over all processes.
        total_steps: Optimizer steps of the whole run, if known.

    Example:
        >>> from lightning_step import NMPattern, STE, apply_nm_masks
        >>> from lightning_step.parametrization import nm_masks
        >>> layer = nn.Linear(8, 4)
        >>> targets = apply_nm_masks(layer, NMPattern(2, 4), enabled=False).masked
        >>> masks = MaskSet(layer, targets, nm_masks(layer), STE())
        >>> masks.begin(0)
        >>> masks.enabled, int(layer.weight.count_nonzero())
        (True, 16)
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        masks: Mapping[str, NMMask],
        recipe: Recipe,
        reduce: Reduce = all_reduce,
        total_steps: int | None = None,
    ) -> None:
        self.parameters: dict[str, nn.Parameter] = {t.name: parameter_of(model, t) for t in targets}
        self.flip_rates: dict[str, float] = {}  # of every tensor, in the step that was measured last
        self.targets = {t.name: t for t in targets}  # with the n:m that each is to end with
        self._masks = {t.name: masks[t.name] for t in targets}
        self._plan = recipe.plan()
        self._rule = self._plan.gradient
        self._before: dict[str, Tensor] = {}  # bool masks, only between the hooks of a step that needs them
        self._kept: dict[str, Tensor] = {}  # see `kept_magnitude`, where the last step was measured
        self._rates: dict[Tensor, float] = {}
        self._measure = False
        self._reduce = reduce
        self._began: int | None = None  # steps taken when masks began
        self._total_steps = total_steps
        for name, mask in self._masks.items():
            mask.final = self.targets[name].pattern
        # Masks left over from an earlier fit are switched by this recipe from now on.
        self.enable(False, 0)

    @property
    def enabled(self) -> bool:
        """Whether masks are on."""
        return any(mask.enabled for mask in self._masks.values())

    @property
    def rates(self) -> Mapping[Tensor, float]:
        """What the rates of parameters are multiplied with in the next step, of all for which that is not 1."""
        return self._rates

    @property
    def chooses(self) -> bool:
        """Whether n is chosen when masks begin."""
        return self._plan.allocate is not None

    def enable(self, on: bool, t: int) -> None:
        """Switch the masks; the weights stay as they are.

        Args:
            on: Whether forward passes see masked weights.
            t: Optimizer steps taken.
        """
        for mask in self._masks.values():
            mask.gradient = self._rule.through
            mask.enabled = on
        self._kept.clear()
        self._show(t)

    @torch.no_grad()
    def begin(self, t: int) -> None:
        """Switch the masks on as the recipe wants it: n is chosen now, and a fixed mask is made by pruning, once.

        Args:
            t: Optimizer steps taken.
        """
        self._began = t
        if self._plan.allocate is not None:
            chosen = self._plan.allocate(list(self.parameters), self._layers())
            self._choose(dict(zip(self.parameters, chosen, strict=True)))
        self.enable(True, t)
        if self._rule.fixed:
            for name, parameter in self.parameters.items():
                weight = local(parameter)
                _hold(weight, self._masks[name].mask(weight))

    def keep(self, on: bool) -> None:
        """Have masks kept between the steps, or no longer. See Note [Freshness].

        Args:
            on: Whether to keep them.
        """
        for name, mask in self._masks.items():
            mask.kept.train(on and not any_sharded((self.parameters[name],)), partial(self._prepare, name))

    def _prepare(self, name: str) -> None:
        if not is_small(self.parameters[name]):
            return  # its mask is made by itself; to look through all others here would take quadratic time
        prepare_masks([(self.parameters[name], mask) for name, mask in self._masks.items()])

    def drop(self) -> None:
        """Forget the masks that are kept: the weights have changed, or will."""
        for mask in self._masks.values():
            mask.kept.drop()

    def mask_of(self, name: str) -> Tensor:
        """The mask in force, or the one that it would be while masks are off.

        Args:
            name: Name of a masked tensor.

        Returns:
            Boolean, the shape of what this process holds of the tensor.
        """
        return self._masks[name].mask(local(self.parameters[name]))

    def kept_magnitude(self, name: str) -> Tensor:
        """How much of a tensor its mask keeps, or would keep. See `kept_magnitude_update`.

        Args:
            name: Name of a masked tensor.

        Returns:
            The pair, of what this process holds of the tensor.
        """
        kept = self._kept.get(name)  # masks are dear: those of a measured step are not made a third time
        return kept_magnitude_update(local(self.parameters[name]), self.mask_of(name)) if kept is None else kept

    @property
    def density(self) -> float:
        """The share of weights that the masks in force keep; 1 while they are off."""
        if not self.enabled:
            return 1.0
        kept = sum(self.parameters[name].numel() * mask.pattern.n / mask.pattern.m for name, mask in self._masks.items())
        return kept / sum(parameter.numel() for parameter in self.parameters.values())

    def edit_gradients(self, grad_scale: Tensor | None) -> None:
        r"""Add :math:`\lambda\,(1-\Pi)\odot w` to the gradients that the optimizer is about to use.

        Args:
            grad_scale: Factor that is still in the gradients; the term is given the same.
        """
        if not (self.enabled and self._rule.lam):
            return
        given = [(p, self._masks[name]) for name, p in self.parameters.items() if p.grad is not None]
        add_pruned_parts(given, self._rule.lam, grad_scale)

    def before_step(self, *, measure: bool) -> None:
        """Remember the masks, where something after the step has to know them.

        Args:
            measure: Whether to measure the flip rate of this step.
        """
        self._measure = measure and self.enabled
        self._before.clear()
        self._kept.clear()
        if self._measure or (self.enabled and self._rule.fixed):
            self._before = {name: self._masks[name].kept_mask(local(p)) for name, p in self.parameters.items()}

    def after_step(self, t: int) -> float | None:
        """Hold fixed masks, bring the patterns up to date, measure.

        Args:
            t: Optimizer steps taken.

        Returns:
            Share of mask entries that changed in this step, if it was to be measured.
        """
        if self.enabled and self._rule.fixed:
            for name, mask in self._before.items():
                _hold(local(self.parameters[name]), mask)
        if self.enabled:
            self._show(t)
        rate = self._flip_rate() if self._measure else None
        self._before.clear()
        return rate

    def state_dict(self) -> dict[str, Any]:
        """What the masks are now, and are to become: for a resumed run, an evaluation, or an export of the checkpoint.

        Returns:
            Plain values.
        """
        return {
            "began": self._began,
            "now": {name: [mask.pattern.n, mask.pattern.m] for name, mask in self._masks.items()},
            "final": {name: [mask.final.n, mask.final.m] for name, mask in self._masks.items()},
            "leak": max(mask.leak for mask in self._masks.values()),
        }

    def load_state_dict(self, state: Mapping[str, Any], on: bool, t: int) -> None:
        """Go on where `state_dict` was called.

        Args:
            state: From `state_dict`; empty for one from before there was one.
            on: Whether masks were on.
            t: Optimizer steps taken.
        """
        self._began = state.get("began")
        self._choose({name: NMPattern(*pattern) for name, pattern in state.get("final", {}).items()})
        self.enable(on, t)

    def _show(self, t: int) -> None:
        """Bring every mask up to date. What stays is left alone, or torch.compile would take it for new."""
        moment = Moment(t, self._began, self._total_steps)
        on = self.enabled
        leak = float(self._plan.fade(moment)) if on else 0.0
        for name, mask in self._masks.items():
            # A mask that is off stands for what is to come: an export before masks begin prunes to that, if told to.
            pattern = self._plan.pattern(name, mask.final, moment) if on else mask.final
            if mask.pattern != pattern:
                mask.pattern = pattern
            if mask.leak != leak:
                mask.leak = leak
        self._rates = self._rates_now(moment) if on else {}

    def _rates_now(self, moment: Moment) -> dict[Tensor, float]:
        factors: dict[tuple[NMPattern, float], float] = {}
        rates: dict[Tensor, float] = {}
        for name, mask in self._masks.items():
            key = mask.pattern, mask.leak
            if key not in factors:
                factors[key] = float(self._plan.rate(*key, moment))
            if factors[key] != 1.0:
                rates[self.parameters[name]] = factors[key]
        return rates

    def _choose(self, patterns: Mapping[str, NMPattern]) -> None:
        for name, pattern in patterns.items():
            self._masks[name].final = pattern
            self.targets[name] = replace(self.targets[name], pattern=pattern)

    def _layers(self) -> list[Layer]:
        """What there is to know of every tensor, the same on every process: see Note [One sum for all processes]."""
        table = []
        for name, parameter in self.parameters.items():
            mask = self._masks[name]
            # Shards add up to the whole, replicas to a multiple of it: all that counts are shares within one tensor.
            table.append(order_statistics(local(parameter), mask.final, mask.dim))
        sums = self._reduce(torch.cat([each.to(table[0].device) for each in table], dim=1)).tolist()
        layers, at = [], 0
        for target in self.targets.values():
            places = slice(at, at + target.pattern.m)
            layers.append(
                Layer(target.shape, target.pattern, magnitudes=tuple(sums[0][places]), squares=tuple(sums[1][places]))
            )
            at += target.pattern.m
        return layers

    def _flip_rate(self) -> float:
        pairs = []
        for name, before in self._before.items():
            after = self.mask_of(name)
            pairs.append(flip_rate_update(before, after) * shards(self.parameters[name]))
            self._kept[name] = kept_magnitude_update(local(self.parameters[name]), after)
        by_tensor = torch.stack([pair.to(pairs[0].device) for pair in pairs])
        if any_sharded(self.parameters.values()):  # replicas have flipped the same entries: nothing to add up or wait for
            by_tensor = self._reduce(by_tensor)
        counts = by_tensor.cpu()  # the only wait for the device
        self.flip_rates = {name: ratio_compute(pair) for name, pair in zip(self._before, counts, strict=True)}
        return ratio_compute(counts.sum(0))


def _hold(parameter: Tensor, mask: Tensor) -> None:
    """Prune, in place; what is kept stays apart from what is pruned. See Note [Kept zeros]."""
    zeros = mask & (parameter == 0)
    keep_(parameter, mask)
    parameter.masked_fill_(zeros, torch.finfo(parameter.dtype).smallest_normal)


def parameter_of(model: nn.Module, target: Target) -> nn.Parameter:
    """The latent weight behind a target.

    Args:
        model: The model the target was found in.
        target: The target.

    Returns:
        The ``Parameter``, masked or not.

    Example:
        >>> from lightning_step import NMPattern, find_targets
        >>> layer = nn.Linear(8, 4)
        >>> parameter_of(layer, find_targets(layer, NMPattern(2, 4)).masked[0]) is layer.weight
        True
    """
    module_name, attribute = target.owners[0]
    parameter = submodule(model, module_name)._parameters[attribute]
    assert parameter is not None  # a target is only made of a parameter that is there
    return parameter


def restore_masks(masks: Mapping[str, NMMask], state: Mapping[str, Any]) -> None:
    """Masks as a checkpoint has them, to evaluate it: nothing is trained, so it does not matter which recipe made them.

    Args:
        masks: Tensor name to its mask.
        state: Of the driver, from the checkpoint.

    Example:
        >>> mask = NMMask(NMPattern(1, 4), enabled=False)
        >>> restore_masks({"fc.weight": mask}, {"masks": True, "patterns": {"now": {"fc.weight": [2, 4]}, "leak": 0.0}})
        >>> mask
        NMMask(2:4 along dim -1, straight_through, on)
    """
    saved = state.get("patterns", {})
    for name, mask in masks.items():
        mask.enabled, mask.leak = bool(state["masks"]), float(saved.get("leak", 0.0))
        for which, found in (("pattern", saved.get("now", {})), ("final", saved.get("final", {}))):
            if name in found:
                setattr(mask, which, NMPattern(*found[name]))
