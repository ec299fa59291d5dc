"""The driver: knows torch only, and is the one place that changes the phase."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_step.events import SwitchEvent, bad_gradient, bad_moment, how_many, no_moment
from lightning_step.freezing import FrozenStep
from lightning_step.hooks import StepHooks, check_bare
from lightning_step.masking import MaskSet, parameter_of
from lightning_step.parametrization import install_masks
from lightning_step.pattern import NMPattern
from lightning_step.rates import StepRates
from lightning_step.recipes import Decision, Recipe, Watcher, default_recipe
from lightning_step.resume import STATE_VERSION, check_config, check_version, config_of
from lightning_step.sampling import SecondMomentSampler
from lightning_step.sharding import Reduce, all_reduce, reshard
from lightning_step.targets import Overrides, Targets, find_targets
from lightning_step.watching import Role, SwitchBoard
from lightning_step.wiring import adapter_of, check_plan, clock_of, frozen_step, held_by, only_makes_state, switches

__all__ = ["Sparsifier"]


class Sparsifier:
    """Trains n:m masks along with a model, in any PyTorch loop.

    Hooks the optimizer; the loop itself does not change. Call `lightning_step.strip` on the model at the end.

    Args:
        model: The model. Masks are installed in place, switched off until the recipe says so.
        optimizer: The optimizer that holds its parameters. STEP needs one with a second-moment adapter.
        n: Weights kept in every group.
        m: Weights in a group.
        recipe: How to learn the masks; `default_recipe` if None.
        total_steps: Optimizer steps of the whole run; needed where the recipe has limits that are fractions.
        include: Shell-style globs of what gets a mask; None: everything that can.
        exclude: Globs of what stays dense.
        overrides: Globs of what gets another n:m.
        min_weights: Tensors with fewer weights stay dense.
        read_every: Bring variance samples to the host and decide every so many optimizer steps.
        max_coordinates: Sample the variance change on about this many coordinates at most.
        measure_every: Measure the mask flip rate every so many optimizer steps, the same on every process; 0: never.
        reduce: Adds a tensor up over all processes that train this model; by default over all of ``torch.distributed``.
        on_event: Called at every switch.

    Raises:
        TargetError: If there is nothing to mask, or the optimizer holds none of it.
        OptimizerError: If it is a wrapper around another one, or the recipe freezes a second moment nobody can read.
        ConfigurationError: If the recipe's limits do not fit the run, or shards cut groups in two.

    Example:
        >>> import torch
        >>> model = nn.Linear(8, 4)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> sparsifier = Sparsifier(model, optimizer, n=2, m=4, total_steps=10)
        >>> for _ in range(10):
        ...     model(torch.ones(1, 8)).square().sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> [(event.step, event.rule) for event in sparsifier.events], int(model.weight.count_nonzero())
        ([(0, 'fixed step reached'), (5, 't_max reached')], 16)

    References:
        Lu et al., `STEP <https://arxiv.org/abs/2302.01172>`_, ICML 2023, algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        n: int = 2,
        m: int = 4,
        *,
        recipe: Recipe | None = None,
        total_steps: int | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        overrides: Overrides | None = None,
        min_weights: int = 0,
        read_every: int = 10,
        max_coordinates: int = 65_536,
        measure_every: int = 0,
        reduce: Reduce = all_reduce,
        on_event: Callable[[SwitchEvent], None] | None = None,
    ) -> None:
        self.recipe = default_recipe() if recipe is None else recipe
        self.t = 0  # optimizer steps taken
        self.events: list[SwitchEvent] = []
        self.measure_every = measure_every
        self.optimizer = optimizer
        self.reduce = reduce
        self._on_event = on_event
        self._flip_rate: float | None = None
        self._warned: set[str] = set()
        self._live = False  # between the hooks of a step that has gradients
        self._resumed = False  # from `load_state_dict` to the check before the next step

        reshard(model)
        check_bare(optimizer)
        found = find_targets(
            model, NMPattern(n, m), include=include, exclude=exclude, overrides=overrides, min_weights=min_weights
        )
        held = held_by(optimizer, model, found)
        adapter = adapter_of(self.recipe, optimizer)
        check_plan(self.recipe, held.masked, total_steps)

        def make_sampler(watcher: Watcher) -> SecondMomentSampler:
            assert adapter is not None  # see needs_adapter
            assert watcher.statistic is not None
            scope = [parameter_of(model, target) for target in held.masked]
            return SecondMomentSampler(
                optimizer, adapter, scope, watcher.statistic, max_coordinates=max_coordinates, reduce=reduce
            )

        clock = clock_of(adapter, optimizer, total_steps)
        self._new_board = partial(SwitchBoard, switches(self.recipe), clock, make_sampler, read_every=max(1, read_every))
        self._board = self._new_board()
        # All that can be refused has been refused: only now is the model touched.
        masks = install_masks(model, held.masked)
        self.masks = MaskSet(model, held.masked, masks, self.recipe, reduce, total_steps)
        self._config, self._left_out = config_of(self.recipe, held.masked), held.left_out
        self._frozen = frozen_step(self.recipe, adapter, optimizer, model, self.masks)
        self._rates = StepRates(optimizer)
        self.notes = self._board.notes  # what a user should know before the first step
        self._hooks = StepHooks(optimizer, self._before_step, self._after_step)
        self.masks.keep(True)
        self._decide()

    @property
    def targets(self) -> Targets:
        """What is masked, with the n:m that it is to end with, and what is left out."""
        return Targets(tuple(self.masks.targets.values()), self._left_out)

    @property
    def phase(self) -> int:
        """1 while the model trains dense, 2 once masks are on."""
        return 2 if self.masks.enabled else 1

    @property
    def frozen(self) -> list[str]:
        """Names of the parameters whose second moment is frozen."""
        return [] if self._frozen is None else list(self._frozen.names)

    def gauges(self) -> dict[str, float]:
        """What to plot after an optimizer step.

        Returns:
            ``phase``; until the switch ``variance_change``, ``window_mean`` and ``threshold``; in phase II ``flip_rate``.
            Each only once it is known.
        """
        flips = {} if self._flip_rate is None else {"flip_rate": self._flip_rate}
        return {"phase": float(self.phase), **self._board.gauges(), **flips}

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a crash and lives neither in the model nor in the optimizer.

        Returns:
            Plain numbers, strings, lists and dictionaries.
        """
        self._read()
        return {
            "version": STATE_VERSION,
            "config": self._config,
            "t": self.t,
            "masks": self.masks.enabled,
            "patterns": self.masks.state_dict(),
            "frozen": self.frozen,
            "open": self._board.state_dict(),
            "events": [vars(event) for event in self.events],
            "flip_rate": self._flip_rate,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was written. Load the model and the optimizer too. Nothing changes if it raises.

        Args:
            state: From `state_dict`.

        Raises:
            ResumeError: If it was written under another recipe, pattern or model, or by a newer version.
        """
        check_version(state)
        check_config(saved=state["config"], current=self._config)
        t, masks, flip_rate = int(state["t"]), bool(state["masks"]), state["flip_rate"]
        events = [SwitchEvent(**event) for event in state["events"]]
        board = self._new_board()  # what has closed since may be open there
        board.load_state_dict(state["open"])
        if self._frozen is not None:
            self._frozen.restore(state["frozen"])
        # All that can be refused has been refused: only now is anything changed.
        self.t, self.events, self._board, self._flip_rate = t, events, board, flip_rate
        self.masks.load_state_dict(state.get("patterns", {}), masks, t)
        self.masks.drop()
        self._resumed = True

    def check_restored(self) -> None:
        """Make sure that the optimizer's state came back together with the phase. The first resumed step does so, too.

        Raises:
            ResumeError: If it did not.
        """
        if self._frozen is not None:
            self._frozen.check_restored()
        self._resumed = False

    def detach(self) -> None:
        """Take the hooks off the optimizer; masks stay as they are."""
        self._rates.end()
        self._hooks.remove()
        self.masks.keep(False)

    def _before_step(self) -> None:
        self._live = any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"])
        # Without gradients the stock step moves nothing either.
        self._live = self._live and not only_makes_state(self.optimizer, self.reduce)
        if not self._live:
            return
        if self._resumed:
            self.check_restored()
        found_inf, grad_scale = self._scaler()
        self.masks.edit_gradients(grad_scale)
        self._board.observe(found_inf, grad_scale)
        self.masks.before_step(measure=self._measures(self.t + 1))
        if self._frozen is not None:
            self._frozen.withhold()
        self._rates.begin(self.masks.rates)

    def _after_step(self) -> None:
        self.masks.drop()  # their memory
        if not self._live:
            return
        self._live = False
        found_inf, grad_scale = self._scaler()
        if self._frozen is not None:
            self._frozen.step(found_inf, grad_scale)
        self._rates.end()
        # A step that a fused optimizer skips is none, just as one that the scaler does not even call.
        skipped = found_inf is not None and bool(found_inf)
        self.t += not skipped
        flip_rate = self.masks.after_step(self.t)
        if skipped:
            return
        self._flip_rate = self._flip_rate if flip_rate is None else flip_rate
        self._decide()

    def _measures(self, t: int) -> bool:
        return self.measure_every > 0 and t % self.measure_every == 0

    def _scaler(self) -> tuple[Tensor | None, Tensor | None]:
        """What a loss scaler tells a fused optimizer for the time of one step."""
        return getattr(self.optimizer, "found_inf", None), getattr(self.optimizer, "grad_scale", None)

    def _decide(self) -> None:
        due = self._board.due(self.t)
        if due or self._measures(self.t):
            self._read()
        if due:
            for roles, decision in list(self._board.decide(self.t)):
                self._switch(roles, decision)

    def _read(self) -> None:
        if self._board.read():
            self._warn("gradient", bad_gradient(self.t))

    def _switch(self, roles: set[Role], decision: Decision) -> None:
        frozen: list[str] = []
        if "freeze" in roles and self._frozen is not None:
            frozen = self._freeze(self._frozen)
            if not frozen:
                return
        if "masks" in roles:
            self.masks.begin(self.t)
        self._board.close(roles)
        chosen = [t.pattern for t in self.targets.masked] if self.masks.chooses and "masks" in roles else ()
        what = how_many(len(frozen or self.masks.parameters), chosen)
        event = SwitchEvent(self.t, "masks" in roles, "freeze" in roles, decision.rule, decision.numbers, what)
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def _freeze(self, frozen: FrozenStep) -> list[str]:
        """Names of what froze; nothing before the first step, when there is no second moment, or if it is not finite."""
        bad = frozen.non_finite()
        if bad:
            self._warn("moment", bad_moment(bad, self.t))
            return []
        if not self.t:  # what a restored optimizer holds already may be a preconditioner
            return []
        unseen = frozen.unseen()
        if unseen:
            self._warn("gradients", no_moment(unseen, self.t))
        return frozen.freeze()

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=2)
