"""Bytes and seconds of every export format for a BERT-Base-sized and a GPT-2-small-sized model, beside plain safetensors.

``python examples/benchmarks/export_sizes.py`` builds both from their configs, in bfloat16 with random weights that are made
2:4, writes and loads each in every format, and writes ``results.json`` and ``results.md`` to ``--out``. No weights are
downloaded. Every time is the fastest of ``--repeats``, in turns with plain ``safetensors.torch.save_file`` and ``load_file``
on the same machine in the same run. Loading means: into a model that is there, so that a mapped file is read to its end.
``--tiny`` tries the command with models of two small layers. Needs transformers, and onnx for the last row.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from lightning_step import NMPattern, Targets, apply_nm_masks, export_model, load_sparse, strip
from lightning_step.export import check_onnx, export_folder, export_onnx

PATTERN = NMPattern(2, 4)
TINY_BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
}
TINY_GPT2: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 64,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def bert(tiny: bool) -> PreTrainedModel:
    """BERT-Base has the sizes that its config has by default."""
    return BertModel(BertConfig(**(TINY_BERT if tiny else {})))


def gpt2(tiny: bool) -> PreTrainedModel:
    """GPT-2 small as well."""
    config = GPT2Config(**(TINY_GPT2 if tiny else {}))
    config.use_cache = False
    return GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[bool], PreTrainedModel]] = {"BERT-Base": bert, "GPT-2 small": gpt2}


def made_sparse(make: Callable[[bool], PreTrainedModel], tiny: bool) -> tuple[PreTrainedModel, Targets]:
    """Random weights, every maskable layer but the embedding and the tied head 2:4, in bfloat16."""
    torch.manual_seed(0)
    model = make(tiny)
    nn.Module.train(model, False)
    model.bfloat16()
    targets = apply_nm_masks(model, PATTERN)
    strip(model)
    return model, targets


def plain_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with a tied tensor once, as ``save_file`` wants it."""
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(value), (name, value.detach()))
    return dict(tensors.values())


def entropy_bound(model: nn.Module, targets: Targets) -> float:
    """Bytes below which no file that knows only the pattern can be: kept values, and log2 C(m, n) bits a group."""
    bits = 8.0 * sum(tensor.numel() * tensor.itemsize for tensor in plain_tensors(model).values())
    for target in targets.masked:
        weights, pattern = math.prod(target.shape), target.pattern
        bits -= weights * 16 * (1 - pattern.density) - weights * math.log2(pattern.choices) / pattern.m
    return bits / 8


def packed_share(path: Path, targets: Targets) -> float:
    """Bytes of the masked tensors in a packed file, of those they have dense."""
    stored = load_file(path)
    parts = [part for part in stored if part.endswith((".nm_values", ".nm_index"))]
    dense = sum(math.prod(target.shape) * torch.bfloat16.itemsize for target in targets.masked)
    return sum(stored[part].nbytes for part in parts) / dense


