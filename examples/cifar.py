"""Images: ResNet-18, DenseNet-121 or a vision transformer on CIFAR-10, CIFAR-100 or scikit-learn's digits.

``lightning-step fit --config examples/configs/digits.yaml`` needs no files. CIFAR is read from the official archives,
unpacked (https://www.cs.toronto.edu/~kriz/cifar.html)::

    <folder>/cifar-10-batches-py/data_batch_1 .. data_batch_5, test_batch
    <folder>/cifar-100-python/train, test

or from one NumPy file, ``<folder>/cifar10.npz`` or ``<folder>/cifar100.npz``, with ``x_train`` and ``x_test`` (uint8, shape
(images, 32, 32, 3)), ``y_train`` and ``y_test``. With ``download: true`` torchvision, if installed, fetches the archives.
Needs ``transformers``; the digits need ``scikit-learn``.
"""

from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel, get_cosine_schedule_with_warmup
from typing_extensions import override

Size = Literal["tiny", "small", "base"]
Name = Literal["cifar10", "cifar100", "digits"]

# Widths of the four stages; those of `base` are the published ones.
RESNET = {"tiny": [8, 8, 16, 16], "small": [16, 32, 64, 128], "base": [64, 128, 256, 512]}
# Layers of the four blocks, and the channels that each of them adds.
DENSENET = {"tiny": ([2, 2, 2, 2], 8), "small": ([2, 4, 4, 4], 16), "base": ([6, 12, 24, 16], 32)}
# Layers, width, heads.
VIT = {"tiny": (1, 16, 2), "small": (4, 64, 4), "base": (7, 384, 6)}


class Classifier(nn.Module):
    """A network of the library with a linear layer on top of what it makes of an image."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (batch, classes), for images of shape (batch, channels, side, side)."""
        logits: Tensor = self.head(self.body(images).pooler_output.flatten(1))
        return logits


def resnet18(size: Size, channels: int, classes: int) -> nn.Module:
    """ResNet-18 for small images: a 3 x 3 stem at full resolution, and no pooling behind it."""
    widths = RESNET[size]
    body = ResNetModel(ResNetConfig(embedding_size=widths[0], hidden_sizes=widths, depths=[2, 2, 2, 2], layer_type="basic"))
    # The stem of the library, 7 x 7 with stride 2 and pooling, would leave 8 x 8 pixels of 32 x 32.
    stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
    body.embedder = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU())  # type: ignore[assignment]
    return Classifier(body, widths[-1], classes)


def vit(size: Size, channels: int, classes: int, side: int) -> nn.Module:
    """A vision transformer that sees 64 patches of CIFAR's images, and 16 of the digits."""
    layers, width, heads = VIT[size]
    config = ViTConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=side,
        patch_size=max(2, side // 8),
        num_channels=channels,
        initializer_range=width**-0.5,  # the library's 0.02 is for a width of 768; narrow ones hardly begin to learn from it
    )
    return Classifier(ViTModel(config), width, classes)


class DenseLayer(nn.Module):
    """Norm and activation before each of two convolutions; what comes out is put beside what went in."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(4 * growth)
        self.squeeze = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.mix = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, channels + growth, height, width)."""
        new = self.mix(F.relu(self.norm2(self.squeeze(F.relu(self.norm1(x))))))
        return torch.cat([new, x], dim=1)


