"""What a monitor is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from lightning_step.errors import ArgumentTypeError, ConfigurationError

__all__ = ["MonitorOptions", "check_interval"]


@dataclass(frozen=True)
class MonitorOptions:
    """What is logged, and how often.

    Args:
        every: Optimizer steps between two logs; 0: never; None: as often as the trainer logs.
        histograms_every: Optimizer steps between two histograms of every tensor; 0: none; None: ten times ``every``.
        per_layer: Also log flip rate, kept magnitude and norms of v of every masked tensor by itself.
        text: Write recipe, layer table and switches to TensorBoard's text page.
        layout: Put Z, its window mean, the threshold and the switch into one chart of TensorBoard's custom scalars.
        figure: Draw the variance curve at every switch and at the end (needs matplotlib).
        hparams: Fill TensorBoard's page of hyperparameters.
        metrics: Tags of further final metrics for that page; None: what the trainer's callbacks monitor.

    Raises:
        ArgumentTypeError: If an interval is no integer.
        ConfigurationError: If it is negative, or ``histograms_every`` no multiple of ``every``.

    Example:
        >>> MonitorOptions().resolve(50).histograms_every
        500
    """

    every: int | None = None
    histograms_every: int | None = None
    per_layer: bool = False
    text: bool = True
    layout: bool = True
    figure: bool = True
    hparams: bool = True
    metrics: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("every", "histograms_every"):
            value = getattr(self, name)
            if isinstance(value, bool):
                raise ArgumentTypeError(_no_interval(name, value))
            check_interval(name, value)
        if self.every and self.histograms_every and self.histograms_every % self.every:
            raise ConfigurationError(
                f"Expected `histograms_every` to be a multiple of `every` (optimizer steps), but got "
                f"{self.histograms_every} and {self.every}."
            )

    def resolve(self, interval: int) -> MonitorOptions:
        """Put numbers in the place of defaults.

        Args:
            interval: Optimizer steps between two logs of the trainer; 0: there is nobody to log to.

        Returns:
            Options with both intervals set.
        """
        every = 0 if not interval else interval if self.every is None else self.every
        histograms = 10 * every if self.histograms_every is None else self.histograms_every
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return MonitorOptions(**{**kept, "every": every, "histograms_every": histograms if every else 0})


def check_interval(name: str, value: object) -> None:
    """Refuse what is no number of optimizer steps.

    Args:
        name: The argument it was given as.
        value: What was given: None and truth values are no intervals, but mean something.

    Raises:
        ArgumentTypeError: If it is something else.
        ConfigurationError: If it is negative.

    Example:
        >>> check_interval("every", 50)
    """
    if value is not None and not isinstance(value, int):
        raise ArgumentTypeError(_no_interval(name, value))
    if value is not None and value < 0:
        raise ConfigurationError(f"Expected `{name}` >= 0 (optimizer steps; 0 for never), but got {value!r}.")


def _no_interval(name: str, value: object) -> str:
    return f"Expected `{name}` to be an integer (optimizer steps), but got {value!r}."
