"""What a checkpoint says of the run that wrote it, and whether this run may go on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_step.errors import ResumeError
from lightning_step.recipes import Recipe, describe
from lightning_step.targets import Target

__all__ = ["STATE_VERSION", "brief", "check_config", "check_version", "config_of"]

STATE_VERSION = 1


def check_version(state: Mapping[str, Any]) -> None:
    """Refuse a state this version cannot read.

    Args:
        state: From a ``state_dict``.

    Raises:
        ResumeError: If it has no version, or a newer one.

    Example:
        >>> check_version({"version": STATE_VERSION})
    """
    version = state.get("version")
    if version != STATE_VERSION:
        raise ResumeError(
            f"Expected a state of version {STATE_VERSION}, but got version {version!r}. "
            "Resume with the lightning-step that wrote the checkpoint, or a newer one."
        )


def config_of(recipe: Recipe, targets: Sequence[Target]) -> dict[str, Any]:
    """The configuration a run must share with the checkpoint it resumes from.

    Args:
        recipe: The recipe.
        targets: The masked tensors.

    Returns:
        Plain values: the recipe, and n, m and group dimension of every masked tensor.

    Example:
        >>> from lightning_step import Dense
        >>> config_of(Dense(), [])
        {'recipe': {'type': 'Dense'}, 'patterns': {}}
    """
    patterns = {target.name: [target.pattern.n, target.pattern.m, target.dim] for target in targets}
    return {"recipe": describe(recipe), "patterns": patterns}


def check_config(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to resume under another recipe or pattern.

    Args:
        saved: Configuration of the checkpoint.
        current: Configuration of this run.

    Raises:
        ResumeError: If they differ; it shows both.

    Example:
        >>> check_config({"recipe": 1, "patterns": {}}, {"recipe": 1, "patterns": {}})
    """
    if saved["recipe"] != current["recipe"]:
        raise ResumeError(
            f"Expected the recipe of the checkpoint, {brief(saved['recipe'])}, but got {brief(current['recipe'])}. "
            "Resume with the same recipe, or load only the weights to start a new run."
        )
    if saved["patterns"] != current["patterns"]:
        raise ResumeError(
            "Expected the patterns of the checkpoint, but got others: "
            f"{_differences(saved['patterns'], current['patterns'])}. "
            "Resume with the same n, m, include, exclude and overrides, or load only the weights to start a new run."
        )


def brief(recipe: Any) -> str:
    """A described recipe on one line.

    Args:
        recipe: From `describe`.

    Returns:
        Its name and arguments as one would write them.

    Example:
        >>> from lightning_step import SRSTE
        >>> brief(describe(SRSTE()))
        'SRSTE(lam=0.0002)'
    """
    if not isinstance(recipe, Mapping):
        return repr(recipe)
    arguments = ", ".join(f"{key}={brief(value)}" for key, value in recipe.items() if key != "type")
    return f"{recipe.get('type')}({arguments})"


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    shown = [f"{name} was {_nm(saved.get(name))}, is {_nm(current.get(name))}" for name in names[:3]]
    return "; ".join(shown) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def _nm(entry: Sequence[int] | None) -> str:
    return "dense" if entry is None else f"{entry[0]}:{entry[1]} along dim {entry[2]}"
