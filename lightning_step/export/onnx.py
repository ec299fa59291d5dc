"""A hardened model as ONNX, and the proof that its products see the pattern along the axis they sum over."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_step.errors import ArgumentTypeError, ConfigurationError
from lightning_step.export.files import check_writable
from lightning_step.export.hardening import masks_to_apply, sparse_entries, tensors_of, verify
from lightning_step.export.manifest import HEADER_KEY, SparseTensor
from lightning_step.export.onnx_graph import GraphWeight, graph_weights
from lightning_step.export.onnx_write import MAX_BYTES, write_onnx
from lightning_step.parametrization import nm_masks, strip
from lightning_step.sharding import any_sharded
from lightning_step.targets import Targets
from lightning_step.version import __version__

__all__ = ["ONNX_MANIFEST_VERSION", "ExportedOnnx", "export_onnx", "need_onnx"]

ONNX_MANIFEST_VERSION = 1


@dataclass(frozen=True)
class ExportedOnnx:
    """What was written.

    Example:
        >>> ExportedOnnx(Path("model.onnx"), 100, {"node_linear:1": "fc.weight"}, ()).nodes
        {'node_linear:1': 'fc.weight'}
    """

    path: Path
    bytes: int  # of both files
    nodes: Mapping[str, str]  # node and number of its input, "node_linear:1" -> the masked tensor that comes in there
    elsewhere: tuple[str, ...]  # tensors that hold their pattern, but that no product of the graph uses as they are
    data: Path | None = None  # the file beside it that holds the weights, if one file would be too large


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    targets: Targets | None = None,
    one_shot: bool = False,
    info: Mapping[str, Any] | None = None,
    max_file_bytes: int = MAX_BYTES,
    **settings: Any,
) -> ExportedOnnx:
    """Write a model as ONNX through ``torch.onnx``, its zeros in it, and say in the file which nodes hold n:m.

    A copy is hardened, put into evaluation mode and exported; the model is left as it is. The file is there whole or not
    at all. `check_onnx` proves the pattern again, whatever was done to the file since. Needs ``lightning-step[onnx]``.

    Args:
        model: A model with masks, or, with ``targets``, one whose weights hold their zeros already.
        args: Example inputs, as the model takes them.
        path: The file to write.
        kwargs: Example inputs by name.
        targets: What must hold its pattern, for a model without masks (after `strip`). Verified, never pruned.
        one_shot: Apply masks that are still off, too.
        info: Plain values to keep in the file.
        max_file_bytes: If the file would be larger, the weights go into a second one beside it, to be kept together with it.
            2 GiB is the most that one can hold.
        settings: Passed on to ``torch.onnx.export``: ``input_names``, ``dynamic_shapes``, ``opset_version``, ...

    Returns:
        Path, size, and which node multiplies with which masked tensor.

    Raises:
        ConfigurationError: If onnx is not installed, no mask is on, the model is sharded, its graph alone is larger than
            a file may be, the path cannot be written, or ``torch.onnx`` cannot export the model.
        ArgumentTypeError: If ``info`` holds other than plain values.
        ViolationError: If a tensor does not hold its pattern.
        ExportError: If writing fails midway. The old file is left as it was.

    Example:
        >>> from lightning_step import NMPattern, apply_nm_masks
        >>> layer = nn.Linear(8, 4)
        >>> _ = apply_nm_masks(layer, NMPattern(2, 4))
        >>> exported = export_onnx(layer, (torch.zeros(1, 8),), "layer.onnx")  # doctest: +SKIP
        >>> exported.nodes  # doctest: +SKIP
        {'node_linear:1': 'weight'}
    """
    need_onnx()
    path = check_writable(path)
    settings = _checked_settings(settings)
    hard, entries, tensors = _hardened_copy(model, targets, one_shot)
    for name, entry in entries.items():
        verify(name, tensors[name], entry)
    proto = _through_torch(hard, args, kwargs, settings)
    _name_nodes(proto.graph)
    nodes, elsewhere = _matched(proto.graph, tensors, entries)
    entry = proto.metadata_props.add()
    entry.key, entry.value = HEADER_KEY, _manifest(nodes, elsewhere, entries, info)
    data = write_onnx(path, proto, max_file_bytes)
    size = sum(each.stat().st_size for each in (path, data) if each is not None)
    return ExportedOnnx(path, size, nodes, elsewhere, data)


def need_onnx(*names: str) -> None:
    """Find out now whether the extra is installed.

    Args:
        names: The packages that are needed; none: those that export needs.

    Raises:
        ConfigurationError: If one is not.

    Example:
        >>> need_onnx("no_such_package")
        Traceback (most recent call last):
        lightning_step.errors.ConfigurationError: Expected the package 'no_such_package' ..., but got: No module named ...
    """
    for name in names or ("onnx", "onnxscript"):
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigurationError(
                f"Expected the package {name!r} to read and write ONNX, but got: {error}. "
                "Install it with `pip install 'lightning-step[onnx]'`."
            ) from error


def _checked_settings(settings: dict[str, Any]) -> dict[str, Any]:
    taken = sorted(
        settings.keys() & {"f", "model", "dynamo", "export_params", "external_data", "keep_initializers_as_inputs"}
    )
    if taken:
        raise ConfigurationError(
            f"Expected settings of torch.onnx.export that say how the graph looks, but got {taken[0]!r}. Leave it out: "
            "it is decided here."
        )
    return settings


def _hardened_copy(
    model: nn.Module, targets: Targets | None, one_shot: bool
) -> tuple[nn.Module, dict[str, SparseTensor], dict[str, Tensor]]:
    tensors, _ = tensors_of(model)
    if any_sharded(tensors.values()):
        raise ConfigurationError(
            "Expected a model that is whole on every process, but got one that is sharded. Write it with `export_model`, "
            "load that file into a model on one process and export that one."
        )
    masks = {} if targets is not None else masks_to_apply(model, one_shot)
    # A LightningModule holds its trainer, and that one everything else: it stays the same object.
    shared = {
        id(each): each for m in model.modules() for each in (getattr(m, "_trainer", None), getattr(m, "_fabric", None))
    }
    hard = copy.deepcopy(model, shared).eval()
    for mask in nm_masks(hard).values():
        mask.enabled, mask.leak = mask.enabled or one_shot, 0.0
    strip(hard)
    tensors, aliases = tensors_of(hard)
    return hard, sparse_entries(tensors, aliases, masks, targets), tensors


def _through_torch(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, settings: dict[str, Any]
) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        # Of torch's own making, inside of its exporter.
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        try:
            program = torch.onnx.export(
                model, args, kwargs=dict(kwargs or {}), dynamo=True, **{"verbose": False, **settings}
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ConfigurationError(
                f"Expected a model that torch.onnx can export with these inputs, but got {type(model).__name__}: {error}"
            ) from error
    if program is None:
        raise ConfigurationError("Expected torch.onnx to give back a program, but got none.")
    return program.model_proto


def _name_nodes(graph: Any) -> None:
    """A name for every node, and none twice: the manifest speaks of nodes by name."""
    taken: set[str] = set()
    for i, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}_{i}"
        taken.add(node.name)


def _matched(
    graph: Any, tensors: Mapping[str, Tensor], entries: Mapping[str, SparseTensor]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Find the tensors in the graph by what is in them: exporters transpose, reorder, split and rename them."""
    waiting = {name: _rows(_array(tensors[name], entry.dim)) for name, entry in entries.items()}
    seen: dict[str, set[bytes]] = {name: set() for name in entries}
    nodes: dict[str, str] = {}
    others: list[GraphWeight] = []
    for weight in graph_weights(graph):
        rows = _rows(weight.rows)
        # All rows of one tensor: whole, with its gates in another order, or a slice of it.
        name = next((name for name, known in waiting.items() if rows and rows <= known), None)
        if name is None:
            others.append(weight)
        else:
            nodes[weight.key] = name
            seen[name] |= rows
    left = {name: entries[name] for name, known in waiting.items() if seen[name] != known}
    scaled = _scaled(others, tensors, left)
    return nodes | scaled, tuple(name for name in left if name not in scaled.values())


