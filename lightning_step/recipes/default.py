"""What is used when no recipe is named."""

from __future__ import annotations

from lightning_step.recipes.base import Recipe
from lightning_step.recipes.rate import RateScale
from lightning_step.recipes.step import STEP
from lightning_step.recipes.switches import AtStep, AutoSwitch

__all__ = ["default_recipe"]


def default_recipe() -> Recipe:
    r"""The recipe of a callback that is told n and m and nothing else.

    STEP with masks from the first step, with v frozen in the second part of a run, and with masked tensors trained at a rate
    that rises from :math:`\gamma` to :math:`\gamma\,m/n` in the first 20 % of it. The benchmarks in the documentation say
    why, and how it compares; the recipe of the paper is ``STEP(lam=0.0, form="paper", max_step=math.inf)``.

    Returns:
        A recipe.

    Example:
        >>> default_recipe().plan().masks
        AtStep(step=0)

    References:
        Lu et al., `STEP <https://arxiv.org/abs/2302.01172>`_, ICML 2023, whose masks begin at the switch.
    """
    return RateScale(STEP(AutoSwitch(t_min=0.4), masks_from=AtStep(0)), power=1.0)
