"""Which runtime can take which masked tensor, and why not: facts about layouts, not a promise of speed.

Note [What is judged]
    A runtime *takes* a tensor if its documented limits allow sparse kernels for it. Whether they win depends on batch size
    and device, and small products lose. ``None`` stands for what is not documented. The limits are those of
    `lightning_step.export.to_semi_structured` for both backends of torch; TensorRT wants at least two zeros in every four
    input channels of each output channel and kernel position, and never takes a grouped convolution.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_step.export.manifest import Manifest, SparseTensor
from lightning_step.export.semi_structured import why_not_packed
from lightning_step.group_dims import group_dim
from lightning_step.masked_classes import original_class
from lightning_step.naming import named_modules
from lightning_step.parametrization import nm_masks
from lightning_step.pattern import NMPattern
from lightning_step.summary import format_table

__all__ = ["RUNTIMES", "Acceleration", "Verdict", "accelerations", "format_accelerations", "judge", "of_file", "short_form"]

RUNTIMES: Mapping[str, str] = {
    "cusparselt": "torch cuSPARSELt",
    "cutlass": "torch CUTLASS",  # compute capability 8.x only
    "tensorrt": "TensorRT",
}
"""The runtimes that are judged: the key of their verdict, and their name."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Verdict:
    """Whether one runtime takes one tensor.

    Example:
        >>> str(Verdict(False, "1:4 is not 2:4")), str(Verdict(None, "nobody says"))
        ('no: 1:4 is not 2:4', 'not known: nobody says')
    """

    takes: bool | None  # None: not known
    reason: str = ""

    def __str__(self) -> str:
        return "yes" if self.takes else f"{'no' if self.takes is False else 'not known'}: {self.reason}"


@dataclass(frozen=True)
class Acceleration:
    """What is known of one tensor.

    Example:
        >>> judge("fc.weight", (64, 64), NMPattern(2, 4), 1, torch.bfloat16, "linear").nowhere
        False
    """

    name: str
    shape: tuple[int, ...]
    pattern: NMPattern
    dim: int
    dtype: torch.dtype
    layer: str
    verdicts: Mapping[str, Verdict]

    @property
    def nowhere(self) -> bool:
        """Whether no runtime takes the tensor.

        Returns:
            True if all say no, or nothing is known.
        """
        return not any(verdict.takes for verdict in self.verdicts.values())


def judge(name: str, shape: tuple[int, ...], pattern: NMPattern, dim: int, dtype: torch.dtype, layer: str) -> Acceleration:
    """Judge one tensor; see Note [What is judged].

    Args:
        name: Of the tensor.
        shape: Of the dense tensor.
        pattern: What it holds.
        dim: The dimension that holds the groups.
        dtype: It will be run in.
        layer: What uses it: ``"linear"``, ``"convolution"``, ``"grouped convolution"``, ``"depthwise convolution"``,
            ``"transposed convolution"``, ``"HF Conv1D"``, ``"tied embedding"``, or any other kind, of which little is known.

    Returns:
        A verdict for every runtime.

    Example:
        >>> row = judge("fc.weight", (64, 72), NMPattern(2, 4), 1, torch.bfloat16, "linear")
        >>> {runtime: str(verdict) for runtime, verdict in row.verdicts.items()}["cusparselt"]
        'no: cusparselt needs multiples of 16x16 for bfloat16'
    """
    unfit = "" if _within_two_four(pattern) else f"{pattern} is not 2:4"
    verdicts = {backend: _torch_verdict(unfit, shape, dtype, layer, backend) for backend in ("cusparselt", "cutlass")}
    verdicts["tensorrt"] = _tensorrt_verdict(unfit, shape, dim, layer)
    return Acceleration(name, shape, pattern, dim, dtype, layer, verdicts)