def _scaled(
    weights: Sequence[GraphWeight], tensors: Mapping[str, Tensor], entries: Mapping[str, SparseTensor]
) -> dict[str, str]:
    """Tensors whose zeros are where they were, but whose values are not: a normalization was folded into them."""
    zeros = {name: _array(tensors[name] == 0, entry.dim) for name, entry in entries.items()}
    found: dict[str, str] = {}
    for weight in weights:
        here = weight.rows == 0
        name = next((name for name, there in zeros.items() if np.array_equal(here, there)), None)
        if name is not None:
            found[weight.key] = name
            del zeros[name]
    return found


def _array(tensor: Tensor, dim: int) -> np.ndarray[Any, Any]:
    moved = tensor.detach().cpu().movedim(dim, -1).contiguous()
    moved = moved.reshape(-1, moved.shape[-1])
    return moved.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[moved.itemsize]).numpy()


def _rows(array: np.ndarray[Any, Any]) -> set[bytes]:
    size = array.shape[-1] * array.itemsize
    data = np.ascontiguousarray(array).tobytes()
    return {data[i : i + size] for i in range(0, len(data), size)}


def _manifest(
    nodes: Mapping[str, str], elsewhere: Sequence[str], entries: Mapping[str, SparseTensor], info: Mapping[str, Any] | None
) -> str:
    body = {
        "version": ONNX_MANIFEST_VERSION,
        "format": "onnx",
        "nodes": {node: {"tensor": name, "n": entries[name].n, "m": entries[name].m} for node, name in nodes.items()},
        "elsewhere": list(elsewhere),
        "sparse": {name: asdict(entry) for name, entry in entries.items()},
        "info": dict(info or {}),
        "written_by": f"lightning-step {__version__}",
        "n_means": "weights kept of every m consecutive ones along dim",
    }
    try:
        return json.dumps(body, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"Expected `info` to hold plain values, but got {info!r} ({error}).") from error
