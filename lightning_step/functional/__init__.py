"""The mathematics, pure: tensors in, tensors out, no state."""

from lightning_step.functional.adam import (
    AdamState,
    PreconditionForm,
    adam_bound,
    adam_step,
    moment_behind,
    preconditioned_step,
    preconditioner,
)
from lightning_step.functional.allocation import (
    Layer,
    choices_of,
    cost,
    erk_allocation,
    magnitude_allocation,
    order_statistics,
    search_allocation,
)
from lightning_step.functional.autoswitch import (
    Statistic,
    second_moment_change,
    statistic_compute,
    statistic_update,
    window_length,
    window_mean,
)
from lightning_step.functional.mask import apply_mask, as_groups, magnitude_mask, nm_mask
from lightning_step.functional.nadam import (
    NAdamState,
    nadam_bound,
    nadam_momentum,
    nadam_step,
    preconditioned_nadam_step,
)
from lightning_step.functional.packing import Packed, index_bytes, index_width, pack_nm, unpack_nm
from lightning_step.functional.radam import preconditioned_radam_step, radam_step, rectification
from lightning_step.functional.schedule import Fading, decay_frames, mask_decay, structure_decay
from lightning_step.functional.stats import (
    Violation,
    density_update,
    find_violation,
    flip_rate_update,
    kept_magnitude_update,
    ratio_compute,
    violation_update,
)
from lightning_step.functional.ste import pruned_part, straight_through

__all__ = [
    "AdamState",
    "Fading",
    "Layer",
    "NAdamState",
    "Packed",
    "PreconditionForm",
    "Statistic",
    "Violation",
    "adam_bound",
    "adam_step",
    "apply_mask",
    "as_groups",
    "choices_of",
    "cost",
    "decay_frames",
    "density_update",
    "erk_allocation",
    "find_violation",
    "flip_rate_update",
    "index_bytes",
    "index_width",
    "kept_magnitude_update",
    "magnitude_allocation",
    "magnitude_mask",
    "mask_decay",
    "moment_behind",
    "nadam_bound",
    "nadam_momentum",
    "nadam_step",
    "nm_mask",
    "order_statistics",
    "pack_nm",
    "preconditioned_nadam_step",
    "preconditioned_radam_step",
    "preconditioned_step",
    "preconditioner",
    "pruned_part",
    "radam_step",
    "ratio_compute",
    "rectification",
    "search_allocation",
    "second_moment_change",
    "statistic_compute",
    "statistic_update",
    "straight_through",
    "structure_decay",
    "unpack_nm",
    "violation_update",
    "window_length",
    "window_mean",
]
