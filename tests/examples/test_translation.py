"""The translation: files, subwords, the loss, BLEU, and a fit under STEP that is exported and loaded back."""

import pytest
import torch

from examples import translation
from examples.translation import END, PAD
from tests.examples.fitting import check_fit, validate
from tests.examples.tiny_files import write_pairs

VOCABULARY = 300


@pytest.fixture
def folder(tmp_path):
    write_pairs(tmp_path)
    return tmp_path


def tiny(**changed):
    return translation.Translator(
        **{"size": "tiny", "vocabulary": VOCABULARY, "beams": 1, "longest": 6, "warmup": 2, **changed}
    )


def tiny_data(folder, **changed):
    return translation.TranslationData(str(folder), **{"vocabulary": VOCABULARY, "batch_size": 8, **changed})


def ready(data, stage="fit"):
    data.prepare_data()
    data.setup(stage)
    return data


def test_base_is_the_published_network():
    with torch.device("meta"):
        model = translation.transformer("base", 37_000, 0.1)
    # Vaswani et al., table 3: 65 million, the shared embedding of 37,000 x 512 among them.
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == pytest.approx(65e6, rel=0.05)
    assert model.lm_head.weight is model.model.shared.weight


@pytest.mark.parametrize("text", ["Zwei Kinder spielen .", "ein Mann, 42 Jahre alt — grüßt 世界 🙂", "  of  "])
def test_decoding_gives_back_any_text(text, folder):
    data = ready(tiny_data(folder))
    [ids] = data.encode([text])
    assert ids[-1] == END
    assert PAD not in ids
    assert data.decode(torch.tensor([[*ids, PAD, PAD]])) == [text.strip()]


def test_subwords_are_learned_once_and_the_same_every_time(folder, tmp_path):
    data = ready(tiny_data(folder))
    learned = data.subwords.read_bytes()
    data.subwords.unlink()
    assert ready(tiny_data(folder)).subwords.read_bytes() == learned
    assert data.tokenizer.get_vocab_size() == VOCABULARY
    data.subwords.write_bytes(learned.replace(b"</s>", b"</S>"))  # whatever is there is not learned anew
    assert ready(tiny_data(folder)).tokenizer.token_to_id("</S>") == END


def test_long_pairs_are_left_out_of_training_and_cut_off_elsewhere(folder):
    whole = ready(tiny_data(folder))
    lengths = sorted(max(map(len, pair)) for pair in whole.pairs["train"])
    most = lengths[12]
    short = ready(tiny_data(folder, longest=most))
    assert len(short.pairs["train"]) == sum(length <= most for length in lengths) < len(lengths)
    assert max(len(side) for pair in short.pairs["train"] for side in pair) == most
    assert short.pairs["val"] == [(source[:most], target[:most]) for source, target in whole.pairs["val"]]


def test_batches_are_filled_up_and_keep_every_pair(folder):
    data = ready(tiny_data(folder, batch_size=5))
    seen = []
    for batch in data.val_dataloader():
        rows = zip(batch["source"].tolist(), batch["target"].tolist(), strict=True)
        seen += [tuple([token for token in row if token != PAD] for row in pair) for pair in rows]
    assert seen == data.pairs["val"]


def test_the_loss_is_that_of_every_subword_given_those_before_it():
    torch.manual_seed(0)
    model = tiny(dropout=0.0).eval()
    batch = {"source": torch.tensor([[5, 6, END], [7, END, PAD]]), "target": torch.tensor([[8, 9, END], [10, END, PAD]])}
    losses = []
    for source, target in (([5, 6, END], [8, 9, END]), ([7, END], [10, END])):  # one by one, and without filling up
        for i, subword in enumerate(target):
            given = torch.tensor([[PAD, *target[:i]]])
            logits = model.model(input_ids=torch.tensor([source]), decoder_input_ids=given).logits[0, -1]
            losses.append(-logits.log_softmax(0)[subword])
    assert model.loss(batch).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_a_translation_is_the_best_subword_every_time():
    torch.manual_seed(0)
    model = tiny(longest=5).eval()
    source = torch.tensor([[5, 6, 7, END]])
    given = [PAD]
    for _ in range(4):
        logits = model.model(input_ids=source, decoder_input_ids=torch.tensor([given])).logits[0, -1]
        logits[PAD] = -torch.inf
        given.append(int(logits.argmax()))
    assert model.translate(source)[0, :4].tolist() == given[1:]


def test_bleu_is_the_mean_of_the_four_precisions():
    pytest.importorskip("sacrebleu")
    model = tiny()
    model.translations, model.references = ["the cat sat on the mat"], ["the cat sat on a mat"]
    by_hand = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25  # words, pairs, triples and fours; both are equally long
    assert model.bleu() == pytest.approx(by_hand)
    assert (model.translations, model.references) == ([], [])


def test_bleu_is_taken_over_all_batches_and_against_the_text_itself(folder):
    pytest.importorskip("sacrebleu")

    class Copies(translation.Translator):
        """Says what is in front of it."""

        def translate(self, source):
            return source

    for language in ("de", "en"):  # now copying is translating
        (folder / f"val.{language}").write_text((folder / "val.de").read_text(encoding="utf-8"), encoding="utf-8")
    data = tiny_data(folder, batch_size=5)
    metrics = validate(Copies(size="tiny", vocabulary=VOCABULARY), data)
    assert metrics["val_bleu"] == pytest.approx(100.0)
    assert len(data.pairs["val"]) > 20


def test_files_of_unequal_length_are_refused(folder):
    with (folder / "train.de").open("a", encoding="utf-8") as file:
        file.write("noch einer\n")
    with pytest.raises(ValueError, match=r"Expected as many lines in .*train.de as in .*train.en, but got \[25, 24\]"):
        tiny_data(folder).prepare_data()


def test_a_missing_file_says_what_to_fetch_and_where_to_put_it(folder):
    (folder / "val.en").unlink()
    with pytest.raises(FileNotFoundError, match=rf"Expected the file {folder}/val.en, one sentence a line.*Fetch Multi30k"):
        ready(tiny_data(folder))


def test_a_fit_under_step_is_exported_and_loaded_back(folder, tmp_path):
    pytest.importorskip("sacrebleu")
    data = tiny_data(folder, batch_size=4, longest=40)
    masked = check_fit(lambda: tiny(lr=1e-2, dropout=0.0), data, tmp_path)
    assert len(masked) == 6 + 10  # four products of every attention and two of every feed-forward; no embedding
    assert not any("shared" in name or "lm_head" in name for name in masked)
