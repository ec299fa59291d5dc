"""What recipes that vary another recipe have in common."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.recipes.base import Recipe

__all__ = ["Wrapper"]


class Wrapper(Recipe):
    """A recipe that has another one's plan but for a part.

    The recipe it varies is its field ``recipe``. Wrappers may be put around each other, in any order and each kind once.

    Example:
        >>> from lightning_step import SRSTE, StructureDecay
        >>> isinstance(StructureDecay(SRSTE()), Wrapper)
        True
    """

    recipe: Recipe

    def check_recipe(self) -> None:
        """Refuse what cannot be varied. Called at construction.

        Raises:
            ArgumentTypeError: If ``recipe`` is no recipe.
            ConfigurationError: If it never has masks, or is varied in the same way already.
        """
        own = type(self).__name__
        if not isinstance(self.recipe, Recipe):
            raise ArgumentTypeError(
                f"Expected `recipe` of {own} to be a recipe, but got {self.recipe!r}. Write {own}(SRSTE()), with brackets."
            )
        if self.recipe.plan().masks is None:
            raise ConfigurationError(
                f"Expected `recipe` of {own} to have masks, but got {self.recipe!r}, which never has any: there is nothing "
                "that could change. Use it by itself."
            )
        if any(type(inner) is type(self) for inner in _chain(self.recipe)):
            raise ConfigurationError(
                f"Expected one {own} around a recipe, but got a second one inside: {self.recipe!r}. They would answer the "
                "same question differently. Keep one."
            )


def _chain(recipe: Recipe) -> Iterator[Recipe]:
    yield recipe
    if isinstance(recipe, Wrapper):
        yield from _chain(recipe.recipe)
