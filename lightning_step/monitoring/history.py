"""The variance curve as far as it was logged, to draw it in the middle of a run and after a resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_step.figures import Curve, VarianceLog

__all__ = ["VarianceHistory"]

_NAMES = ("variance_change", "window_mean", "threshold", "phase")


class VarianceHistory:
    """Points that were logged. Of long runs of one phase it keeps the ends: nothing else is drawn of them.

    Example:
        >>> history = VarianceHistory()
        >>> for step in (10, 20, 30):
        ...     history.add(step, {"phase": 1.0, "variance_change": 1 / step})
        >>> history.log().change.steps, history.log().phase.steps
        ((10, 20, 30), (10, 30))
    """

    def __init__(self) -> None:
        self._points: dict[str, list[tuple[int, float]]] = {name: [] for name in _NAMES}

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Remember what was logged.

        Args:
            step: Where on the x-axis.
            scalars: Values by name; those that are no part of the curve are passed over.
        """
        for name, points in self._points.items():
            if name in scalars:
                if name == "phase" and len(points) > 1 and points[-1][1] == points[-2][1] == scalars[name]:
                    points.pop()
                points.append((step, scalars[name]))

    def log(self) -> VarianceLog:
        """What there is to draw.

        Returns:
            The curves; ``change`` is empty if nothing was ever sampled.
        """
        curves = [Curve(tuple(s for s, _ in points), tuple(v for _, v in points)) for points in self._points.values()]
        return VarianceLog(*curves)

    def state_dict(self) -> dict[str, Any]:
        """The points, as plain numbers.

        Returns:
            What `load_state_dict` takes.
        """
        return {name: [list(point) for point in points] for name, points in self._points.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called.

        Args:
            state: From `state_dict`.
        """
        self._points = {name: [(int(s), float(v)) for s, v in state.get(name, [])] for name in _NAMES}
