"""GLUE: the files of every task, its metrics against numbers worked out by hand, and a fit under STEP."""

import math

import lightning.pytorch as pl
import pytest
import torch
from transformers import BertForPreTraining

from examples import glue_bert
from tests.examples.fitting import QUIET, check_fit, validate
from tests.examples.tiny_files import GLUE, KINDS, WORDS, write_glue, write_pretrained

# Rank correlation needs all scores at once, and torchmetrics says so.
pytestmark = pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all targets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    write_glue(folder)
    write_pretrained(folder)
    return folder


def data_of(folder, task="SST-2", **changed):
    tokenizer = str(folder / "google-bert" / "bert-base-uncased")
    return glue_bert.GlueData(task, str(folder), **{"tokenizer": tokenizer, "batch_size": 8, **changed})


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


def tiny(task="SST-2", **changed):
    return glue_bert.GlueClassifier(task, **{"size": "tiny", "vocabulary": 40, "lr": 1e-2, **changed})


def test_base_is_bert_base():
    with torch.device("meta"):
        model = glue_bert.GlueClassifier("MNLI")
    # 110 million as published; the exact number is that of the checkpoint (109,482,240) and a head of three classes.
    assert sum(p.numel() for p in model.parameters()) == 109_482_240 + 3 * 768 + 3


@pytest.mark.parametrize("task", sorted(GLUE))
def test_sentences_and_labels_come_from_the_right_columns(task, folder):
    data = ready(data_of(folder, task))
    pair = "{other}" in GLUE[task][1]
    kind = next(cell[1:-1] for cell in GLUE[task][1] if cell[1:-1] in KINDS)
    rows = data.parts["val"]
    assert [row[-1] for row in rows] == [KINDS[kind][i % len(KINDS[kind])] for i in range(24)]
    assert all(len(row) == (3 if pair else 2) for row in rows)
    assert all(set(text.split()) <= set(WORDS) for row in rows for text in row[:-1])
    batch = next(iter(data.val_dataloader()))
    spoken = data.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert spoken == " ".join(rows[0][:-1])
    if kind == "score":
        assert batch["labels"].tolist()[:4] == [0.0, 2.5, 5.0, 0.0]
    else:
        assert batch["labels"].tolist()[:4] == [i % len(KINDS[kind]) for i in range(4)]


@pytest.mark.parametrize("task", sorted(GLUE))
def test_every_task_is_trained_and_scored_by_its_own_metrics(task, folder):
    metrics = validate(tiny(task), data_of(folder, task))
    assert set(metrics) == {"val_loss", *(f"val_{name}" for name in glue_bert.TASKS[task].scores)}


