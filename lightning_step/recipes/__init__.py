"""Recipes and switches: configuration, frozen and plain."""

from lightning_step.recipes.base import Freeze, GradientRule, PatternRule, Plan, Recipe, Scope, describe, final_pattern
from lightning_step.recipes.baselines import ASP, SRSTE, STE, Dense
from lightning_step.recipes.step import STEP
from lightning_step.recipes.switches import AtStep, AutoSwitch, RelativeNorm, Staleness, Switch
from lightning_step.recipes.watcher import Clock, Decision, Reading, Watcher

__all__ = [
    "ASP",
    "SRSTE",
    "STE",
    "STEP",
    "AtStep",
    "AutoSwitch",
    "Clock",
    "Decision",
    "Dense",
    "Freeze",
    "GradientRule",
    "PatternRule",
    "Plan",
    "Reading",
    "Recipe",
    "RelativeNorm",
    "Scope",
    "Staleness",
    "Switch",
    "Watcher",
    "describe",
    "final_pattern",
]
