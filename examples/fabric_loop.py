"""STEP in a Lightning Fabric loop: Fabric sets up model and optimizer, `Sparsifier` hooks the optimizer that steps.

``python examples/fabric_loop.py`` takes about half a minute on one core; ``--resume`` goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from char_transformer import CharModel, RandomCrops, help_topics
from lightning.fabric import Fabric

from lightning_step import Sparsifier, export_model
from lightning_step.summary import format_targets

CONTEXT = 64


def main() -> None:
    """Train with a checkpoint on the way, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--stop", type=int, help="stop after this step, as a crash would")
    parser.add_argument("--out", type=Path, default=Path("out/fabric"), help="where checkpoint and model go")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--precision", default="32-true", help="what Fabric takes")
    args = parser.parse_args()

    fabric = Fabric(accelerator="auto", devices=1, precision=args.precision)
    fabric.launch()
    fabric.seed_everything(0)
    batches = RandomCrops(help_topics(), batch_size=32, context=CONTEXT, batches=args.steps, seed=0)
    module = CharModel(width=64, context=CONTEXT)
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=4e-3, betas=(0.9, 0.99)))
    model.mark_forward_method("loss")

    # Fabric's optimizer is a wrapper; the hooks go on the one inside, and masks on the module inside.
    sparsifier = Sparsifier(module, optimizer.optimizer, n=2, m=4, total_steps=args.steps, on_event=fabric.print)
    fabric.print(format_targets(sparsifier.targets))
    state = {"model": model, "optimizer": optimizer, "sparsifier": sparsifier, "batches": batches}
    checkpoint = args.out / "last.ckpt"
    if args.resume:
        fabric.load(checkpoint, state)

    for inputs, targets in batches:
        loss = model.loss(fabric.to_device(inputs), fabric.to_device(targets))
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        if sparsifier.t % 100 == 0 or sparsifier.t == args.stop:
            fabric.print(f"step {sparsifier.t}: training loss {loss.item():.3f}, phase {sparsifier.phase}")
            fabric.save(checkpoint, state)
        if sparsifier.t == args.stop:
            return

    exported = export_model(module, args.out / "model.safetensors")
    fabric.print(f"wrote {exported.path}, {exported.bytes:,} bytes")


if __name__ == "__main__":
    main()
