"""Second-moment adapters: read v, freeze it, take preconditioned steps."""

import torch

from lightning_step.optim.adam import AdamAdapter
from lightning_step.optim.base import Moments, SecondMomentAdapter, adapter_for, register_adapter

__all__ = ["AdamAdapter", "Moments", "SecondMomentAdapter", "adapter_for", "register_adapter"]

for _optimizer_type in (torch.optim.Adam, torch.optim.AdamW):
    register_adapter(_optimizer_type, AdamAdapter())
