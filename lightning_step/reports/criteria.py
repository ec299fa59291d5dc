r"""Where a criterion would have fired, from curves that hold only some of the steps.

Note [Bounds between logged steps]
    A criterion looks at every optimizer step, a log holds every tenth or fiftieth. But a norm of v cannot do anything in
    between: :math:`v_t \ge \beta_2 v_{t-1}` holds for each coordinate, so :math:`\lVert v_t\rVert \ge \beta_2 \lVert
    v_{t-1}\rVert`. From the logged step before t this bounds :math:`\lVert v_t\rVert` from below, and from the one behind t
    from above. A criterion *must* have fired where it holds at both bounds, and *may* have fired where it holds at one of
    them; so it fired between the first step of the second kind and the first of the first kind. Where every step was
    logged the bounds are equal and so are the steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lightning_step.figures import Curve

__all__ = ["Firing", "Limits", "Samples", "relative_norm_firing", "staleness_firing", "window_firing"]

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Flags: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
MAX_STEPS = 5_000_000  # a longer run is not followed step by step


class Limits(NamedTuple):
    """Within what a criterion may fire.

    Example:
        >>> Limits(t_min=0, t_max=500, known=300).end
        300
    """

    t_min: int  # never before this step
    t_max: int  # at this step at the latest
    known: int  # the curve says nothing of later steps: the run ended, or v froze

    @property
    def end(self) -> int:
        """The last step that can be judged.

        Returns:
            A step.
        """
        return min(self.t_max, self.known)


class Samples(NamedTuple):
    """A logged norm of v.

    Example:
        >>> Samples(Curve((1, 2), (0.5, 0.6)), beta2=0.99).beta2
        0.99
    """

    curve: Curve
    beta2: float


class Firing(NamedTuple):
    """When a criterion would have fired.

    Example:
        >>> str(Firing(11, 20)), str(Firing(7, 7)), str(Firing(None, 500, forced=True)), str(Firing(None, None))
        ('between steps 11 and 20', 'step 7', 'step 500 (T_max)', 'not as far as the log tells')
    """

    earliest: int | None  # it did not fire before; None: nowhere
    latest: int | None  # it fired here at the latest; None: it may not have fired at all
    forced: bool = False  # only because of t_max

    def __str__(self) -> str:
        if self.forced:
            between = f"step {self.latest}" if self.earliest is None else f"between steps {self.earliest} and {self.latest}"
            return f"{between} (T_max)"
        if self.earliest is None:
            return "not as far as the log tells"
        if self.latest is None:
            return f"not before step {self.earliest}; the log does not tell whether later"
        if self.earliest == self.latest:
            return f"step {self.latest}"
        return f"between steps {self.earliest} and {self.latest}"


def relative_norm_firing(samples: Samples, threshold: float, limits: Limits) -> Firing:
    r"""Where the norm of v changed by less than a fraction in one step; see Note [Bounds between logged steps].

    Args:
        samples: The L2 norm of v.
        threshold: :math:`\tau`.
        limits: Within what it may fire.

    Returns:
        When it fired.

    Example:
        >>> norms = Samples(Curve((1, 2, 3), (1.0, 2.0, 2.5)), beta2=0.999)
        >>> str(relative_norm_firing(norms, 0.5, Limits(0, 9, 3)))
        'step 3'
    """
    low, high = _bounds(samples, limits)
    least, most = _ratio(low[1:], high[:-1]), _ratio(high[1:], low[:-1])  # of steps 1, 2, ...
    must = (least > 1 - threshold) & (most < 1 + threshold)
    may = (most > 1 - threshold) & (least < 1 + threshold)
    return _firing(np.append(False, must), np.append(False, may), 2, limits)


def staleness_firing(samples: Samples, window: int, threshold: float, limits: Limits) -> Firing:
    r"""Where the norm of v, its bias corrected, was close to what it was one window ago.

    Args:
        samples: The L1 norm of v.
        window: :math:`T_w` in optimizer steps.
        threshold: :math:`\tau`.
        limits: Within what it may fire.

    Returns:
        When it fired.

    Example:
        >>> norms = Samples(Curve((1, 2, 3), (0.5, 0.75, 0.875)), beta2=0.5)
        >>> str(staleness_firing(norms, 1, 0.96, Limits(0, 9, 3)))
        'step 2'
    """
    low, high = _bounds(samples, limits)
    if window >= len(low):
        return _firing(np.zeros(1, bool), np.zeros(1, bool), window + 1, limits)
    t = np.arange(len(low))
    bias = 1 - samples.beta2**t
    bias[0] = 1  # nothing is asked of step 0
    low, high = low / bias, high / bias
    least, most = _ratio(low[window:], high[:-window]), _ratio(high[window:], low[:-window])
    before = np.zeros(window, bool)
    return _firing(np.append(before, least >= threshold), np.append(before, most >= threshold), window + 1, limits)


def window_firing(mean: Curve, threshold: float, limits: Limits) -> Firing:
    """Where the window mean of Z was below the threshold, as logged: a dip between logged steps is not seen.

    Args:
        mean: The mean of Z over the full window.
        threshold: What it has to fall below.
        limits: Within what it may fire.

    Returns:
        Between the logged step before it was seen and the one where it was seen.

    Example:
        >>> str(window_firing(Curve((100, 110), (2e-8, 9e-9)), 1e-8, Limits(50, 500, 300)))
        'between steps 101 and 110'
    """
    judged = [(t, value) for t, value in zip(*mean, strict=True) if limits.t_min <= t <= limits.end]
    seen = next((t for t, value in judged if value < threshold), None)
    if seen is None:
        return Firing(None, limits.t_max, forced=True) if limits.t_max <= limits.known else Firing(None, None)
    before = max((t for t in mean.steps if t < seen), default=seen - 1)
    return Firing(max(before + 1, limits.t_min), seen)


def _bounds(samples: Samples, limits: Limits) -> tuple[Array, Array]:
    """Lower and upper bounds of the norm at steps 0, 1, 2, ...; equal where it was logged."""
    steps, values = np.array(samples.curve.steps, np.int64), np.array(samples.curve.values, np.float64)
    sound = np.isfinite(values) & (values > 0) & (steps > 0) & (steps <= limits.known)
    steps, values = steps[sound], values[sound]
    length = min(max(limits.end, 0), MAX_STEPS) + 1
    if not len(steps):
        return np.zeros(length), np.full(length, np.inf)
    t = np.arange(length)
    before, behind = np.searchsorted(steps, t, side="right") - 1, np.searchsorted(steps, t, side="left")
    after, until = np.maximum(before, 0), np.minimum(behind, len(steps) - 1)
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        low = np.where(before < 0, 0.0, values[after] * samples.beta2 ** np.maximum(t - steps[after], 0).astype(float))
        high = values[until] / samples.beta2 ** np.maximum(steps[until] - t, 0).astype(float)
    return low, np.where(behind == len(steps), np.inf, high)


def _ratio(above: Array, below: Array) -> Array:
    """Nothing is known of a ratio to nothing."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return np.nan_to_num(above / below, nan=np.inf, posinf=np.inf)


def _firing(must: Flags, may: Flags, first: int, limits: Limits) -> Firing:
    """From what is known of steps 0, 1, 2, ...; before ``first`` there are too few samples."""
    start = max(first, limits.t_min)
    earliest = next(iter(np.flatnonzero(may[start:]) + start), None)
    latest = next(iter(np.flatnonzero(must[start:]) + start), None)
    early = None if earliest is None else int(earliest)
    if latest is None and limits.t_max <= min(limits.known, MAX_STEPS):
        return Firing(early, limits.t_max, forced=True)
    return Firing(early, None if latest is None else int(latest))
