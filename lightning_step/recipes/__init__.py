"""Recipes and switches: configuration, frozen and plain."""

from lightning_step.recipes.base import Recipe, describe
from lightning_step.recipes.baselines import ASP, SRSTE, STE, Dense
from lightning_step.recipes.concentration import Concentration
from lightning_step.recipes.decay import DenseTail, MaskDecay, StructureDecay
from lightning_step.recipes.layerwise import Layerwise
from lightning_step.recipes.plan import (
    AllocationRule,
    FadeRule,
    Freeze,
    GradientRule,
    Moment,
    PatternRule,
    Plan,
    Scope,
    final_pattern,
    full_strength,
)
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
    "Reading",
    "Recipe",
    "RelativeNorm",
    "Scope",
    "Staleness",
    "StructureDecay",
    "Switch",
    "Watcher",
    "Wrapper",
    "describe",
    "final_pattern",
    "full_strength",
]
