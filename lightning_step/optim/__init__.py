"""Second-moment adapters: read v, freeze it, take preconditioned steps."""

import torch

from lightning_step.optim.adam import AdamAdapter
from lightning_step.optim.base import Moments, SecondMomentAdapter, adapter_for, register_adapter
from lightning_step.optim.nadam import NAdamAdapter
from lightning_step.optim.radam import RAdamAdapter

__all__ = [
    "AdamAdapter",
    "Moments",
    "NAdamAdapter",
    "RAdamAdapter",
    "SecondMomentAdapter",
    "adapter_for",
    "register_adapter",
]

register_adapter(torch.optim.Adam, AdamAdapter())
register_adapter(torch.optim.AdamW, AdamAdapter())
register_adapter(torch.optim.NAdam, NAdamAdapter())
register_adapter(torch.optim.RAdam, RAdamAdapter())
