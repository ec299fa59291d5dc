"""What recipes are compared on: each of the example programs, in a size for one to two minutes on one core.

A task is plain data, so that it can be hashed and sent to a worker: which classes of `examples/`, with which arguments, for
how many steps, and what is measured. Adding one means adding one entry.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


@dataclass(frozen=True)
class Grid:
    """What is tried for every recipe alike."""

    rates: tuple[float, ...]
    lams: tuple[float, ...]


# SGD's rates are other ones, so its rows have a grid of their own, of the same size.
SGD = Grid((3e-2, 1e-1, 3e-1, 1.0), (2e-4, 1e-3, 4e-3))


@dataclass(frozen=True, eq=False)
class Task:
    """A model, its data, and what is measured. Tasks are told apart by who they are, so that runs of them can be hashed.

    Args:
        name: Its name in results.
        module: The program in `examples/`, without ``.py``.
        model_class: Its LightningModule, which takes ``lr``.
        data_class: Its LightningDataModule.
        model: Other arguments of the model. ``{data}`` in a string is the data folder, here and below.
        data: Arguments of the data.
        steps: Optimizer steps of a run, whatever the recipe; a dense phase counts.
        pretraining: Optimizer steps of dense training that all rows start after; 0: from random weights.
        pretraining_rate: Learning rate of that.
        validate_every: Optimizer steps between validations, for the curves.
        adam: Rates and lams for recipes under AdamW.
        sgd: The same under SGD.
        metric: What rate and lam are chosen by.
        reported: What is in the tables: something of the test data, where there are some.
        unit: Of what is reported.
        also: Another score to show beside it, that users know better but that says less about small differences.
        higher_is_better: Of both.
        exclude: Globs of tensors that are left dense.
        trainer: Other arguments of the trainer, for instance ``accelerator`` (default: ``"cpu"``) and ``precision``.
        seeded: Whether the data take the seed, too.
        batches: Most batches of validation and test data that are looked at; None: all.
        pruned_to: Patterns a dense model is pruned to at the end, for comparison.
        needs: Libraries, by the name they are imported as.
        files: Files that have to be there, relative to the data folder.
        fetch: What to do if they are not.
    """

    name: str
    module: str
    model_class: str
    data_class: str
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1000
    pretraining: int = 0
    pretraining_rate: float = 0.0
    validate_every: int = 100
    adam: Grid = Grid((5e-4, 1e-3, 2e-3, 4e-3), (2e-4, 4e-3, 1.6e-2))
    sgd: Grid = SGD
    metric: str = "val_loss"
    reported: str = "val_loss"
    unit: str = "validation loss"
    also: str | None = None
    higher_is_better: bool = False
    exclude: tuple[str, ...] = ()
    trainer: Mapping[str, Any] = field(default_factory=dict)
    seeded: bool = False
    batches: int | None = None
    pruned_to: tuple[str, ...] = ("2:4", "1:8")
    needs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    fetch: str = ""

    def make_model(self, lr: float, folder: Path) -> pl.LightningModule:
        """The model, with random weights that depend on the global seed."""
        kind = getattr(import_module(self.module), self.model_class)
        model: pl.LightningModule = kind(**located(self.model, folder), lr=lr)
        return model

    def make_data(self, folder: Path, seed: int) -> pl.LightningDataModule:
        """The data, of which nothing is read yet."""
        kind = getattr(import_module(self.module), self.data_class)
        own = {"seed": seed} if self.seeded else {}
        data: pl.LightningDataModule = kind(**located(self.data, folder), **own)
        return data

    def grid(self, optimizer: str) -> Grid:
        """The rates and lams of recipes under an optimizer."""
        return self.sgd if optimizer == "SGD" else self.adam

    def missing(self, folder: Path) -> str | None:
        """Why it cannot be run here, and what to do; None if it can."""
        libraries = [name for name in self.needs if find_spec(name) is None]
        if libraries:
            return (
                f"needs {', '.join(libraries)}: pip install {' '.join(INSTALLED_AS.get(name, name) for name in libraries)}"
            )
        if self.trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
            return "needs a CUDA device"
        absent = [str(folder / file) for file in self.files if not (folder / file).exists()]
        return f"expected {', '.join(absent)}. {self.fetch}" if absent else None

    def config(self) -> dict[str, Any]:
        """What a run depends on, as plain values."""
        return {
            "name": self.name,
            "model": {"class": f"{self.module}.{self.model_class}", **self.model},
            "data": {"class": f"{self.module}.{self.data_class}", **self.data},
            "steps": self.steps,
            "exclude": list(self.exclude),
            **({"pretraining": [self.pretraining, self.pretraining_rate]} if self.pretraining else {}),
            **({} if self.batches is None else {"batches": self.batches}),
            **({"trainer": dict(self.trainer)} if self.trainer else {}),
        }

    def sized(self, **changes: Any) -> Task:
        """The same with other values of some fields."""
        return replace(self, **changes)


INSTALLED_AS = {"sklearn": "scikit-learn"}


def located(arguments: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments with the data folder in its place."""
    return {k: v.replace("{data}", str(folder)) if isinstance(v, str) else v for k, v in arguments.items()}


