"""STEP in the Hugging Face ``Trainer``: one callback over `Sparsifier`, for any model, resume included.

``python examples/hf_trainer.py`` trains a small GPT-2 from scratch in about half a minute on one core;
``--resume out/hf/checkpoint-200`` goes on from a checkpoint. Needs ``transformers`` and ``accelerate``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from char_transformer import RandomCrops, help_topics
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from lightning_step import Sparsifier, strip
from lightning_step.summary import format_targets

CONTEXT = 64


class SparsityCallback(TrainerCallback, ExportableState):
    """Learns N:M masks while a Hugging Face ``Trainer`` trains.

    Its state is a part of the trainer's own ``trainer_state.json``, weights and optimizer are saved by the trainer.

    Args:
        **arguments: What `Sparsifier` takes, from ``n`` on.
    """

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.sparsifier: Sparsifier | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called when weights and optimizer are restored, if they are. Hooks the optimizer."""
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate puts a wrapper around the one that steps
        sparsifier = Sparsifier(kwargs["model"], optimizer, total_steps=state.max_steps, **self.arguments)
        if state.global_step:
            saved: Any = state.stateful_callbacks  # from a file it is a dictionary by class name
            sparsifier.load_state_dict(saved[type(self).__name__]["sparsifier"])
        elif state.is_world_process_zero:
            print(format_targets(sparsifier.targets))
        self.sparsifier = sparsifier

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called at the end. Takes the hooks off; masks stay on the model."""
        assert self.sparsifier is not None
        self.sparsifier.detach()

    def state(self) -> dict[str, Any]:
        """Called when a checkpoint is written: plain values, which the trainer writes as JSON."""
        return {"sparsifier": None if self.sparsifier is None else self.sparsifier.state_dict()}


class Crops(Dataset[dict[str, torch.Tensor]]):
    """Random crops of a text, each a function of its number alone."""

    def __init__(self, text: torch.Tensor, count: int) -> None:
        self.crops, self.count = RandomCrops(text, 1, CONTEXT, count, seed=0), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        characters = self.crops.batch(index)[0][0]
        return {"input_ids": characters, "labels": characters}  # the model shifts them itself


def main() -> None:
    """Train, strip, save, load back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--save-steps", type=int, default=100, help="write a checkpoint every so many steps")
    parser.add_argument("--out", type=Path, default=Path("out/hf"), help="where checkpoints and the model go")
    parser.add_argument("--resume", type=str, help="a checkpoint to go on from")
    args = parser.parse_args()

    torch.manual_seed(0)
    text = help_topics()
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    )
    settings = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        save_steps=args.save_steps,
        per_device_train_batch_size=32,
        learning_rate=4e-3,
        adam_beta2=0.99,
        logging_steps=100,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    sparsity = SparsityCallback(n=2, m=4, on_event=print)
    trainer = Trainer(model, settings, train_dataset=Crops(text, 32 * args.steps), callbacks=[sparsity])
    trainer.train(resume_from_checkpoint=args.resume)

    pruned = strip(model)  # plain modules again, the zeros in their weights
    model.save_pretrained(args.out / "model")  # an ordinary Hugging Face model
    again = GPT2LMHeadModel.from_pretrained(args.out / "model")
    zeros = sum(int((again.get_parameter(name) == 0).sum()) for name in pruned)
    print(f"wrote {args.out / 'model'}: {len(pruned)} tensors hold 2:4, {zeros:,} zeros in them")


if __name__ == "__main__":
    main()
