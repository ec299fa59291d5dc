"""Pictures of what a run did, drawn from plain numbers."""

from lightning_step.figures.canvas import blank_figure
from lightning_step.figures.variance import Curve, VarianceLog, draw_variance

__all__ = ["Curve", "VarianceLog", "blank_figure", "draw_variance"]
