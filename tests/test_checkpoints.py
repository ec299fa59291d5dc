"""What is read of a checkpoint, and that nothing in it is ever run."""

import os
import pickle

import pytest
import torch

from lightning_step.checkpoints import read_checkpoint
from lightning_step.cli import main
from lightning_step.errors import ConfigurationError, FileFormatError


class Settings:
    """What people keep among their hyperparameters."""

    def __init__(self, path):
        self.path = path


class Trap(Settings):
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("stranger", [Settings, Trap])
def test_objects_other_than_tensors_and_plain_values_are_refused_and_never_made(stranger, tmp_path, capsys):
    path, sprung = tmp_path / "a.ckpt", tmp_path / "sprung"
    torch.save({"state_dict": {"fc.weight": torch.ones(4, 8)}, "hyper_parameters": {"it": stranger(str(sprung))}}, path)
    with pytest.raises(
        FileFormatError, match=r"Expected a Lightning checkpoint, but got .*a\.ckpt.*holds objects other than"
    ):
        read_checkpoint(path)
    assert main(["export", str(path), "--format", "dense", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: FileFormatError: Expected a Lightning checkpoint")
    assert not sprung.exists()
    if stranger is Trap:
        torch.load(path, weights_only=False)
        assert sprung.exists(), "it is a trap"


def test_a_bare_pickle_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": {}, "trap": Trap(str(tmp_path / "sprung"))}))
    with pytest.raises(FileFormatError, match="Expected a Lightning checkpoint"):
        read_checkpoint(path)
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_without_the_submodule_is_refused(tmp_path):
    torch.save({"state_dict": {"fc.weight": torch.ones(4, 8)}}, tmp_path / "a.ckpt")
    assert list(read_checkpoint(tmp_path / "a.ckpt", "fc").tensors) == ["weight"]
    with pytest.raises(ConfigurationError, match=r"to name a submodule in .*a\.ckpt', but got 'net'"):
        read_checkpoint(tmp_path / "a.ckpt", "net")