def accelerations(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[Acceleration, ...]:
    """Judge every masked tensor of a model.

    Args:
        model: A model with masks, on or off; their final patterns count.
        dtype: What the model will be cast to for inference. None: it stays as it is.

    Returns:
        One entry per tensor, under its first name.

    Example:
        >>> from lightning_step import apply_nm_masks
        >>> layer = nn.Linear(64, 64)
        >>> _ = apply_nm_masks(layer, NMPattern(2, 4))
        >>> [str(row.verdicts["cusparselt"]) for row in accelerations(layer)]
        ['no: cusparselt takes no float32 2:4 weights; ask for a cast with dtype=torch.bfloat16']
    """
    masks = nm_masks(model)
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for module_name, module in named_modules(model):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{module_name}.{attribute}" if module_name else attribute
                owners.setdefault(id(parameter), []).append((name, module, attribute))
    rows = []
    for uses in owners.values():
        mask = next((masks[name] for name, _, _ in uses if name in masks), None)
        if mask is not None:
            first, module, attribute = uses[0]
            parameter = module._parameters[attribute]
            assert parameter is not None  # only those were collected
            shape, kinds = tuple(parameter.shape), [_kind(module, attribute) for _, module, attribute in uses]
            layer = next((kind for kind in kinds if kind != "linear"), "linear")
            rows.append(judge(first, shape, mask.final, mask.dim % len(shape), dtype or parameter.dtype, layer))
    return tuple(rows)


def of_file(manifest: Manifest, dtypes: Mapping[str, torch.dtype]) -> tuple[Acceleration, ...]:
    """Judge every sparse tensor of a file.

    Args:
        manifest: Of the file. Where it does not name the layers, they are guessed from the shapes, and what depends on the
            guess is not known.
        dtypes: Dtype of every sparse tensor.

    Returns:
        One entry per tensor.

    Example:
        >>> of_file(Manifest("dense", {}), {})
        ()
    """
    known = manifest.info.get("layers")
    layers: Mapping[str, Any] = known if isinstance(known, dict) else {}
    return tuple(
        judge(name, e.shape, e.pattern, e.dim, dtypes[name], str(layers[name]))
        if name in layers
        else _guessed(name, e, dtypes[name])
        for name, e in manifest.sparse.items()
    )


def short_form(rows: Sequence[Acceleration]) -> str:
    """One line for the start of a run.

    Args:
        rows: From `accelerations`.

    Returns:
        How many tensors each runtime would take, and the main reason against the first of them.

    Example:
        >>> short_form([judge("a", (64, 72), NMPattern(2, 4), 1, torch.bfloat16, "linear")])
        'can run sparse as bfloat16: torch cuSPARSELt 0 of 1 tensors (cusparselt needs ...), torch CUTLASS 0, TensorRT 1'
    """
    parts: list[str] = []
    for runtime, title in RUNTIMES.items():
        verdicts = [row.verdicts[runtime] for row in rows]
        part = f"{title} {sum(bool(v.takes) for v in verdicts)}"
        against = Counter(v.reason for v in verdicts if not v.takes)
        if not parts:
            part += f" of {len(rows)} tensors" + (f" ({against.most_common(1)[0][0]})" if against else "")
        parts.append(part)
    dtypes = " and ".join(sorted({str(row.dtype).removeprefix("torch.") for row in rows}))
    return f"can run sparse as {dtypes}: " + ", ".join(parts)


def format_accelerations(rows: Iterable[Acceleration]) -> str:
    """The whole report.

    Args:
        rows: From `accelerations` or `of_file`.

    Returns:
        A table, and the reasons below it.

    Example:
        >>> print(format_accelerations([judge("a", (64, 64), NMPattern(2, 4), 1, torch.float16, "linear")]))
        tensor  layer   torch cuSPARSELt  torch CUTLASS  TensorRT
        a       linear  yes               yes            yes
    """
    reasons: dict[str, str] = {}
    cells = [["tensor", "layer", *RUNTIMES.values()]]
    for row in rows:
        line = [row.name, row.layer]
        for runtime in RUNTIMES:
            verdict = row.verdicts[runtime]
            said = str(verdict).partition(":")[0]
            mark = "" if verdict.takes else f" [{reasons.setdefault(verdict.reason, str(len(reasons) + 1))}]"
            line.append(said + mark)
        cells.append(line)
    return "\n".join([*format_table(cells), *(f"[{number}] {reason}" for reason, number in reasons.items())])


def _within_two_four(pattern: NMPattern) -> bool:
    """Whether what holds the pattern holds 2:4 as well, however its groups are filled."""
    return (pattern.m % 4 == 0 and pattern.n <= 2) or (pattern.n, pattern.m) == (1, 2)


def _torch_verdict(unfit: str, shape: tuple[int, ...], dtype: torch.dtype, layer: str, backend: Any) -> Verdict:
    if layer == "HF Conv1D":
        shape = shape[::-1]  # packed as (out, in)
    elif layer != "linear":
        return Verdict(False, f"torch packs the weights of Linear layers only, and this is a {layer}")
    reason = unfit or why_not_packed(shape, dtype, backend)
    return Verdict(not reason, reason)


def _tensorrt_verdict(unfit: str, shape: tuple[int, ...], dim: int, layer: str) -> Verdict:
    if layer in ("grouped convolution", "depthwise convolution"):
        return Verdict(False, f"a {layer} never runs sparse")
    if unfit or layer not in ("linear", "HF Conv1D", "convolution"):
        return Verdict(False, unfit) if unfit else Verdict(None, f"nothing is documented of a {layer}")
    if shape[dim] % 4:
        return Verdict(False, "the input size is not divisible by 4")
    return Verdict(True)


def _kind(module: nn.Module, attribute: str) -> str:
    if isinstance(module, nn.Embedding):
        return "tied embedding"
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        if isinstance(module, _TRANSPOSED):
            return "transposed convolution"
        if module.groups == 1:
            return "convolution"
        return "depthwise convolution" if module.groups == module.in_channels else "grouped convolution"
    if isinstance(module, nn.Linear):
        # A subclass that multiplies in a way of its own may not know a packed weight.
        plain = original_class(module).forward is nn.Linear.forward
        return "linear" if plain else original_class(module).__name__
    return "HF Conv1D" if group_dim(module, attribute) == 0 else original_class(module).__name__


def _guessed(name: str, entry: SparseTensor, dtype: torch.dtype) -> Acceleration:
    """A file does not say what uses a tensor: what speaks against it is sure, what speaks for it depends on the layer."""
    flat = len(entry.shape) == 2
    guess = ("linear" if flat else "convolution") if entry.dim else ("HF Conv1D" if flat else "transposed convolution")
    unless = "a layer of this kind multiplies with it" if flat else "its convolution is not grouped"
    unsure = Verdict(None, f"yes, if {unless}; the file does not name its layers")
    row = judge(name, entry.shape, entry.pattern, entry.dim, dtype, guess)
    verdicts = {runtime: unsure if verdict.takes else verdict for runtime, verdict in row.verdicts.items()}
    return replace(row, layer=f"{guess}?", verdicts=verdicts)
