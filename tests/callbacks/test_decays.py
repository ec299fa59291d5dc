"""Patterns and factors that change during a fit: resumed, evaluated, exported, and written in YAML."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_step import (
    SRSTE,
    STE,
    STEP,
    AtStep,
    Concentration,
    DenseTail,
    Layerwise,
    MaskDecay,
    NMPattern,
    Recipe,
    SparseExport,
    STEPSparsityCallback,
    StructureDecay,
    export_model,
    load_sparse,
    nm_masks,
    strip,
)
from lightning_step.checkpoints import export_checkpoint, read_checkpoint
from lightning_step.errors import ConfigurationError, ResumeError
from lightning_step.export import read_manifest

STEPS = 20
RECIPES: dict[str, Recipe] = {
    "StructureDecay": StructureDecay(STEP(AtStep(4)), end=0.8),
    "MaskDecay": MaskDecay(SRSTE(lam=1e-2), end=16),
    "Layerwise": Layerwise(STEP(AtStep(6)), by="magnitude", budget=0.4),
    "DenseTail": DenseTail(STE(), start=0.7),
    "all": DenseTail(MaskDecay(Layerwise(StructureDecay(STEP(AtStep(4)), end=14), by="erk"), end=12), start=0.9),
    "drift": StructureDecay(STEP(Concentration(1e9, window=5, t_min=0, t_max=15)), end=1.0),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def saved_at(step: int, tmp_path: Path) -> Path:
    return next(tmp_path.glob(f"*step={step}.ckpt"))


@pytest.fixture
def fit(tiny: Any, make_trainer: Any, tmp_path: Path) -> Any:
    """Fits with a checkpoint at every step; gives back module, callback and trainer."""

    def fit(recipe: Recipe, *others: Any, steps: int = STEPS, total_steps: int = STEPS, **arguments: Any) -> Any:
        module, n = tiny(), arguments.pop("n", 1)
        callback = STEPSparsityCallback(n, 4, recipe, read_every=2, verbose=False, total_steps=total_steps)
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(callback, keep, *others, steps=steps)
        trainer.fit(module, **arguments)
        return module, callback, trainer

    return fit


# Resume -------------------------------------------------------------------------------------------------------------


@every_recipe
@pytest.mark.parametrize("crash", [3, 9, 15])
def test_a_fit_resumed_in_the_middle_equals_the_undisturbed_one_bit_for_bit(
    recipe: Recipe, crash: int, fit: Any, tmp_path: Path
) -> None:
    module, callback, _ = fit(recipe)
    again, resumed, _ = fit(recipe, ckpt_path=saved_at(crash, tmp_path))
    assert resumed.state_dict() == callback.state_dict()
    assert repr(nm_masks(again)) == repr(nm_masks(module))
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert set(map(str, resumed.sparsifiers[0].events)) == set(map(str, callback.sparsifiers[0].events))


def test_a_resume_without_the_wrapper_or_in_another_is_refused(fit: Any, tmp_path: Path) -> None:
    fit(StructureDecay(STE(), end=10), steps=5)
    for other in (STE(), MaskDecay(STE(), end=10), StructureDecay(STE(), end=11)):
        with pytest.raises(ResumeError, match=r"the recipe of the checkpoint, StructureDecay\(recipe=STE\(\), end=10"):
            fit(other, ckpt_path=saved_at(5, tmp_path))


def test_a_checkpoint_from_before_patterns_were_saved_still_resumes(fit: Any, tmp_path: Path) -> None:
    fit(SRSTE(), steps=5)
    path = saved_at(5, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    (own,) = checkpoint["callbacks"]["STEPSparsityCallback"]["optimizers"]
    del own["patterns"]
    torch.save(checkpoint, path)
    module, _, trainer = fit(SRSTE(), ckpt_path=path)
    assert trainer.global_step == STEPS
    assert int(module.net[0].weight.count_nonzero()) == 16 * 8 // 4
    assert read_checkpoint(path).patterns["net.0.weight"] == (NMPattern(1, 4), 1)


# Evaluate -----------------------------------------------------------------------------------------------------------


@every_recipe
@pytest.mark.parametrize("step", [9, 15])
def test_an_evaluated_checkpoint_computes_what_the_run_did_then(
    recipe: Recipe, step: int, fit: Any, tiny: Any, make_trainer: Any, tmp_path: Path
) -> None:
    """Whatever recipe evaluates it: the checkpoint says what its masks were."""
    then, *_ = fit(recipe, steps=step)
    for other in (recipe, STE()):
        fresh = tiny()
        callback = STEPSparsityCallback(1, 4, other, verbose=False)
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(callback, keep, limit_predict_batches=1)
        (output,) = trainer.predict(fresh, ckpt_path=saved_at(step, tmp_path), weights_only=True)
        assert torch.equal(output, then(then.batch(10_000)[0]))
        assert repr(nm_masks(fresh)) == repr(nm_masks(then))


# Export -------------------------------------------------------------------------------------------------------------


@every_recipe
def test_the_file_of_a_finished_run_holds_the_final_patterns(recipe: Recipe, fit: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    module, callback, _ = fit(recipe, SparseExport(str(path)))
    final = {target.name: target.pattern for target in callback.sparsifiers[0].targets.masked}
    assert {name: entry.pattern for name, entry in read_manifest(path).sparse.items()} == final
    for name, weight in load_sparse(path).items():
        if name in final:
            groups = weight.reshape(-1, 4)
            assert ((groups != 0).sum(1) == final[name].n).all()
    strip(module)
    assert torch.equal(load_sparse(path)["net.0.weight"], module.net[0].weight)
    assert read_manifest(path).info["recipe"] == callback.manifest_info()["recipe"]


def test_a_run_that_ends_in_a_frame_exports_the_pattern_in_force_and_says_so(fit: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.warns(
        UserWarning, match=r"but got 2:4 in 'net\.0\.weight', which was to get 1:4 \(and 2 more\): .*in force"
    ):
        fit(StructureDecay(STE(), end=0.8), SparseExport(str(path)), steps=12)
    assert {str(entry.pattern) for entry in read_manifest(path).sparse.values()} == {"2:4"}


def test_a_best_checkpoint_from_a_wider_frame_is_exported_as_such_and_says_so(fit: Any, tmp_path: Path) -> None:
    fit(StructureDecay(STE(), end=0.8))
    path = tmp_path / "model.safetensors"
    export = SparseExport(str(path), which=str(saved_at(3, tmp_path)))
    with pytest.warns(
        UserWarning, match=r"but got 3:4 in 'net\.0\.weight', which was to get 1:4 .*let checkpoints compete only"
    ):
        fit(StructureDecay(STE(), end=0.8), export)
    assert {str(entry.pattern) for entry in read_manifest(path).sparse.values()} == {"3:4"}


def test_layerwise_patterns_are_those_of_the_checkpoint(fit: Any, tmp_path: Path) -> None:
    _, callback, _ = fit(Layerwise(STEP(AtStep(6)), by="magnitude", budget=0.4))
    written = export_checkpoint(read_checkpoint(saved_at(9, tmp_path)), tmp_path / "model.safetensors")
    final = {target.name: target.pattern for target in callback.sparsifiers[0].targets.masked}
    assert {name: entry.pattern for name, entry in written.manifest.sparse.items()} == final
    with pytest.raises(ConfigurationError, match="it may have been written before masks began, or were at full strength"):
        export_checkpoint(read_checkpoint(saved_at(5, tmp_path)), tmp_path / "early.safetensors")


def test_masks_that_still_come_on_are_not_written_unless_told_to(fit: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    recipe = MaskDecay(SRSTE(), end=16)
    with pytest.warns(UserWarning, match=r"pruned weights that are not yet zero: .*model\.safetensors was not written"):
        module, *_ = fit(recipe, SparseExport(str(path)), steps=8)
    assert not path.exists()
    with pytest.raises(
        ConfigurationError, match=r"but got 'net\.0\.weight' \(and 2 more\) with pruned weights at 0\.5 of their"
    ):
        export_model(module, path)
    with pytest.raises(ConfigurationError, match="before masks began, or were at full strength"):
        export_checkpoint(read_checkpoint(saved_at(8, tmp_path)), path)
    export_model(module, path, one_shot=True)
    assert int((load_sparse(path)["net.0.weight"].reshape(-1, 4) != 0).sum(1).max()) == 1
    assert strip(module) == []
    assert not (module.net[0].weight == 0).any()


def test_one_shot_before_masks_begin_prunes_to_the_pattern_to_come(fit: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fit(StructureDecay(STEP(AtStep(15)), end=20), SparseExport(str(path), one_shot=True), steps=5)
    assert {str(entry.pattern) for entry in read_manifest(path).sparse.values()} == {"1:4"}


# Told at the start ---------------------------------------------------------------------------------------------------


def test_the_start_table_shows_final_patterns_and_the_whole_recipe(
    tiny: Any, make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    callback = STEPSparsityCallback(1, 4, Layerwise(StructureDecay(STE(), end=10), by="erk", budget=0.5))
    with caplog.at_level(logging.INFO):
        make_trainer(callback, steps=1).fit(tiny())
    final = [str(target.pattern) for target in callback.sparsifiers[0].targets.masked]
    assert len(set(final)) > 1
    assert all(pattern in caplog.text for pattern in final)
    assert (
        "Layerwise(recipe=StructureDecay(recipe=STE(), end=10, start=None), by='erk', budget=0.5, uses=None)" in caplog.text
    )
