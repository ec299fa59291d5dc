"""All switches of one run: which are still open, what they have seen, and which fire now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from lightning_step.recipes import Clock, Decision, Switch, Watcher
from lightning_step.sampling import SecondMomentSampler

__all__ = ["Role", "SwitchBoard"]

Role = Literal["masks", "freeze"]
"""What a switch begins."""


class SwitchBoard:
    """Watches the switches of a recipe. Equal switches are one: they fire together.

    Args:
        switches: What each switch begins.
        clock: Length of the run and constants of its optimizer.
        make_sampler: Makes the sampler of a watcher that wants samples.
        read_every: Read samples and decide every so many optimizer steps.

    Example:
        >>> from lightning_step import AtStep
        >>> board = SwitchBoard({"masks": AtStep(1), "freeze": AtStep(1)}, Clock(), None, read_every=1)
        >>> [(sorted(roles), decision.step) for roles, decision in board.decide(1)]
        [(['freeze', 'masks'], 1)]
    """

    def __init__(
        self,
        switches: Mapping[Role, Switch],
        clock: Clock,
        make_sampler: Callable[[Watcher], SecondMomentSampler] | None,
        *,
        read_every: int,
    ) -> None:
        by_switch = {switch: switch.start(clock) for switch in switches.values()}
        self._open: dict[Role, Watcher] = {role: by_switch[switch] for role, switch in switches.items()}
        self._read_every = read_every
        self._closing: dict[str, float] = {}  # what the last switch fired on, until the next step
        self._samplers: dict[Watcher, SecondMomentSampler] = {}
        for watcher in by_switch.values():
            if watcher.statistic is not None and make_sampler is not None:
                self._samplers[watcher] = make_sampler(watcher)

    @property
    def notes(self) -> list[str]:
        """What a user should know before the first step."""
        return [
            f"the switch averages {w.keep} optimizer steps but may wait for {w.t_max} at most: T_max will decide "
            "unless it is given a shorter window"
            for w in self._samplers
            if w.keep > w.t_max
        ]

    def observe(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """Take a sample for every open switch that wants one. See `SecondMomentSampler.observe`.

        Args:
            found_inf: Non-zero where the step is about to be skipped.
            grad_scale: Factor that is still in the gradients.
        """
        self._closing = {}
        for sampler in self._samplers.values():
            sampler.observe(found_inf, grad_scale)

    def read(self) -> int:
        """Bring pending samples to the host.

        Returns:
            How many samples were dropped so far because a gradient was not finite.
        """
        for watcher, sampler in self._samplers.items():
            for value in sampler.read():
                watcher.observe(value)
        return sum(sampler.non_finite for sampler in self._samplers.values())

    def due(self, t: int) -> bool:
        """Whether to decide after this step.

        A resumed run must decide as the undisturbed one, so this depends on the step alone, not on when samples were read.

        Args:
            t: Optimizer steps taken.

        Returns:
            True if an open switch may fire now.
        """
        return any(self._due(watcher, t) for watcher in self._open.values())

    def decide(self, t: int) -> Iterator[tuple[set[Role], Decision]]:
        """Every switch that fires after this step; it stays open until `close` is called.

        Args:
            t: Optimizer steps taken.

        Yields:
            What begins, and why.
        """
        for watcher in dict.fromkeys(self._open.values()):
            decision = watcher.decide(t) if self._due(watcher, t) else None
            if decision is not None:
                yield {role for role, other in self._open.items() if other is watcher}, decision

    def close(self, roles: set[Role]) -> None:
        """Stop watching what has begun.

        Args:
            roles: What has begun.
        """
        self._closing = self.gauges()
        self._open = {role: watcher for role, watcher in self._open.items() if role not in roles}
        still = set(self._open.values())
        self._samplers = {watcher: sampler for watcher, sampler in self._samplers.items() if watcher in still}

    def gauges(self) -> dict[str, float]:
        """What to plot. See `Watcher.gauges`.

        Returns:
            The values of the first open switch that takes samples; those it fired on right after; then nothing.
        """
        return next((watcher.gauges() for watcher in self._samplers), self._closing)

    def state_dict(self) -> dict[str, Any]:
        """What is open, and the samples.

        Returns:
            Plain values.
        """
        return {role: watcher.state_dict() for role, watcher in self._open.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called.

        Args:
            state: From `state_dict`.
        """
        self.close({role for role in self._open if role not in state})
        self._closing = {}  # nothing has fired here
        for role, watcher in self._open.items():
            watcher.load_state_dict(state[role])

    def _due(self, watcher: Watcher, t: int) -> bool:
        return t % self._read_every == 0 or t >= watcher.t_max
