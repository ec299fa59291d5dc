"""Recipes and switches: configuration, frozen and plain."""

from lightning_step.recipes.base import Recipe, describe
from lightning_step.recipes.baselines import ASP, SRSTE, STE, Dense
from lightning_step.recipes.concentration import Concentration
from lightning_step.recipes.decay import DenseTail, MaskDecay, StructureDecay
from lightning_step.recipes.default import default_recipe
from lightning_step.recipes.layerwise import Layerwise
from lightning_step.recipes.plan import (
    AllocationRule,
    FadeRule,
    Freeze,
    GradientRule,
    Moment,
    PatternRule,
    Plan,
    RateRule,
    Scope,
    final_pattern,
    full_strength,
    given_rate,
)
from lightning_step.recipes.rate import RateScale
from lightning_step.recipes.step import STEP
from lightning_step.recipes.switches import AtStep, AutoSwitch, RelativeNorm, Staleness, Switch
from lightning_step.recipes.watcher import Clock, Decision, Reading, Watcher
from lightning_step.recipes.wrapper import Wrapper

__all__ = [
    "ASP",
    "SRSTE",
    "STE",
    "STEP",
    "AllocationRule",
    "AtStep",
    "AutoSwitch",
    "Clock",
    "Concentration",
    "Decision",
    "Dense",
    "DenseTail",
    "FadeRule",
    "Freeze",
    "GradientRule",
    "Layerwise",
    "MaskDecay",
    "Moment",
    "PatternRule",
    "Plan",
    "RateRule",
    "RateScale",
    "Reading",
    "Recipe",
    "RelativeNorm",
    "Scope",
    "Staleness",
    "StructureDecay",
    "Switch",
    "Watcher",
    "Wrapper",
    "default_recipe",
    "describe",
    "final_pattern",
    "full_strength",
    "given_rate",
]
