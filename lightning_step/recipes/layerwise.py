"""Another n for every layer, under one budget for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from typing_extensions import override

from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.functional import (
    Layer,
    choices_of,
    cost,
    erk_allocation,
    magnitude_allocation,
    search_allocation,
)
from lightning_step.pattern import NMPattern
from lightning_step.recipes.base import Recipe
from lightning_step.recipes.plan import Plan
from lightning_step.recipes.step import STEP
from lightning_step.recipes.wrapper import Wrapper

__all__ = ["Layerwise"]

_FORMS = {"search": search_allocation, "magnitude": magnitude_allocation, "erk": erk_allocation}


@dataclass(frozen=True)
class Layerwise(Wrapper):
    """Choose n for every tensor when masks begin; m stays, and the budget is shared by all tensors of an optimizer.

    The n to choose from are powers of two, the tensor's own, and m. A weight after some dense training says more than a
    random one: with masks from the first step on, ``"search"`` and ``"magnitude"`` are for pretrained models. With n = 1 and
    its own budget there is nothing to share out: 2:16 costs what 1:8 does and leaves a choice.

    Args:
        recipe: How the masks are learned.
        by: ``"search"``: tighten where least of a layer's weights is lost, every layer counts alike; ``"magnitude"``: keep
            what is large within its layer, every weight counts alike; ``"erk"``: by shapes alone.
        budget: Share of the dense cost that may be kept. None: what the given n:m cost.
        uses: How often each weight of a tensor is used for one example, by glob; the last match wins. Then the budget is one
            of multiplications: for a convolution the number of output positions, for a linear layer that of tokens. None:
            the budget is one of weights.

    Raises:
        ArgumentTypeError: If ``recipe`` is no recipe, or ``uses`` no mapping.
        ConfigurationError: If ``recipe`` has no masks, or an argument is out of range; when fitting starts, if the budget
            is too small for one weight in every group, or ``uses`` does not name a tensor.

    Example:
        >>> plan = Layerwise(STEP(), by="erk", budget=0.25).plan()
        >>> layers = [Layer((64, 64), NMPattern(1, 4)), Layer((8, 64), NMPattern(1, 4))]
        >>> [str(pattern) for pattern in plan.allocate(["fc.weight", "head.weight"], layers)]
        ['1:4', '1:4']

    References:
        Sun et al., DominoSearch: Find layer-wise fine-grained N:M sparse schemes from dense neural networks, NeurIPS 2021.
        Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, ICML 2020.
    """

    recipe: Recipe = field(default_factory=STEP)
    by: Literal["search", "magnitude", "erk"] = "search"
    budget: float | None = None
    uses: Mapping[str, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        self.check_recipe()
        if self.by not in _FORMS:
            raise ConfigurationError(f"Expected `by` to be one of {[*_FORMS]}, but got {self.by!r}.")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ConfigurationError(f"Expected 0 < `budget` <= 1, a share of the dense cost, but got {self.budget!r}.")
        _check_uses(self.uses)

    @override
    def plan(self) -> Plan:
        return dataclasses.replace(self.recipe.plan(), allocate=self._allocate)

    def _allocate(self, names: Sequence[str], layers: Sequence[Layer]) -> list[NMPattern]:
        used = [layer._replace(uses=_uses_of(name, self.uses)) for name, layer in zip(names, layers, strict=True)]
        dense = sum(cost(layer, layer.pattern.m) for layer in used)
        given = sum(cost(layer, layer.pattern.n) for layer in used)
        least = sum(cost(layer, choices_of(layer.pattern)[0]) for layer in used)
        budget = given if self.budget is None else self.budget * dense
        if least > budget * (1 + 1e-9):
            raise ConfigurationError(
                f"Expected `budget` of Layerwise to leave every group one weight, {least / dense:.4g} of the dense cost at "
                f"least, but got {self.budget}. Raise it, or use a larger m."
            )
        return _FORMS[self.by](used, budget)


def _uses_of(name: str, uses: Mapping[str, float] | None) -> float:
    found = [value for glob, value in ({"*": 1.0} if uses is None else uses).items() if fnmatchcase(name, glob)]
    if not found:
        raise ConfigurationError(
            f"Expected `uses` of Layerwise to name every masked tensor, but got none for {name!r} among {[*(uses or ())]}. "
            "Add it, or a glob like '*'."
        )
    return float(found[-1])


def _check_uses(uses: object) -> None:
    if uses is None:
        return
    if not isinstance(uses, Mapping):
        raise ArgumentTypeError(f"Expected `uses` to map globs to numbers, but got {uses!r}.")
    for glob, value in uses.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigurationError(f"Expected `uses[{glob!r}]` > 0, how often a weight is used, but got {value!r}.")
