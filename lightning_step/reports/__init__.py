"""Figures, tables and pages from event files, exported files and results of benchmarks."""

from lightning_step.reports.figures import FIGURES, write_figure
from lightning_step.reports.report import write_report
from lightning_step.reports.results import Result, read_results
from lightning_step.reports.variance import Curve, VarianceLog, plot_variance, read_variance

__all__ = [
    "FIGURES",
    "Curve",
    "Result",
    "VarianceLog",
    "plot_variance",
    "read_results",
    "read_variance",
    "write_figure",
    "write_report",
]