CHAR = Task(
    name="char",
    module="char_transformer",
    model_class="CharTransformer",
    data_class="TopicsDataModule",
    model={"width": 96, "layers": 2, "heads": 4, "context": 64},
    data={"batch_size": 16, "context": 64, "batches": 100},
    adam=Grid((2e-3, 4e-3, 8e-3, 1.6e-2), (4e-3, 1.6e-2, 6.4e-2)),
    unit="validation loss in nats per character",
    seeded=True,
    pruned_to=("2:4", "1:4", "1:8", "1:16"),
)

# A trained model that is to become sparse: a shorter run at lower rates, from weights that have had 3,000 steps.
CHAR_TUNED = CHAR.sized(
    name="char-tuned",
    steps=300,
    validate_every=100,
    pretraining=3000,
    pretraining_rate=4e-3,
    # A wide one: what is trained already wants a low rate while it is dense, and a high one under masks.
    adam=Grid((2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), (4e-3, 3e-2)),
    sgd=Grid((3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), (2e-4, 4e-3)),
)

DIGITS = Task(
    name="digits",
    module="cifar",
    model_class="ImageClassifier",
    data_class="ImageData",
    model={"network": "vit", "size": "small", "dataset": "digits"},
    data={"dataset": "digits", "batch_size": 32},
    steps=800,
    metric="val_accuracy",
    reported="test_accuracy",
    unit="test accuracy",
    higher_is_better=True,
    needs=("sklearn", "transformers"),
)

CIFAR10 = Task(
    name="cifar10",
    module="cifar",
    model_class="ImageClassifier",
    data_class="ImageData",
    model={"network": "resnet18", "size": "tiny", "dataset": "cifar10", "betas": (0.9, 0.99)},
    data={"dataset": "cifar10", "folder": "{data}/cifar", "batch_size": 64, "train": 10_000},
    steps=600,
    validate_every=600,
    batches=64,
    reported="test_loss",
    unit="test loss in nats per image",
    also="test_accuracy",
    needs=("transformers",),
    files=("cifar/cifar-10-batches-py/data_batch_1",),
    fetch="Fetch https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz and unpack it there.",
)

MULTI30K = Task(
    name="multi30k",
    module="translation",
    model_class="Translator",
    data_class="TranslationData",
    model={"size": "small", "vocabulary": 4000, "warmup": 100, "beams": 1, "longest": 40},
    data={"folder": "{data}/multi30k", "vocabulary": 4000, "batch_size": 32, "longest": 40},
    steps=600,
    validate_every=600,
    batches=16,
    reported="test_loss",
    unit="test loss in nats per subword",
    also="test_bleu",
    needs=("transformers", "sacrebleu"),
    files=tuple(f"multi30k/{part}.{language}" for part in ("train", "val", "test") for language in ("de", "en")),
    fetch="Fetch the files of https://github.com/multi30k/dataset/tree/master/data/task1/raw, unpacked, under these names.",
)

SST2 = Task(
    name="sst2",
    module="glue_bert",
    model_class="GlueClassifier",
    data_class="GlueData",
    model={"task": "SST-2", "pretrained": None, "size": "small", "betas": (0.9, 0.99)},
    data={"task": "SST-2", "folder": "{data}/glue", "tokenizer": "{data}/bert", "longest": 48, "train": 32_000},
    steps=600,
    validate_every=300,
    unit="loss on the development file in nats per sentence",
    also="val_accuracy",
    needs=("transformers",),
    files=("glue/SST-2/train.tsv", "glue/SST-2/dev.tsv", "bert/vocab.txt"),
    fetch="Fetch SST-2 from https://gluebenchmark.com/tasks, and vocab.txt of google-bert/bert-base-uncased.",
)