# Of eight examples, three are found (tp), two are not (fn), one is taken for one (fp), two are right to be left (tn).
PREDICTED, TRUE = [1, 1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]
GUESSED, MEASURED = [1.0, 2.0, 4.0, 3.0], [0.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("CoLA", {"matthews": (3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4)}),
        ("SST-2", {"accuracy": 5 / 8}),
        ("MRPC", {"accuracy": 5 / 8, "f1": 2 * 3 / (2 * 3 + 1 + 2)}),
        ("QQP", {"accuracy": 5 / 8, "f1": 2 / 3}),
        ("MNLI", {"accuracy": 5 / 8}),
        # Deviations from the means: (-1.5, -0.5, 1.5, 0.5) and (-1.75, -0.75, 0.25, 2.25).
        ("STS-B", {"pearson": 4.5 / math.sqrt(5 * 8.75), "spearman": 1 - 6 * 2 / (4 * 15)}),
    ],
)
def test_metrics_are_those_worked_out_by_hand(task, expected):
    scores = tiny(task).scores["val"]
    halves = [(GUESSED, MEASURED)] if task == "STS-B" else [(PREDICTED[:3], TRUE[:3]), (PREDICTED[3:], TRUE[3:])]
    for predicted, true in halves:  # over all examples at once: a mean over batches would be another number
        scores.update(torch.tensor(predicted), torch.tensor(true))
    found = {name.removeprefix("val_"): value.item() for name, value in scores.compute().items()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_network_that_always_says_one_is_right_as_often_as_one_is(folder):
    model = tiny("RTE")
    torch.nn.init.zeros_(model.model.classifier.weight)
    model.model.classifier.bias.data = torch.tensor([0.0, 1.0])
    data = data_of(folder, "RTE", batch_size=7)
    rows = ready(data).parts["val"]
    share = sum(row[-1] == "not_entailment" for row in rows) / len(rows)
    metrics = validate(model, data)
    assert metrics["val_accuracy"] == pytest.approx(share)
    assert metrics["val_loss"] == pytest.approx(math.log(1 + math.e) - share, rel=1e-5)


def test_a_vocabulary_is_all_that_the_tokenizer_needs(folder, tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "man", "the", "##s"]) + "\n"
    )
    data = ready(data_of(folder, tokenizer=str(tmp_path)))
    batch = data.collate([["The mans", "1"], ["the", "0"]])
    assert batch["input_ids"].tolist() == [[2, 6, 5, 7, 3], [2, 6, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_quotes_and_a_byte_order_mark_are_taken_as_they_are(folder, tmp_path):
    (tmp_path / "MRPC").mkdir()
    text = '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\ta "man\tthe" dog\n'
    for part in ("train", "dev"):
        (tmp_path / "MRPC" / f"{part}.tsv").write_text(text, encoding="utf-8")
    data = data_of(folder, "MRPC")
    data.folder = tmp_path / "MRPC"
    assert data.read("train") == [['a "man', 'the" dog', "1"]]


def test_what_is_held_out_is_the_seeds_and_not_trained_on(folder):
    first, again, other = (ready(data_of(folder, held_out=0.25, seed=seed)).parts for seed in (0, 0, 1))
    assert first == again
    assert first["val"] != other["val"]
    assert (len(first["val"]), len(first["train"])) == (6, 18)
    assert sorted(first["val"] + first["train"]) == sorted(data_of(folder).read("train"))


def test_a_missing_file_says_what_to_fetch_and_where_to_put_it(tmp_path, folder):
    data = data_of(folder, "QNLI")
    data.folder = tmp_path
    with pytest.raises(
        FileNotFoundError, match=rf"Expected the file {tmp_path}/train.tsv.*Fetch the task from.*`held_out: 0.1`"
    ):
        data.setup("fit")


def test_other_columns_are_refused_by_name(tmp_path, folder):
    (tmp_path / "train.tsv").write_text("text\tlabel\nthe man\t1\n", encoding="utf-8")
    data = data_of(folder)
    data.folder = tmp_path
    with pytest.raises(ValueError, match=r"Expected the columns \['sentence', 'label'\] in .*, but got \['text', 'label'\]"):
        data.setup("fit")


def test_pretrained_weights_are_loaded_and_all_of_them_train(folder):
    path = str(folder / "google-bert" / "bert-base-uncased")
    model = glue_bert.GlueClassifier("MNLI", pretrained=path).model
    saved = BertForPreTraining.from_pretrained(path).bert.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.bert.state_dict().items())
    assert model.classifier.out_features == 3
    assert all(module.training for module in model.modules())


def test_norms_and_biases_do_not_decay(folder):
    model, trainer = tiny(), pl.Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(model, data_of(folder))
    decays = {id(p): group["weight_decay"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    found = {name: decays[id(p)] for name, p in model.model.named_parameters()}
    assert len(found) == len(decays)
    assert all(decay == (0.0 if "bias" in name or "LayerNorm" in name else 0.01) for name, decay in found.items())


@pytest.mark.parametrize("task", ["CoLA", "STS-B"])
def test_a_fit_under_step_is_exported_and_loaded_back(task, folder, tmp_path):
    masked = check_fit(lambda: tiny(task, dropout=0.0), data_of(folder, task, batch_size=4), tmp_path)
    assert len(masked) == 8  # six products of the layer, the pooler and the head
