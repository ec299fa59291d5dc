"""What a run logged of its masks: one group of scalars for every optimizer that holds masked tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_step.figures import Curve, VarianceLog
from lightning_step.reports.runs import Run

__all__ = ["Mark", "MaskedGroup", "layer_curves", "masked_groups", "recipe_of", "switch_reasons"]

# A logger may have a prefix: "mine-sparsity/phase".
_GROUP = re.compile(r"((?:[^/]*-)?sparsity(?:/\d+)?)/[^/]+")
_LAYER = re.compile(r"(?:[^/]*-)?sparsity(?:/\d+)?/layer/(.+)/([^/]+)", re.DOTALL)
_REASON = re.compile(r"optimizer step (\d+): ([^(;\n]*)[^\n]*")


class Mark(NamedTuple):
    """Something that began.

    Example:
        >>> Mark(150, "masks on").or_before
        False
    """

    step: int  # optimizer steps taken
    what: str  # masks on; v frozen
    or_before: bool = False  # it had begun when the run logged for the first time


@dataclass(frozen=True)
class MaskedGroup:
    """The scalars of one optimizer that holds masked tensors.

    Example:
        >>> from lightning_step.reports.event_files import EventLog
        >>> from pathlib import Path
        >>> run = Run("a", Path("a"), EventLog({"sparsity/1/phase": Curve((10, 20), (1.0, 2.0))}))
        >>> [(group.label, group.marks) for group in masked_groups(run)]
        [('a, optimizer 1', [Mark(step=20, what='masks on', or_before=False)])]
    """

    run: Run
    prefix: str  # sparsity, or sparsity/0 where there are several; a logger's own prefix goes before

    @property
    def label(self) -> str:
        """How it is called in the report.

        Returns:
            The run's name, with the optimizer's number if there are several.
        """
        _, _, number = self.prefix.partition("/")
        return f"{self.run.name}, optimizer {number}" if number else self.run.name

    def curve(self, name: str) -> Curve:
        """One of its scalars.

        Args:
            name: Without the prefix.

        Returns:
            The curve, which may be empty.
        """
        return self.run.log.scalars.get(f"{self.prefix}/{name}", Curve((), ()))

    @property
    def variance(self) -> VarianceLog:
        """What it logged of its switch.

        Returns:
            Four curves, each of which may be empty.
        """
        return VarianceLog(*(self.curve(name) for name in ("variance_change", "window_mean", "threshold", "phase")))

    @property
    def marks(self) -> list[Mark]:
        """Where masks began and where v froze: as the switches say of themselves, else as the curves show it.

        Returns:
            In the order of the steps.
        """
        said = [(int(m[1]), m[2]) for line in switch_reasons(self.run) if (m := _REASON.search(line))]
        if said and "/" not in self.prefix:  # of several optimizers, they do not say which one it was
            marks = [Mark(step, "masks on") for step, what in said if "masks on" in what]
            return sorted(marks + [Mark(step, "v frozen") for step, what in said if "frozen" in what])
        log = self.variance
        first = min(log.phase.steps, default=0)
        marks = [] if log.masks_on is None else [Mark(log.masks_on, "masks on", log.masks_on == first)]
        frozen = log.frozen if log.change.steps else None
        return marks + ([] if frozen is None else [Mark(frozen, "v frozen")])

    @property
    def frozen(self) -> int | None:
        """The step at which v froze.

        Returns:
            The step; None if nothing says that it did.
        """
        return next((mark.step for mark in self.marks if mark.what == "v frozen"), None)


def masked_groups(run: Run) -> list[MaskedGroup]:
    """The optimizers of a run that hold masked tensors.

    Args:
        run: The run.

    Returns:
        One group for each; none if the run logged nothing of sparsity.

    Example:
        >>> from lightning_step.reports.event_files import EventLog
        >>> from pathlib import Path
        >>> masked_groups(Run("dense", Path("dense"), EventLog({"loss": Curve((1,), (2.0,))})))
        []
    """
    matches = [match for tag in run.log.scalars if (match := _GROUP.fullmatch(tag))]
    return [MaskedGroup(run, prefix) for prefix in sorted({match[1] for match in matches}, key=lambda p: (len(p), p))]


def layer_curves(run: Run, what: str) -> dict[str, Curve]:
    """One scalar of every layer.

    Args:
        run: The run.
        what: ``flip_rate``, ``kept_magnitude``, ``v_l1`` or ``v_l2``.

    Returns:
        Name of the layer to its curve, in the order they were logged in; empty if they were not.

    Example:
        >>> from lightning_step.reports.event_files import EventLog
        >>> from pathlib import Path
        >>> log = EventLog({"sparsity/layer/blocks.0.fc.weight/flip_rate": Curve((10,), (0.5,))})
        >>> list(layer_curves(Run("step", Path("step"), log), "flip_rate"))
        ['blocks.0.fc.weight']
    """
    matches = [(match, curve) for tag, curve in run.log.scalars.items() if (match := _LAYER.fullmatch(tag))]
    return {match[1]: curve for match, curve in matches if match[2] == what}


def switch_reasons(run: Run) -> list[str]:
    r"""What the run says of its own switches: in its exported file, or in a text that it logged.

    Args:
        run: The run.

    Returns:
        One line each; none where nothing says so.

    Example:
        >>> from lightning_step.reports.event_files import EventLog
        >>> from pathlib import Path
        >>> text = "STEP\n\noptimizer step 9: masks on (2 tensors); t_max reached: T_max = 9\n"
        >>> switch_reasons(Run("step", Path("step"), EventLog(texts={"sparsity/recipe": text})))
        ['optimizer step 9: masks on (2 tensors); t_max reached: T_max = 9']
    """
    for file in run.files:
        lines = file.info.get("switches")
        if isinstance(lines, list) and lines:
            return [str(line) for line in lines]
    texts = [text for tag, text in run.log.texts.items() if "sparsity/" in tag]
    return list(dict.fromkeys(match.group().strip() for text in texts for match in _REASON.finditer(text)))


def recipe_of(run: Run) -> Mapping[str, Any]:
    """The recipe, as an exported file describes it.

    Args:
        run: The run.

    Returns:
        Its ``type`` and its fields; empty where no file says so.

    Example:
        >>> from lightning_step.reports.event_files import EventLog
        >>> from pathlib import Path
        >>> recipe_of(Run("dense", Path("dense"), EventLog()))
        {}
    """
    recipes = (file.info.get("recipe") for file in run.files)
    return next((recipe for recipe in recipes if isinstance(recipe, Mapping)), {})
