"""The command line, as a shell sees it, and every configuration that the repository ships."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_step
from lightning_step import STEP, Concentration, DenseTail, Layerwise, MaskDecay, StructureDecay, load_sparse
from lightning_step.cli import main
from lightning_step.export import read_manifest
from lightning_step.recipes import describe

ROOT = Path(__file__).parents[1]
PACKAGE = Path(lightning_step.__file__).parents[1]
CONFIGS = sorted((ROOT / "examples" / "configs").rglob("*.yaml"))
HEADS = "\n".join(path.read_text(encoding="utf-8") for path in CONFIGS)
COMMANDS = sorted({tuple(shlex.split(line)) for line in re.findall(r"^# +lightning-step (.+)$", HEADS, re.MULTILINE)})

CONFIG = """
seed_everything: 0
model:
  class_path: {model}
optimizer:
  class_path: {optimizer}
  init_args: {{lr: 0.01}}
trainer:
  accelerator: cpu
  max_steps: 12
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_step.STEPSparsityCallback
      init_args: {sparsity}
    - class_path: lightning_step.SparseExport
      init_args: {{path: {path}}}
"""
BORING = "lightning.pytorch.demos.boring_classes.BoringModel"
FOREIGN = """
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_step import NMPattern
from lightning_step.errors import PatternError

class Broken(BoringModel):
    def __init__(self):
        raise ValueError("not of our making")

class BrokenWhileHandling(BoringModel):
    def __init__(self):
        try:
            NMPattern(5, 4)
        except PatternError:
            raise ValueError("not of our making")

class BrokenInTraining(BoringModel):
    def training_step(self, batch, batch_idx):
        try:
            NMPattern(5, 4)
        except PatternError:
            raise TypeError("not of our making") from None
"""


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Writes a configuration into a folder of its own, which becomes the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])  # main adds the working directory

    def write(model=BORING, optimizer="AdamW", sparsity="{n: 2, m: 4}", path="out/model.safetensors"):
        text = CONFIG.format(model=model, optimizer=optimizer, sparsity=sparsity, path=path)
        (tmp_path / "config.yaml").write_text(text)
        return ["fit", "--config", "config.yaml"]

    return write


def shell(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-step {lightning_step.__version__}\n"


def test_without_jsonargparse_it_says_what_to_install(tmp_path):
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    program = "import sys; sys.modules['jsonargparse'] = None; from lightning_step.cli import main; sys.exit(main(['fit']))"
    done = shell("-c", program, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lightning-step needs jsonargparse for its command line: pip install 'lightning-step[cli]'\n"


def test_a_fit_reports_the_switch_and_the_file(configure, tmp_path):
    done = shell("-m", "lightning_step", *configure(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert "N:M masks on 1 of 2 tensors: 64 of 66 weights (97.0 %), of which 32 are kept" in lines
    masks, freeze = (line for line in lines if line.startswith("lightning-step, optimizer step "))
    assert masks.startswith("lightning-step, optimizer step 0: masks on (1 tensor); ")
    assert freeze.startswith("lightning-step, optimizer step 6: second moment frozen (1 tensor); t_max reached: ")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert f"lightning-step, wrote out/model.safetensors (dense, {size:,} bytes): 1 tensor verified" in lines
    weight = load_sparse(tmp_path / "out" / "model.safetensors")["layer.weight"]
    assert (weight.reshape(-1, 4) != 0).sum(1).tolist() == [2] * 16


def test_an_error_of_ours_is_one_line_in_the_shell_too(configure, tmp_path):
    done = shell("-m", "lightning_step", *configure(sparsity="{n: 5, m: 4}"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: PatternError: Expected 1 <= n <= m, but got n=5 and m=4. n is")


@pytest.mark.filterwarnings("ignore")  # Lightning's own: no workers, no validation loop, an overridden configure_optimizers
@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"sparsity": "{n: 5, m: 4}"}, "PatternError: Expected 1 <= n <= m, but got n=5 and m=4."),
        ({"sparsity": "{n: 2:4, m: 4}"}, "PatternError: Expected 1 <= n <= m, but got n=124 and m=4."),
        ({"sparsity": "{exclude: [heda]}"}, "TargetError: Expected every glob of `exclude` to match a module or a tensor"),
        ({"path": "out/"}, "ConfigurationError: Expected `path` to name a file, but got the folder 'out"),
        ({"optimizer": "torch.optim.SGD"}, "OptimizerError: Expected an optimizer with a registered second-moment adapter"),
    ],
)
def test_an_error_of_ours_is_one_line_and_status_1(changed, error, configure, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    arguments = configure(**changed)
    assert main(arguments) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {error}")


NESTED = """{n: 1, m: 4, recipe: {class_path: lightning_step.StructureDecay, init_args: {end: 9, recipe: {
  class_path: lightning_step.Layerwise, init_args: {by: erk, uses: {"*": 2}, recipe: {
    class_path: lightning_step.MaskDecay, init_args: {end: 0.75, fading: exponential, recipe: {
      class_path: lightning_step.STEP, init_args: {lam: 0.01, switch: {
        class_path: lightning_step.Concentration, init_args: {window: 3, t_min: 0, t_max: 5}}}}}}}}}}}"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("sparsity", "recipe"),
    [
        (
            NESTED,
            StructureDecay(
                Layerwise(
                    MaskDecay(STEP(Concentration(window=3, t_min=0, t_max=5), lam=0.01), end=0.75, fading="exponential"),
                    by="erk",
                    uses={"*": 2},
                ),
                end=9,
            ),
        ),
        ("{n: 1, m: 4, recipe: {class_path: lightning_step.DenseTail}}", DenseTail()),
    ],
)
def test_wrappers_nest_in_yaml(sparsity, recipe, configure, tmp_path):
    assert main(configure(sparsity=sparsity)) == 0
    assert read_manifest(tmp_path / "out" / "model.safetensors").info["recipe"] == describe(recipe)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "error"), [("Broken", ValueError), ("BrokenWhileHandling", ValueError), ("BrokenInTraining", TypeError)]
)
def test_a_foreign_error_is_not_swallowed(model, error, configure, tmp_path):
    (tmp_path / "of_another_project.py").write_text(FOREIGN)
    arguments = configure(model=f"of_another_project.{model}")
    with pytest.raises(error, match="not of our making"):
        main(arguments)


@pytest.mark.filterwarnings("ignore")
def test_arguments_that_nobody_knows_are_left_to_the_parser(configure, capsys):
    arguments = [*configure(), "--trainer.nonsense", "1"]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_every_configuration_says_how_to_run_it():
    assert CONFIGS
    named = {word for command in COMMANDS for word in command}
    assert [path.name for path in CONFIGS if path.relative_to(ROOT).as_posix() not in named] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: Path(command[-1]).stem)
def test_the_command_at_the_head_of_a_configuration_runs(command, tiny_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths in it lead here
    for folder in tiny_files.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.syspath_prepend(ROOT)  # what the working directory is to a user: where `examples` is found
    arguments = [str(ROOT / word) if word.startswith("examples/") else word for word in command]
    assert main([*arguments, "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]) == 0
