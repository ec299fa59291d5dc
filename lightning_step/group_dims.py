"""Along which dimension a layer's weight is grouped.

Note [Group dimension]
    Groups run along the input (reduction) dimension of the product the layer computes, because that is where sparse
    hardware skips work. Linear ``(out, in)``: dim 1. Conv ``(out, in, ...)``: dim 1, the input channels of one output
    channel at one kernel position. Transposed conv ``(in, out, ...)``: dim 0. Hugging Face ``Conv1D`` ``(in, out)``: dim 0.
    Attention projections and recurrent weights ``(out, in)``: dim 1.
"""

from __future__ import annotations

from torch import nn

from lightning_step.recurrent import is_recurrent_weight

__all__ = ["group_dim", "groups_of_channels", "hf_conv1d"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PROJECTIONS = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}


def group_dim(module: nn.Module, attribute: str) -> int | None:
    """The dimension that holds the groups. See Note [Group dimension].

    Args:
        module: A layer.
        attribute: Name of its parameter.

    Returns:
        The dimension; None where the layer does not multiply by the tensor.

    Example:
        >>> group_dim(nn.Linear(8, 4), "weight"), group_dim(nn.ConvTranspose1d(8, 4, 3), "weight")
        (1, 0)
        >>> group_dim(nn.Embedding(8, 4), "weight") is None
        True
    """
    if isinstance(module, nn.MultiheadAttention):
        return 1 if attribute in _PROJECTIONS else None
    if is_recurrent_weight(module, attribute):
        return 1
    if attribute != "weight":
        return None
    if isinstance(module, _TRANSPOSED) or hf_conv1d(module):
        return 0
    return 1 if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) else None


def groups_of_channels(module: nn.Module) -> int:
    """How many blocks the group dimension falls into that no group may straddle.

    Args:
        module: A layer.

    Returns:
        A transposed convolution's ``groups``; 1 for all other layers, whose weights hold the channels of one block only.

    Example:
        >>> groups_of_channels(nn.ConvTranspose1d(8, 8, 3, groups=2)), groups_of_channels(nn.Conv1d(8, 8, 3, groups=2))
        (2, 1)
    """
    return int(module.groups) if isinstance(module, _TRANSPOSED) else 1


def hf_conv1d(module: nn.Module) -> type[nn.Module] | None:
    """Hugging Face's ``Conv1D``, a Linear layer whose weight is stored as ``(in, out)``.

    Args:
        module: A layer.

    Returns:
        That class if the layer is one, or of a subclass; else None.

    Example:
        >>> hf_conv1d(nn.Linear(8, 4)) is None
        True
    """
    # By name, so that transformers need not be installed, let alone imported.
    return next(
        (c for c in type(module).__mro__ if (c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D")), None
    )
