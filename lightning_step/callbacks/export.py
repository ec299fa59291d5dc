"""The Lightning callback that writes the sparse model when fitting ends."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_step.callbacks.console import say
from lightning_step.callbacks.trainer import callbacks_of
from lightning_step.checkpoints import export_checkpoint, read_checkpoint
from lightning_step.errors import ConfigurationError
from lightning_step.export import Exported, Format, accelerations, check_format, check_writable, export_model
from lightning_step.parametrization import nm_masks
from lightning_step.pattern import NMPattern
from lightning_step.sharding import any_sharded, on_one

__all__ = ["SparseExport"]

T = TypeVar("T")


class SparseExport(pl.Callback):
    """Verifies, hardens and writes the masked model to one safetensors file when fitting ends.

    The model in memory is left as it is. If training ended before masks began there is nothing to write: it says so, and
    prunes nothing unless told to. Under ``fast_dev_run`` everything is tried, but no file is written.

    Args:
        path: The file to write, on rank 0. Whether it can be written is found out at ``setup``.
        format: ``"dense"`` (plain keys, exact zeros, read by every safetensors loader) or ``"packed"`` (kept values and mask
            ranks; read it with `lightning_step.load_sparse`); or a list of both, with ``{format}`` in ``path``.
        module: Name of the submodule to export, so that its keys have no prefix; None: the whole LightningModule.
        one_shot: Prune by magnitude at the end if no mask was learned.
        which: ``"last"`` for the model as fitting leaves it, ``"best"`` for the best checkpoint of the trainer's first
            ``ModelCheckpoint``, or the path of a checkpoint. Masks are those of the checkpoint's own phase: one from before
            the switch is not written.

    Raises:
        ConfigurationError: At construction for an unknown format, or several for one file; at ``setup`` for a path that
            cannot be written, a module that does not exist, or ``"best"`` without checkpoints that tell their masks.
        FileFormatError: When fitting ends, if the checkpoint to export is not there or cannot be read.

    Example:
        >>> SparseExport("out/model.safetensors", format="packed").format
        'packed'
    """

    def __init__(
        self,
        path: str,
        format: Format | list[Format] = "dense",
        module: str | None = None,
        one_shot: bool = False,
        which: str = "last",
    ) -> None:
        self.path = path
        self.format = format
        self.module = module
        self.one_shot = one_shot
        self.which = which
        self.exported: Exported | None = None  # what was written last, once it was
        self.written: list[str] = []  # paths of all that was written since fitting was set up
        self._paths = _paths(path, format)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called first in every stage. Before fitting, makes sure that the file can be written at the end."""
        if stage == "fit":
            self.written = []
            for path in self._paths.values():
                _once(trainer, partial(check_writable, path))
            if self.which == "best" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                _check_checkpoints(trainer)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the model is complete. Makes sure that the submodule exists."""
        self._module(pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the last hook that may still change weights. Rank 0 writes the file; all wait for how it went."""
        if self.which == "last" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.export_now(trainer)
            return
        info = self._info(trainer, pl_module)
        for exported in _once(trainer, lambda: self._export_checkpoint(_best(trainer, self.which), info)):
            self._tell(exported)

    def export_now(self, trainer: pl.Trainer) -> list[Exported]:
        """Write the model as it is now, for instance from a hook in the middle of training. Call it on every process.

        Args:
            trainer: The trainer that fits the model.

        Returns:
            What was written, one entry per format; nothing, with a warning, if no mask is on.
        """
        pl_module = trainer.lightning_module
        module = self._module(pl_module)
        masks = nm_masks(module)
        if not all(mask.prunes for mask in masks.values() if mask.enabled) and not self.one_shot:
            rank_zero_warn(
                "Expected masks at full strength, but got pruned weights that are not yet zero: "
                f"{self.path} was not written. Train to the end of the mask decay, or pass one_shot=True."
            )
            return []
        if not any(mask.enabled for mask in masks.values()) and not (masks and self.one_shot):
            rank_zero_warn(_nothing_learned(len(masks), self.path))
            return []
        _warn_unfinished(
            {n: (mask.pattern, mask.final) for n, mask in masks.items() if mask.pattern != mask.final}, self.path
        )
        info = self._info(trainer, pl_module)
        written = []
        for format, path in self._paths.items():
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                with tempfile.TemporaryDirectory() as folder:  # everything is tried, and the file of a real run stays
                    tried = self._export(module, str(Path(folder, "model.safetensors")), format, trainer, info)
                say(f"lightning-step, {_count(tried)} verified for {path}, which fast_dev_run leaves alone")
            else:
                written.append(self._export(module, path, format, trainer, info))
                self._tell(written[-1])
        return written

    def _export(self, module: nn.Module, path: str, format: Format, trainer: pl.Trainer, info: dict[str, Any]) -> Exported:
        def write() -> Exported:
            return export_model(module, path, format, one_shot=self.one_shot, info=info)

        # Shards have to be gathered by every process together; `export_model` does that, and writes on rank 0.
        return write() if any_sharded(module.parameters()) else _once(trainer, write)

    def _export_checkpoint(self, chosen: str, info: dict[str, Any]) -> list[Exported]:
        if not chosen:
            rank_zero_warn(f"Expected a best checkpoint, but ModelCheckpoint saved none: {self.path} was not written.")
            return []
        checkpoint = read_checkpoint(chosen, self.module)
        if checkpoint.patterns and not checkpoint.on and not self.one_shot:
            rank_zero_warn(
                f"Expected learned masks in {chosen!r}, but got a checkpoint from before masks came on: {self.path} was not "
                "written and nothing was pruned. Monitor from the switch on, export which='last', or pass one_shot=True."
            )
            return []
        # Steps and recipe are those of the checkpoint; what happened after it is none of its business.
        kept = {key: value for key, value in info.items() if key == "layers"}
        behind = {name: (checkpoint.patterns[name][0], final) for name, final in checkpoint.unfinished.items()}
        _warn_unfinished(behind, self.path)
        formats = self._paths.items()
        return [export_checkpoint(checkpoint, path, each, one_shot=self.one_shot, info=kept) for each, path in formats]

    def _tell(self, exported: Exported) -> None:
        self.exported = exported
        self.written.append(str(exported.path))
        say(
            f"lightning-step, wrote {exported.path} ({exported.manifest.format}, {exported.bytes:,} bytes): "
            f"{_count(exported)} verified"
        )

    def _info(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        rows = accelerations(self._module(pl_module))
        verdicts = {row.name: {runtime: str(verdict) for runtime, verdict in row.verdicts.items()} for row in rows}
        return _info(trainer) | {"layers": {row.name: row.layer for row in rows}, "acceleration": verdicts}

    def _module(self, pl_module: pl.LightningModule) -> nn.Module:
        try:
            return pl_module if self.module is None else pl_module.get_submodule(self.module)
        except AttributeError as error:
            names = [name for name, _ in pl_module.named_children()]
            raise ConfigurationError(
                f"Expected `module` to name a submodule of {type(pl_module).__name__}, but got {self.module!r}. "
                f"It has: {', '.join(names)}."
            ) from error


def _paths(path: str, format: Format | Sequence[Format]) -> dict[Format, str]:
    formats = [check_format(each) for each in ([format] if isinstance(format, str) else format)]
    if not formats or (len(set(formats)) > 1 and "{format}" not in path):
        raise ConfigurationError(
            f"Expected one format, or several and '{{format}}' in `path`, but got {formats} and {path!r}. "
            "Write for instance 'out/model-{format}.safetensors'."
        )
    return {each: path.replace("{format}", each) for each in formats}


def _check_checkpoints(trainer: pl.Trainer) -> None:
    keeper = trainer.checkpoint_callback
    if keeper is None or not hasattr(keeper, "best_model_path") or getattr(keeper, "save_weights_only", False):
        got = "none" if keeper is None else f"{type(keeper).__name__}, which saves only weights or knows no best"
        raise ConfigurationError(
            f"Expected a ModelCheckpoint for which='best', but got {got}. Add one with a `monitor` and "
            "save_weights_only=False: the masks' phase is in the rest of the checkpoint."
        )


def _best(trainer: pl.Trainer, which: str) -> str:
    """The checkpoint that is meant; nothing if there is none yet."""
    return str(getattr(trainer.checkpoint_callback, "best_model_path", "")) if which == "best" else which


def _once(trainer: pl.Trainer, work: Callable[[], T]) -> T:
    return on_one(work) if trainer.world_size > 1 else work()


def _count(exported: Exported) -> str:
    tensors = len(exported.manifest.sparse)
    return f"{tensors} tensor{'s' * (tensors != 1)}"


def _warn_unfinished(patterns: Mapping[str, tuple[NMPattern, NMPattern]], path: str) -> None:
    if patterns:
        name, (now, final) = next(iter(patterns.items()))
        rank_zero_warn(
            f"Expected the patterns that training was to end with, but got {now} in {name!r}, which was to get {final} (and "
            f"{len(patterns) - 1} more): {path} holds the patterns in force. Train to the end of the structure decay, and "
            "let checkpoints compete only from there on."
        )


def _nothing_learned(masks: int, path: str) -> str:
    if not masks:
        return (
            f"Expected masks on the model, but got none: {path} was not written. "
            "Add STEPSparsityCallback to the trainer's callbacks."
        )
    return (
        f"Expected learned masks, but got {masks} that never came on: training ended before the switch (or the recipe is "
        f"Dense), so {path} was not written and nothing was pruned. Train longer, switch earlier, or pass one_shot=True."
    )


def _info(trainer: pl.Trainer) -> dict[str, Any]:
    """What other callbacks have to say for the manifest; callbacks do not import each other."""
    info: dict[str, Any] = {"steps": trainer.global_step}
    for callback in callbacks_of(trainer):
        source = getattr(callback, "manifest_info", None)
        if callable(source):
            info |= source()
    return info
