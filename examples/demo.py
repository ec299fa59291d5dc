"""Train a small character transformer dense, under STEP, and under the default recipe (2:4); export, load back, compare.

``python examples/demo.py`` takes two to four minutes on two cores. Everything it writes is in ``out/demo``.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from char_transformer import CharTransformer, TopicsDataModule
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import save_file
from torch import Tensor

from lightning_step import STEP, AutoSwitch, SparseExport, STEPSparsityCallback, load_sparse
from lightning_step.export import read_manifest
from lightning_step.functional import find_violation
from lightning_step.reports import plot_variance
from lightning_step.summary import format_table

# What AutoSwitch compares with its threshold goes with the square of the gradient. The default, Adam's eps of 1e-8, asks for
# gradients of a standard deviation below 1e-3 (at beta2 = 0.99). Here the window mean falls to 4.3e-8 in 330 steps and stays
# above 4.0e-8 to the end of a dense run, so at the default T_max would decide. This threshold is where the curve flattens.
THRESHOLD = 4.3e-8
# The best of the grid in `benchmarks/compare.py`; the published 2e-4 was found for momentum SGD, and is far too weak here.
LAM = 1.6e-2

PLAIN: dict[str, Any] = {"accelerator": "cpu", "enable_checkpointing": False, "enable_model_summary": False}


def main() -> int:
    """Run the demo.

    Returns:
        Exit code: 0 if the exported file gives the same loss and holds its pattern everywhere.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each of the three runs")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for everything that is written")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep_quiet()
    # Matrices this small gain little from a second thread; on a busy machine two that wait for each other lose much.
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)

    # 1. The dense control.
    print(f"\nDense control, {args.steps} steps\n")
    dense, dense_loss, _ = train("dense", args, [])
    save_file(dense.model.state_dict(), args.out / "dense.safetensors")

    # 2. The same model, data and steps under STEP, dense until it switches; nothing but a callback is added.
    print(f"\nSTEP, 2:4, {args.steps} steps\n")
    recipe = STEP(AutoSwitch(threshold=THRESHOLD), lam=LAM)
    sparsity = STEPSparsityCallback(n=2, m=4, recipe=recipe)
    _, step_loss, logger = train("step", args, [sparsity])

    # 3. What you get when you say nothing else than n:m, and its files.
    print(f"\nThe default recipe, 2:4, {args.steps} steps\n")
    default = STEPSparsityCallback(n=2, m=4)
    exports = [
        SparseExport(str(args.out / f"sparse-{format}.safetensors"), format=format, module="model")
        for format in ("dense", "packed")
    ]
    _, sparse_loss, _ = train("default", args, [default, *exports])

    # 4. What is in the files: into a fresh model that knows nothing of masks, and every group counted.
    losses = {export.format: loaded_back_loss(export.path) for export in exports}
    broken = [f"{export.path}: {name}" for export in exports for name in violations(export.path)]

    # 5. The end table.
    picture = plot_variance(logger.log_dir, args.out / "variance.png")
    rows = [["", "validation loss", "bytes", "file"]]
    rows += [["dense control", *file_row(dense_loss, args.out / "dense.safetensors")]]
    rows += [["STEP", f"{step_loss:.6f}", "", ""]]
    rows += [["default, as trained", f"{sparse_loss:.6f}", "", ""]]
    rows += [[f"default, loaded back ({e.format})", *file_row(losses[e.format], Path(e.path))] for e in exports]
    print("\n" + "\n".join(format_table(rows, right=[1, 2])))
    print("\n" + "\n".join(format_table([["layer", "kept"], *kept_by_kind(load_sparse(exports[1].path))], right=[1])))
    print(f"\nswitch of STEP     {'; '.join(sparsity.manifest_info()['switches'])}")
    print(f"switches, default  {'; '.join(default.manifest_info()['switches'])}")
    print(f"variance plot      {picture}, of STEP")
    print(f"TensorBoard logs   {args.out}  (tensorboard --logdir {args.out})")

    # 6. The verdict.
    same = all(math.isclose(loss, sparse_loss, rel_tol=1e-6) for loss in losses.values())
    print(f"\nloaded-back loss {'the same' if same else 'DIFFERS'}, {len(broken)} tensors violate 2:4 {' '.join(broken)}")
    return 0 if same and not broken else 1


def train(
    name: str, args: argparse.Namespace, callbacks: list[pl.Callback]
) -> tuple[CharTransformer, float, TensorBoardLogger]:
    """Train one model; returns it, its validation loss and its log."""
    pl.seed_everything(args.seed, verbose=False)
    model = CharTransformer()
    data = TopicsDataModule(batches=min(args.steps, 100), seed=args.seed)
    logger = TensorBoardLogger(args.out, name=name)
    trainer = pl.Trainer(
        max_steps=args.steps,
        max_epochs=math.ceil(args.steps / data.batches),
        logger=logger,
        log_every_n_steps=10,
        callbacks=callbacks,
        num_sanity_val_steps=0,
        **PLAIN,
    )
    trainer.fit(model, data)
    [metrics] = trainer.validate(model, data, verbose=False)
    return model, metrics["val_loss"], logger


def loaded_back_loss(path: str) -> float:
    """The validation loss of what the file holds, in a fresh model and a trainer without callbacks of ours."""
    fresh = CharTransformer()
    load_sparse(path, fresh.model)
    [metrics] = pl.Trainer(logger=False, **PLAIN).validate(fresh, TopicsDataModule(), verbose=False)
    return float(metrics["val_loss"])


def violations(path: str) -> list[str]:
    """Names of the tensors that do not hold the pattern which the file's manifest promises."""
    tensors, promised = load_sparse(path), read_manifest(path).sparse
    return [name for name, entry in promised.items() if find_violation(tensors[name], entry.pattern, entry.dim)]


def kept_by_kind(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Share of non-zero weights of every matrix, layers of one kind taken together."""
    kinds: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(tensor)
    shares = {kind: sum(int(t.count_nonzero()) for t in ts) / sum(t.numel() for t in ts) for kind, ts in kinds.items()}
    return [[kind, f"{share:.1%}".replace("%", " %")] for kind, share in shares.items()]


def file_row(loss: float, path: Path) -> list[str]:
    """Cells of one file."""
    return [f"{loss:.6f}", f"{path.stat().st_size:,}", str(path)]


def keep_quiet() -> None:
    """Silence what is not about this run."""
    # Lightning 2.6 calls what torch 2.13 deprecates.
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    # Lightning advertises its other packages in every run.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.getMessage())


if __name__ == "__main__":
    raise SystemExit(main())
