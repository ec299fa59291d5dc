"""Train N:M structured-sparse networks with Adam: the STEP recipe for Lightning and plain PyTorch."""

from lightning_step.callbacks import SparseExport, SparsityMonitor, STEPSparsityCallback
from lightning_step.errors import LightningStepError
from lightning_step.events import SwitchEvent
from lightning_step.export import export_model, load_sparse
from lightning_step.freshness import kept_weights
from lightning_step.parametrization import NMMask, apply_nm_masks, latent_weights, nm_masks, strip
from lightning_step.pattern import NMPattern
from lightning_step.recipes import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    AutoSwitch,
    Concentration,
    Dense,
    DenseTail,
    Layerwise,
    MaskDecay,
    RateScale,
    Recipe,
    RelativeNorm,
    Staleness,
    StructureDecay,
    Switch,
    default_recipe,
)
from lightning_step.sparsifier import Sparsifier
from lightning_step.targets import LeftOut, Target, Targets, find_targets
from lightning_step.version import __version__

__all__ = [
    "ASP",
    "SRSTE",
    "STE",
    "STEP",
    "AtStep",
    "AutoSwitch",
    "Concentration",
    "Dense",
    "DenseTail",
    "Layerwise",
    "LeftOut",
    "LightningStepError",
    "MaskDecay",
    "NMMask",
    "NMPattern",
    "RateScale",
    "Recipe",
    "RelativeNorm",
    "STEPSparsityCallback",
    "SparseExport",
    "Sparsifier",
    "SparsityMonitor",
    "Staleness",
    "StructureDecay",
    "Switch",
    "SwitchEvent",
    "Target",
    "Targets",
    "__version__",
    "apply_nm_masks",
    "default_recipe",
    "export_model",
    "find_targets",
    "kept_weights",
    "latent_weights",
    "load_sparse",
    "nm_masks",
    "strip",
]
