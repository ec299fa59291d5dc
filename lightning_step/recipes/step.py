"""STEP: dense until Adam's second moment is trustworthy, then masks with that second moment frozen."""

from __future__ import annotations

from dataclasses import dataclass, field

from typing_extensions import override

from lightning_step.errors import ConfigurationError
from lightning_step.functional import PreconditionForm
from lightning_step.recipes.base import Recipe, check_lam, check_switch
from lightning_step.recipes.plan import Freeze, GradientRule, Plan, Scope
from lightning_step.recipes.switches import AutoSwitch, Switch

__all__ = ["STEP"]


@dataclass(frozen=True)
class STEP(Recipe):
    r"""Phase I trains dense under Adam; at the switch v becomes a constant preconditioner and phase II learns the masks.

    Args:
        switch: When v freezes and, by default, masks begin.
        lam: :math:`\lambda` of the SR-STE term in phase II. The paper has none; under Adam the pull on the pruned weights
            decides most of the quality on small transformers (`make compare`), and 2e-4, tuned for SGD, is too weak.
        masks_from: When masks begin, if that is to be another moment than the switch: ``AtStep(0)`` masks from the start.
        scope: Whose second moment is frozen.
        form: How the preconditioner is made from v: ``"adam"`` goes on without a jump, ``"paper"`` is the paper's form.
        max_step: Largest move of one coordinate in one step of phase II, in learning rates. None: what live Adam
            makes of a first gradient;
            infinity: none, as in the paper.

    Raises:
        ArgumentTypeError: If ``switch`` or ``masks_from`` is no switch.
        ConfigurationError: If ``lam``, ``scope``, ``form`` or ``max_step`` is out of range.

    Example:
        >>> from lightning_step import AtStep
        >>> STEP(switch=AtStep(0.3), lam=1e-3).plan().freeze.when
        AtStep(step=0.3)

    References:
        Lu et al., `STEP: Learning N:M Structured Sparsity Masks from Scratch with Precondition
        <https://arxiv.org/abs/2302.01172>`_, ICML 2023, algorithm 1.
    """

    switch: Switch = field(default_factory=AutoSwitch)
    lam: float = 4e-3
    masks_from: Switch | None = None
    scope: Scope = "masked"
    form: PreconditionForm = "adam"
    max_step: float | None = None

    def __post_init__(self) -> None:
        check_switch("switch", self.switch)
        if self.masks_from is not None:
            check_switch("masks_from", self.masks_from)
        check_lam(self.lam)
        for name, value, known in (
            ("scope", self.scope, ("masked", "all")),
            ("form", self.form, ("adam", "paper")),
        ):
            if value not in known:
                raise ConfigurationError(f"Expected `{name}` to be one of {known}, but got {value!r}.")
        if self.max_step is not None and not self.max_step > 0:
            raise ConfigurationError(f"Expected `max_step` > 0 (learning rates) or None, but got {self.max_step!r}.")

    @override
    def plan(self) -> Plan:
        masks = self.switch if self.masks_from is None else self.masks_from
        freeze = Freeze(self.switch, self.scope, self.form, self.max_step)
        return Plan(masks, GradientRule(lam=self.lam), freeze)
