"""GLUE: BERT fine-tuned on one of its tasks, judged by that task's own metrics.

The files are those of https://gluebenchmark.com/tasks, tab-separated and without quoting::

    <folder>/CoLA/train.tsv, dev.tsv     <folder>/SST-2/train.tsv, dev.tsv     and so on for the other tasks

Columns are found by the header, see `TASKS`; the official CoLA files have none, and may do without. With ``download: true``
the library ``datasets``, if installed, fetches them and they are written in this form. Where there is no ``dev.tsv``, or a
second opinion is wanted, ``held_out`` takes a part of the training file instead. Needs ``transformers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, MatthewsCorrCoef, MulticlassAccuracy
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, get_scheduler
from typing_extensions import override

Name = Literal["CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI", "QNLI", "RTE", "WNLI"]
# Layers, width, heads. `base` is BERT-Base.
SIZES = {"tiny": (1, 16, 2), "small": (2, 128, 4), "base": (12, 768, 12)}


@dataclass(frozen=True)
class Task:
    """Where a task's files have what, and how it is scored."""

    texts: tuple[str, ...]  # columns of the sentences
    label: str  # column of the label
    labels: tuple[str, ...] = ("0", "1")  # in the order of the hub's numbers; none: a number is to be foretold
    scores: tuple[str, ...] = ("accuracy",)  # the first is the one that counts
    dev: str = "dev"
    hub: tuple[str, ...] = ("sentence1", "sentence2")  # columns on the Hugging Face hub


ENTAILED = ("entailment", "not_entailment")
TASKS = {
    "CoLA": Task(("sentence",), "label", scores=("matthews",), hub=("sentence",)),
    "SST-2": Task(("sentence",), "label", hub=("sentence",)),
    "MRPC": Task(("#1 String", "#2 String"), "Quality", scores=("f1", "accuracy")),
    "QQP": Task(("question1", "question2"), "is_duplicate", scores=("f1", "accuracy"), hub=("question1", "question2")),
    "STS-B": Task(("sentence1", "sentence2"), "score", (), ("pearson", "spearman")),
    "MNLI": Task(
        ("sentence1", "sentence2"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        dev="dev_matched",
        hub=("premise", "hypothesis"),
    ),
    "QNLI": Task(("question", "sentence"), "label", ENTAILED, hub=("question", "sentence")),
    "RTE": Task(("sentence1", "sentence2"), "label", ENTAILED),
    "WNLI": Task(("sentence1", "sentence2"), "label"),
}
METRICS: dict[str, Any] = {
    "accuracy": lambda classes: BinaryAccuracy() if classes == 2 else MulticlassAccuracy(classes, average="micro"),
    "f1": lambda classes: BinaryF1Score(),
    "matthews": lambda classes: MatthewsCorrCoef("binary"),
    "pearson": lambda classes: PearsonCorrCoef(),
    "spearman": lambda classes: SpearmanCorrCoef(),
}


def bert(pretrained: str | None, size: str, outputs: int, vocabulary: int, dropout: float) -> nn.Module:
    """BERT with a new head: weights from the hub or a folder, or random ones of a given size."""
    if pretrained is not None:
        model: nn.Module = BertForSequenceClassification.from_pretrained(
            pretrained, num_labels=outputs, hidden_dropout_prob=dropout, ignore_mismatched_sizes=True
        )
        return model.train()  # it comes in evaluation mode, which Lightning would keep
    layers, width, heads = SIZES[size]
    config: Any = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=dropout,
    )
    config.num_labels = outputs
    return BertForSequenceClassification(config)


