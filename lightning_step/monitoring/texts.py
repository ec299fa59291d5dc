"""What a run is, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_step.recipes import describe
from lightning_step.resume import brief
from lightning_step.sparsifier import Sparsifier
from lightning_step.summary import format_targets
from lightning_step.targets import merge_targets

__all__ = ["hyperparameters", "panel"]


def panel(sparsifiers: Sequence[Sparsifier]) -> str:
    """Recipe, layer table, and every switch with its reason, for TensorBoard's text page.

    Args:
        sparsifiers: One per optimizer that holds masked tensors.

    Returns:
        Markdown.

    Example:
        >>> import torch
        >>> from lightning_step import SRSTE
        >>> model = torch.nn.Linear(8, 4)
        >>> sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe=SRSTE())
        >>> print(panel([sparsifier]).splitlines()[2])
        `SRSTE(lam=0.0002)`
    """
    table = format_targets(merge_targets([sparsifier.targets for sparsifier in sparsifiers]))
    several = len(sparsifiers) > 1
    said = [
        f"- {f'optimizer {i}, ' if several else ''}{line}"
        for i, sparsifier in enumerate(sparsifiers)
        for line in [*map(str, sparsifier.events), *sparsifier.notes]
    ]
    return "\n".join(
        [
            *("### Recipe", "", f"`{brief(describe(sparsifiers[0].recipe))}`", ""),
            *("### Layers", "", "```", table, "```", ""),
            *("### Switch", "", *(said or ["- not yet"])),
        ]
    )


def hyperparameters(sparsifiers: Sequence[Sparsifier]) -> dict[str, Any]:
    """What one may want to compare runs by.

    Args:
        sparsifiers: One per optimizer that holds masked tensors.

    Returns:
        Numbers and strings by name.

    Example:
        >>> import torch
        >>> from lightning_step import SRSTE
        >>> model = torch.nn.Linear(8, 4)
        >>> sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe=SRSTE())
        >>> hyperparameters([sparsifier])
        {'sparsity/pattern': '2:4', 'sparsity/tensors': 1, 'sparsity/recipe': 'SRSTE', 'sparsity/recipe/lam': 0.0002}
    """
    targets = [target for sparsifier in sparsifiers for target in sparsifier.targets.masked]
    return {
        "sparsity/pattern": ", ".join(sorted({str(target.pattern) for target in targets})),
        "sparsity/tensors": len(targets),
        **_flat("sparsity/recipe", describe(sparsifiers[0].recipe)),
    }


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value if isinstance(value, (str, int, float)) else str(value)}
    flat = {name: value["type"]} if "type" in value else {}
    for key, entry in value.items():
        if key != "type":
            flat |= _flat(f"{name}/{key}", entry)
    return flat
