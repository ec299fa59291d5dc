"""Recipes that tighten masks little by little, or let go of them for a while. Each wraps any recipe that has masks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial

from typing_extensions import override

from lightning_step.errors import ConfigurationError
from lightning_step.functional import Fading, mask_decay, structure_decay
from lightning_step.pattern import NMPattern
from lightning_step.recipes.base import Recipe
from lightning_step.recipes.limits import check_limit, resolve_limit
from lightning_step.recipes.plan import FadeRule, Moment, PatternRule, Plan
from lightning_step.recipes.step import STEP
from lightning_step.recipes.wrapper import Wrapper

__all__ = ["DenseTail", "MaskDecay", "StructureDecay"]


@dataclass(frozen=True)
class StructureDecay(Wrapper):
    r"""Narrow the pattern in frames of equal length: m-1:m, m/2:m, m/4:m, and so on, at last n:m.

    Args:
        recipe: How the masks are learned.
        end: From which step (integer) or fraction of all steps (float) on a tensor has its own n:m.
        start: When the first frame begins; None: when masks do. If that is not before ``end``, there is nothing but n:m.

    Raises:
        ArgumentTypeError: If ``recipe`` is no recipe, or a limit no number.
        ConfigurationError: If ``recipe`` has no masks, or a limit is out of range.

    Example:
        >>> rule = StructureDecay(STEP(), end=300).plan().pattern
        >>> [str(rule("fc.weight", NMPattern(1, 8), Moment(t, began=0))) for t in (0, 100, 200, 300)]
        ['7:8', '4:8', '2:8', '1:8']

    References:
        Kao et al., `Training Recipe for N:M Structured Sparsity with Decaying Pruning Mask
        <https://arxiv.org/abs/2209.07617>`_, 2022.
    """

    recipe: Recipe = field(default_factory=STEP)
    end: int | float = 0.5
    start: int | float | None = None

    def __post_init__(self) -> None:
        self.check_recipe()
        _check_span(self.start, self.end)

    @override
    def plan(self) -> Plan:
        plan = self.recipe.plan()
        return dataclasses.replace(plan, pattern=partial(self._now, plan.pattern))

    def _now(self, inner: PatternRule, name: str, pattern: NMPattern, moment: Moment) -> NMPattern:
        return structure_decay(inner(name, pattern, moment), *_gone_and_length(self.start, self.end, moment))


@dataclass(frozen=True)
class MaskDecay(Wrapper):
    r"""Let masks come on slowly: pruned weights take part with a factor that falls from 1 to 0.

    .. math:: \tilde w = (\Pi + \beta\,(1-\Pi)) \odot w

    The gradient passes as in the recipe it wraps, and so does the pull on pruned weights. The published recipe has the
    gradient of :math:`\tilde w` itself, which fades as the weights do.

    Args:
        recipe: How the masks are learned.
        end: From which step (integer) or fraction of all steps (float) on pruned weights are zero.
        start: When the factor begins to fall; None: when masks begin. If that is not before ``end``, masks are hard at once.
        fading: ``"linear"``, or ``"exponential"``, which falls fast at first and is cut off at ``last``.
        last: Factor of the exponential form right before ``end``.

    Raises:
        ArgumentTypeError: If ``recipe`` is no recipe, or a limit no number.
        ConfigurationError: If ``recipe`` has no masks or holds pruned weights at zero, or an argument is out of range.

    Example:
        >>> fade = MaskDecay(STEP(), end=300).plan().fade
        >>> [fade(Moment(t, began=100)) for t in (100, 150, 300)]
        [1.0, 0.75, 0.0]

    References:
        Kao et al., 2022, mask decay.
    """

    recipe: Recipe = field(default_factory=STEP)
    end: int | float = 0.5
    start: int | float | None = None
    fading: Fading = "linear"
    last: float = 1e-3

    def __post_init__(self) -> None:
        self.check_recipe()
        _check_span(self.start, self.end)
        if self.fading not in ("linear", "exponential"):
            raise ConfigurationError(f"Expected `fading` to be 'linear' or 'exponential', but got {self.fading!r}.")
        if not 0 < self.last < 1:
            raise ConfigurationError(f"Expected 0 < `last` < 1, the factor right before the end, but got {self.last!r}.")
        if self.recipe.plan().gradient.fixed:
            raise ConfigurationError(
                f"Expected `recipe` of MaskDecay to keep its pruned weights alive, but got {self.recipe!r}, which prunes "
                "once and holds them at zero: there is nothing left to fade. Wrap STE, SRSTE or STEP."
            )

    @override
    def plan(self) -> Plan:
        plan = self.recipe.plan()
        return dataclasses.replace(plan, fade=partial(self._now, plan.fade))

    def _now(self, inner: FadeRule, moment: Moment) -> float:
        gone, length = _gone_and_length(self.start, self.end, moment)
        return max(inner(moment), mask_decay(gone, length, self.fading, self.last))


@dataclass(frozen=True)
class DenseTail(Wrapper):
    """Train the last part dense, and prune by magnitude after the very last step. For comparison.

    In the tail a tensor has m:m, which keeps all of it; from the end of the run on, its own n:m. A run that ends before has
    learned masks, but leaves a dense model.

    Args:
        recipe: How the masks are learned until then.
        start: From which step (integer) or fraction of all steps (float) on to train dense.

    Raises:
        ArgumentTypeError: If ``recipe`` is no recipe, or ``start`` no number.
        ConfigurationError: If ``recipe`` has no masks, or ``start`` is out of range; when fitting starts, if it is not
            known how long the run is.

    Example:
        >>> rule = DenseTail(STEP(), start=0.75).plan().pattern
        >>> [str(rule("fc.weight", NMPattern(1, 4), Moment(t, began=0, total_steps=40))) for t in (29, 30, 39, 40)]
        ['1:4', '4:4', '4:4', '1:4']

    References:
        Hu et al., `Accelerating Transformer Pre-training with 2:4 Sparsity <https://arxiv.org/abs/2404.01847>`_, ICML 2024,
        which leaves the model dense at the end.
    """

    recipe: Recipe = field(default_factory=STEP)
    start: int | float = 0.9

    def __post_init__(self) -> None:
        self.check_recipe()
        check_limit("start", self.start)

    @override
    def plan(self) -> Plan:
        plan = self.recipe.plan()
        return dataclasses.replace(plan, pattern=partial(self._now, plan.pattern))

    def _now(self, inner: PatternRule, name: str, pattern: NMPattern, moment: Moment) -> NMPattern:
        total = moment.total_steps
        if total is None:
            raise ConfigurationError(
                "Expected a known number of optimizer steps, because DenseTail prunes after the last of them, but got an "
                "unlimited run, or one under manual optimization. Set max_steps or max_epochs, or pass `total_steps`."
            )
        dense = resolve_limit("start", self.start, total) <= moment.t < total
        return NMPattern(pattern.m, pattern.m) if dense else inner(name, pattern, moment)


def _check_span(start: int | float | None, end: int | float) -> None:
    check_limit("end", end)
    if start is not None:
        check_limit("start", start)
        if type(start) is type(end) and start > end:
            raise ConfigurationError(f"Expected `start` <= `end`, but got start={start} and end={end}.")


def _gone_and_length(start: int | float | None, end: int | float, moment: Moment) -> tuple[int, int]:
    """Steps since a decay began, and how long it is."""
    last = resolve_limit("end", end, moment.total_steps)
    first = resolve_limit("start", start, moment.total_steps) if start is not None else moment.first
    return moment.t - first, last - first
