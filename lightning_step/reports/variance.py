"""The curve behind a switch: how much the second moment moved, read back from a TensorBoard folder and drawn."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_step.errors import FileFormatError
from lightning_step.figures import Curve, VarianceLog, draw_variance

__all__ = ["Curve", "VarianceLog", "plot_variance", "read_variance"]


def read_variance(folder: str | os.PathLike[str], prefix: str = "sparsity") -> VarianceLog:
    """Read what `STEPSparsityCallback` logged of the second moment.

    Args:
        folder: A TensorBoard folder that holds the event file of one run.
        prefix: What the names of the scalars begin with; ``sparsity/0`` where several optimizers were masked.

    Returns:
        The curves.

    Raises:
        FileFormatError: If there is no such scalar in the folder.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> with SummaryWriter(tempfile.mkdtemp()) as writer:
        ...     writer.add_scalar("sparsity/variance_change", 0.5, 10)
        >>> read_variance(writer.log_dir).change
        Curve(steps=(10,), values=(0.5,))
    """
    # Slow to import, and only needed here.
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    folder = Path(folder)
    if not folder.is_dir():
        raise FileFormatError(f"Expected a TensorBoard folder, but got {str(folder)!r}, which is no folder.")
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})  # 0: keep every point
    events.Reload()
    names = events.Tags()[SCALARS]

    def curve(name: str) -> Curve:
        tag = f"{prefix}/{name}"
        points = {event.step: event.value for event in events.Scalars(tag)} if tag in names else {}
        return Curve(tuple(sorted(points)), tuple(points[step] for step in sorted(points)))

    log = VarianceLog(curve("variance_change"), curve("window_mean"), curve("threshold"), curve("phase"))
    if not log.change.steps:
        shown = ", ".join(names[:8]) or "no scalars"
        raise FileFormatError(
            f"Expected scalars named {prefix + '/variance_change'!r} in {str(folder)!r}, but got: {shown}. Train with "
            "STEPSparsityCallback, a recipe that samples the second moment (STEP with AutoSwitch) and a TensorBoardLogger, "
            "and name the folder that holds the event file (version_0)."
        )
    return log


def plot_variance(
    folder: str | os.PathLike[str], path: str | os.PathLike[str] = "variance.png", prefix: str = "sparsity"
) -> Path:
    """Draw Z, its window mean and the threshold on a log axis, with the switch marked.

    Args:
        folder: A TensorBoard folder that holds the event file of one run.
        path: The picture to write; its ending chooses the format. Missing folders are made.
        prefix: What the names of the scalars begin with.

    Returns:
        The path.

    Raises:
        ConfigurationError: If matplotlib is not installed.
        FileFormatError: If there is nothing to draw in the folder.

    Example:
        >>> plot_variance("no/such/folder")
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected a TensorBoard folder, but got 'no/such/folder', which is no folder.
    """
    log, path = read_variance(folder, prefix), Path(path)
    figure = draw_variance(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
