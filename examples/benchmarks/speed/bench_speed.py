"""How much time and memory N:M sparsity costs, as ratios measured side by side in one process.

``python examples/benchmarks/speed/bench_speed.py`` takes some minutes on one thread of a CPU and writes ``results.json`` and
``results.md`` to ``--out``. ``--only masks,optimizer`` runs parts, ``--quick`` tries the command on tiny models, ``--largest
300`` lets models grow up to 300M weights, ``--device cuda`` runs what a GPU can show, with a compiled GPT-2 small and 2:4
inference besides. Every figure is a ratio of medians of interleaved repeats. Every part has a process of its own: after the
others, a step of a thousand small layers took twice as long. Two busy threads on shared cores give times that are quantized
by the scheduler: use one (the default), and a quiet machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from aims import verdict
from command import chosen, parser_of, write
from inference_speed import inference
from masking_speed import masks
from optimizer_speed import growth, optimizers
from side_by_side import Row, Settings, facts
from startup_speed import elapsed, files, fits, imports
from training_speed import half, layers, steps

PARTS: dict[str, Callable[[Settings], list[Row]]] = {
    "masks": masks,
    "optimizer": optimizers,
    "growth": growth,
    "steps": steps,
    "layers": layers,
    "import": imports,
    "fit": fits,
    "files": files,
}
ON_CUDA: dict[str, Callable[[Settings], list[Row]]] = {
    **{name: PARTS[name] for name in ("masks", "optimizer", "steps", "layers")},
    "half": half,
    "inference": inference,
}


def page(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        f"{about['machine']}; Python {about['python']}, torch {about['torch']}, lightning {about['lightning']}, "
        f"{about['threads']} thread(s); medians of {about['repeats']} interleaved repeats (a third for training steps).",
        "",
        "| part | what | ratio | of | median | aim |",
        "|---|---|---:|---|---:|---|",
    ]
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds * 1e3:.3g} ms"
        lines.append(f"| {row.part} | {row.what} | {row.value:.3g} | {row.of} | {seconds} | {verdict(row)} |")
    return "\n".join(lines) + "\n"


def measured(name: str, settings: Settings) -> list[Row]:
    """The figures of one part, from this process."""
    torch.set_num_threads(settings.threads)
    return (ON_CUDA if settings.device.type == "cuda" else PARTS)[name](settings)


def measured_apart(name: str, settings: Settings) -> list[Row]:
    """The same from a process that has done nothing else."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (name, settings))


def main() -> None:
    """Measure and write."""
    parser = parser_of(__doc__, Path("out/speed"), "parts")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--largest", type=int, default=16, help="millions of weights")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("Expected a CUDA device, but got none that torch can use. Drop --device cuda.")
    repeats = arguments.repeats or (2 if arguments.quick else 15)
    settings = Settings(device, repeats, arguments.quick, arguments.largest, arguments.threads)
    known = ON_CUDA if device.type == "cuda" else PARTS
    names = chosen(arguments.only, known, "parts")
    start, rows = time.perf_counter(), []
    measure = measured if arguments.quick else measured_apart
    for name in names:
        rows += measure(name, settings)
        print(f"{name}: done after {elapsed(start)}", file=sys.stderr)
    about = {**facts(settings), "device": str(device), "quick": arguments.quick}
    write(arguments.out, {**about, "rows": [row._asdict() for row in rows]}, page(rows, about))


if __name__ == "__main__":
    main()
