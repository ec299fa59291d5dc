"""Where the criteria that a run did not follow would have switched it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple

from lightning_step.functional import window_length
from lightning_step.recipes import AutoSwitch, RelativeNorm, Staleness
from lightning_step.reports.criteria import (
    Firing,
    Limits,
    Samples,
    relative_norm_firing,
    staleness_firing,
    window_firing,
)
from lightning_step.reports.groups import MaskedGroup, recipe_of, switch_reasons

__all__ = ["Setting", "Verdict", "setting_of", "verdicts"]

ADAM_BETA2 = 0.999


class Setting(NamedTuple):
    """What the criteria of one run are computed with.

    Example:
        >>> Setting(1000, 0.99, 100, "arithmetic", "given").window
        100
    """

    steps: int  # optimizer steps of the run
    beta2: float
    window: int  # T_w
    mean: str  # of the Z that was logged: arithmetic or geometric
    source: str  # where beta2 and the window are from


class Verdict(NamedTuple):
    """What one criterion says.

    Example:
        >>> Verdict("Staleness", Firing(7, 7), "").says
        'step 7'
    """

    criterion: str
    firing: Firing | None  # None: it cannot be told from what was logged
    why: str  # what it was computed from, or what is missing

    @property
    def says(self) -> str:
        """In words.

        Returns:
            One line.
        """
        return "cannot be told" if self.firing is None else str(self.firing)


def setting_of(group: MaskedGroup, beta2: float | None = None) -> Setting:
    """Find out what a run was trained with, as far as its switches or its exported file say so.

    Args:
        group: The run.
        beta2: Decay of the second moment, for those who know it better.

    Returns:
        The setting; Adam's default decay where nothing says another.

    Example:
        >>> from pathlib import Path
        >>> from lightning_step.reports.event_files import EventLog
        >>> from lightning_step.reports.runs import Run
        >>> setting_of(MaskedGroup(Run("a", Path("a"), EventLog()), "sparsity")).window
        1000
    """
    run = group.run
    said = next((int(match[1]) for line in switch_reasons(run) if (match := re.search(r"T_w = (\d+)", line))), None)
    switch = _switch(group)
    if beta2 is not None:
        source = f"β2 = {beta2:g}, as given"
    elif said is not None and said > 1 and switch.get("window") is None:
        beta2, source = 1 - 1 / said, f"T_w = {said}, as the switch says"
    elif (logged := _beta2_of(run.folder)) is not None:
        beta2, source = logged, f"β2 = {logged:g}, as hparams.yaml says"
    else:
        beta2, source = ADAM_BETA2, f"β2 = {ADAM_BETA2:g}, Adam's default, because the run does not say another (--beta2)"
    steps = max((s for file in run.files if isinstance(s := file.info.get("steps"), int)), default=run.last_step)
    text = " ".join([*switch_reasons(run), *run.log.texts.values()])
    geometric = switch.get("mean", "geometric" if re.search(r"mean\W{1,3}geometric", text) else "") == "geometric"
    return Setting(steps, beta2, window_length(beta2), "geometric" if geometric else "arithmetic", source)


def verdicts(group: MaskedGroup, setting: Setting) -> list[Verdict]:
    """Every criterion of this package, on what one run logged.

    Args:
        group: The run.
        setting: From `setting_of`.

    Returns:
        One verdict for each criterion.

    Example:
        >>> from pathlib import Path
        >>> from lightning_step.reports.event_files import EventLog
        >>> from lightning_step.reports.runs import Run
        >>> group = MaskedGroup(Run("a", Path("a"), EventLog()), "sparsity")
        >>> [verdict.says for verdict in verdicts(group, setting_of(group))]
        ['cannot be told', 'cannot be told', 'cannot be told', 'cannot be told']
    """
    return [*_windows(group, setting), _relative_norm(group, setting), _staleness(group, setting)]


def _windows(group: MaskedGroup, setting: Setting) -> list[Verdict]:
    own, other = setting.mean, "arithmetic" if setting.mean == "geometric" else "geometric"
    names = [f"AutoSwitch, {mean} mean" for mean in (own, other)]
    log = group.variance
    if not log.change.steps:
        why = "the run took no samples of Z: its recipe has no AutoSwitch, or nothing of it was logged"
        return [Verdict(name, None, why) for name in names]
    defaults, switch = AutoSwitch(), _switch(group)
    limits = _limits(switch.get("t_min", defaults.t_min), switch.get("t_max", defaults.t_max), setting, log.change.steps[-1])
    threshold = log.threshold.values[-1] if log.threshold.steps else 1e-8
    firing = window_firing(log.window_mean, threshold, limits)
    resolution = f"window mean of Z against {threshold:.3g}, logged {_every(log.change.steps)}"
    verdict = Verdict(names[0], firing, f"{resolution}; not before step {limits.t_min}")
    missing = f"the run logged the {own} Z; train with AutoSwitch(mean={other!r}) to know"
    if other == "geometric" and firing.latest is not None and not firing.forced:
        why = "a geometric mean is at most the arithmetic one, as long as every coordinate moves"
        return [verdict, Verdict(names[1], Firing(limits.t_min, firing.latest), f"{why}; {missing}")]
    return [verdict, Verdict(names[1], None, missing)]


def _relative_norm(group: MaskedGroup, setting: Setting) -> Verdict:
    rule, curve = RelativeNorm(), group.curve("v_l2")
    name = f"RelativeNorm, below {rule.threshold:g}"
    if not curve.steps:
        return Verdict(name, None, "the run did not log v_l2")
    limits = _limits(rule.t_min, rule.t_max, setting, _known(group, curve.steps))
    firing = relative_norm_firing(Samples(curve, setting.beta2), rule.threshold, limits)
    return Verdict(name, firing, f"v_l2, logged {_every(curve.steps)}")


def _staleness(group: MaskedGroup, setting: Setting) -> Verdict:
    rule, curve = Staleness(), group.curve("v_l1")
    name = f"Staleness, from {rule.threshold:g} on"
    if not curve.steps:
        return Verdict(name, None, "the run did not log v_l1")
    limits = _limits(rule.t_min, rule.t_max, setting, _known(group, curve.steps))
    firing = staleness_firing(Samples(curve, setting.beta2), setting.window, rule.threshold, limits)
    return Verdict(name, firing, f"v_l1 over T_w = {setting.window} steps, logged {_every(curve.steps)}")


def _switch(group: MaskedGroup) -> Mapping[str, Any]:
    """The AutoSwitch of the recipe, as an exported file describes it."""
    switch = recipe_of(group.run).get("switch")
    return switch if isinstance(switch, Mapping) and switch.get("type") == "AutoSwitch" else {}


def _beta2_of(folder: Path) -> float | None:
    """From the hyperparameters that Lightning keeps beside the events; read as text, because YAML may ask for classes."""
    try:
        text = (folder / "hparams.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    number = r"([\d.]+(?:e-?\d+)?)"
    found = re.search(rf"^(?:\w*beta2|betas:[^\n]*\n\s*- {number}\n\s*-):? {number}$", text, re.MULTILINE)
    value = float(found[2]) if found and re.fullmatch(r"\d*\.\d+(e-?\d+)?", found[2]) else None
    return value if value is not None and 0 < value < 1 else None


def _limits(t_min: float, t_max: float, setting: Setting, known: int) -> Limits:
    low, high = (round(t * setting.steps) if isinstance(t, float) else t for t in (t_min, t_max))
    return Limits(low, high, known)


def _known(group: MaskedGroup, steps: tuple[int, ...]) -> int:
    """What is logged after v froze says nothing of a live v."""
    return min(steps[-1], steps[-1] if group.frozen is None else group.frozen)


def _every(steps: tuple[int, ...]) -> str:
    gaps = [after - before for before, after in pairwise(steps)]
    usual = mode(gaps) if gaps else 0
    return "at every step" if usual == 1 else f"every {usual} steps" if usual else "once"
