"""The metric of masks that follow each other, and what a model with masks feeds to all metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_step.functional import flip_rate_update
from lightning_step.metrics.share import Share, boolean, same_shape
from lightning_step.parametrization import nm_masks
from lightning_step.sharding import like, local

__all__ = ["FlipRate", "metric_inputs"]


class FlipRate(Share):
    r"""Share of the mask entries that changed, :math:`\lVert \Pi_t - \Pi_{t-1}\rVert_1 / d`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``mask`` (`torch.Tensor`): boolean, any shape;
    - ``before`` (`torch.Tensor`): the mask of the same tensor at the time to compare with, one optimizer step ago for the
      flip rate of the literature.

    As output of ``forward`` and ``compute`` it returns

    - ``flip_rate`` (`torch.Tensor`): float64, shape ``()``, between 0 and 1; NaN without an update.

    The metric keeps no mask, so which step is compared with which is up to the caller.

    Args:
        kwargs: What every torchmetrics ``Metric`` takes.

    Raises:
        ArgumentTypeError: At an update, if a mask is not boolean.
        ConfigurationError: At an update, if the shapes differ.

    Example:
        >>> metric = FlipRate()
        >>> metric.update(mask=torch.tensor([True, False, True, False]), before=torch.tensor([False, True, True, False]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    References:
        Hu et al., `Accelerating Transformer Pre-training with 2:4 Sparsity <https://arxiv.org/abs/2404.01847>`_, ICML 2024.
    """

    higher_is_better = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("flipped", "entries", **kwargs)

    def update(self, mask: Tensor, before: Tensor) -> None:
        """Count the entries of one mask.

        Args:
            mask: Boolean, any shape.
            before: The mask of the same tensor at the time to compare with.
        """
        boolean("mask", mask)
        boolean("before", before)
        same_shape(("mask", mask), ("before", before))
        self.add(flip_rate_update(local(before), local(mask)), mask)


@torch.no_grad()
def metric_inputs(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a model with masks feeds to the metrics, one tensor at a time.

    Args:
        model: A model with masks. A tensor that is shared comes once.

    Yields:
        Name, and by name of the argument: the ``latent`` weight, its ``mask`` whether that is on or not, the ``weight`` that
        the layer computes with, ``pattern`` and ``dim``.

    Example:
        >>> from torchmetrics import MetricCollection
        >>> from lightning_step import NMPattern, apply_nm_masks
        >>> from lightning_step.metrics import Density, KeptMagnitude, NMCompliance
        >>> layer = nn.Linear(8, 4)
        >>> _ = apply_nm_masks(layer, NMPattern(2, 4))
        >>> metrics = MetricCollection([Density(), NMCompliance(), FlipRate(), KeptMagnitude()])
        >>> before = {name: inputs["mask"] for name, inputs in metric_inputs(layer)}
        >>> for name, inputs in metric_inputs(layer):  # an optimizer step later
        ...     metrics.update(**inputs, before=before[name])
        >>> values = metrics.compute()
        >>> values["Density"].item(), values["NMCompliance"].item(), values["FlipRate"].item()
        (0.5, 1.0, 0.0)
    """
    masks = nm_masks(model)
    for name, parameter in model.named_parameters():
        if name not in masks:
            continue
        own, latent = masks[name], parameter.detach()
        weight, mask = like(own(local(latent)), latent), own.mask(latent)  # see Note [Shards]
        yield name, {"weight": weight, "latent": latent, "mask": mask, "pattern": own.pattern, "dim": own.dim}
