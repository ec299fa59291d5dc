"""NMMask, the parametrization that masks a weight, and its installation in a model.

Note [Shared classes, plain names]
    ``torch.nn.utils.parametrize.register_parametrization`` works with `NMMask`, but `apply_nm_masks` does not go through
    it: that makes a new class for every module (so torch.compile compiles every block anew) and moves the weight to
    ``parametrizations.weight.original`` (so checkpoints, name-based parameter groups and sharded state dicts break).
    Instead a module's class is swapped for one subclass per original type, in which reading ``module.weight`` gives the
    masked weight, while the ``Parameter`` stays registered under its own name. `NMMask` holds no tensors and is not
    registered as a child: the state dict, ``named_parameters`` and ``named_modules`` are those of the plain module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.freshness import Kept
from lightning_step.functional import apply_mask, magnitude_mask, straight_through
from lightning_step.masked_classes import masks_of, masks_off, put_mask, take_masks
from lightning_step.naming import named_modules, submodule
from lightning_step.pattern import NMPattern
from lightning_step.sharding import check_groups, like, local, reshard
from lightning_step.targets import Overrides, Target, Targets, find_targets

__all__ = ["Gradient", "NMMask", "apply_nm_masks", "install_masks", "latent_weights", "nm_masks", "strip"]

Gradient = Literal["straight_through", "masked"]
"""``straight_through``: pruned weights get the gradient too and can return; ``masked``: they get none."""


class NMMask(nn.Module):
    r"""Maps a latent weight to its masked weight, :math:`\Pi(w) \odot w`.

    The mask is a function of the weight, computed where the weight is read; nothing is stored that could be lost.

    Args:
        pattern: The n:m pattern.
        dim: The dimension of the weight that holds the groups.
        gradient: How the gradient passes.
        enabled: While False the weight is handed through untouched.

    Example:
        >>> NMMask(NMPattern(2, 4))(torch.tensor([1., 4., 3., 2.]))
        tensor([0., 4., 3., 0.])
        >>> layer = nn.utils.parametrize.register_parametrization(nn.Linear(4, 1), "weight", NMMask(NMPattern(1, 4)))
        >>> int(layer.weight.count_nonzero())
        1
    """

    def __init__(
        self,
        pattern: NMPattern,
        dim: int = -1,
        *,
        gradient: Gradient = "straight_through",
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(pattern, NMPattern):
            raise ArgumentTypeError(f"Expected `pattern` to be an NMPattern, but got {pattern!r}. Write NMPattern(2, 4).")
        self.pattern = pattern  # now; a recipe may change it while the model trains
        self.final = pattern  # what the tensor is to end with; a recipe may choose another n, once
        self.given = pattern  # what it was made with
        self.dim = dim
        self.gradient: Gradient = gradient
        self.enabled = enabled
        self.leak = 0.0  # what pruned weights are multiplied with; above 0 while a recipe lets the mask come on slowly
        self.kept = Kept()

    @property
    def prunes(self) -> bool:
        """Whether what the mask drops is zero where the weight is read: it is on, and at full strength."""
        return self.enabled and not self.leak

    @property
    def rule(self) -> tuple[NMPattern, int]:
        """What the mask depends on, besides the weight."""
        return self.pattern, self.dim

    def mask(self, weight: Tensor) -> Tensor:
        """The mask this weight has now, whether enabled or not.

        Args:
            weight: The latent weight, shape ``(..., k*m, ...)``.

        Returns:
            Boolean, the shape of ``weight``.

        Example:
            >>> NMMask(NMPattern(1, 2)).mask(torch.tensor([1., -2.]))
            tensor([False,  True])
        """
        return like(magnitude_mask(local(weight.detach()), self.pattern, self.dim), weight)  # see Note [Shards]

    def kept_mask(self, weight: Tensor) -> Tensor:
        """The mask this weight has now, computed once for each of its states while it trains. See Note [Freshness].

        Args:
            weight: The latent weight.

        Returns:
            Boolean, the shape of ``weight``; to be read, not written.

        Example:
            >>> NMMask(NMPattern(1, 2)).kept_mask(torch.tensor([1., -2.]))
            tensor([False,  True])
        """
        return self.kept.mask(weight, self.rule, lambda: self.mask(weight))

    def shown(self, weight: Tensor, training: bool) -> Tensor:
        """What a layer reads as its weight: as `forward`, with what is kept. See Note [Freshness].

        Args:
            weight: The latent weight.
            training: Whether the layer is in training mode.

        Returns:
            The masked weight; the latent weight itself while not enabled.

        Example:
            >>> NMMask(NMPattern(1, 2)).shown(torch.tensor([1., -2.]), training=True)
            tensor([ 0., -2.])
        """
        if not self.enabled:
            return weight
        if training:
            return self._through(weight, self.kept_mask(weight))
        if not self.kept.windows or torch.is_grad_enabled():
            return self.forward(weight)
        return self.kept.weight(weight, (self.pattern, self.dim, self.leak), lambda: self.forward(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Mask a weight.

        Args:
            weight: The latent weight, shape ``(..., k*m, ...)``.

        Returns:
            The masked weight; the latent weight itself while not enabled.

        Example:
            >>> NMMask(NMPattern(1, 2), enabled=False)(torch.tensor([1., -2.]))
            tensor([ 1., -2.])
        """
        return self._through(weight, self.mask(weight)) if self.enabled else weight

    def _through(self, weight: Tensor, mask: Tensor) -> Tensor:
        if self.gradient == "straight_through":
            return straight_through(weight, mask, self.leak)
        return torch.where(mask, weight, weight * self.leak) if self.leak else apply_mask(weight, mask)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning a weight assigns the latent weight (``torch.nn.utils.parametrize`` calls this).

        Args:
            weight: The assigned weight.

        Returns:
            The same tensor.

        Example:
            >>> NMMask(NMPattern(1, 2)).right_inverse(torch.tensor([1., -2.]))
            tensor([ 1., -2.])
        """
        return weight

    def extra_repr(self) -> str:
        """What ``print(module)`` shows.

        Returns:
            Pattern, dimension, gradient and whether it is on.

        Example:
            >>> NMMask(NMPattern(2, 4), 1)
            NMMask(2:4 along dim 1, straight_through, on)
        """
        strength = f"on, {self.leak:.3g} of the rest" if self.enabled and self.leak else "on" if self.enabled else "off"
        return f"{self.pattern} along dim {self.dim}, {self.gradient}, {strength}"


def apply_nm_masks(
    model: nn.Module,
    pattern: NMPattern,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    overrides: Overrides | None = None,
    min_weights: int = 0,
    enabled: bool = True,
) -> Targets:
    """Put masks on a model's weights, in place.

    Parameters stay the same objects under the same names, so optimizers made earlier and checkpoints stay valid.

    Args:
        model: The model.
        pattern: The n:m pattern of every tensor that ``overrides`` does not name.
        include: Shell-style globs of what gets a mask; None: everything that can.
        exclude: Globs of what stays dense.
        overrides: Globs of what gets another n:m.
        min_weights: Tensors with fewer weights stay dense.
        enabled: Whether the masks are on at once.

    Returns:
        What is masked, and what is left out with the reason.

    Raises:
        TargetError: If a glob matches nothing, or no tensor is left to mask.
        ConfigurationError: If a tensor has a mask of another pattern already.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> _ = apply_nm_masks(layer, NMPattern(2, 4))
        >>> int(layer.weight.count_nonzero()), list(layer.state_dict())
        (16, ['weight', 'bias'])
    """
    reshard(model)
    targets = find_targets(model, pattern, include=include, exclude=exclude, overrides=overrides, min_weights=min_weights)
    install_masks(model, targets.masked, enabled=enabled)
    return targets


def install_masks(model: nn.Module, targets: Sequence[Target], *, enabled: bool = False) -> dict[str, NMMask]:
    """Put a mask on every target; what carries the same one already keeps it, with its state.

    Args:
        model: The model the targets were found in.
        targets: What to mask.
        enabled: Whether a new mask is on at once.

    Returns:
        Target name to its mask.

    Raises:
        ConfigurationError: If a tensor has a mask of another pattern or dimension already, or is sharded inside a group.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> install_masks(layer, find_targets(layer, NMPattern(2, 4)).masked)
        {'weight': NMMask(2:4 along dim 1, straight_through, off)}
    """
    masks: dict[str, NMMask] = {}
    for target in targets:
        module_name, attribute = target.owners[0]
        parameter = submodule(model, module_name)._parameters[attribute]
        if parameter is not None:
            check_groups(target.name, parameter, target.dim, target.pattern.m)
    for target in targets:
        present = [masks_of(submodule(model, name)).get(attribute) for name, attribute in target.owners]
        mask = next((m for m in present if m is not None), None) or NMMask(target.pattern, target.dim, enabled=enabled)
        if (mask.given, mask.dim) != (target.pattern, target.dim):
            raise ConfigurationError(
                f"Expected {target.name!r} to be unmasked or to have the pattern {target.pattern} along dim {target.dim}, "
                f"but got {mask.given} along dim {mask.dim} from an earlier call. Call `strip(model)` first."
            )
        for name, attribute in target.owners:
            put_mask(submodule(model, name), attribute, mask)
        masks[target.name] = mask
    return masks


def nm_masks(model: nn.Module) -> dict[str, NMMask]:
    """The masks of a model.

    Args:
        model: Any module.

    Returns:
        Full tensor name to its mask. A shared tensor or layer appears under each of its names, with one and the same mask.

    Example:
        >>> nm_masks(nn.Linear(8, 4))
        {}
    """
    found: dict[str, NMMask] = {}
    for name, module in named_modules(model):
        for attribute, mask in masks_of(module).items():
            found[f"{name}.{attribute}" if name else attribute] = mask
    return found


@contextmanager
def latent_weights(model: nn.Module) -> Iterator[None]:
    """For a while, ``layer.weight`` is the latent ``Parameter``: to initialize, inspect or edit it by name.

    While masks are on, ``layer.weight`` is a temporary, and what is written into it is lost.

    Args:
        model: A model with masks, or without.

    Yields:
        Nothing; the masks that were on are on again afterwards.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> _ = apply_nm_masks(layer, NMPattern(2, 4))
        >>> with latent_weights(layer):
        ...     _ = nn.init.ones_(layer.weight)
        >>> layer.weight[0].tolist()
        [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    """
    with masks_off(nm_masks(model).values()):
        yield


@torch.no_grad()
def strip(model: nn.Module) -> list[str]:
    """Take the masks off and leave their zeros in the weights, in place.

    Gives back the original module types and keys with the same ``Parameter`` objects. What the model computes stays the
    same: a mask that is off leaves its tensor dense, and one that still comes on leaves pruned weights as small as they are.

    Args:
        model: A model with masks. One without is left alone.

    Returns:
        Names of the tensors that now hold zeros.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> _ = apply_nm_masks(layer, NMPattern(2, 4))
        >>> strip(layer), type(layer) is nn.Linear, int(layer.weight.count_nonzero())
        (['weight'], True, 16)
    """
    reshard(model)
    hardened: list[str] = []
    done: set[int] = set()  # a shared tensor is zeroed once, under its first name
    for name, module in named_modules(model):
        for attribute, mask in masks_of(module).items():
            parameter = module._parameters[attribute]
            if mask.enabled and parameter is not None and id(parameter) not in done:
                weight = local(parameter)
                weight.copy_(mask(weight))
                done.add(id(parameter))
                if mask.prunes:
                    hardened.append(f"{name}.{attribute}" if name else attribute)
        if masks_of(module):
            take_masks(module)
    return hardened
