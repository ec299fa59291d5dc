"""The Lightning callback that writes the sparse model when fitting ends."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_step.callbacks.trainer import callbacks_of
from lightning_step.errors import ConfigurationError
from lightning_step.export import Exported, Format, check_format, check_writable, export_model
from lightning_step.parametrization import nm_masks
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
            ranks; read it with `lightning_step.load_sparse`).
        module: Name of the submodule to export, so that its keys have no prefix; None: the whole LightningModule.
        one_shot: Prune by magnitude at the end if no mask was learned.

    Raises:
        ConfigurationError: At construction for an unknown format; at ``setup`` for a path that cannot be written or a
            module that does not exist.

    Example:
        >>> SparseExport("out/model.safetensors", format="packed").format
        'packed'
    """

    def __init__(self, path: str, format: Format = "dense", module: str | None = None, one_shot: bool = False) -> None:
        self.path = path
        self.format: Format = check_format(format)
        self.module = module
        self.one_shot = one_shot
        self.exported: Exported | None = None  # what was written, once it was

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called first in every stage. Before fitting, makes sure that the file can be written at the end."""
        if stage == "fit":
            _once(trainer, lambda: check_writable(self.path))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the model is complete. Makes sure that the submodule exists."""
        self._module(pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the last hook that may still change weights. Rank 0 writes the file; all wait for how it went."""
        module = self._module(pl_module)
        masks = nm_masks(module)
        if not any(mask.enabled for mask in masks.values()) and not (masks and self.one_shot):
            rank_zero_warn(_nothing_learned(len(masks), self.path))
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            with tempfile.TemporaryDirectory() as folder:  # everything is tried, and the file of a real run stays
                tried = self._export(module, str(Path(folder, "model.safetensors")), trainer)
            rank_zero_info(f"lightning-step, {_count(tried)} verified for {self.path}, which fast_dev_run leaves alone")
            return
        self.exported = self._export(module, self.path, trainer)
        rank_zero_info(
            f"lightning-step, wrote {self.exported.path} ({self.format}, {self.exported.bytes:,} bytes): "
            f"{_count(self.exported)} verified"
        )

    def _export(self, module: nn.Module, path: str, trainer: pl.Trainer) -> Exported:
        def write() -> Exported:
            return export_model(module, path, self.format, one_shot=self.one_shot, info=_info(trainer))

        # Shards have to be gathered by every process together; `export_model` does that, and writes on rank 0.
        return write() if any_sharded(module.parameters()) else _once(trainer, write)

    def _module(self, pl_module: pl.LightningModule) -> nn.Module:
        try:
            return pl_module if self.module is None else pl_module.get_submodule(self.module)
        except AttributeError as error:
            names = [name for name, _ in pl_module.named_children()]
            raise ConfigurationError(
                f"Expected `module` to name a submodule of {type(pl_module).__name__}, but got {self.module!r}. "
                f"It has: {', '.join(names)}."
            ) from error


def _once(trainer: pl.Trainer, work: Callable[[], T]) -> T:
    return on_one(work) if trainer.world_size > 1 else work()


def _count(exported: Exported) -> str:
    tensors = len(exported.manifest.sparse)
    return f"{tensors} tensor{'s' * (tensors != 1)}"


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