class GlueClassifier(pl.LightningModule):
    """BERT under AdamW with linear warm-up and linear decay.

    Args:
        task: Which one; the same as that of the data.
        pretrained: Name on the Hugging Face hub, or folder, of the weights to start from; None: random ones.
        size: Size of a network with random weights; ``"base"`` is BERT-Base.
        vocabulary: Size of the vocabulary of a network with random weights.
        lr: Highest learning rate.
        weight_decay: AdamW's decoupled decay; none for biases and norms.
        betas: AdamW's decays. AutoSwitch needs a second moment that settles within the run: a short one takes 0.99.
        warmup: Share of the optimizer steps until the rate is at its highest.
        dropout: Share of activations that is left out in training.
    """

    def __init__(
        self,
        task: Name = "MRPC",
        pretrained: str | None = None,
        size: Literal["tiny", "small", "base"] = "base",
        vocabulary: int = 30_522,
        lr: float = 2e-5,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.task = TASKS[task]
        self.model = bert(pretrained, size, max(1, len(self.task.labels)), vocabulary, dropout)
        scores = MetricCollection({name: METRICS[name](len(self.task.labels)) for name in self.task.scores})
        self.scores = nn.ModuleDict({"val": scores.clone("val_"), "test": scores.clone("test_")})

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in nats, or the squared error where a number is to be foretold."""
        return F.cross_entropy(logits, labels) if self.task.labels else F.mse_loss(logits[:, 0], labels)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        labels = batch.pop("labels")
        loss = self.loss(self.model(**batch).logits, labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: dict[str, Tensor], name: str) -> None:
        """Log the loss and the task's metrics, each over all sentences at once."""
        labels = batch.pop("labels")
        logits = self.model(**batch).logits
        scores: Any = self.scores[name]
        scores.update(logits.argmax(1) if self.task.labels else logits[:, 0], labels)
        self.log(f"{name}_loss", self.loss(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log_dict(scores, prog_bar=True)

    @override
    def configure_optimizers(self) -> Any:
        h = self.hparams
        matrices = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": h["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=h["lr"], betas=h["betas"])
        total = int(self.trainer.estimated_stepping_batches)
        schedule: Any = get_scheduler("linear", optimizer, int(h["warmup"] * total), total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class GlueData(pl.LightningDataModule):
    """One task of GLUE, tokenized. Its test labels are secret, so testing reads the development file as well.

    Args:
        task: Which one.
        folder: Where the folders of the tasks are.
        tokenizer: Name on the Hugging Face hub of the tokenizer, or a folder with its ``vocab.txt``.
        download: Let the library datasets fetch the files if they are not there.
        batch_size: Examples per batch.
        longest: Subwords of the longest input; more are cut off.
        train: Train on this many examples only; None: all of them.
        held_out: Share of the training file to validate on, instead of the development file.
        seed: Seed of what is held out.
    """

    def __init__(
        self,
        task: Name = "MRPC",
        folder: str = "data/glue",
        tokenizer: str = "google-bert/bert-base-uncased",
        download: bool = False,
        batch_size: int = 32,
        longest: int = 128,
        train: int | None = None,
        held_out: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.task, self.task_name, self.folder = TASKS[task], task, Path(folder) / task
        self.tokenizer_name, self.download, self.batch_size, self.longest = tokenizer, download, batch_size, longest
        self.train, self.held_out, self.seed = train, held_out, seed
        self.tokenizer: Any = None
        self.parts: dict[str, list[list[str]]] = {}

    @override
    def prepare_data(self) -> None:
        if self.download and not (self.folder / "train.tsv").exists():
            fetch(self.task_name, self.folder)

    @override
    def setup(self, stage: str) -> None:
        self.tokenizer = BertTokenizer.from_pretrained(self.tokenizer_name)
        rows = self.read("train")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        held_out = int(len(rows) * self.held_out)
        self.parts["train"] = [rows[i] for i in order[held_out:][: self.train]]
        self.parts["val"] = [rows[i] for i in order[:held_out]] if self.held_out else self.read(self.task.dev)

    def read(self, part: str) -> list[list[str]]:
        """The sentences and, last, the label of every example."""
        path = self.folder / f"{part}.tsv"
        if not path.exists():
            raise FileNotFoundError(
                f"Expected the file {path}, but it is not there. Fetch the task from https://gluebenchmark.com/tasks and "
                f"unpack it there, or set `download: true` with the library datasets installed. Without a development file, "
                "`held_out: 0.1` validates on a tenth of the training file."
            )
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        rows = [line.split("\t") for line in lines]
        columns = [*self.task.texts, self.task.label]
        if not set(columns) <= set(rows[0]) and self.task_name == "CoLA":
            rows.insert(0, ["source", "label", "mark", "sentence"])
        if not set(columns) <= set(rows[0]):
            raise ValueError(f"Expected the columns {columns} in {path}, but got {rows[0]}.")
        places = [rows[0].index(column) for column in columns]
        return [[row[place] for place in places] for row in rows[1:]]

    def collate(self, rows: Sequence[list[str]]) -> dict[str, Tensor]:
        """Subwords, filled up to the longest of the batch, and labels as numbers."""
        *texts, labels = (list(column) for column in zip(*rows, strict=True))
        batch = self.tokenizer(*texts, truncation=True, max_length=self.longest, padding=True, return_tensors="pt")
        numbers = [self.task.labels.index(label) if self.task.labels else float(label) for label in labels]
        return {**batch, "labels": torch.tensor(numbers)}

    def loader(self, part: str) -> DataLoader[Any]:
        """Batches of one part."""
        rows: Any = self.parts[part]
        return DataLoader(rows, self.batch_size, shuffle=part == "train", collate_fn=self.collate)

    @override
    def train_dataloader(self) -> Any:
        return self.loader("train")

    @override
    def val_dataloader(self) -> Any:
        return self.loader("val")

    test_dataloader = val_dataloader


def fetch(name: str, folder: Path) -> None:
    """Let the library datasets fetch a task, and write it in the official form."""
    from datasets import load_dataset

    task = TASKS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for part, split in (("train", "train"), (task.dev, task.dev.replace("dev", "validation"))):
        lines = ["\t".join([*task.texts, task.label])]
        for row in load_dataset("nyu-mll/glue", name.replace("-", "").lower(), split=split):
            label = task.labels[row["label"]] if task.labels else str(row["label"])
            lines.append("\t".join([*(" ".join(row[column].split()) for column in task.hub), label]))
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
