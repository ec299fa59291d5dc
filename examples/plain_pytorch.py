"""STEP in a plain PyTorch loop: one object is made, and the loop stays what it was.

``python examples/plain_pytorch.py`` takes about half a minute on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from char_transformer import CharModel, InOrder, RandomCrops, help_topics

from lightning_step import Sparsifier, export_model, strip
from lightning_step.summary import format_targets

CONTEXT = 64


def main() -> None:
    """Train, export, strip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=Path("out/plain/model.safetensors"), help="the file to write")
    args = parser.parse_args()

    torch.manual_seed(0)
    text = help_topics()
    cut = len(text) * 9 // 10
    batches = RandomCrops(text[:cut], batch_size=16, context=CONTEXT, batches=args.steps, seed=0)
    model = CharModel(context=CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99))

    sparsifier = Sparsifier(model, optimizer, n=2, m=4, total_steps=args.steps, on_event=print)
    print(format_targets(sparsifier.targets))

    for step, (inputs, targets) in enumerate(batches, start=1):
        loss = model.loss(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call] # torch does not annotate it
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: training loss {loss.item():.3f}, phase {sparsifier.phase}")

    trained = validation_loss(model, text[cut:])
    exported = export_model(model, args.out, "packed")
    strip(model)  # plain modules again, the zeros in their weights
    print(f"validation loss {trained:.4f}, after strip {validation_loss(model, text[cut:]):.4f}")
    print(f"wrote {exported.path}, {exported.bytes:,} bytes")


@torch.no_grad()
def validation_loss(model: CharModel, text: torch.Tensor) -> float:
    """Mean cross-entropy in nats per character."""
    losses = [model.loss(inputs, targets).item() for inputs, targets in InOrder(text, 32, CONTEXT)]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
