"""Lightning callbacks: thin tables of hooks."""

from lightning_step.callbacks.export import SparseExport
from lightning_step.callbacks.monitor import SparsityMonitor
from lightning_step.callbacks.step import STEPSparsityCallback

__all__ = ["STEPSparsityCallback", "SparseExport", "SparsityMonitor"]
