"""The subcommands, run in a process that knows neither the model's class nor jsonargparse."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lightning_step
from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    Dense,
    NMPattern,
    STEPSparsityCallback,
    apply_nm_masks,
    export_model,
    load_sparse,
)
from lightning_step.cli import main
from lightning_step.export import read_manifest

BLOCKED = """
import sys
sys.modules['jsonargparse'] = None  # how Python itself marks a module that cannot be imported
from lightning_step.cli import main
made = ["--out", "a.safetensors"]
for words in (["export", sys.argv[1], "--format", "packed", *made], ["inspect", made[1]], ["--help"]):
    assert main(words) == 0
"""
RECIPES = [Dense(), ASP(AtStep(2)), STE(), SRSTE(), STEP(AtStep(2))]


class OnlyHere(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.embedding, self.head = nn.Embedding(4, 8), nn.Linear(8, 4)
        self.head.weight = self.embedding.weight

    def training_step(self, batch, batch_idx):
        return self.head(self.net(torch.ones(2, 8))).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(4))


@pytest.fixture
def train(tmp_path):
    """Trains for four steps and gives the checkpoint and the model."""

    def run(recipe):
        torch.manual_seed(3)
        model, callbacks = OnlyHere(), [ModelCheckpoint(tmp_path, filename="run")]
        if recipe is not None:
            callbacks.append(STEPSparsityCallback(recipe=recipe, verbose=False))
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=callbacks, log_every_n_steps=1, **quiet).fit(model)
        return tmp_path / "run.ckpt", model

    return run


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(8, 8, 3, groups=2))
    apply_nm_masks(model, NMPattern(2, 4))
    return export_model(model, tmp_path / "model.safetensors", "dense").path


def planted(file, digests=True):
    """The same file with one group that holds too much; without digests as nobody wrote them before they came."""
    with safe_open(file, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    tensors["0.weight"][5, 8:12] = 1
    if not digests:
        metadata["lightning_step"] = json.dumps({**json.loads(metadata["lightning_step"]), "sha256": {}})
    bad = file.with_name("bad.safetensors")
    save_file(tensors, bad, metadata)
    return bad


def test_a_process_without_the_class_and_without_jsonargparse(train, tmp_path):
    checkpoint, _ = train(STEP(AtStep(2)))
    environment = {"PYTHONPATH": str(Path(lightning_step.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BLOCKED, str(checkpoint)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  verify " in done.stdout
    assert "fit --config" in done.stdout


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
@pytest.mark.parametrize("format", ["dense", "packed"])
def test_a_checkpoint_is_exported_as_its_model_is(recipe, format, train, tmp_path, capsys):
    checkpoint, model = train(recipe)
    extra = ["--one-shot"] if isinstance(recipe, Dense) else []
    assert main(["export", str(checkpoint), "--format", format, "--out", str(tmp_path / "a.safetensors"), *extra]) == 0
    assert "2 tensors verified" in capsys.readouterr().out
    expected = load_sparse(export_model(model, tmp_path / "b.safetensors", one_shot=bool(extra)).path)
    found = load_sparse(tmp_path / "a.safetensors")
    assert found.keys() == expected.keys()
    assert read_manifest(tmp_path / "a.safetensors").aliases == {"head.weight": "embedding.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("recipe", "words", "error"),
    [
        (STEP(AtStep(100)), [], "ConfigurationError: Expected learned masks in .* before masks began"),
        (None, [], "ConfigurationError: Expected patterns in .* To prune it by magnitude, pass one_shot"),
        (STE(), ["--n", "2", "--m", "4"], "ConfigurationError: Expected no pattern, as .* has those of its run"),
        (STE(), ["--n", "2"], "ConfigurationError: Expected both --n and --m"),
        (STE(), ["--exclude", "nat.*"], "TargetError: Expected every glob of `exclude` to match"),
        (STE(), ["--module", "nat"], "ConfigurationError: Expected `module` to name a submodule"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(recipe, words, error, train, tmp_path, capsys):
    checkpoint, _ = train(recipe)
    capsys.readouterr()
    out = tmp_path / "a.safetensors"
    assert main(["export", str(checkpoint), "--format", "dense", "--out", str(out), *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert re.match(f"error: {error}", captured.err)
    assert not out.exists()


@pytest.mark.filterwarnings("ignore")
def test_a_dense_run_is_pruned_where_it_is_told(train, tmp_path):
    checkpoint, model = train(None)
    words = ["--one-shot", "--n", "1", "--m", "4", "--include", "net.*", "--exclude", "net.2"]
    assert main(["export", str(checkpoint), "--format", "dense", "--out", str(tmp_path / "a.safetensors"), *words]) == 0
    found = load_sparse(tmp_path / "a.safetensors")
    assert (found["net.0.weight"].reshape(-1, 4) != 0).sum(1).tolist() == [1] * 32
    assert torch.equal(found["net.2.weight"], model.net[2].weight)


def test_inspect_says_pattern_density_bytes_and_runtimes(file, capsys):
    assert main(["inspect", str(file)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[3] == ["0.weight", "2:4", "dim", "1", "(64,", "64)", "float32", "50.0%", "16,384", "100.0%"]
    # export_model was given no names of layers: a grouped convolution must not look like one that TensorRT takes
    assert ["0.weight", "linear?", "no", "[1]", "no", "[2]", "not", "known", "[3]"] in lines
    assert ["1.weight", "convolution?", "no", "[4]", "no", "[4]", "not", "known", "[5]"] in lines


@pytest.mark.parametrize("digests", [True, False])
def test_verify_names_the_first_bad_group(digests, file, capsys):
    assert main(["verify", str(file)]) == 0
    assert capsys.readouterr().out.endswith(": 2 tensors verified\n")
    assert main(["verify", str(planted(file, digests))]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ViolationError: Expected '0.weight' to hold 2:4 along dim 1, but got 4 non-zero weights")
    assert "group (5, 2)" in error


def test_verify_tells_a_change_that_leaves_the_pattern(file, capsys):
    with safe_open(file, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file({**tensors, "0.weight": tensors["0.weight"] * 2}, file, metadata)
    assert main(["verify", str(file)]) == 1
    assert capsys.readouterr().err.startswith("error: FileFormatError: Expected '0.weight' in ")


def test_convert_there_and_back_is_exact(file, tmp_path, capsys):
    packed, again = str(tmp_path / "p.safetensors"), str(tmp_path / "d.safetensors")
    assert main(["convert", str(file), "--to", "packed", "--out", packed]) == 0
    assert main(["convert", packed, "--to", "dense", "--out", again]) == 0
    assert Path(again).read_bytes() == file.read_bytes()
    assert Path(packed).stat().st_size < file.stat().st_size
    assert main(["inspect", packed]) == 0
    assert " 52.3%" in next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("0.weight")
    )  # half + 3/128
    assert main(["convert", again, "--to", "packed", "--out", again]) == 0  # onto itself
    assert Path(again).read_bytes() == Path(packed).read_bytes()


@pytest.mark.parametrize("command", ["inspect", "verify", "convert", "export"])
def test_what_is_no_file_of_ours_is_one_line_and_nothing_is_written(command, tmp_path, capsys):
    (tmp_path / "a").write_bytes(b"not a file of ours")
    out = tmp_path / "out"
    more = {"convert": ["--to", "dense", "--out", str(out)], "export": ["--format", "dense", "--out", str(out)]}
    for name in ("a", "missing", "."):
        assert main([command, str(tmp_path / name), *more.get(command, [])]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: FileFormatError: Expected a ")
        assert len(error.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "words", [["inspect"], ["convert", "a"], ["convert", "a", "--to", "onnx", "--out", "b"], ["verify", "a", "b"]]
)
def test_wrong_usage_is_status_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: lightning-step" in capsys.readouterr().err


def test_a_failed_convert_leaves_the_old_file(file, tmp_path, capsys):
    out = Path(shutil.copy(file, tmp_path / "out.safetensors"))
    before = out.read_bytes()
    for digests, error in ((False, "ViolationError"), (True, "FileFormatError")):
        assert main(["convert", str(planted(file, digests)), "--to", "dense", "--out", str(out)]) == 1
        assert capsys.readouterr().err.startswith(f"error: {error}")
    assert out.read_bytes() == before
