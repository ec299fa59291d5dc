"""What a switch remembers from step to step, and how it decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_step.errors import ConfigurationError
from lightning_step.functional import Statistic

__all__ = ["Clock", "Decision", "Reading", "Watcher"]


@dataclass(frozen=True)
class Clock:
    """What a switch may know of a run before it starts.

    Args:
        total_steps: Optimizer steps of the whole run; None if nobody knows.
        beta2: Decay of the optimizer's second moment; None if it has none.
        eps: The optimizer's eps; None if it has none.

    Example:
        >>> Clock(total_steps=1000, beta2=0.999, eps=1e-8).need_beta2()
        0.999
    """

    total_steps: int | None = None
    beta2: float | None = None
    eps: float | None = None

    def need_beta2(self) -> float:
        """The decay of the second moment.

        Returns:
            beta2.

        Raises:
            ConfigurationError: If the optimizer has none.
        """
        return self._need("window", self.beta2)

    def need_eps(self) -> float:
        """The optimizer's eps.

        Returns:
            eps.

        Raises:
            ConfigurationError: If the optimizer has none.
        """
        return self._need("threshold", self.eps)

    def _need(self, argument: str, value: float | None) -> float:
        if value is None:
            raise ConfigurationError(
                f"Expected an optimizer with beta2 and eps, from which `{argument}` takes its default, but got one "
                f"without. Give the switch its `{argument}`."
            )
        return value


class Reading(NamedTuple):
    """What a criterion says of the samples so far.

    Example:
        >>> Reading(True, 9e-9, 1e-8, "window mean below threshold", "T_w = 100").fired
        True
    """

    fired: bool
    value: float | None  # what is compared; None before there are enough samples
    threshold: float | None  # what it is compared with
    rule: str  # its name, for the log
    detail: str  # its setting, for the log


class Decision(NamedTuple):
    """A switch that happened.

    Example:
        >>> Decision(100, "t_max reached", "T_max = 100").step
        100
    """

    step: int  # optimizer steps taken
    rule: str  # which rule fired
    numbers: str  # the numbers behind it, readable


class Watcher:
    """Collects the samples of one switch and decides.

    Args:
        statistic: The statistic whose samples it wants; None: none.
        keep: How many of the newest samples it needs.
        rule: The criterion over these samples.
        t_min: Never before this optimizer step.
        t_max: At this optimizer step at the latest.
        correct: Makes of the value of the k-th sample, the first is 1, what the criterion is about.

    Example:
        >>> watcher = Watcher(None, 0, lambda samples: Reading(False, None, None, "", ""), t_min=3, t_max=3)
        >>> watcher.decide(2) is None, watcher.decide(3).rule
        (True, 'fixed step reached')
    """

    def __init__(
        self,
        statistic: Statistic | None,
        keep: int,
        rule: Callable[[Sequence[float]], Reading],
        *,
        t_min: int,
        t_max: int,
        correct: Callable[[float, int], float] | None = None,
    ) -> None:
        self.statistic = statistic
        self.keep = keep
        self.t_min = t_min
        self.t_max = t_max
        self._rule = rule
        self._correct = correct
        self._samples: list[float] = []
        self._taken = 0  # samples so far, those no longer kept included

    def observe(self, value: Any) -> None:
        """Add the sample of one optimizer step.

        Args:
            value: The statistic's value.
        """
        self._taken += 1
        self._samples.append(value if self._correct is None else self._correct(value, self._taken))
        del self._samples[: -self.keep or None]

    def decide(self, t: int) -> Decision | None:
        """Decide after an optimizer step.

        Args:
            t: Optimizer steps taken so far.

        Returns:
            The decision with the rule that fired, or None.
        """
        reading = self._reading()
        if t < self.t_min or not (reading.fired or t >= self.t_max):
            return None
        if self.statistic is None:
            return Decision(t, "fixed step reached", f"step {self.t_max}")
        rule = reading.rule if reading.fired else "t_max reached"
        return Decision(t, rule, self._numbers(reading))

    def gauges(self) -> dict[str, float]:
        """What to plot.

        Returns:
            ``variance_change`` (the newest sample), ``window_mean`` (what the criterion compares) and ``threshold``, each
            only once there is one.

        Example:
            >>> from lightning_step import AutoSwitch
            >>> watcher = AutoSwitch(window=1, threshold=0.5, t_min=0, t_max=9).start(Clock())
            >>> watcher.observe(2.0)
            >>> watcher.gauges()
            {'variance_change': 2.0, 'window_mean': 2.0, 'threshold': 0.5}
        """
        reading = self._reading()
        values = {"variance_change": self._newest(), "window_mean": reading.value, "threshold": reading.threshold}
        return {name: value for name, value in values.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        """The samples and how many there have been, as plain numbers.

        Returns:
            What `load_state_dict` takes.
        """
        return {"samples": list(self._samples), "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the samples.

        Args:
            state: From `state_dict`.
        """
        self._samples = [float(value) for value in state["samples"]]
        self._taken = int(state.get("taken", len(self._samples)))

    def _reading(self) -> Reading:
        return self._rule(self._samples)

    def _newest(self) -> float | None:
        return self._samples[-1] if self._samples else None

    def _numbers(self, reading: Reading) -> str:
        limits = f"T_min = {self.t_min}, T_max = {self.t_max}"
        if reading.value is None:
            return f"{min(self._taken, self.keep)} samples, window not full ({reading.detail}), {limits}"
        return f"{reading.value:.3g} against {reading.threshold:.3g} ({reading.detail}, {limits})"
