"""The language model: the text and its pieces, perplexity, and a fit under STEP that is exported and loaded back."""

import pytest
import torch
from tokenizers.decoders import ByteLevel
from transformers import GPT2LMHeadModel

from examples import gpt2_wikitext
from tests.examples.fitting import check_fit, validate
from tests.examples.tiny_files import write_pretrained, write_wikitext

VOCABULARY = 280


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wikitext")
    write_wikitext(folder, words=400)
    return folder


def tiny(**changed):
    arguments = {"size": "tiny", "vocabulary": VOCABULARY, "context": 32, "lr": 1e-2, "dropout": 0.0}
    return gpt2_wikitext.LanguageModel(**{**arguments, **changed})


def data_of(folder, **changed):
    arguments = {"tokenizer": None, "vocabulary": VOCABULARY, "context": 32, "batch_size": 8}
    return gpt2_wikitext.WikiText(str(folder), **{**arguments, **changed})


def ready(data, stage="fit"):
    data.prepare_data()
    data.setup(stage)
    return data


def test_base_is_gpt2_small():
    with torch.device("meta"):
        model = gpt2_wikitext.LanguageModel()
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_pieces_follow_one_another_and_less_than_one_is_dropped():
    pieces = gpt2_wikitext.Pieces(torch.arange(23), 5)
    assert len(pieces) == 4
    assert torch.cat([pieces[i] for i in range(4)]).tolist() == list(range(20))
    with pytest.raises(ValueError, match=r"Expected a text of at least `context=5` subwords, but got 4"):
        gpt2_wikitext.Pieces(torch.arange(4), 5)


def test_the_text_is_kept_as_it_is(folder):
    data = ready(data_of(folder))
    tokenizer = data.tokenizer
    ids = gpt2_wikitext.encode(tokenizer, data.read("val"), at_a_time=3)
    assert torch.equal(ids, gpt2_wikitext.encode(tokenizer, data.read("val")))
    text = (folder / "wiki.valid.tokens").read_text(encoding="utf-8")
    assert ByteLevel().decode([tokenizer.id_to_token(i) for i in ids.tolist()]) == text
    assert torch.equal(torch.cat([piece for batch in data.val_dataloader() for piece in batch]), ids[: len(ids) // 32 * 32])


def test_words_are_counted_with_the_end_of_every_line(folder):
    data = ready(data_of(folder))
    text = (folder / "wiki.valid.tokens").read_text(encoding="utf-8")
    words = len(text.replace("\n", " <eos> ").split())
    subwords = len(gpt2_wikitext.encode(data.tokenizer, [text]))
    assert data.subwords_per_word["val"] == pytest.approx(subwords / words)


def test_subwords_are_learned_from_the_training_text_alone_and_once(folder, tmp_path):
    write_wikitext(tmp_path, words=400)
    data = ready(data_of(tmp_path))
    learned = data.subwords.read_bytes()
    (tmp_path / "wiki.valid.tokens").write_text("zzz zzz zzz zzz\n" * 100, encoding="utf-8")
    data.subwords.unlink()
    data.prepare_data()
    assert data.subwords.read_bytes() == learned
    data.subwords.write_bytes(learned + b"\n")
    data.prepare_data()
    assert data.subwords.read_bytes() == learned + b"\n"


def test_a_network_that_knows_nothing_is_as_perplexed_as_there_are_subwords(folder):
    model = tiny()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    data = data_of(folder)
    metrics = validate(model, data)
    assert metrics["val_perplexity"] == pytest.approx(VOCABULARY, rel=1e-4)
    assert metrics["val_word_perplexity"] == pytest.approx(VOCABULARY ** data.subwords_per_word["val"], rel=1e-4)


def test_the_loss_is_the_librarys_own():
    torch.manual_seed(0)
    model, batch = tiny().eval(), torch.randint(VOCABULARY, (3, 32))
    assert model.loss(batch).item() == pytest.approx(model.model(input_ids=batch, labels=batch).loss.item(), rel=1e-5)


def test_perplexity_is_taken_over_all_pieces_at_once(folder):
    model = tiny()
    torch.nn.init.normal_(model.model.transformer.wte.weight)  # far from uniform, so that batches differ
    one, many = (validate(model, data_of(folder, batch_size=size)) for size in (64, 3))
    assert many == pytest.approx(one, rel=1e-4)


def test_a_missing_file_says_what_to_fetch_and_where_to_put_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"Expected the file {tmp_path}/wiki.train.tokens or .*Fetch WikiText-2"):
        data_of(tmp_path).prepare_data()


def test_pretrained_weights_and_their_tokenizer_are_loaded_and_all_of_them_train(folder, tmp_path):
    write_pretrained(tmp_path)
    path = str(tmp_path / "openai-community" / "gpt2")
    model = gpt2_wikitext.LanguageModel(pretrained=path).model
    saved = GPT2LMHeadModel.from_pretrained(path).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    data = ready(data_of(folder, tokenizer=path))
    text = (folder / "wiki.train.tokens").read_text(encoding="utf-8")
    assert len(data.parts["train"]) == len(text) // 32  # this tokenizer makes a subword of every letter


def test_a_fit_under_step_is_exported_and_loaded_back(folder, tmp_path):
    masked = check_fit(tiny, data_of(folder, batch_size=2), tmp_path)
    assert len(masked) == 4  # two of the attention, two of the feed-forward; the head is the embedding
