"""The Lightning callback that trains masks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_step.callbacks.console import Console
from lightning_step.callbacks.handover import Handover, packed
from lightning_step.callbacks.monitoring import announce, monitor_options
from lightning_step.callbacks.trainer import (
    builds_late,
    callbacks_of,
    check_strategy,
    check_total_steps,
    steps_logged,
    total_steps,
)
from lightning_step.errors import ConfigurationError, ResumeError, TargetError
from lightning_step.freshness import drop_kept, kept_weights
from lightning_step.masking import parameter_of, restore_masks
from lightning_step.monitoring import Monitor, MonitorOptions, check_interval
from lightning_step.parametrization import apply_nm_masks, nm_masks
from lightning_step.pattern import NMPattern
from lightning_step.recipes import Recipe, default_recipe, describe
from lightning_step.resume import check_config, check_version, config_of
from lightning_step.sharding import all_reduce
from lightning_step.sparsifier import Sparsifier
from lightning_step.targets import Targets

__all__ = ["STEPSparsityCallback"]


class STEPSparsityCallback(pl.Callback):
    """Learns N:M masks while a Lightning ``Trainer`` fits.

    The model, its optimizer and its schedulers stay as they are. Masks are part of the forward pass in every stage once the
    recipe has switched them on; weights in checkpoints are the latent (dense) ones under their plain names.

    Args:
        n: Weights KEPT in every group of ``m`` along the input dimension.
        m: Weights in a group.
        recipe: How to learn the masks: `STEP`, `SRSTE`, `STE`, `ASP`, `Dense`, or one around another.
            None: `default_recipe`.
        include: Shell-style globs over module and tensor names of what gets a mask; None: everything that can.
        exclude: Globs of what stays dense.
        overrides: Globs of what gets another pattern, as ``{glob: [n, m]}``; the last matching entry wins.
        min_weights: Tensors with fewer weights stay dense.
        total_steps: Optimizer steps of the whole run, of which a recipe's fractions are taken: one number for every
            optimizer, or a list of one for each that configure_optimizers returns. None: what the trainer expects; under
            manual optimization it does not know, unless a single optimizer runs until ``max_steps``.
        read_every: Bring variance samples to the host, and decide, every so many optimizer steps.
        max_coordinates: Sample the variance change on about this many coordinates at most.
        verbose: Show a table at the start and at the end, and a line at every switch (rank 0).
        monitor: Log to the trainer's loggers. True: as often as the trainer logs; a number: every so many optimizer steps;
            False: nothing at all. A `SparsityMonitor` among the trainer's callbacks says more.
        keep_evaluation_weights: Mask every weight once per validation, test or prediction loop, and keep the results until
            it ends: a second copy of the masked tensors. False: mask them anew in every forward pass, one at a time.

    Raises:
        PatternError: If n:m is no pattern.
        TargetError: At ``setup``, if a glob matches nothing or no tensor is left to mask.
        ConfigurationError: At ``setup``, if the trainer has two of these, or a strategy that hides parameters; at fit start,
            if the recipe's limits do not fit, or shards cut groups in two.
        OptimizerError: At fit start, if the recipe has to freeze the second moment of an optimizer nobody knows.
        ResumeError: On resume, if the checkpoint was written under another pattern or recipe.

    Example:
        >>> from lightning_step import SRSTE
        >>> STEPSparsityCallback(n=1, m=4, recipe=SRSTE(lam=1e-3), exclude=["head.*"]).pattern
        NMPattern(n=1, m=4)

    References:
        Lu et al., `STEP <https://arxiv.org/abs/2302.01172>`_, ICML 2023.
    """

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        recipe: Recipe | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        overrides: dict[str, list[int]] | None = None,
        min_weights: int = 0,
        total_steps: int | list[int] | None = None,
        read_every: int = 10,
        max_coordinates: int = 65_536,
        verbose: bool = True,
        monitor: bool | int = True,
        keep_evaluation_weights: bool = True,
    ) -> None:
        check_total_steps(total_steps)
        check_interval("monitor", monitor)
        self.pattern = NMPattern(n, m)
        self.total_steps = total_steps
        self.recipe: Recipe = default_recipe() if recipe is None else recipe
        self.verbose = verbose
        self.monitor = monitor
        self.keep_evaluation_weights = keep_evaluation_weights
        self.sparsifiers: list[Sparsifier] = []  # one per optimizer that holds masked tensors, while fitting
        self.targets: Targets | None = None
        self._selection: dict[str, Any] = {
            "include": include,
            "exclude": exclude or (),
            "overrides": overrides,
            "min_weights": min_weights,
        }
        self._sampling: dict[str, Any] = {"read_every": read_every, "max_coordinates": max_coordinates}
        self._handover = Handover()
        self._fitting = False  # from the fit's start, when the optimizers are hooked, to its end
        self._console = Console()
        self._monitor = Monitor([], [], MonitorOptions(every=0))
        self._evaluation: ExitStack | None = None  # while nobody is expected to write weights

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called first in every stage. Puts masks, switched off, on the layers that exist already."""
        if stage == "fit":
            self._handover.renew(pl_module, packed([sparsifier.state_dict() for sparsifier in self.sparsifiers]))
            self.sparsifiers = []
        check_strategy(trainer.strategy)
        others = [callback for callback in callbacks_of(trainer) if isinstance(callback, STEPSparsityCallback)]
        if len(others) > 1:
            raise ConfigurationError(
                f"Expected one STEPSparsityCallback per Trainer, but got {len(others)}. Give single layers another pattern "
                "with `overrides`, and choose one recipe."
            )
        try:
            self._apply_masks(pl_module)
        except TargetError:
            # Layers may still be made in the module's own setup or configure_model; then on_fit_start finds them.
            if not builds_late(pl_module):
                raise

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when optimizers exist but their state is not restored yet. Hooks the optimizers."""
        self.targets = self._apply_masks(pl_module)
        restored, lost = self._handover.take()
        self._console.prepare(self.verbose)
        options = monitor_options(trainer, self.monitor)
        for index in self._holders(trainer):  # one that is refused leaves those before it to on_exception
            self.sparsifiers.append(self._sparsifier(trainer, pl_module, index, options.every or 0))
        self._monitor = Monitor(self.sparsifiers, trainer.loggers, options)
        announce(self._monitor, trainer, pl_module)
        self._console.begin(pl_module, self.recipe, self.sparsifiers, self._sampling["read_every"])
        if restored is not None:
            self._restore(restored)
        if lost:
            rank_zero_warn(
                "This model was fitted before. Its masks go on, but Lightning has made a new optimizer, so the frozen "
                "second moment is gone and Adam's own is used. To go on exactly, pass `ckpt_path` to fit."
            )
        self._handover.begin(pl_module)
        self._fitting = True
        if restored is None:
            self._console.first()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when everything is restored. Makes sure that the optimizer came back together with the phase."""
        for sparsifier in self.sparsifiers:
            sparsifier.check_restored()
        self._monitor.start(steps_logged(trainer, in_batch=False))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after every batch. Lets the monitor log, if it is time or something has switched; so with the bar."""
        self._console.progress(trainer)
        self._monitor.observe(steps_logged(trainer))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends as it should. Lets the monitor log what it has not logged yet."""
        self._monitor.finish(steps_logged(trainer, in_batch=False))
        self._console.finish()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before validation. Outside of fitting, switches masks on if the loaded checkpoint had them on."""
        self._enable_restored(pl_module)
        drop_kept(pl_module)  # callbacks that swap averages in write past autograd, and not every model calls eval()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after validation. Forgets masks that it read in training mode: other weights may be swapped in again."""
        drop_kept(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before testing. Switches masks on if the loaded checkpoint had them on."""
        self._enable_restored(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before predicting. Switches masks on if the loaded checkpoint had them on."""
        self._enable_restored(pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before every batch of validation. From the first on, when weights are in place, each is masked once."""
        self._begin_evaluation(pl_module)

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before every batch of a test. From the first on, when weights are in place, each is masked once."""
        self._begin_evaluation(pl_module)

    @override
    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before every batch to predict. From the first on, when weights are in place, each is masked once."""
        self._begin_evaluation(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the last batch of validation. Weights may change from here on."""
        self._end_evaluation()

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the last batch of a test. Weights may change from here on."""
        self._end_evaluation()

    @override
    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the last batch to predict. Weights may change from here on."""
        self._end_evaluation()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called last in every stage. Takes the hooks off the optimizers, masks stay; shows the end table after a fit."""
        self._end(pl_module)
        if stage == "fit":
            self._console.close(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when a stage is interrupted. Takes the hooks off the optimizers."""
        self._end(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Phase, switch step, reason and window of every optimizer: plain values, never empty."""
        kept = None if self._fitting else self._handover.state
        if kept is not None:
            return kept
        curves = self._monitor.state_dict()
        return packed([sparsifier.state_dict() for sparsifier in self.sparsifiers]) | ({"monitor": curves} if curves else {})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called when a checkpoint is loaded. Goes back to it, or keeps the state until the optimizers exist."""
        if self._fitting:  # a tuner has trained for a while, and gives everything back
            check_version(state_dict)
            self._restore(state_dict)
        else:
            self._handover.load(state_dict)

    def manifest_info(self) -> dict[str, Any]:
        """What an exported file should say of its training.

        Returns:
            Recipe and switches as plain values.

        Example:
            >>> STEPSparsityCallback().manifest_info()["recipe"]["type"]
            'RateScale'
        """
        events = [str(event) for sparsifier in self.sparsifiers for event in sparsifier.events]
        return {"recipe": describe(self.recipe), "switches": events}

    def _apply_masks(self, pl_module: pl.LightningModule) -> Targets:
        return apply_nm_masks(pl_module, self.pattern, enabled=False, **self._selection)

    def _holders(self, trainer: pl.Trainer) -> list[int]:
        """Which of the trainer's optimizers hold at least one tensor to mask."""
        assert self.targets is not None  # set just before
        masked = {id(parameter_of(trainer.lightning_module, target)) for target in self.targets.masked}
        held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in trainer.optimizers]
        holders = [index for index, parameters in enumerate(held) if masked & parameters]
        if not holders:
            raise TargetError(
                f"Expected an optimizer that holds one of the {len(masked)} tensors to mask, but got none among "
                f"{[type(optimizer).__name__ for optimizer in trainer.optimizers]}. Return one over the model's own "
                "parameters from configure_optimizers."
            )
        return holders

    def _sparsifier(self, trainer: pl.Trainer, pl_module: pl.LightningModule, index: int, every: int) -> Sparsifier:
        return Sparsifier(
            pl_module,
            trainer.optimizers[index],
            self.pattern.n,
            self.pattern.m,
            recipe=self.recipe,
            total_steps=total_steps(trainer, index, self.total_steps),
            measure_every=every,
            reduce=all_reduce if trainer.world_size > 1 else torch.clone,
            on_event=self._console.event,
            **self._selection,
            **self._sampling,
        )

    def _restore(self, state: dict[str, Any]) -> None:
        saved = state["optimizers"]
        if len(saved) != len(self.sparsifiers):
            raise ResumeError(
                f"Expected {len(saved)} optimizers with masked tensors, as in the checkpoint, but got "
                f"{len(self.sparsifiers)}. Resume with the same configure_optimizers."
            )
        for sparsifier, own in zip(self.sparsifiers, saved, strict=True):
            sparsifier.load_state_dict(own)
        self._monitor.load_state_dict(state.get("monitor", []))

    def _enable_restored(self, pl_module: pl.LightningModule) -> None:
        """Masks as they were in a checkpoint that is evaluated. Which recipe made them does not matter."""
        loaded = self._handover.loaded
        if loaded is None or pl_module.trainer.state.fn == "fit":
            return
        self.targets = self._apply_masks(pl_module)
        masks = nm_masks(pl_module)
        for own in loaded["optimizers"]:
            saved = own["config"]
            there = [target for target in self.targets.masked if target.name in saved["patterns"]]
            check_config(saved, {**config_of(self.recipe, there), "recipe": saved["recipe"]})
            restore_masks({target.name: masks[target.name] for target in there}, own)

    def _begin_evaluation(self, pl_module: pl.LightningModule) -> None:
        if self._evaluation is None and self.keep_evaluation_weights:
            self._evaluation = ExitStack()
            self._evaluation.enter_context(kept_weights(pl_module))

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def _end(self, pl_module: pl.LightningModule) -> None:
        self._end_evaluation()
        self._handover.keep(pl_module)
        self._fitting = False
        for sparsifier in self.sparsifiers:
            sparsifier.detach()
