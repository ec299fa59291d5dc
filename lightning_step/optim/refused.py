"""Optimizers that look like Adam and whose second moment is still no constant to divide by, with the reason."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_step.errors import OptimizerError

__all__ = ["check_holds_zeros", "why_refused"]

# By package, or by package and name: none of them has to be installed. An adapter registered for one of them comes first.
_REASONS = {
    "torch.Adamax": (
        "It keeps a decaying maximum of |g|, no second moment: one number for the largest recent gradient, which settles to "
        "nothing (between two peaks it only decays), so no switch can say when it is trustworthy, and a frozen one would "
        "hold every coordinate at the height of its last outlier"
    ),
    "torch.Muon": "It has a momentum only; its steps are orthogonalized matrices and divide by no second moment",
    "torch.Adafactor": (
        "It keeps sums over rows and columns in the place of a second moment, so there is no tensor to freeze"
    ),
    "torch.SparseAdam": "It takes sparse gradients only, which a masked layer does not give",
    "bitsandbytes": (
        "It keeps its moments in 8 bits with one scale for a block of weights, or under names of its own, and steps in a "
        "kernel of its own: a preconditioner written in their place would be rounded block by block"
    ),
    "schedulefree": (
        "It trains one set of weights and evaluates another, an average that exists only between its own eval() and "
        "train(): its step moves both together and cannot be taken apart"
    ),
}


def check_holds_zeros(optimizer: Optimizer) -> None:
    """Refuse an optimizer that keeps the weights twice, under a recipe that holds pruned weights at zero.

    Args:
        optimizer: The optimizer.

    Raises:
        OptimizerError: If it does.

    Example:
        >>> import torch
        >>> check_holds_zeros(torch.optim.SGD([torch.zeros(1)]))
    """
    cls = type(optimizer)
    if cls.__module__.partition(".")[0] == "schedulefree":
        raise OptimizerError(
            f"Expected an optimizer that keeps the weights only once, but got {cls.__module__}.{cls.__qualname__}. Weights "
            "pruned for good are held at zero where the model trains; the copy it averages would bring them back. Use "
            "SRSTE or STE, whose masks follow the weights, or another optimizer."
        )


def why_refused(optimizer_type: type) -> str | None:
    """Why the second moment of a type of optimizer is not frozen, if that is known.

    Args:
        optimizer_type: The type.

    Returns:
        A sentence without its full stop, or None.

    Example:
        >>> import torch
        >>> why_refused(torch.optim.Adamax)[:35]
        'It keeps a decaying maximum of |g|,'
    """
    package = optimizer_type.__module__.partition(".")[0]
    return _REASONS.get(f"{package}.{optimizer_type.__qualname__}") or _REASONS.get(package)