WIKITEXT = Task(
    name="wikitext",
    module="gpt2_wikitext",
    model_class="LanguageModel",
    data_class="WikiText",
    model={"pretrained": None, "size": "small", "vocabulary": 4000, "context": 64, "dropout": 0.0},
    data={"folder": "{data}/wikitext-103", "tokenizer": None, "vocabulary": 4000, "context": 64, "batch_size": 16},
    steps=600,
    validate_every=300,
    batches=64,
    metric="val_perplexity",
    reported="test_perplexity",
    unit="test perplexity per subword",
    needs=("transformers",),
    files=tuple(f"wikitext-103/wiki.{part}.tokens" for part in ("train", "valid", "test")),
    fetch="Fetch WikiText-2 or WikiText-103 and put their .tokens files there.",
)

# The others, trained already, that are to become sparse: what the papers do with BERT and GPT-2. Each is sized so that a run
# takes a quarter of a minute, for the grid is wide (see `CHAR_TUNED`) and every recipe is tuned. Losses over time are left
# out: validation within so few steps would take as long as they do.
NEVER = 1_000_000
FINE_TUNING = CHAR_TUNED.adam

CIFAR10_TUNED = CIFAR10.sized(
    name="cifar10-tuned",
    data={**CIFAR10.data, "train": 20_000},
    steps=100,
    validate_every=NEVER,
    pretraining=1500,
    pretraining_rate=8e-3,
    batches=32,
    adam=FINE_TUNING,
)

MULTI30K_TUNED = MULTI30K.sized(
    name="multi30k-tuned",
    model={"size": "small", "vocabulary": 2000, "warmup": 20, "beams": 1, "longest": 32},
    data={"folder": "{data}/multi30k", "vocabulary": 2000, "batch_size": 24, "longest": 32},
    steps=100,
    validate_every=NEVER,
    pretraining=1500,
    pretraining_rate=2e-3,
    batches=8,
    adam=FINE_TUNING,
)

SST2_TUNED = SST2.sized(
    name="sst2-tuned",
    steps=100,
    validate_every=NEVER,
    pretraining=600,
    pretraining_rate=1e-3,
    adam=FINE_TUNING,
)

WIKITEXT_TUNED = WIKITEXT.sized(
    name="wikitext-tuned",
    model={"pretrained": None, "size": "small", "vocabulary": 2000, "context": 64, "dropout": 0.0},
    data={"folder": "{data}/wikitext-103", "tokenizer": None, "vocabulary": 2000, "context": 64, "batch_size": 8},
    steps=150,
    validate_every=NEVER,
    pretraining=3000,
    pretraining_rate=2e-3,
    batches=48,
    adam=FINE_TUNING,
)

# For a large GPU: the networks of the paper, in runs of about a minute.
ON_GPU = {"accelerator": "cuda", "precision": "bf16-mixed"}

CIFAR10_GPU = CIFAR10.sized(
    name="cifar10-resnet18",
    model={"network": "resnet18", "size": "base", "dataset": "cifar10"},
    data={"dataset": "cifar10", "folder": "{data}/cifar", "batch_size": 128},
    steps=3000,
    validate_every=1500,
    batches=None,
    adam=Grid((1e-3, 3e-3), (4e-3, 3e-2)),
    trainer=ON_GPU,
    pruned_to=("2:4", "1:4", "1:8", "1:16"),
)

WIKITEXT_GPU = WIKITEXT.sized(
    name="wikitext-gpt2",
    model={"pretrained": None, "size": "base", "vocabulary": 16_384, "context": 512, "dropout": 0.0},
    data={
        "folder": "{data}/wikitext-103",
        "tokenizer": None,
        "vocabulary": 16_384,
        "context": 512,
        "batch_size": 16,
    },
    steps=1000,
    validate_every=500,
    adam=Grid((6e-4, 1.2e-3), (4e-3, 3e-2)),
    trainer=ON_GPU,
)

TASKS = {
    task.name: task
    for task in (
        *(CHAR, DIGITS, CIFAR10, MULTI30K, SST2, WIKITEXT, CIFAR10_GPU, WIKITEXT_GPU),
        *(CHAR_TUNED, CIFAR10_TUNED, MULTI30K_TUNED, SST2_TUNED, WIKITEXT_TUNED),
    )
}
