"""Shell-style globs over the names of modules and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_step.errors import ArgumentTypeError, TargetError
from lightning_step.naming import named_modules
from lightning_step.pattern import NMPattern

__all__ = ["Selection", "check_globs", "chosen_names"]


@dataclass(frozen=True)
class Selection:
    """Which names a user let in, kept out, or gave another pattern.

    Example:
        >>> selection = Selection.over(nn.Sequential(nn.Linear(4, 4)), None, ["0"], {})
        >>> selection.refusal(["0.weight"])
        "excluded by '0'"
    """

    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    overrides: Mapping[str, NMPattern]

    @classmethod
    def over(
        cls,
        model: nn.Module,
        include: Sequence[str] | None,
        exclude: Sequence[str],
        overrides: Mapping[str, NMPattern],
    ) -> Selection:
        """Check every glob against a model.

        Args:
            model: The model whose names the globs are about.
            include: Globs of what may be chosen; None lets everything in.
            exclude: Globs of what may not.
            overrides: Globs of what gets another pattern.

        Returns:
            The selection.

        Raises:
            ArgumentTypeError: If ``include`` or ``exclude`` is a single string.
            TargetError: If a glob matches no module and no tensor.

        Example:
            >>> Selection.over(nn.Linear(4, 4), ["weight"], [], {}).include
            ('weight',)
        """
        modules = list(named_modules(model))
        names = [name for name, _ in modules if name]
        names += [f"{m}.{p}" if m else p for m, module in modules for p in module._parameters]
        for argument, globs in (("include", include or ()), ("exclude", exclude), ("overrides", overrides)):
            if isinstance(globs, str):
                raise ArgumentTypeError(f"Expected `{argument}` to be a list of globs, but got the string {globs!r}.")
            check_globs(argument, globs, names)
        return cls(None if include is None else tuple(include), tuple(exclude), overrides)

    def refusal(self, names: Sequence[str]) -> str | None:
        """Why a tensor is not chosen.

        Args:
            names: Every name the tensor goes by; several where layers share it.

        Returns:
            The reason, or None if it is chosen.

        Example:
            >>> Selection(("fc*",), (), {}).refusal(["head.weight"])
            'not named by `include`'
        """
        for glob in self.exclude:
            if _matches(glob, names):
                return f"excluded by {glob!r}"
        if self.include is not None and not any(_matches(glob, names) for glob in self.include):
            return "not named by `include`"
        return None

    def names_exactly(self, names: Sequence[str]) -> bool:
        """Whether a tensor or its module is asked for by its full name, not just swept in by a wildcard.

        Args:
            names: Every name the tensor goes by.

        Returns:
            True if ``include`` or ``overrides`` spells out one of them.

        Example:
            >>> Selection(("*", "head"), (), {}).names_exactly(["head.weight"])
            True
        """
        spelled = {*(self.include or ()), *self.overrides}
        return any(name in spelled or name.rpartition(".")[0] in spelled for name in names)

    def override(self, names: Sequence[str]) -> NMPattern | None:
        """The pattern that ``overrides`` gives a tensor; the last matching entry wins.

        Args:
            names: Every name the tensor goes by.

        Returns:
            The pattern, or None if no entry matches.

        Example:
            >>> str(Selection(None, (), {"*": NMPattern(1, 4)}).override(["fc.weight"]))
            '1:4'
        """
        found = None
        for glob, pattern in self.overrides.items():
            if _matches(glob, names):
                found = pattern
        return found


def _matches(glob: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(candidate, glob) for name in names for candidate in _with_parents(name))


def _with_parents(name: str) -> list[str]:
    """``a.b.weight`` gives ``a``, ``a.b`` and itself: a glob that matches a container covers what is in it."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def check_globs(argument: str, globs: Iterable[str], names: Sequence[str]) -> None:
    """Refuse a glob that matches nothing.

    Args:
        argument: What the user calls the list.
        globs: The globs.
        names: Of all modules and tensors.

    Raises:
        TargetError: If a glob matches none of the names.

    Example:
        >>> check_globs("include", ["fc*"], ["fc1", "fc1.weight"])
    """
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
            raise TargetError(
                f"Expected every glob of `{argument}` to match a module or a tensor, but got {glob!r}, which matches "
                f"none. The model has: {shown}."
            )


def chosen_names(names: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str]) -> set[str]:
    """The names that globs choose, where there is no model to ask.

    Args:
        names: Of all tensors.
        include: Globs of what is chosen; None: everything.
        exclude: Globs of what is not; they win.

    Returns:
        The chosen ones.

    Raises:
        TargetError: If a glob matches none of the names, and nothing that they begin with.

    Example:
        >>> sorted(chosen_names(["fc.weight", "fc.bias", "head.weight"], ["*.weight"], ["head"]))
        ['fc.weight']
    """
    known = list(dict.fromkeys(parent for name in names for parent in _with_parents(name)))
    for argument, globs in (("include", include or ()), ("exclude", exclude)):
        check_globs(argument, globs, known)
    selection = Selection(None if include is None else tuple(include), tuple(exclude), {})
    return {name for name in names if selection.refusal([name]) is None}
