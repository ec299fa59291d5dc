"""A Lightning checkpoint of a sparse run, read without the model's class and exported without training.

Note [What a checkpoint says]
    The state dict holds the latent weights, the callback's state the final pattern and group dimension of every masked
    tensor and whether its masks were on. Nothing else is needed: the mask is a function of the weight. Where a recipe
    lets patterns change, those in force when the checkpoint was written count, as long as masks were on.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_step.errors import ConfigurationError, FileFormatError
from lightning_step.export import Exported, Format, SparseTensor, export_tensors
from lightning_step.globs import Selection, check_globs
from lightning_step.naming import plain_name
from lightning_step.parametrization import NMMask
from lightning_step.pattern import NMPattern
from lightning_step.resume import check_version

__all__ = ["Checkpoint", "export_checkpoint", "read_checkpoint"]

_STATE_KEY = "STEPSparsityCallback"


@dataclass(frozen=True)
class Checkpoint:
    """What of a checkpoint matters here.

    Example:
        >>> Checkpoint("a.ckpt", {}, {}, {}, frozenset(), {}).on
        frozenset()
    """

    path: str
    tensors: Mapping[str, Tensor]  # latent, each once
    aliases: Mapping[str, str]
    patterns: Mapping[str, tuple[NMPattern, int]]  # pattern and group dimension of what is, or will be, masked
    on: frozenset[str]  # whose masks were on
    info: Mapping[str, Any]
    unfinished: Mapping[str, NMPattern] = field(default_factory=dict)  # what was to get another pattern, and which


def read_checkpoint(path: str | os.PathLike[str], module: str | None = None) -> Checkpoint:
    """Read a checkpoint that Lightning wrote; nothing in it is run (``weights_only=True``).

    Args:
        path: The file.
        module: Name of the submodule whose tensors are wanted, so that their names have no prefix; None: all.

    Returns:
        Weights and patterns.

    Raises:
        FileFormatError: If it is no readable Lightning checkpoint.
        ResumeError: If it is of a newer version.

    Example:
        >>> read_checkpoint("/nonexistent.ckpt")
        Traceback (most recent call last):
        lightning_step.errors.FileFormatError: Expected a Lightning checkpoint, but got '/nonexistent.ckpt': No such file...
    """
    body = _loaded(Path(path))
    prefix = f"{module}." if module else ""
    tensors, aliases = _each_once(body["state_dict"], prefix)
    if not tensors:
        raise ConfigurationError(f"Expected `module` to name a submodule in {str(path)!r}, but got {module!r}.")
    state = body.get("callbacks", {}).get(_STATE_KEY, {"optimizers": []})
    if state["optimizers"]:
        check_version(state)
    patterns: dict[str, tuple[NMPattern, int]] = {}
    on: set[str] = set()
    unfinished: dict[str, NMPattern] = {}
    for own in state["optimizers"]:
        for full, (now, final, dim) in _patterns_of(own).items():
            if full.startswith(prefix):
                name = full.removeprefix(prefix)
                name = aliases.get(name, name)
                patterns[name] = (now, dim)
                unfinished |= {name: final} if now != final else {}
                on |= {name} if own["masks"] and not own.get("patterns", {}).get("leak") else set()
    info = {"steps": body.get("global_step"), "checkpoint": Path(path).name}
    recipes = [own["config"]["recipe"] for own in state["optimizers"]]
    info |= {"recipe": recipes[0]} if recipes else {}
    return Checkpoint(str(path), tensors, aliases, patterns, frozenset(on), info, unfinished)


def export_checkpoint(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    format: Format = "dense",
    *,
    one_shot: bool = False,
    pattern: NMPattern | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    info: Mapping[str, Any] | None = None,
) -> Exported:
    """Write the sparse model of a checkpoint.

    Args:
        checkpoint: From `read_checkpoint`.
        path: The file to write.
        format: See `export_model`.
        one_shot: Prune by magnitude what has no learned mask in the checkpoint.
        pattern: Pattern for ``one_shot`` where the checkpoint is of a dense run and has none; groups then run along dim 1,
            and ``include`` has to say which tensors are products.
        include: Globs of what to prune; None: all that the checkpoint has a pattern for.
        exclude: Globs of what stays dense.
        info: More plain values for the manifest.

    Returns:
        What was written.

    Raises:
        ConfigurationError: If masks were never on and ``one_shot`` is False, or the patterns are not known or known twice.
        TargetError: If a glob matches nothing.
        ExportError: If writing fails midway.

    Example:
        >>> export_checkpoint(Checkpoint("a.ckpt", {}, {}, {}, frozenset(), {}), "a.safetensors")
        Traceback (most recent call last):
        lightning_step.errors.ConfigurationError: Expected patterns in 'a.ckpt', but got a checkpoint without ...
    """
    names = list(checkpoint.tensors)
    for argument, globs in (("include", include or ()), ("exclude", exclude)):
        check_globs(argument, globs, _with_modules(names))
    selection = Selection(None if include is None else tuple(include), tuple(exclude), {})
    patterns = _patterns(checkpoint, one_shot, pattern, include)
    chosen = {
        name: patterns[name]
        for name in patterns
        if (one_shot or name in checkpoint.on) and selection.refusal([name]) is None
    }
    if not chosen:
        raise ConfigurationError(
            f"Expected learned masks in {checkpoint.path!r}, but got {len(checkpoint.on)} that are on and chosen of "
            f"{len(patterns)}: it may have been written before masks began, or were at full strength. Take a later "
            "checkpoint, or prune by magnitude now with one_shot (--one-shot)."
        )
    sparse = {name: _entry(name, checkpoint.tensors[name], *found) for name, found in chosen.items()}
    masks = {name: NMMask(*found) for name, found in chosen.items()}
    return export_tensors(
        checkpoint.tensors,
        sparse,
        path,
        format,
        masks=masks,
        aliases=checkpoint.aliases,
        info={**checkpoint.info, **(info or {})},
    )


def _patterns_of(own: Mapping[str, Any]) -> dict[str, tuple[NMPattern, NMPattern, int]]:
    """Pattern in force (before masks began: the one to come), pattern at the end, and group dimension."""
    saved = own.get("patterns", {})
    found = {}
    for name, (n, m, dim) in own["config"]["patterns"].items():
        final = saved.get("final", {}).get(name, [n, m])
        now = saved.get("now", {}).get(name, final) if own["masks"] else final
        found[name] = (NMPattern(*now), NMPattern(*final), dim)
    return found


def _patterns(
    checkpoint: Checkpoint, one_shot: bool, pattern: NMPattern | None, include: Sequence[str] | None
) -> Mapping[str, tuple[NMPattern, int]]:
    where = repr(checkpoint.path)
    if checkpoint.patterns:
        if pattern is not None:
            raise ConfigurationError(
                f"Expected no pattern, as {where} has those of its run, but got {pattern}. Leave out n and m."
            )
        return checkpoint.patterns
    if pattern is None or not one_shot or include is None:
        raise ConfigurationError(
            f"Expected patterns in {where}, but got a checkpoint without the state of STEPSparsityCallback (a dense run, or "
            "save_weights_only). To prune it by magnitude, pass one_shot, n, m and include (--one-shot --n --m --include)."
        )
    selection = Selection(tuple(include), (), {})
    wide = [name for name, tensor in checkpoint.tensors.items() if tensor.dim() > 1 and tensor.is_floating_point()]
    return {name: (pattern, 1) for name in wide if selection.refusal([name]) is None}


def _entry(name: str, tensor: Tensor, pattern: NMPattern, dim: int) -> SparseTensor:
    shape = tuple(tensor.shape)
    if dim >= len(shape) or shape[dim] % pattern.m:
        raise ConfigurationError(
            f"Expected m={pattern.m} to divide {name!r} along dim {dim}, but got the shape {shape}. Exclude the tensor."
        )
    return SparseTensor(pattern.n, pattern.m, dim, shape)


def _loaded(path: Path) -> dict[str, Any]:
    try:
        if path.is_dir():
            raise OSError(None, "it is a folder (a sharded checkpoint: consolidate it first)")
        body = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(body["state_dict"], dict):
            raise TypeError("its state_dict is no dictionary")
        return dict(body)
    except pickle.UnpicklingError as error:
        why = "it is damaged, or holds objects other than tensors and plain values, which are not loaded"
        raise FileFormatError(f"Expected a Lightning checkpoint, but got {str(path)!r}: {why}.") from error
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError) as error:
        said = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise FileFormatError(f"Expected a Lightning checkpoint, but got {str(path)!r}: {said}.") from error


def _each_once(state: Mapping[str, Any], prefix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under their first name. Tied ones come back from a checkpoint as views of one storage."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for key, tensor in state.items():
        name = plain_name(key)
        if not isinstance(tensor, Tensor) or not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor
    return tensors, aliases


def _with_modules(names: Sequence[str]) -> list[str]:
    parts = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(each[: i + 1]) for each in parts for i in range(len(each))))
