"""Language modelling: GPT-2 on WikiText, judged by perplexity.

The text is read from the plain files of WikiText-2 and WikiText-103, or from any others of the same names::

    <folder>/wiki.train.tokens   <folder>/wiki.valid.tokens   <folder>/wiki.test.tokens     (or wiki.train.raw and so on)

With ``download`` set to a configuration on the Hugging Face hub, for instance ``wikitext-103-raw-v1``, the library
``datasets``, if installed, fetches them and they are written in this form. Subwords are those of a tokenizer on the hub or
in a folder, or learned from the training file. Needs ``transformers``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, get_scheduler
from typing_extensions import override

# Layers, width, heads. `base` is GPT-2 small.
SIZES = {"tiny": (1, 16, 2), "small": (4, 128, 4), "base": (12, 768, 12)}
PARTS = {"train": "train", "val": "valid", "test": "test"}  # our name of a part, and that of its file


def gpt2(pretrained: str | None, size: str, vocabulary: int, context: int, dropout: float) -> nn.Module:
    """GPT-2: weights from the hub or a folder, or random ones of a given size. The embedding is the output matrix, too."""
    dropouts: Any = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    if pretrained is not None:
        model: nn.Module = GPT2LMHeadModel.from_pretrained(pretrained, **dropouts)
        return model.train()  # it comes in evaluation mode, which Lightning would keep
    layers, width, heads = SIZES[size]
    shape: Any = {"n_positions": context, "n_embd": width, "n_layer": layers, "n_head": heads}
    spread = 0.02 * (768 / width) ** 0.5  # as published for `base`; narrow ones hardly begin to learn from so little
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, bos_token_id=None, eos_token_id=None, initializer_range=spread, **shape, **dropouts
        )
    )


class LanguageModel(pl.LightningModule):
    """GPT-2 under AdamW with linear warm-up and cosine decay.

    Args:
        pretrained: Name on the Hugging Face hub, or folder, of the weights to start from; None: random ones.
        size: Size of a network with random weights; ``"base"`` is GPT-2 small.
        vocabulary: Number of subwords of a network with random weights; the same as that of the data.
        context: Longest input, in subwords, of a network with random weights.
        lr: Highest learning rate.
        weight_decay: AdamW's decoupled decay; none for biases and norms.
        betas: AdamW's decays. 0.99 averages the second moment over 100 steps; long runs can take 0.999.
        warmup: Share of the optimizer steps until the rate is at its highest.
        dropout: Share of activations that is left out in training.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        size: Literal["tiny", "small", "base"] = "base",
        vocabulary: int = 50_257,
        context: int = 1024,
        lr: float = 5e-5,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup: float = 0.05,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = gpt2(pretrained, size, vocabulary, context, dropout)
        self.nats: Tensor | float = 0.0  # the loss of everything that was evaluated, added up
        self.subwords = 0

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy in nats per subword that is foretold: all but the first."""
        logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    @override
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: Tensor, name: str) -> None:
        """Log the loss in nats per subword, and keep it for the perplexity."""
        foretold = batch[:, 1:].numel()
        loss = self.loss(batch)
        self.log(f"{name}_loss", loss, batch_size=foretold, sync_dist=True)
        self.nats, self.subwords = self.nats + loss * foretold, self.subwords + foretold

    @override
    def on_validation_epoch_end(self) -> None:
        self.log_perplexity("val")

    @override
    def on_test_epoch_end(self) -> None:
        self.log_perplexity("test")

    def log_perplexity(self, name: str) -> None:
        """Log the perplexity per subword, and that per word, which does not depend on the vocabulary."""
        mean = float(self.nats) / self.subwords
        words = self.trainer.datamodule.subwords_per_word[name]  # type: ignore[attr-defined]
        values = {
            f"{name}_perplexity": math.exp(min(mean, 80.0)),
            f"{name}_word_perplexity": math.exp(min(mean * words, 80.0)),
        }
        self.log_dict(values, prog_bar=True, sync_dist=True)
        self.nats, self.subwords = 0.0, 0

    @override
    def configure_optimizers(self) -> Any:
        h = self.hparams
        matrices = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": h["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=h["lr"], betas=h["betas"])
        total = int(self.trainer.estimated_stepping_batches)
        schedule: Any = get_scheduler("cosine", optimizer, int(h["warmup"] * total), total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Pieces(Dataset[Tensor]):
    """A text in pieces of ``length`` subwords, one after the other; what is left at the end is dropped."""

    def __init__(self, text: Tensor, length: int) -> None:
        if len(text) < length:
            raise ValueError(f"Expected a text of at least `context={length}` subwords, but got {len(text)}.")
        self.pieces = text[: len(text) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> Tensor:
        return self.pieces[index]


class WikiText(pl.LightningDataModule):
    """A text as subwords, in pieces of equal length.

    Args:
        folder: Where the files are.
        tokenizer: Name on the Hugging Face hub, or folder, of the tokenizer; None: subwords learned from the training file.
        vocabulary: Number of subwords to learn.
        download: Configuration of ``Salesforce/wikitext`` on the hub to fetch if the files are not there.
        batch_size: Pieces per batch.
        context: Subwords per piece.
    """

    def __init__(
        self,
        folder: str = "data/wikitext-103",
        tokenizer: str | None = "openai-community/gpt2",
        vocabulary: int = 50_257,
        download: str | None = None,
        batch_size: int = 8,
        context: int = 1024,
    ) -> None:
        super().__init__()
        self.folder, self.tokenizer_name, self.vocabulary = Path(folder), tokenizer, vocabulary
        self.download, self.batch_size, self.context = download, batch_size, context
        self.tokenizer: Any = None
        self.parts: dict[str, Pieces] = {}
        self.subwords_per_word: dict[str, float] = {}

    @property
    def subwords(self) -> Path:
        """Where a vocabulary that was learned is kept."""
        return self.folder / f"subwords-{self.vocabulary}.json"

    @override
    def prepare_data(self) -> None:
        if self.download is not None and not (self.folder / "wiki.train.raw").exists():
            fetch(self.download, self.folder)
        if self.tokenizer_name is None and not self.subwords.exists():
            learn_subwords(self.read("train"), self.vocabulary).save(str(self.subwords))

    @override
    def setup(self, stage: str) -> None:
        if self.tokenizer_name is None:
            self.tokenizer = Tokenizer.from_file(str(self.subwords))
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name).backend_tokenizer
        for part in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            lines = self.read(part)
            words = sum(len(line.split()) + 1 for line in lines)  # as papers count them: the end of a line is one
            text = encode(self.tokenizer, lines)
            self.parts[part] = Pieces(text, self.context)
            self.subwords_per_word[part] = len(text) / words

    def read(self, part: str) -> list[str]:
        """The lines of one part, each with its end."""
        paths = [self.folder / f"wiki.{PARTS[part]}.{ending}" for ending in ("tokens", "raw")]
        for path in paths:
            if path.exists():
                text = path.read_text(encoding="utf-8").removesuffix("\n")
                return [f"{line}\n" for line in text.split("\n")]
        raise FileNotFoundError(
            f"Expected the file {paths[0]} or {paths[1]}, but got neither. Fetch WikiText-2 or WikiText-103 and put the "
            "files there, or set `download: wikitext-103-raw-v1` with the library datasets installed."
        )

    @override
    def train_dataloader(self) -> Any:
        return DataLoader(self.parts["train"], self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> Any:
        return DataLoader(self.parts["val"], self.batch_size)

    @override
    def test_dataloader(self) -> Any:
        return DataLoader(self.parts["test"], self.batch_size)


def encode(tokenizer: Any, lines: list[str], at_a_time: int = 10_000) -> Tensor:
    """The text as subwords, int64 of shape (subwords,)."""
    chunks = []  # what the tokenizer says of every line is large, so not for the whole text at once
    for start in range(0, len(lines), at_a_time):
        encoded = tokenizer.encode_batch(lines[start : start + at_a_time], add_special_tokens=False)
        chunks.append(torch.tensor([number for line in encoded for number in line.ids], dtype=torch.long))
    return torch.cat(chunks)


def learn_subwords(lines: list[str], size: int) -> Any:
    """Byte-pair encoding over bytes, as that of GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def fetch(configuration: str, folder: Path) -> None:
    """Let the library datasets fetch the text, and write it as plain files."""
    from datasets import load_dataset

    folder.mkdir(parents=True, exist_ok=True)
    for part, split in (("train", "train"), ("valid", "validation"), ("test", "test")):
        rows = load_dataset("Salesforce/wikitext", configuration, split=split)
        (folder / f"wiki.{part}.raw").write_text("".join(row["text"] for row in rows), encoding="utf-8")
