"""All masks of one optimizer's tensors, and what a recipe does with them around an optimizer step.

Note [Kept zeros]
    A fixed mask is read off the weights like any other: what was pruned is zero, so what is not zero was kept, and nothing
    is stored that could be lost on resume. A kept weight that a step brings to exactly zero would tie with the pruned ones
    and could lose its place to one of a lower index. So it is held at the smallest normal number instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_step.functional import apply_mask, flip_rate_update, pruned_part, ratio_compute
from lightning_step.naming import submodule
from lightning_step.parametrization import NMMask
from lightning_step.pattern import NMPattern
from lightning_step.recipes import Recipe
from lightning_step.sharding import Reduce, all_reduce, any_sharded, local, shards
from lightning_step.targets import Target

__all__ = ["MaskSet"]


class MaskSet:
    """The masks under one recipe.

    Args:
        model: The model the targets were found in.
        targets: The masked tensors.
        masks: Target name to its mask.
        recipe: What to do with them.
        reduce: Adds a tensor up over all processes.

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
    ) -> None:
        self.parameters: dict[str, nn.Parameter] = {t.name: parameter_of(model, t) for t in targets}
        self._targets = {t.name: t for t in targets}
        self._masks = {t.name: masks[t.name] for t in targets}
        self._plan = recipe.plan()
        self._rule = self._plan.gradient
        self._before: dict[str, Tensor] = {}  # bool masks, only between the hooks of a step that needs them
        self._measure = False
        self._reduce = reduce
        # Masks left over from an earlier fit are switched by this recipe from now on.
        self.enable(False, 0)

    @property
    def enabled(self) -> bool:
        """Whether masks are on."""
        return any(mask.enabled for mask in self._masks.values())

    def enable(self, on: bool, t: int) -> None:
        """Switch the masks; the weights stay as they are.

        Args:
            on: Whether forward passes see masked weights.
            t: Optimizer steps taken.
        """
        for name, mask in self._masks.items():
            mask.gradient = self._rule.through
            mask.enabled = on
            mask.pattern = self._pattern(name, t)

    @torch.no_grad()
    def begin(self, t: int) -> None:
        """Switch the masks on as the recipe wants it: a fixed mask is made by pruning, once.

        Args:
            t: Optimizer steps taken.
        """
        self.enable(True, t)
        if self._rule.fixed:
            for name, parameter in self.parameters.items():
                weight = local(parameter)
                _hold(weight, self._masks[name].mask(weight))

    def edit_gradients(self, grad_scale: Tensor | None) -> None:
        r"""Add :math:`\lambda\,(1-\Pi)\odot w` to the gradients that the optimizer is about to use.

        Args:
            grad_scale: Factor that is still in the gradients; the term is given the same.
        """
        if not (self.enabled and self._rule.lam):
            return
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                weight = local(parameter)
                term = pruned_part(weight, self._masks[name].mask(weight))
                if grad_scale is not None:
                    term *= grad_scale.to(term)
                local(parameter.grad).add_(term, alpha=self._rule.lam)

    def before_step(self, *, measure: bool) -> None:
        """Remember the masks, where something after the step has to know them.

        Args:
            measure: Whether to measure the flip rate of this step.
        """
        self._measure = measure and self.enabled
        self._before.clear()
        if self._measure or (self.enabled and self._rule.fixed):
            self._before = {name: self._masks[name].mask(local(p)) for name, p in self.parameters.items()}

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
            for name, current in self._masks.items():
                current.pattern = self._pattern(name, t)
        rate = self._flip_rate() if self._measure else None
        self._before.clear()
        return rate

    def _pattern(self, name: str, t: int) -> NMPattern:
        return self._plan.pattern(name, self._targets[name].pattern, t)

    def _flip_rate(self) -> float:
        pairs = [
            flip_rate_update(before, self._masks[name].mask(local(self.parameters[name]))) * shards(self.parameters[name])
            for name, before in self._before.items()
        ]
        total = torch.stack([pair.to(pairs[0].device) for pair in pairs]).sum(0)
        # Replicas have flipped the same entries: there is nothing to add up, and nothing to wait for.
        return ratio_compute(self._reduce(total) if any_sharded(self.parameters.values()) else total)


def _hold(parameter: Tensor, mask: Tensor) -> None:
    """Prune, in place; what is kept stays apart from what is pruned. See Note [Kept zeros]."""
    zeros = mask & (parameter == 0)
    parameter.copy_(apply_mask(parameter, mask))
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
