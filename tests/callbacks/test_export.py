from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from lightning_step import SRSTE, STEP, AtStep, Dense, SparseExport, STEPSparsityCallback, load_sparse, nm_masks
from lightning_step.export import read_manifest


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_the_file_loads_back_to_what_the_model_computes(format: str, tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    path, module = tmp_path / "new" / "model.safetensors", tiny()
    export = SparseExport(str(path), format=format)  # type: ignore[arg-type]
    make_trainer(STEPSparsityCallback(n=1, m=4, recipe=STEP(AtStep(5))), export).fit(module)
    restored = load_sparse(path, tiny())
    x, _ = module.batch(1)
    assert torch.equal(restored(x), module(x))
    assert restored.net[0].weight.count_nonzero() == restored.net[0].weight.numel() // 4
    assert export.exported is not None
    assert export.exported.bytes == path.stat().st_size


def test_the_dense_file_is_an_ordinary_safetensors_file(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    make_trainer(STEPSparsityCallback(recipe=SRSTE()), SparseExport(str(path))).fit(tiny())
    plain = tiny()
    plain.load_state_dict(load_file(path), strict=True)


def test_a_submodule_is_written_without_its_prefix(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    path, module = tmp_path / "net.safetensors", tiny()
    make_trainer(STEPSparsityCallback(recipe=SRSTE()), SparseExport(str(path), module="net")).fit(module)
    assert sorted(load_sparse(path)) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    load_sparse(path, tiny().net)


def test_the_manifest_names_recipe_and_switch(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    callbacks = (SparseExport(str(path)), STEPSparsityCallback(recipe=STEP(AtStep(5), lam=1e-3)))
    make_trainer(*callbacks).fit(tiny())
    info = read_manifest(path).info
    assert info["steps"] == 20
    assert info["recipe"] == callbacks[1].manifest_info()["recipe"]
    assert info["recipe"]["lam"] == 1e-3
    assert info["switches"] == ["optimizer step 5: masks on, second moment frozen (3 tensors); fixed step reached: step 5"]


@pytest.mark.parametrize("recipe", [Dense(), STEP(AtStep(1_000))], ids=["dense", "ended before the switch"])
def test_nothing_learned_nothing_written(recipe: Any, tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    path, module = tmp_path / "model.safetensors", tiny()
    with pytest.warns(
        UserWarning, match=r"3 that never came on: training ended before the switch .*nothing was pruned.*one_shot"
    ):
        make_trainer(STEPSparsityCallback(recipe=recipe), SparseExport(str(path))).fit(module)
    assert not path.exists()
    assert all(parameter.count_nonzero() == parameter.numel() for parameter in module.parameters())


def test_one_shot_prunes_the_file_and_not_the_model(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    path, module = tmp_path / "model.safetensors", tiny()
    make_trainer(STEPSparsityCallback(recipe=Dense()), SparseExport(str(path), one_shot=True)).fit(module)
    written = load_sparse(path)["net.0.weight"]
    assert written.count_nonzero() == written.numel() // 2
    assert module.net[0].weight.count_nonzero() == written.numel()
    assert torch.equal(written, nm_masks(module)["net.0.weight"].mask(module.net[0].weight) * module.net[0].weight)


def test_without_masks_it_says_what_is_missing(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Expected masks on the model, but got none.*Add STEPSparsityCallback"):
        make_trainer(SparseExport(str(tmp_path / "model.safetensors"))).fit(tiny())


def test_the_last_word_on_the_weights_is_exported(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    class Doubles(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.head.bias.fill_(7.0)

    path = tmp_path / "model.safetensors"
    make_trainer(STEPSparsityCallback(recipe=SRSTE()), SparseExport(str(path)), Doubles()).fit(tiny())
    assert torch.equal(load_sparse(path)["head.bias"], torch.full((2,), 7.0))


def test_it_says_what_it_wrote(tiny: Any, make_trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.safetensors"
    with caplog.at_level(logging.INFO):
        make_trainer(STEPSparsityCallback(recipe=SRSTE()), SparseExport(str(path), format="packed")).fit(tiny())
    assert f"lightning-step, wrote {path} (packed, {path.stat().st_size:,} bytes): 3 tensors verified" in caplog.text


def test_an_earlier_file_is_replaced_only_at_the_end(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("old")

    class Looks(pl.Callback):
        seen = ""

        def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.seen = path.read_text()

    looks = Looks()
    make_trainer(STEPSparsityCallback(recipe=SRSTE()), SparseExport(str(path)), looks).fit(tiny())
    assert looks.seen == "old"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    load_sparse(path, tiny())
