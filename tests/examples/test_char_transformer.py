from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import char_transformer

    yield char_transformer
    sys.modules.pop("char_transformer")


def test_the_text_is_split_without_overlap(example: Any) -> None:
    data, text = example.TopicsDataModule(), example.help_topics()
    assert torch.equal(torch.cat([data.train_text, data.val_text]), text)
    assert len(data.train_text) == len(text) * 9 // 10
    assert 0 < int(text.min()) < int(text.max()) < example.VOCABULARY


def test_targets_are_the_inputs_one_character_later(example: Any) -> None:
    text = torch.arange(1000)
    for inputs, targets in [*example.RandomCrops(text, 3, 8, 2, seed=0), *example.InOrder(text, 3, 8)]:
        assert inputs.shape == targets.shape == (3, 8)
        assert torch.equal(inputs + 1, targets)


def test_validation_reads_every_character_at_most_once_and_leaves_less_than_a_batch(example: Any) -> None:
    batches = list(example.InOrder(torch.arange(100), 3, 8))
    assert torch.equal(torch.cat([inputs.flatten() for inputs, _ in batches]), torch.arange(96))


def test_the_model_does_not_look_ahead(example: Any) -> None:
    model = example.CharModel(width=8, layers=1, heads=2, context=6)
    characters = torch.randint(128, (1, 6))
    changed = characters.clone()
    changed[0, 4:] = 0
    assert torch.equal(model(characters)[0, :4], model(changed)[0, :4])


@pytest.mark.parametrize("step", [3, 5, 8])
def test_an_interrupted_run_goes_on_with_the_batches_it_would_have_seen(example: Any, tmp_path: Path, step: int) -> None:
    def fit(steps: int, resume: Path | None = None) -> dict[str, torch.Tensor]:
        pl.seed_everything(7, verbose=False)
        model = example.CharTransformer(width=8, layers=1, heads=2, context=8, cosine=False)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
        trainer = pl.Trainer(
            max_steps=steps,
            callbacks=[saver],
            logger=False,
            accelerator="cpu",
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, example.TopicsDataModule(batch_size=2, context=8, batches=4), ckpt_path=resume)
        return model.state_dict()

    whole = fit(11)
    resumed = fit(11, tmp_path / f"step={step}.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
