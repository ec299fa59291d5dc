"""Metrics of weights: how many are left, whether groups hold their pattern, how much magnitude a mask keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_step.functional import density_update, kept_magnitude_update, violation_update
from lightning_step.metrics.share import Share, boolean, same_shape
from lightning_step.pattern import NMPattern
from lightning_step.sharding import local

__all__ = ["Density", "KeptMagnitude", "NMCompliance"]


class Density(Share):
    r"""Share of the weights that are not zero, :math:`\lVert w\rVert_0 / d`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``weight`` (`torch.Tensor`): what a layer computes with, any dtype, any shape.

    As output of ``forward`` and ``compute`` it returns

    - ``density`` (`torch.Tensor`): float64, shape ``()``, between 0 and 1; NaN without an update.

    Args:
        kwargs: What every torchmetrics ``Metric`` takes.

    Example:
        >>> metric = Density()
        >>> metric.update(torch.tensor([1.0, 0.0, 0.0, 2.0]))
        >>> metric.update(torch.ones(4))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("nonzeros", "weights", **kwargs)

    def update(self, weight: Tensor) -> None:
        """Count the weights of one tensor.

        Args:
            weight: What a layer computes with, any dtype, any shape.
        """
        self.add(density_update(local(weight)), weight)


class NMCompliance(Share):
    r"""Share of the groups that hold n:m, those of ``m`` consecutive weights with at most ``n`` that are not zero.

    As input to ``forward`` and ``update`` the metric accepts

    - ``weight`` (`torch.Tensor`): what a layer computes with, any dtype, shape ``(..., k*m, ...)``;
    - ``pattern`` (`NMPattern`) and ``dim`` (int), both optional: those of this tensor, where it has others.

    As output of ``forward`` and ``compute`` it returns

    - ``compliance`` (`torch.Tensor`): float64, shape ``()``; 1 exactly if no group breaks its pattern, NaN without
      an update.

    Args:
        n: Weights that may be other than zero in every group.
        m: Weights in a group.
        dim: The dimension that holds the groups: 1 is the input dimension of linear layers and convolutions.
        kwargs: What every torchmetrics ``Metric`` takes.

    Raises:
        PatternError: If n:m is no pattern; at an update, if ``m`` does not divide the size along ``dim``.

    Example:
        >>> metric = NMCompliance(2, 4)
        >>> metric.update(torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, n: int = 2, m: int = 4, dim: int = 1, **kwargs: Any) -> None:
        pattern = NMPattern(n, m)
        super().__init__(f"holding_{n}_{m}_{dim}", f"groups_{n}_{m}_{dim}", **kwargs)
        self.pattern, self.dim = pattern, dim

    def update(self, weight: Tensor, pattern: NMPattern | None = None, dim: int | None = None) -> None:
        """Count the groups of one tensor.

        Args:
            weight: What a layer computes with, any dtype, shape ``(..., k*m, ...)``.
            pattern: Of this tensor; None: that of the metric.
            dim: Of this tensor; None: that of the metric.
        """
        violations = violation_update(
            local(weight), self.pattern if pattern is None else pattern, self.dim if dim is None else dim
        )
        groups = violations[1]
        self.add(torch.stack([groups - violations[0], groups]), weight)


class KeptMagnitude(Share):
    r"""Share of the magnitude that a mask keeps, :math:`\lVert \Pi \odot w\rVert_1 / \lVert w\rVert_1`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``latent`` (`torch.Tensor`): the weight as the optimizer sees it, before masking, any float dtype, any shape;
    - ``mask`` (`torch.Tensor`): boolean, the same shape.

    As output of ``forward`` and ``compute`` it returns

    - ``kept`` (`torch.Tensor`): float64, shape ``()``, between 0 and 1; NaN if there is no magnitude at all.

    Args:
        kwargs: What every torchmetrics ``Metric`` takes.

    Raises:
        ArgumentTypeError: At an update, if the mask is not boolean.
        ConfigurationError: At an update, if the shapes differ.

    Example:
        >>> metric = KeptMagnitude()
        >>> metric.update(torch.tensor([3.0, -1.0]), torch.tensor([True, False]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("kept", "magnitude", dtype=torch.float64, **kwargs)

    def update(self, latent: Tensor, mask: Tensor) -> None:
        """Add the magnitude of one tensor.

        Args:
            latent: The weight before masking, any float dtype, any shape.
            mask: Boolean, the same shape.
        """
        boolean("mask", mask)
        same_shape(("latent", latent), ("mask", mask))
        self.add(kept_magnitude_update(local(latent), local(mask)), latent)
