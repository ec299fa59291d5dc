"""What must not stand in one table, nor in one file of results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def check(lines: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what must not stand in one table: unequal steps, models or data, and one name for two recipes."""
    for task in {line["task"] for line in lines}:
        own = [line for line in lines if line["task"] == task]
        steps: dict[float, set[str]] = {}
        for line in own:
            steps.setdefault(line["steps"] / line["times"], set()).add(line["row"])
        if len(steps) > 1:
            found = {f"{count:g}": sorted(rows) for count, rows in sorted(steps.items())}
            raise SystemExit(f"Expected the same number of steps in every row of {task}, but got {found}.")
        same(f"the task {task}", [{**line["config"]["task"], "steps": None} for line in own])
        for row in {line["row"] for line in own}:
            same(f"{row!r} of {task}", [without_lam(line["config"]["recipe"]) for line in own if line["row"] == row])


def same(what: str, settings: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what is not everywhere the same."""
    found = {json.dumps(setting, sort_keys=True) for setting in settings}
    if len(found) > 1:
        raise SystemExit(f"Expected {what} to be one thing in all results, but got {' and '.join(sorted(found))}.")


def without_lam(recipe: Any) -> Any:
    """A recipe but for what is tuned in it."""
    if isinstance(recipe, Mapping):
        return {name: without_lam(value) for name, value in recipe.items() if name != "lam"}
    return recipe


def identity(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What may be there once only: two of these with different details must not be in one table."""
    return (config["task"]["name"], *(config[name] for name in ("row", "n", "m", "lr", "lam", "seed")))


def differences(old: Any, new: Any, where: str = "") -> str:
    """In which values two settings differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return ", ".join(differences(old.get(key), new.get(key), f"{where}.{key}".lstrip(".")) for key in keys)
    return f"{where} was {old!r} and is {new!r}"
