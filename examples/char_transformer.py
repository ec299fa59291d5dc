"""A small causal character transformer, and the text it reads: the help topics that ship with Python.

Both are ordinary Lightning classes and know nothing of sparsity; `demo.py`, `plain_pytorch.py` and the YAML files in
`configs/` put masks on them from outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

VOCABULARY = 128  # ASCII; the few other characters of the text become "?"


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix over time, then over channels; shapes (batch, time, width)."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, width / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time, width))
        hidden: Tensor = x + self.out(F.gelu(self.fc(self.norm2(x))))
        return hidden


def waves(context: int, width: int) -> Tensor:
    """Sines and cosines that tell positions apart, of the size of the character embeddings; shape (context, width)."""
    angles = torch.arange(context)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)  # (context, width / 2)
    return 0.1 * torch.cat([angles.sin(), angles.cos()], dim=1)


class CharModel(nn.Module):
    """The network: characters in, logits of the next character out. The embedding is the output matrix, too.

    Args:
        vocabulary: Number of characters.
        width: Channels.
        layers: Blocks.
        heads: Attention heads per block.
        context: Longest input in characters.
    """

    position: Tensor  # float32, (context, width)

    def __init__(
        self, vocabulary: int = VOCABULARY, width: int = 96, layers: int = 2, heads: int = 4, context: int = 64
    ) -> None:
        super().__init__()
        self.character = nn.Embedding(vocabulary, width)
        self.register_buffer("position", waves(context, width), persistent=False)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.character.weight, std=0.1)  # torch's own 1.0 drowns what the blocks add at this size

    def forward(self, characters: Tensor) -> Tensor:
        """Logits, shape (batch, time, vocabulary), for characters of shape (batch, time)."""
        x = self.character(characters) + self.position[: characters.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.character.weight)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per character; both of shape (batch, time)."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())


class CharTransformer(pl.LightningModule):
    """`CharModel` under AdamW with linear warm-up and cosine decay.

    Args:
        width: Channels.
        layers: Blocks.
        heads: Attention heads per block.
        context: Longest input in characters.
        lr: Highest learning rate.
        betas: AdamW's decays. 0.99 averages the second moment over 100 steps, which suits a run of several hundred.
        weight_decay: AdamW's decoupled decay.
        warmup: Optimizer steps until the rate is at its highest.
        cosine: Let the rate fall to a tenth by the end of the run; False keeps it.
    """

    def __init__(
        self,
        width: int = 96,
        layers: int = 2,
        heads: int = 4,
        context: int = 64,
        lr: float = 4e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        warmup: int = 50,
        cosine: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = CharModel(VOCABULARY, width, layers, heads, context)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.model.loss(*batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model.loss(*batch), prog_bar=True, batch_size=len(batch[0]))

    @override
    def configure_optimizers(self) -> Any:
        h = self.hparams
        optimizer = torch.optim.AdamW(self.parameters(), lr=h["lr"], betas=h["betas"], weight_decay=h["weight_decay"])
        total = float(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            progress = min(1.0, step / total)
            decayed = 0.55 + 0.45 * math.cos(math.pi * progress) if h["cosine"] else 1.0
            return float(min(1.0, (step + 1) / (h["warmup"] + 1)) * decayed)

        schedule = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def help_topics() -> Tensor:
    """The text of ``pydoc_data.topics`` as character codes, shape (characters,)."""
    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()


class RandomCrops:
    """An endless supply of random crops, handed out ``batches`` at a time.

    Batch number i depends on the seed and i alone, and the number is in the checkpoint (Lightning saves the state of any
    loader that has one), so an interrupted run goes on with the very batches it would have seen.
    """

    def __init__(self, text: Tensor, batch_size: int, context: int, batches: int, seed: int) -> None:
        self.text, self.batch_size, self.context, self.batches, self.seed = text, batch_size, context, batches, seed
        self.drawn = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.batches - self.drawn % self.batches):
            self.drawn += 1
            yield self.batch(self.drawn)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each of shape (batch, context)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        starts = torch.randint(len(self.text) - self.context, (self.batch_size, 1), generator=generator)
        crops = self.text[starts + torch.arange(self.context + 1)]  # (batch, context + 1)
        return crops[:, :-1], crops[:, 1:]

    def state_dict(self) -> dict[str, int]:
        """How many batches were handed out."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind them."""
        self.drawn = state["drawn"]


class InOrder:
    """A text from its beginning to its end, in full batches; less than one batch is dropped at the end."""

    def __init__(self, text: Tensor, batch_size: int, context: int) -> None:
        size = batch_size * context
        used = (len(text) - 1) // size * size
        shape = (-1, batch_size, context)
        self.inputs, self.targets = text[:used].view(shape), text[1 : used + 1].view(shape)

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.inputs, self.targets, strict=True)


class TopicsDataModule(pl.LightningDataModule):
    """Python's help topics: the first nine tenths to train on, the last tenth to validate on.

    Args:
        batch_size: Crops per batch.
        context: Characters per crop.
        batches: Training batches per epoch.
        seed: Seed of the crops.
    """

    def __init__(self, batch_size: int = 16, context: int = 64, batches: int = 100, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.context, self.batches, self.seed = batch_size, context, batches, seed
        text = help_topics()
        cut = len(text) * 9 // 10
        self.train_text, self.val_text = text[:cut], text[cut:]

    @override
    def train_dataloader(self) -> RandomCrops:
        return RandomCrops(self.train_text, self.batch_size, self.context, self.batches, self.seed)

    @override
    def val_dataloader(self) -> InOrder:
        return InOrder(self.val_text, self.batch_size, self.context)
