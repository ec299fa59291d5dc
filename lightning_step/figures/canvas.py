"""An empty figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_step.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["blank_figure"]


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure that no window and no global state knows of.

    Args:
        width: In inches.
        height: In inches.

    Returns:
        The figure, with 150 dots to the inch.

    Raises:
        ConfigurationError: If matplotlib is not installed.

    Example:
        >>> blank_figure(8, 4.5).axes
        []
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            "Expected matplotlib to be installed, because it draws the figure, but could not import it. "
            "Run: pip install 'lightning-step[plots]'."
        ) from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")  # not through pyplot: no state, no display
    FigureCanvasAgg(figure)
    return figure