def fastest(repeats: int, *works: Callable[[], object]) -> list[float]:
    """Seconds of each, the lowest of several rounds in which each has its turn."""
    best = [math.inf] * len(works)
    for _ in range(repeats):
        for i, work in enumerate(works):
            start = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def save_and_sync(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """What `export_model` does besides: the data are on the disk when it returns."""
    save_file(tensors, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def measured(
    name: str, make: Callable[[bool], PreTrainedModel], tiny: bool, repeats: int, folder: Path
) -> list[dict[str, Any]]:
    """A row for every format."""
    model, targets = made_sparse(make, tiny)
    other = make(tiny)  # what is loaded into
    other.bfloat16()
    paths = {kind: folder / f"{kind}.safetensors" for kind in ("plain", "synced", "dense", "packed")}
    tensors = plain_tensors(model)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    writers: dict[str, Callable[[], object]] = {
        "safetensors.torch": lambda: save_file(tensors, paths["plain"]),
        "safetensors.torch, fsync": lambda: save_and_sync(tensors, paths["synced"]),
        "dense": lambda: export_model(model, paths["dense"], "dense", targets=targets),
        "packed": lambda: export_model(model, paths["packed"], "packed", targets=targets),
        "folder": lambda: export_folder(model, folder / "folder", targets=targets),
    }
    loaders: dict[str, Callable[[], object]] = {
        "safetensors.torch": lambda: other.load_state_dict(load_file(paths["plain"]), strict=False),
        "safetensors.torch, fsync": lambda: other.load_state_dict(load_file(paths["synced"]), strict=False),
        "dense": lambda: load_sparse(paths["dense"], other, backend="dense"),
        "packed": lambda: load_sparse(paths["packed"], other, backend="dense"),
        "folder": lambda: type(model).from_pretrained(folder / "folder"),
    }
    unchecked: dict[str, Callable[[], object]] = {
        kind: lambda kind=kind: load_sparse(paths[kind], other, backend="dense", check_digests=False)  # type: ignore[misc]
        for kind in ("dense", "packed")
    }
    written = fastest(repeats, *writers.values())
    loaded = fastest(repeats, *loaders.values(), *unchecked.values())
    files = [*paths.values(), folder / "folder" / "model.safetensors"]
    rows: list[dict[str, Any]] = [
        {"model": name, "format": kind, "bytes": file.stat().st_size, "write_s": write, "load_s": load}
        for kind, file, write, load in zip(writers, files, written, loaded[: len(writers)], strict=True)
    ]
    for kind, load in zip(unchecked, loaded[len(writers) :], strict=True):
        same = next(row for row in rows if row["format"] == kind)
        rows.append({**same, "format": f"{kind}, digests not compared", "load_s": load})
    check_equal(model, load_sparse(paths["packed"]))
    rows.append({"model": name, "format": "onnx", **through_onnx(model, tokens, targets, folder / "model.onnx")})
    bound = entropy_bound(model, targets)
    masked = packed_share(paths["packed"], targets)
    for row in rows:
        row["to_dense"], row["to_bound"] = row["bytes"] / rows[0]["bytes"], row["bytes"] / bound
        row["masked_packed"] = masked
        row["write_ratio"], row["load_ratio"] = row["write_s"] / written[0], row["load_s"] / loaded[0]
    return rows


def check_equal(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """A table of files that do not come back would be worth nothing."""
    wrong = [name for name, value in model.state_dict().items() if not torch.equal(tensors[name], value)]
    if wrong:
        raise SystemExit(f"Expected every tensor back bit for bit, but got another {wrong[0]!r}.")


def through_onnx(model: nn.Module, tokens: torch.Tensor, targets: Targets, path: Path) -> dict[str, Any]:
    """Written once: tracing the model takes most of the time. To load it is to read it and to prove its pattern."""
    start = time.perf_counter()
    exported = export_onnx(model, (tokens,), path, targets=targets)
    middle = time.perf_counter()
    proved = sum(weight.required for weight in check_onnx(path))
    end = time.perf_counter()
    if proved != len(targets.masked):
        raise SystemExit(f"Expected {len(targets.masked)} weights that hold 2:4, but got {proved}.")
    return {"bytes": exported.bytes, "write_s": middle - start, "load_s": end - middle}


def page(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        f"{facts['machine']}; torch {facts['torch']}, {facts['threads']} thread(s); bfloat16, 2:4; "
        f"fastest of {facts['repeats']}. Packed, the masked tensors alone take {rows[0]['masked_packed']:.4f} of dense; "
        "embeddings, norms and biases stay as they are.",
        "",
        "| model | format | bytes | of dense | of the entropy bound | write | load |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['format']} | {row['bytes']:,} | {row['to_dense']:.3f} | {row['to_bound']:.3f} "
            f"| {row['write_s']:.2f} s ({row['write_ratio']:.1f}x) | {row['load_s']:.2f} s ({row['load_ratio']:.1f}x) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/export_sizes"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory(dir=arguments.out) as scratch:  # on the disk that is asked for
            rows += measured(name + " (tiny)" * arguments.tiny, make, arguments.tiny, arguments.repeats, Path(scratch))
    facts = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "repeats": arguments.repeats,
    }
    (arguments.out / "results.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "results.md").write_text(page(rows, facts), encoding="utf-8")
    print(page(rows, facts))


if __name__ == "__main__":
    main()
