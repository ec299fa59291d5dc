"""Translation: an encoder-decoder transformer trained from scratch, judged by BLEU.

Sentences are read from plain text files, one sentence a line, the same line in both languages::

    <folder>/train.<language>   <folder>/val.<language>   <folder>/test.<language>

which is how Multi30k (https://github.com/multi30k/dataset, data/task1/raw) and the WMT files of the Moses tools come. With
``download`` set to a name on the Hugging Face hub, for instance ``wmt/wmt17``, the library ``datasets``, if installed,
fetches them and they are written in this form. The subword vocabulary is learned from the training files, and kept beside.
Needs ``transformers`` and ``sacrebleu``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import MarianConfig, MarianMTModel, get_inverse_sqrt_schedule
from typing_extensions import override

PAD, END = 0, 1
# Layers on either side, width, heads. `base` is the base transformer of Vaswani et al., 2017.
SIZES = {"tiny": (1, 16, 2), "small": (2, 128, 4), "base": (6, 512, 8)}
PARTS = {"train": "train", "val": "validation", "test": "test"}  # our name of a part, and that of the hub

Batch = dict[str, Tensor]  # source and target, int64 of shape (batch, length), filled up with PAD


def transformer(size: str, vocabulary: int, dropout: float) -> MarianMTModel:
    """The network, with random weights. Both embeddings and the output matrix are one tensor."""
    layers, width, heads = SIZES[size]
    return MarianMTModel(
        MarianConfig(
            vocab_size=vocabulary,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            max_position_embeddings=512,
            dropout=dropout,
            activation_function="relu",
            scale_embedding=True,
            init_std=width**-0.5,  # after the scaling, embeddings are as large as the positions
            pad_token_id=PAD,
            eos_token_id=END,
            forced_eos_token_id=END,
            decoder_start_token_id=PAD,
        )
    )


class Translator(pl.LightningModule):
    """The transformer under AdamW with linear warm-up and a rate that then falls with the root of the step.

    Args:
        size: ``"base"`` is the published network, the others are smaller.
        vocabulary: Number of subwords; the same as that of the data.
        lr: Highest learning rate.
        weight_decay: AdamW's decoupled decay.
        warmup: Optimizer steps until the rate is at its highest.
        label_smoothing: Share of the target that is spread over all subwords.
        dropout: Share of activations that is left out in training.
        beams: Translations followed at a time when BLEU is measured; 1: the best subword every time.
        longest: Subwords of the longest translation; nor is it more than twice as long as its source, and ten.
    """

    def __init__(
        self,
        size: Literal["tiny", "small", "base"] = "base",
        vocabulary: int = 32_000,
        lr: float = 7e-4,
        weight_decay: float = 0.01,
        warmup: int = 4000,
        label_smoothing: float = 0.1,
        dropout: float = 0.1,
        beams: int = 4,
        longest: int = 128,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = transformer(size, vocabulary, dropout)
        self.translations: list[str] = []
        self.references: list[str] = []

    def loss(self, batch: Batch, smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy in nats per subword of the target."""
        source, target = batch["source"], batch["target"]
        given = F.pad(target, (1, 0), value=PAD)[:, :-1]  # what the decoder has seen before each subword
        mask = (source != PAD).long()
        logits = self.model(input_ids=source, attention_mask=mask, decoder_input_ids=given, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, label_smoothing=smoothing)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch, self.hparams["label_smoothing"])
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["source"]))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    @override
    def on_validation_epoch_end(self) -> None:
        self.log("val_bleu", self.bleu(), prog_bar=True, sync_dist=True)

    @override
    def on_test_epoch_end(self) -> None:
        self.log("test_bleu", self.bleu(), sync_dist=True)

    def evaluate(self, batch: Batch, name: str) -> None:
        """Log the loss, and translate."""
        subwords = int((batch["target"] != PAD).sum())  # the mean over batches is to be one over subwords
        self.log(f"{name}_loss", self.loss(batch), prog_bar=True, batch_size=subwords, sync_dist=True)
        decode = self.trainer.datamodule.decode  # type: ignore[attr-defined]
        self.translations += decode(self.translate(batch["source"]))
        self.references += decode(batch["target"])

    def translate(self, source: Tensor) -> Tensor:
        """The most likely target found for every source, shape (batch, length)."""
        model: Any = self.model  # the library's types do not know that it generates
        found = model.generate(
            input_ids=source,
            attention_mask=(source != PAD).long(),
            num_beams=self.hparams["beams"],
            max_new_tokens=min(self.hparams["longest"], 2 * source.shape[1] + 10),
            do_sample=False,
        )
        return torch.as_tensor(found[:, 1:])  # behind the PAD that it starts from

    def bleu(self) -> float:
        """BLEU of all sentences since it was last asked for, in percent, with the usual tokenization of sacrebleu."""
        if find_spec("sacrebleu") is None:
            raise ModuleNotFoundError("BLEU is measured by sacrebleu: `pip install sacrebleu`.")
        from sacrebleu import corpus_bleu

        score = corpus_bleu(self.translations, [self.references]).score
        self.translations, self.references = [], []
        return float(score)

    @override
    def configure_optimizers(self) -> Any:
        h = self.hparams
        optimizer = torch.optim.AdamW(self.parameters(), lr=h["lr"], betas=(0.9, 0.98), weight_decay=h["weight_decay"])
        schedule = get_inverse_sqrt_schedule(optimizer, h["warmup"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TranslationData(pl.LightningDataModule):
    """Pairs of sentences as subwords.

    Args:
        folder: Where the files are.
        source: Language to translate from: the ending of its files.
        target: Language to translate to.
        vocabulary: Number of subwords, learned from both languages together.
        download: Name of a data set on the Hugging Face hub to fetch if the files are not there.
        batch_size: Pairs per batch.
        longest: Training pairs with a side of more subwords are left out; others are cut off there.
    """

    def __init__(
        self,
        folder: str = "data/wmt17",
        source: str = "de",
        target: str = "en",
        vocabulary: int = 32_000,
        download: str | None = None,
        batch_size: int = 128,
        longest: int = 128,
    ) -> None:
        super().__init__()
        self.folder, self.languages, self.vocabulary = Path(folder), (source, target), vocabulary
        self.download, self.batch_size, self.longest = download, batch_size, longest
        self.tokenizer: Any = None
        self.pairs: dict[str, list[tuple[list[int], list[int]]]] = {}

    @property
    def subwords(self) -> Path:
        """Where the vocabulary is kept."""
        return self.folder / f"subwords-{'-'.join(self.languages)}-{self.vocabulary}.json"

    @override
    def prepare_data(self) -> None:
        if self.download is not None and not (self.folder / f"train.{self.languages[0]}").exists():
            fetch(self.download, self.folder, self.languages)
        if not self.subwords.exists():
            lines = [line for sentences in zip(*self.read("train"), strict=True) for line in sentences]
            learn_subwords(lines, self.vocabulary).save(str(self.subwords))

    @override
    def setup(self, stage: str) -> None:
        self.tokenizer = Tokenizer.from_file(str(self.subwords))
        for part in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            sides = [self.encode(sentences) for sentences in self.read(part)]
            pairs = list(zip(*sides, strict=True))
            short = [pair for pair in pairs if max(map(len, pair)) <= self.longest]
            cut = [(source[: self.longest], target[: self.longest]) for source, target in pairs]
            self.pairs[part] = short if part == "train" else cut

    def read(self, part: str) -> list[list[str]]:
        """Both sides of one part of the data."""
        paths = [self.folder / f"{part}.{language}" for language in self.languages]
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(
                    f"Expected the file {path}, one sentence a line, but it is not there. Fetch Multi30k (the files of "
                    "https://github.com/multi30k/dataset/tree/master/data/task1/raw, unpacked) or WMT, and name them so; or "
                    "set `download` to their name on the Hugging Face hub, with the library datasets installed."
                )
        sides = [path.read_text(encoding="utf-8").removesuffix("\n").split("\n") for path in paths]
        if len(sides[0]) != len(sides[1]):
            raise ValueError(f"Expected as many lines in {paths[0]} as in {paths[1]}, but got {[len(s) for s in sides]}.")
        return sides

    def encode(self, sentences: list[str]) -> list[list[int]]:
        """Subwords of every sentence, and the end."""
        return [[*encoding.ids, END] for encoding in self.tokenizer.encode_batch(sentences)]

    def decode(self, batch: Tensor) -> list[str]:
        """Every row as text, up to its end."""
        rows = [row[: row.index(END)] if END in row else row for row in batch.tolist()]
        texts: list[str] = self.tokenizer.decode_batch(rows)
        return [text.strip() for text in texts]

    def loader(self, part: str) -> DataLoader[Any]:
        """Batches of one part."""
        train = part == "train"
        return DataLoader(
            self.pairs[part],  # type: ignore[arg-type]
            self.batch_size,
            shuffle=train,
            collate_fn=collate,
            drop_last=train and len(self.pairs[part]) >= self.batch_size,
        )

    @override
    def train_dataloader(self) -> Any:
        return self.loader("train")

    @override
    def val_dataloader(self) -> Any:
        return self.loader("val")

    @override
    def test_dataloader(self) -> Any:
        return self.loader("test")


def collate(pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Fill up to the longest of the batch."""
    source, target = ([torch.tensor(ids) for ids in side] for side in zip(*pairs, strict=True))
    return {
        "source": pad_sequence(source, batch_first=True, padding_value=PAD),
        "target": pad_sequence(target, batch_first=True, padding_value=PAD),
    }


def learn_subwords(lines: list[str], size: int) -> Any:
    """Byte-pair encoding over bytes, so that no character is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>"]  # at PAD and END
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def fetch(name: str, folder: Path, languages: tuple[str, str]) -> None:
    """Let the library datasets fetch a data set, and write it as plain files."""
    from datasets import load_dataset

    folder.mkdir(parents=True, exist_ok=True)
    named = {"name": "-".join(languages)} if "wmt" in name else {}  # WMT has a configuration for each pair of languages
    for part, split in PARTS.items():
        rows = [row.get("translation", row) for row in load_dataset(name, split=split, **named)]
        for language in languages:
            text = "".join(" ".join(row[language].split()) + "\n" for row in rows)
            (folder / f"{part}.{language}").write_text(text, encoding="utf-8")
