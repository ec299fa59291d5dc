"""Figures and tables from event files."""

from lightning_step.reports.variance import Curve, VarianceLog, plot_variance, read_variance

__all__ = ["Curve", "VarianceLog", "plot_variance", "read_variance"]