class DenseNet(nn.Sequential):
    """DenseNet-BC for small images: four blocks; between them, channels and both sides of the image are halved."""

    def __init__(self, size: Size, channels: int, classes: int) -> None:
        depths, growth = DENSENET[size]
        width = 2 * growth
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        for number, depth in enumerate(depths):
            if number:
                half = nn.Conv2d(width, width // 2, 1, bias=False)
                layers += [nn.BatchNorm2d(width), nn.ReLU(), half, nn.AvgPool2d(2)]
                width //= 2
            layers += [DenseLayer(width + i * growth, growth) for i in range(depth)]
            width += depth * growth
        pool = nn.AdaptiveAvgPool2d(1)
        super().__init__(*layers, nn.BatchNorm2d(width), nn.ReLU(), pool, nn.Flatten(), nn.Linear(width, classes))


class ImageClassifier(pl.LightningModule):
    """One of the networks under AdamW with linear warm-up and cosine decay.

    Args:
        network: ``"resnet18"``, ``"densenet121"`` or ``"vit"``.
        size: ``"base"`` is the published network, the others are narrower.
        dataset: What it is for; the same as that of the data.
        lr: Highest learning rate.
        weight_decay: AdamW's decoupled decay.
        betas: AdamW's decays. AutoSwitch needs a second moment that settles within the run: a short one takes 0.99.
        warmup: Share of the optimizer steps until the rate is at its highest.
        label_smoothing: Share of the target that is spread over all classes.
    """

    def __init__(
        self,
        network: Literal["resnet18", "densenet121", "vit"] = "resnet18",
        size: Size = "base",
        dataset: Name = "cifar10",
        lr: float = 1e-3,
        weight_decay: float = 5e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: float = 0.05,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.classes = 100 if dataset == "cifar100" else 10
        channels, side = (1, 8) if dataset == "digits" else (3, 32)
        if network == "vit":
            self.model = vit(size, channels, self.classes, side)
        else:
            self.model = (resnet18 if network == "resnet18" else DenseNet)(size, channels, self.classes)

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.hparams["label_smoothing"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    @override
    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: list[Tensor], name: str) -> None:
        """Log mean loss and the share of images that are classified correctly."""
        images, labels = batch
        logits = self.model(images)
        accuracy = multiclass_accuracy(logits, labels, self.classes, average="micro")
        values = {f"{name}_loss": F.cross_entropy(logits, labels), f"{name}_accuracy": accuracy}
        self.log_dict(values, prog_bar=True, batch_size=len(labels), sync_dist=True)

    @override
    def configure_optimizers(self) -> Any:
        h = self.hparams
        optimizer = torch.optim.AdamW(self.parameters(), lr=h["lr"], betas=h["betas"], weight_decay=h["weight_decay"])
        total = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, int(h["warmup"] * total), total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ImageData(pl.LightningDataModule):
    """Images in memory; a part of the training images, chosen by a seed, is held out to validate on.

    Args:
        dataset: ``"cifar10"``, ``"cifar100"`` or ``"digits"``.
        folder: Where the files of CIFAR are.
        download: Let torchvision fetch the files if they are not there.
        batch_size: Images per batch.
        train: Train on this many images only; None: all of them.
        held_out: Share of the training images to validate on.
        seed: Seed of the split.
    """

    def __init__(
        self,
        dataset: Name = "cifar10",
        folder: str = "data/cifar",
        download: bool = False,
        batch_size: int = 128,
        train: int | None = None,
        held_out: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.dataset, self.folder, self.download = dataset, Path(folder), download
        self.batch_size, self.train, self.held_out, self.seed = batch_size, train, held_out, seed
        self.parts: dict[str, Any] = {}

    @override
    def prepare_data(self) -> None:
        if self.download and self.dataset != "digits":
            from torchvision import datasets

            getattr(datasets, self.dataset.upper())(self.folder, download=True)

    @override
    def setup(self, stage: str) -> None:
        if self.parts:  # all are read at once, whichever stage comes first
            return
        x, y, x_test, y_test = load_digits(self.seed) if self.dataset == "digits" else load_cifar(self.folder, self.dataset)
        pixels = x.to(torch.float32)
        self.mean, self.std = (f(pixels, (0, 2, 3)).view(1, -1, 1, 1) for f in (torch.mean, torch.std))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed)).tolist()
        held_out = int(len(x) * self.held_out)
        images = TensorDataset(x, y)
        chosen = order[held_out:] if self.train is None else order[held_out:][: self.train]
        self.parts = {
            "train": Subset(images, chosen),
            "val": Subset(images, order[:held_out]),
            "test": TensorDataset(x_test, y_test),
        }

    @override
    def train_dataloader(self) -> Any:
        return DataLoader(self.parts["train"], self.batch_size, shuffle=True, drop_last=True)

    @override
    def val_dataloader(self) -> Any:
        return DataLoader(self.parts["val"], self.batch_size)

    @override
    def test_dataloader(self) -> Any:
        return DataLoader(self.parts["test"], self.batch_size)

    @override
    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        images, labels = batch
        images = (images - self.mean.to(images.device)) / self.std.to(images.device)
        training = self.trainer is not None and self.trainer.training
        return [jitter(images) if training else images, labels]


def jitter(images: Tensor) -> Tensor:
    """Every image moved by up to an eighth of its size; those in colour are mirrored half of the time."""
    batch, channels, side, _ = images.shape
    pad = side // 8
    windows = F.pad(images, (pad,) * 4).unfold(2, side, 1).unfold(3, side, 1)  # (batch, channels, dy, dx, side, side)
    dy, dx = torch.randint(2 * pad + 1, (2, batch), device=images.device)
    moved = windows[torch.arange(batch, device=images.device), :, dy, dx]  # (batch, channels, side, side)
    if channels == 1:  # a mirrored digit is none
        return moved
    mirrored = torch.rand(batch, 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, moved.flip(3), moved)


def load_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 1,797 digits inside scikit-learn, 8 x 8 grey pixels; a fifth of them is for testing."""
    if find_spec("sklearn") is None:
        raise ModuleNotFoundError("The digits are a part of scikit-learn: `pip install scikit-learn`.")
    from sklearn import datasets

    digits = datasets.load_digits()
    x, y = torch.from_numpy(digits.images).byte()[:, None], torch.from_numpy(digits.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    return x[train], y[train], x[test], y[test]


def load_cifar(folder: Path, dataset: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, uint8 of shape (images, 3, 32, 32), and labels: those for training, then those for testing."""
    single = folder / f"{dataset}.npz"
    if single.exists():
        with np.load(single) as arrays:
            x, y, x_test, y_test = (arrays[name] for name in ("x_train", "y_train", "x_test", "y_test"))
        parts = [(images.transpose(0, 3, 1, 2), labels.ravel()) for images, labels in ((x, y), (x_test, y_test))]
    elif dataset == "cifar10":
        batches = [read_batch(folder / "cifar-10-batches-py" / f"data_batch_{i}", "labels", single) for i in range(1, 6)]
        images, labels = zip(*batches, strict=True)
        test = read_batch(folder / "cifar-10-batches-py" / "test_batch", "labels", single)
        parts = [(np.concatenate(images), np.concatenate(labels)), test]
    else:
        parts = [read_batch(folder / "cifar-100-python" / name, "fine_labels", single) for name in ("train", "test")]
    (x, y), (x_test, y_test) = ((torch.tensor(x), torch.tensor(y, dtype=torch.long)) for x, y in parts)
    return x, y, x_test, y_test


def read_batch(path: Path, key: str, single: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """One file of the official archive. It is a pickle, so take it from nowhere else."""
    if not path.exists():
        dataset = "cifar-10" if key == "labels" else "cifar-100"
        raise FileNotFoundError(
            f"Expected the file {path}, or {single}, but got neither. Fetch "
            f"https://www.cs.toronto.edu/~kriz/{dataset}-python.tar.gz and unpack it in {single.parent}, or set "
            "`download: true` with torchvision installed."
        )
    with path.open("rb") as file:
        batch = pickle.load(file, encoding="bytes")
    return batch[b"data"].reshape(-1, 3, 32, 32), np.asarray(batch[key.encode()])
