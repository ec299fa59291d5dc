"""Which weights `SparseExport` writes: the last, the best, those of a checkpoint, or those of now."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, SparseExport, STEPSparsityCallback, export_model, load_sparse
from lightning_step.checkpoints import export_checkpoint, read_checkpoint
from lightning_step.errors import ConfigurationError, FileFormatError
from lightning_step.export import read_manifest

RECIPES = [ASP(AtStep(3)), STE(), SRSTE(), STEP(AtStep(3))]


def saver(folder, **arguments):
    return ModelCheckpoint(folder, filename="{step}", **{"every_n_train_steps": 1, "save_top_k": -1, **arguments})


class Scores(pl.Callback):
    """Makes step 6 the best, whatever the loss."""

    def __init__(self, best=6):
        self.best = best

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("score", float(abs(trainer.global_step - self.best)))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_the_best_checkpoint_is_written_as_a_run_that_ended_there(recipe, tiny, make_trainer, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="score", every_n_train_steps=1)
    export = SparseExport(str(tmp_path / "best.safetensors"), which="best")
    make_trainer(Scores(), STEPSparsityCallback(recipe=recipe), best, export, steps=9).fit(tiny())
    ended = tiny()
    make_trainer(STEPSparsityCallback(recipe=recipe), steps=6).fit(ended)
    expected = load_sparse(export_model(ended, tmp_path / "ended.safetensors").path)
    found = load_sparse(tmp_path / "best.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_manifest(tmp_path / "best.safetensors").info["steps"] == 6


def test_a_best_checkpoint_from_before_the_switch_is_not_pruned(tiny, make_trainer, tmp_path):
    path = tmp_path / "best.safetensors"
    callbacks = [Scores(best=2), ModelCheckpoint(tmp_path, monitor="score", every_n_train_steps=1)]
    callbacks += [STEPSparsityCallback(recipe=STEP(AtStep(4))), SparseExport(str(path), which="best")]
    trainer = make_trainer(*callbacks, steps=6)
    with pytest.warns(UserWarning, match="but got a checkpoint from before masks came on"):
        trainer.fit(tiny())
    assert not path.exists()


def test_a_best_checkpoint_that_was_never_saved_is_told(tiny, make_trainer, tmp_path):
    path = tmp_path / "best.safetensors"
    rare = ModelCheckpoint(tmp_path, monitor="score", every_n_train_steps=100)
    export = SparseExport(str(path), which="best")
    trainer = make_trainer(Scores(), STEPSparsityCallback(recipe=STE()), rare, export, steps=3)
    with pytest.warns(UserWarning, match=r"but ModelCheckpoint saved none: .*best\.safetensors was not written"):
        trainer.fit(tiny())
    assert not path.exists()
    assert (export.exported, export.written) == (None, [])


class Averages(pl.Callback):
    """The exponential average by hand: the first update copies, each further one goes a part of the way."""

    def __init__(self, decay):
        self.decay, self.steps, self.average = decay, 0, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}
        old = self.average or now
        self.average = {name: old[name] + (1 - self.decay) * (now[name] - old[name]) for name in now}
        self.steps += 1
        if self.steps == 6:
            self.best, self.last = self.average, now


def two_largest(weight):
    """2:4 by sorting, on the CPU and by hand."""
    groups = weight.reshape(-1, 4)
    kept = torch.zeros_like(groups).scatter_(1, groups.abs().argsort(dim=1, descending=True, stable=True)[:, :2], 1.0)
    return (groups * kept).reshape(weight.shape)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_the_best_checkpoint_of_an_averaged_run_holds_the_averages(recipe, tiny, make_trainer, tmp_path):
    path, averages = tmp_path / "best.safetensors", Averages(0.6)
    best = ModelCheckpoint(tmp_path, filename="best", monitor="score", every_n_train_steps=1)
    callbacks = [averages, Scores(), EMAWeightAveraging(decay=0.6), STEPSparsityCallback(recipe=recipe), best]
    make_trainer(*callbacks, SparseExport(str(path), which="best"), steps=9).fit(tiny())
    by_itself = export_checkpoint(read_checkpoint(tmp_path / "best.ckpt"), tmp_path / "again.safetensors").path
    for found in (load_sparse(path), load_sparse(by_itself)):
        for name in ("net.0.weight", "net.2.weight", "head.weight"):
            torch.testing.assert_close(found[name], two_largest(averages.best[name]), rtol=1e-5, atol=1e-7)
            assert not torch.allclose(found[name], two_largest(averages.last[name]), rtol=1e-3), "not the average"
        torch.testing.assert_close(found["head.bias"], averages.best["head.bias"], rtol=1e-5, atol=1e-7)


def test_a_named_checkpoint_and_its_submodule(tiny, make_trainer, tmp_path):
    make_trainer(STEPSparsityCallback(recipe=SRSTE()), saver(tmp_path), steps=3).fit(tiny())
    named, path = tmp_path / "step=2.ckpt", tmp_path / "net.safetensors"
    export = SparseExport(str(path), which=str(named), module="net")
    make_trainer(STEPSparsityCallback(recipe=SRSTE()), export, steps=5).fit(tiny())
    weight = torch.load(named, weights_only=True)["state_dict"]["net.0.weight"]
    found = load_sparse(path)["0.weight"]
    kept = found != 0
    assert (kept.reshape(-1, 4).sum(1) == 2).all()
    assert torch.equal(found[kept], weight[kept])


def test_a_checkpoint_that_is_not_there_is_refused(tiny, make_trainer, tmp_path):
    export = SparseExport(str(tmp_path / "a.safetensors"), which=str(tmp_path / "none.ckpt"))
    with pytest.raises(FileFormatError, match=r"Expected a Lightning checkpoint, but got .*none\.ckpt"):
        make_trainer(STEPSparsityCallback(recipe=SRSTE()), export, steps=1).fit(tiny())


@pytest.mark.parametrize("keeper", [[], [{"save_weights_only": True}]], ids=["none", "weights only"])
def test_best_needs_checkpoints_that_tell_their_masks(keeper, tiny, make_trainer, tmp_path):
    export = SparseExport(str(tmp_path / "a.safetensors"), which="best")
    keepers = [saver(tmp_path, **arguments) for arguments in keeper]
    with pytest.raises(ConfigurationError, match="Expected a ModelCheckpoint for which='best'"):
        make_trainer(STEPSparsityCallback(recipe=SRSTE()), export, *keepers, steps=1).fit(tiny())


def test_several_formats_hold_the_same_tensors(tiny, make_trainer, tmp_path):
    export = SparseExport(str(tmp_path / "m-{format}.safetensors"), format=["dense", "packed"])
    make_trainer(STEPSparsityCallback(recipe=SRSTE()), export, steps=2).fit(tiny())
    one, other = (load_sparse(tmp_path / f"m-{format}.safetensors") for format in ("dense", "packed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_manifest(tmp_path / "m-packed.safetensors").format == "packed"


def test_several_formats_in_one_file_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="Expected one format, or several and"):
        SparseExport(str(tmp_path / "model.safetensors"), format=["dense", "packed"])


def test_export_now_writes_the_model_of_now_and_training_goes_on(tiny, make_trainer, tmp_path):
    class Midway(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                [self.written] = export.export_now(trainer)
                self.tensors = {name: tensor.clone() for name, tensor in load_sparse(self.written.path).items()}

    export, midway, alone, watched = SparseExport(str(tmp_path / "now.safetensors")), Midway(), tiny(), tiny()
    make_trainer(STEPSparsityCallback(recipe=SRSTE()), steps=3).fit(alone)
    make_trainer(STEPSparsityCallback(recipe=SRSTE()), export, midway, steps=6).fit(watched)
    expected = load_sparse(export_model(alone, tmp_path / "alone.safetensors").path)
    assert all(torch.equal(midway.tensors[name], expected[name]) for name in expected)
    alone = tiny()
    make_trainer(STEPSparsityCallback(recipe=SRSTE()), steps=6).fit(alone)
    assert torch.equal(alone.net[0].weight, watched.net[0].weight)


def test_the_start_says_what_runs_where_and_the_manifest_names_the_layers(tiny, make_trainer, tmp_path, caplog):
    export = SparseExport(str(tmp_path / "model.safetensors"))
    with caplog.at_level("INFO"):
        make_trainer(STEPSparsityCallback(recipe=SRSTE()), export, steps=1).fit(tiny())
    assert "can run sparse as bfloat16: torch cuSPARSELt 0 of 3 tensors (" in caplog.text
    assert "torch CUTLASS 0, TensorRT 3\n" in caplog.text
    info = read_manifest(tmp_path / "model.safetensors").info
    fp32 = "takes no float32 2:4 weights; ask for a cast with dtype=torch.bfloat16"
    assert info["acceleration"]["net.0.weight"] == {
        "cusparselt": f"no: cusparselt {fp32}",
        "cutlass": f"no: cutlass {fp32}",
        "tensorrt": "yes",
    }
    assert info["acceleration"].keys() == info["layers"].keys()
    assert info["layers"] == {"net.0.weight": "linear", "net.2.weight": "linear", "head.weight": "linear"}
