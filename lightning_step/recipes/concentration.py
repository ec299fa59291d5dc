r"""A switch that asks whether v has come to rest, not whether gradients are small: it does not know their scale.

Note [Anchors]
    A sketch of v is kept every sixteenth part of the lag, and only for one lag: 17 of them, whatever :math:`\beta_2`. In
    between, what the steps say of the noise is summed up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from lightning_step.errors import ConfigurationError
from lightning_step.functional import drift_noise, expected_drift, squared_distance, window_length
from lightning_step.recipes.limits import check_order, resolve_limits
from lightning_step.recipes.switches import Switch
from lightning_step.recipes.watcher import Clock, Reading, Watcher

__all__ = ["Concentration"]

_ANCHORS = 16  # per lag, see Note [Anchors]


@dataclass(frozen=True)
class Concentration(Switch):
    r"""Switch when v moves no further over a window than its own sampling noise explains.

    .. math:: \frac{\lVert \sqrt{\hat v_t} - \sqrt{\hat v_{t-L}} \rVert^2}{\text{what it would be at rest}} < \tau

    The ratio is 1 where the gradients of all steps might be drawn alike, and 2 where drift and noise are alike. It stays the
    same when the loss is multiplied by anything, which `AutoSwitch` does not: that one asks for changes below Adam's eps.

    Args:
        threshold: :math:`\tau`. 2 is close to rest, which runs of a thousand steps reach at their very end, if at all; at 10
            the drift is three times the noise.
        window: The lag :math:`L` in optimizer steps. None: :math:`\mathrm{round}(1/(1-\beta_2))`, the memory of v.
        t_min: Never before this step (integer) or fraction of all steps (float).
        t_max: At this step or fraction at the latest.

    Raises:
        ConfigurationError: If ``t_min > t_max``, or a limit, the window or the threshold is out of range.

    Example:
        >>> watcher = Concentration(window=4, t_min=0, t_max=9).start(Clock(9, beta2=0.5))
        >>> for _ in range(5):  # v does not move at all, though gradients are noisy
        ...     watcher.observe((3.0, 1.0, 1.0, 5.0, -2.0))
        >>> sorted(watcher.gauges())
        ['threshold', 'variance_change', 'window_mean']

    References:
        The theory is in `lightning_step.functional.drift`; the idea that v may be frozen once it is stationary is that of
        Lu et al., `STEP <https://arxiv.org/abs/2302.01172>`_, ICML 2023, and Tang et al., `1-bit Adam
        <https://arxiv.org/abs/2102.02888>`_, ICML 2021.
    """

    threshold: float = 10.0
    window: int | None = None
    t_min: int | float = 0.1
    t_max: int | float = 0.5

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ConfigurationError(f"Expected `threshold` > 0, but got {self.threshold!r}. 1 is rest.")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise ConfigurationError(f"Expected `window` to be an integer >= 1 (optimizer steps), but got {self.window!r}.")
        check_order(self.t_min, self.t_max)

    def start(self, clock: Clock) -> Watcher:
        """See `Switch.start`."""
        beta2 = clock.need_beta2()
        length = window_length(beta2) if self.window is None else self.window
        return _DriftWatcher(beta2, length, self.threshold, **resolve_limits(self.t_min, self.t_max, clock.total_steps))


class _DriftWatcher(Watcher):
    """Keeps anchors in the place of samples: steps taken, two sums over the steps since the anchor before, the sketch."""

    def __init__(self, beta2: float, length: int, threshold: float, *, t_min: int, t_max: int) -> None:
        self.every = max(1, length // _ANCHORS)
        self.lag = self.every * max(1, round(length / self.every))
        super().__init__("drift", self.lag + self.every, self._rule_of_rest, t_min=t_min, t_max=t_max)
        self._beta2, self._threshold = beta2, threshold
        self._anchors: list[list[float]] = []
        self._sums = [0.0, 0.0]

    @override
    def observe(self, value: tuple[float, ...]) -> None:
        fourth, squares, v, *sketched = value
        self._taken += 1
        corrected = 1 - self._beta2**self._taken
        for i, part in enumerate(drift_noise(fourth, squares, v, self._taken, self._beta2)):
            self._sums[i] += part
        if self._taken % self.every == 0:
            self._anchors.append([float(self._taken), *self._sums, *(s / math.sqrt(corrected) for s in sketched)])
            del self._anchors[: -1 - self.lag // self.every]
            self._sums = [0.0, 0.0]

    def _rule_of_rest(self, samples: Sequence[float]) -> Reading:
        ratio = self._ratio()
        fired = ratio is not None and ratio < self._threshold
        return Reading(fired, ratio, self._threshold, "drift of v within its noise", f"lag = {self.lag}")

    def _ratio(self) -> float | None:
        """The ratio of Note [Drift against noise]; None without anchors one lag apart, or without any noise."""
        if len(self._anchors) <= self.lag // self.every:
            return None
        noise, steps = (math.fsum(anchor[i] for anchor in self._anchors[1:]) for i in (1, 2))
        if not (noise > 0 and steps > 0):
            return None
        (_, _, _, *before), (t, _, _, *now) = self._anchors[0], self._anchors[-1]
        return squared_distance(now, before) * steps / (noise * expected_drift(int(t), self.lag, self._beta2))

    @override
    def _newest(self) -> float | None:
        """How far the root of v has moved over the lag, in parts of its length."""
        if len(self._anchors) <= self.lag // self.every:
            return None
        before, now = self._anchors[0][3:], self._anchors[-1][3:]
        length = math.fsum(part * part for part in now)
        return math.sqrt(squared_distance(now, before) / length) if length else None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"samples": [list(a) for a in self._anchors], "taken": self._taken, "sums": list(self._sums)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._anchors = [[float(part) for part in anchor] for anchor in state["samples"]]
        self._taken = int(state.get("taken", 0))
        self._sums = [float(part) for part in state.get("sums", (0.0, 0.0))]
