"""A disk that is full, a folder that is read-only or gone: the file is named, the old one is whole, nothing else is left."""

import errno
import os
import resource
import shutil
import signal
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_step import ASP, NMPattern, SparseExport, STEPSparsityCallback, apply_nm_masks, export_model, load_sparse
from lightning_step.errors import ConfigurationError, ExportError

FORMATS = ["dense", "packed"]


def masked(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    apply_nm_masks(model, NMPattern(2, 4))
    return model


@contextmanager
def full_disk(free):
    """No file of this process can grow beyond so many bytes, and it is told so as by a full disk: with an error."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def masked_weights(model):
    """The tensors that the forward pass uses."""
    names = [name.rpartition(".") for name in model.state_dict()]
    return {f"{module}.{name}": getattr(model.get_submodule(module), name).detach() for module, _, name in names}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("free", [0, 8, 100, 4096, 16_000])
@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old file"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_an_error_of_ours_and_leaves_the_old_file(format, old, free, tmp_path):
    model, path = masked(), tmp_path / "model.safetensors"
    if old:
        export_model(masked(seed=1), path, format)
    before, there = weights(model), {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    message = (
        rf"^Expected to write [\d,]+ bytes to '{path}', but got: .*What was there before is untouched\. Make room, or "
        r"choose another path\. The model is still in memory \(after a Trainer, as `trainer\.lightning_module`\); write it"
    )
    with full_disk(free), pytest.raises(ExportError, match=message):
        export_model(model, path, format)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == there
    assert same(weights(model), before)
    export_model(model, path, format)
    assert same(load_sparse(path), masked_weights(model))


def test_a_disk_that_fills_up_while_the_data_are_forced_out_is_the_same_error(tmp_path, monkeypatch):
    """Network file systems say so only then."""

    def fsync(_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    path = export_model(masked(), tmp_path / "file").path
    good = path.read_bytes()
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ExportError, match="Disk quota exceeded"):
        export_model(masked(seed=1), path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", good)]


@contextmanager
def nobody():
    """Folders that are read-only are so for everybody but root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def read_only():
    folder = Path(tempfile.mkdtemp())
    (folder / "model.safetensors").write_bytes(b"old")
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_folder_is_found_before_training_and_at_the_end(read_only):
    model, path = masked(), read_only / "model.safetensors"
    message = rf"^Expected `path` to be writable, but got '{path}': .*Choose a folder that this process may write to"
    with nobody(), pytest.raises(ConfigurationError, match=message):
        SparseExport(str(path)).setup(pl.Trainer(accelerator="cpu", logger=False, barebones=True), None, "fit")
    with nobody(), pytest.raises(ConfigurationError, match=message):
        export_model(model, path)
    assert [(p.name, p.read_bytes()) for p in read_only.iterdir()] == [("model.safetensors", b"old")]


def test_a_path_that_became_a_folder_is_named(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ConfigurationError, match=r"to name a file, but got the folder '.*model\.safetensors'"):
        export_model(masked(), tmp_path / "model.safetensors")
    assert list((tmp_path / "model.safetensors").iterdir()) == []


class Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = masked().requires_grad_(True)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 64), batch_size=2)


class BeforeExport(pl.Callback):
    """Does something to the disk when training is over; callbacks are called in their order."""

    def __init__(self, act):
        self.act = act

    def on_train_end(self, trainer, pl_module):
        self.act()


def make_trainer(path, act, format="dense"):
    """A real run whose disk changes after the last step."""
    return pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        callbacks=[STEPSparsityCallback(recipe=ASP(), verbose=False), BeforeExport(act), SparseExport(str(path), format)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
    )


def test_a_folder_that_vanished_during_training_is_made_again(tmp_path):
    path = tmp_path / "out" / "model.safetensors"
    make_trainer(path, lambda: shutil.rmtree(path.parent)).fit(Tiny())
    assert len(load_sparse(path)) == 4


def test_a_folder_that_became_a_file_is_named_and_the_trained_model_can_still_be_written(tmp_path):
    path = tmp_path / "out" / "model.safetensors"

    def act():
        shutil.rmtree(path.parent)
        path.parent.write_text("in the way")

    trainer = make_trainer(path, act)
    with pytest.raises(ConfigurationError, match=rf"^Expected `path` to be writable, but got '{path}'.*still in memory"):
        trainer.fit(Tiny())
    assert path.parent.read_text() == "in the way"
    module = trainer.lightning_module
    export_model(module, tmp_path / "elsewhere")
    assert same(load_sparse(tmp_path / "elsewhere"), masked_weights(module))


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_is_full_at_the_end_of_training_loses_no_weights(format, tmp_path):
    path = tmp_path / "model.safetensors"
    with ExitStack() as until_there_is_room:
        trainer = make_trainer(path, lambda: until_there_is_room.enter_context(full_disk(4096)), format)
        with pytest.raises(ExportError, match=rf"^Expected to write [\d,]+ bytes to '{path}', but got: .*File too large"):
            trainer.fit(Tiny())
    assert list(tmp_path.iterdir()) == []
    module = trainer.lightning_module
    assert export_model(module, path, format).manifest.sparse.keys() == {"net.0.weight", "net.1.weight"}
    assert same(load_sparse(path), masked_weights(module))
