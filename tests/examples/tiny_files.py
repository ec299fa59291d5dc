"""A few lines of every data set that the examples read, and weights of a few numbers, in the forms that they document."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np

DICTIONARY = {
    "the": "der",
    "a": "ein",
    "man": "Mann",
    "dog": "Hund",
    "house": "Haus",
    "river": "Fluss",
    "sees": "sieht",
    "holds": "hält",
    "red": "rot",
    "near": "nahe",
    "with": "mit",
    "two": "zwei",
    "children": "Kinder",
    "play": "spielen",
}
WORDS = list(DICTIONARY)
GLUE = {
    "CoLA": [["source", "label", "mark", "sentence"], ["x", "{binary}", "*", "{text}"]],
    "SST-2": [["sentence", "label"], ["{text}", "{binary}"]],
    "MRPC": [["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["{binary}", "5", "6", "{text}", "{other}"]],
    "QQP": [
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        ["1", "2", "3", "{text}", "{other}", "{binary}"],
    ],
    "STS-B": [["index", "sentence1", "sentence2", "score"], ["0", "{text}", "{other}", "{score}"]],
    "MNLI": [["index", "sentence1", "sentence2", "label1", "gold_label"], ["0", "{text}", "{other}", "-", "{mnli}"]],
    "QNLI": [["index", "question", "sentence", "label"], ["0", "{text}", "{other}", "{entailed}"]],
    "RTE": [["index", "sentence1", "sentence2", "label"], ["0", "{text}", "{other}", "{entailed}"]],
    "WNLI": [["index", "sentence1", "sentence2", "label"], ["0", "{text}", "{other}", "{binary}"]],
}
KINDS = {
    "binary": ["0", "1"],
    "score": ["0.000", "2.500", "5.000"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "entailed": ["entailment", "not_entailment"],
}


def write_cifar(folder: Path, images: int = 8) -> None:
    """The official archives, unpacked, with ``images`` in every file."""
    random_bytes = np.random.default_rng(0)
    names = [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)] + ["cifar-10-batches-py/test_batch"]
    for name in [*names, "cifar-100-python/train", "cifar-100-python/test"]:
        key, classes = (b"labels", 10) if "cifar-10-" in name else (b"fine_labels", 100)
        data = random_bytes.integers(0, 256, (images, 3072), dtype=np.uint8)
        labels = [int(label) for label in random_bytes.integers(0, classes, images)]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(pickle.dumps({b"data": data, key: labels}))


def sentence(rng: random.Random) -> tuple[str, str]:
    """Words, and the same words in German."""
    words = rng.choices(WORDS, k=rng.randint(3, 9))
    return " ".join(DICTIONARY[word] for word in words), " ".join(words)


def write_pairs(folder: Path, pairs: int = 24) -> None:
    """German and English, one sentence a line."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val", "test"):
        for language, lines in zip(("de", "en"), zip(*(sentence(rng) for _ in range(pairs)), strict=True), strict=True):
            (folder / f"{part}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_glue(folder: Path, examples: int = 24) -> None:
    """Every task of GLUE with the columns of its official files; as there, CoLA has no header."""
    rng = random.Random(0)
    for task, (header, cells) in GLUE.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        for part in ("train", "dev_matched" if task == "MNLI" else "dev"):
            rows = [] if task == "CoLA" else [header]
            for i in range(examples):
                kinds = {kind: values[i % len(values)] for kind, values in KINDS.items()}
                rows.append([cell.format(text=sentence(rng)[1], other=sentence(rng)[1], **kinds) for cell in cells])
            (folder / task / f"{part}.tsv").write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def write_wikitext(folder: Path, words: int = 1500) -> None:
    """The three files of WikiText, with lines of their kind."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "valid", "test"):
        lines, count = [" \n", " = Rivers = \n"], 3
        while count < words:
            line = sentence(rng)[1]
            lines.append(f" {line} , @-@ <unk> . \n")
            count += len(line.split()) + 4
        (folder / f"wiki.{part}.tokens").write_text("".join(lines), encoding="utf-8")


def write_pretrained(folder: Path) -> None:
    """BERT and GPT-2 with tokenizers, under the names that they have on the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertConfig,
        BertForPreTraining,
        BertTokenizerFast,
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
    )

    bert, gpt2 = folder / "google-bert" / "bert-base-uncased", folder / "openai-community" / "gpt2"
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(bert)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForPreTraining(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(bert)

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(gpt2)
    GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=1024, n_embd=16, n_layer=1, n_head=2)).save_pretrained(gpt2)


def write_all(folder: Path) -> Path:
    """Everything that the files in ``examples/configs`` name, relative to ``folder``."""
    write_cifar(folder / "data" / "cifar", images=4)
    write_pairs(folder / "data" / "wmt17", pairs=4)
    write_pairs(folder / "data" / "multi30k", pairs=4)
    write_glue(folder / "data" / "glue")
    write_wikitext(folder / "data" / "wikitext-103")
    write_pretrained(folder)
    return folder
