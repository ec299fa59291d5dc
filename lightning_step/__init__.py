"""Train N:M structured-sparse networks with Adam: the STEP recipe for Lightning and plain PyTorch."""

from lightning_step.errors import LightningStepError
from lightning_step.parametrization import NMMask, apply_nm_masks, strip
from lightning_step.pattern import NMPattern
from lightning_step.recipes import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    AutoSwitch,
    Dense,
    Recipe,
    RelativeNorm,
    Staleness,
    Switch,
)
from lightning_step.sparsifier import Sparsifier, SwitchEvent
from lightning_step.targets import LeftOut, Target, Targets, find_targets

__all__ = [
    "ASP",
    "SRSTE",
    "STE",
    "STEP",
    "AtStep",
    "AutoSwitch",
    "Dense",
    "LeftOut",
    "LightningStepError",
    "NMMask",
    "NMPattern",
    "Recipe",
    "RelativeNorm",
    "Sparsifier",
    "Staleness",
    "Switch",
    "SwitchEvent",
    "Target",
    "Targets",
    "apply_nm_masks",
    "find_targets",
    "strip",
]
