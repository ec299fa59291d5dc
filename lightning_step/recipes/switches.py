r"""When a phase ends: AutoSwitch, a fixed step, and two criteria from the literature.

A switch is configuration, frozen and plain. ``switch.start(clock)`` checks it against the run and gives a `Watcher`, which
holds what changes from step to step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_step.errors import ConfigurationError
from lightning_step.functional import window_length, window_mean
from lightning_step.recipes.limits import check_limit, check_order, resolve_limit, resolve_limits
from lightning_step.recipes.watcher import Clock, Reading, Watcher

__all__ = ["AtStep", "AutoSwitch", "RelativeNorm", "Staleness", "Switch"]


class Switch(ABC):
    """Decides at which optimizer step something begins.

    Example:
        >>> issubclass(AutoSwitch, Switch)
        True
    """

    @abstractmethod
    def start(self, clock: Clock) -> Watcher:
        """Begin to watch a run.

        Args:
            clock: Length of the run and constants of its optimizer.

        Returns:
            The watcher, with no sample yet.

        Raises:
            ConfigurationError: If the limits do not fit the run.
        """


@dataclass(frozen=True)
class AtStep(Switch):
    """Switch right after a fixed optimizer step.

    Args:
        step: An integer counts optimizer steps; a float in [0, 1] is a fraction of all. 0 is before the first step.

    Example:
        >>> AtStep(0.25).start(Clock(total_steps=400)).decide(100).step
        100
    """

    step: int | float = 0

    def __post_init__(self) -> None:
        check_limit("step", self.step)

    def start(self, clock: Clock) -> Watcher:
        """See `Switch.start`."""
        step = resolve_limit("step", self.step, clock.total_steps)
        return Watcher(None, 0, _never, t_min=step, t_max=step)


@dataclass(frozen=True)
class AutoSwitch(Switch):
    r"""Switch when the second moment has stopped moving: the mean of Z over a full window is below a threshold.

    .. math:: \frac1{T_w}\sum_{i=0}^{T_w-1} Z_{t-i} < \epsilon, \quad T_{min} \le t, \quad\text{else at } T_{max}

    The test reads the gradient's scale (about: is its standard deviation below 3e-3 at the defaults?), so often one of the
    limits decides; the log says which.

    Args:
        mean: How Z averages :math:`|v_t - v_{t-1}|` over coordinates; the geometric mean shrugs off outliers.
        window: Window length :math:`T_w` in optimizer steps. None: :math:`\mathrm{round}(1/(1-\beta_2))`.
        threshold: What the window mean has to fall below. None: the optimizer's own eps.
        t_min: Never before this step (integer) or fraction of all steps (float).
        t_max: At this step or fraction at the latest.

    Raises:
        ConfigurationError: If ``t_min > t_max``, or a limit, the window or the threshold is out of range.

    Example:
        >>> watcher = AutoSwitch(window=2, threshold=1.0, t_min=0, t_max=9).start(Clock(9, beta2=0.999, eps=1e-8))
        >>> watcher.observe(1.2); watcher.observe(0.6)
        >>> watcher.decide(2).rule
        'window mean below threshold'

    References:
        Lu et al., `STEP <https://arxiv.org/abs/2302.01172>`_, ICML 2023, AutoSwitch.
    """

    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    window: int | None = None
    threshold: float | None = None
    t_min: int | float = 0.1
    t_max: int | float = 0.5

    def __post_init__(self) -> None:
        if self.mean not in ("arithmetic", "geometric"):
            raise ConfigurationError(f"Expected `mean` to be 'arithmetic' or 'geometric', but got {self.mean!r}.")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise ConfigurationError(f"Expected `window` to be an integer >= 1 (optimizer steps), but got {self.window!r}.")
        if self.threshold is not None and not self.threshold > 0:
            raise ConfigurationError(f"Expected `threshold` > 0, but got {self.threshold!r}.")
        check_order(self.t_min, self.t_max)

    def start(self, clock: Clock) -> Watcher:
        """See `Switch.start`."""
        length = window_length(clock.need_beta2()) if self.window is None else self.window
        threshold = clock.need_eps() if self.threshold is None else self.threshold

        def rule(samples: Sequence[float]) -> Reading:
            mean = window_mean(samples, length)
            fired = mean is not None and mean < threshold
            return Reading(fired, mean, threshold, "window mean below threshold", f"T_w = {length}")

        return Watcher(self.mean, length, rule, **resolve_limits(self.t_min, self.t_max, clock.total_steps))


@dataclass(frozen=True)
class RelativeNorm(Switch):
    r"""Switch when the norm of v changes by less than a fraction in one step. For comparison: it fires within a few steps.

    .. math:: \big|\,\lVert v_t\rVert_2 - \lVert v_{t-1}\rVert_2\,\big| \,/\, \lVert v_{t-1}\rVert_2 < \tau

    Args:
        threshold: :math:`\tau`.
        t_min: Never before this step or fraction.
        t_max: At this step or fraction at the latest.

    Raises:
        ConfigurationError: If ``t_min > t_max``, or a limit or the threshold is out of range.

    Example:
        >>> watcher = RelativeNorm(t_min=0, t_max=9).start(Clock(9))
        >>> watcher.observe(1.0); watcher.observe(1.4)
        >>> watcher.decide(2).rule
        'relative norm change below threshold'

    References:
        Agarwal et al., `Adaptive Gradient Communication via Critical Learning Regime Identification
        <https://arxiv.org/abs/2010.16248>`_, MLSys 2021.
    """

    threshold: float = 0.5
    t_min: int | float = 0
    t_max: int | float = 0.5

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ConfigurationError(f"Expected `threshold` > 0, but got {self.threshold!r}.")
        check_order(self.t_min, self.t_max)

    def start(self, clock: Clock) -> Watcher:
        """See `Switch.start`."""

        def rule(samples: Sequence[float]) -> Reading:
            known = len(samples) >= 2 and samples[-2] > 0
            change = abs(samples[-1] - samples[-2]) / samples[-2] if known else None
            fired = change is not None and change < self.threshold
            return Reading(fired, change, self.threshold, "relative norm change below threshold", "one step")

        return Watcher("l2", 2, rule, **resolve_limits(self.t_min, self.t_max, clock.total_steps))


@dataclass(frozen=True)
class Staleness(Switch):
    r"""Switch when the norm of v is close to what it was one window ago. For comparison.

    .. math:: \lVert \hat v_t\rVert_1 \,/\, \lVert \hat v_{t-T_w}\rVert_1 \ge \tau, \qquad
        \hat v_t = v_t / (1-\beta_2^t)

    With the bias of v corrected: the raw v grows from zero, so that its ratio is far above 1 as soon as the window is full.

    Args:
        threshold: :math:`\tau`.
        window: :math:`T_w` in optimizer steps. None: :math:`\mathrm{round}(1/(1-\beta_2))`.
        t_min: Never before this step or fraction.
        t_max: At this step or fraction at the latest.

    Raises:
        ConfigurationError: If ``t_min > t_max``, or a limit, the window or the threshold is out of range.

    Example:
        >>> watcher = Staleness(window=1, t_min=0, t_max=9).start(Clock(9))
        >>> watcher.observe(1.0); watcher.observe(0.97)
        >>> watcher.decide(2).rule
        'norm ratio above threshold'

    References:
        Tang et al., `1-bit Adam <https://arxiv.org/abs/2102.02888>`_, ICML 2021.
    """

    threshold: float = 0.96
    window: int | None = None
    t_min: int | float = 0
    t_max: int | float = 0.5

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ConfigurationError(f"Expected `threshold` > 0, but got {self.threshold!r}.")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise ConfigurationError(f"Expected `window` to be an integer >= 1 (optimizer steps), but got {self.window!r}.")
        check_order(self.t_min, self.t_max)

    def start(self, clock: Clock) -> Watcher:
        """See `Switch.start`."""
        length = window_length(clock.need_beta2()) if self.window is None else self.window
        beta2 = clock.beta2 or 0.0  # no second moment, no bias

        def correct(norm: float, t: int) -> float:
            return float(norm / (1 - beta2**t))

        def rule(samples: Sequence[float]) -> Reading:
            known = len(samples) > length and samples[-1 - length] > 0
            ratio = samples[-1] / samples[-1 - length] if known else None
            fired = ratio is not None and ratio >= self.threshold
            return Reading(fired, ratio, self.threshold, "norm ratio above threshold", f"T_w = {length}")

        return Watcher("l1", length + 1, rule, **resolve_limits(self.t_min, self.t_max, clock.total_steps), correct=correct)


def _never(samples: Sequence[float]) -> Reading:
    return Reading(False, None, None, "", "")
