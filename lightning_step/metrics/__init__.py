"""torchmetrics classes of what a mask did: density, n:m compliance, flip rate, kept magnitude.

Each is the twin of a function in `lightning_step.functional`, adds up over tensors, updates and processes, and may stand in
any ``MetricCollection``: update a collection by name, and each metric takes what it needs. `metric_inputs` gives the names.
"""

from lightning_step.metrics.masks import FlipRate, metric_inputs
from lightning_step.metrics.weights import Density, KeptMagnitude, NMCompliance

__all__ = ["Density", "FlipRate", "KeptMagnitude", "NMCompliance", "metric_inputs"]
