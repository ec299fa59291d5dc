"""The shape of the code, read from its source. Every checker takes a folder, so that it can be shown to fail."""

import ast
import graphlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_step

ROOT = Path(__file__).parents[1]
PACKAGE = Path(lightning_step.__file__).parent
NAME = "lightning_step"

# Imports go only downwards; within a layer they must not run in a circle.
LAYERS = {
    0: ["errors", "pattern", "version", "compiling"],
    1: ["functional"],
    2: [
        "naming",
        "globs",
        "recurrent",
        "group_dims",
        "targets",
        "sharding",
        "masked_classes",
        "freshness",
        "parametrization",
        "optim",
        "sampling",
        "export",
        "summary",
        "figures",
        "hooks",
        "metrics",
        "terminal",
    ],
    3: [
        "recipes",
        "masking",
        "rates",
        "together",
        "watching",
        "freezing",
        "resume",
        "events",
        "wiring",
        "sparsifier",
        "outcome",
        "checkpoints",
    ],
    4: ["monitoring", "callbacks", "commands"],
    5: ["reports", "sparsity_cli", "cli", "__main__"],
    6: ["__init__"],
}
LAYER_OF = {part: layer for layer, parts in LAYERS.items() for part in parts}
KNOWS_LIGHTNING = {"callbacks", "reports", "cli", "sparsity_cli"}
PARTS = ("errors", "optim", "functional", "recipes", "reports", "export", "summary", "metrics")
PUBLIC = [NAME, *(f"{NAME}.{part}" for part in PARTS)]
EXTRAS = {"transformers", "jsonargparse", "matplotlib", "onnx", "rich"}
MAX_LINES = 400


def sources(folder):
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def module_of(path, package):
    """``package/a/b.py`` is ``a.b``, and ``package/a/__init__.py`` is ``a``."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported(tree, inside):
    """Every (module, name) a source imports, anywhere in it; `inside` is the package relative imports start from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside.split(".")[: len(inside.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def graph_of(package):
    """Module to the modules of the package it imports, and module to everything else it imports."""
    modules = {module_of(path, package): path for path in sources(package)}
    own, foreign = {}, {}
    for module, path in modules.items():
        at = path.parent.relative_to(package).parts
        inside = ".".join([NAME, *at])
        own[module], foreign[module] = set(), set()
        for target, name in imported(ast.parse(path.read_text(encoding="utf-8")), inside):
            if target.split(".")[0] != NAME:
                foreign[module].add(target)
                continue
            relative = target.partition(".")[2]
            submodule = f"{relative}.{name}" if relative else name
            own[module].add(submodule if submodule in modules else relative or "__init__")
    return own, foreign


def check_layers(package):
    own, foreign = graph_of(package)
    parts = {module: module.split(".")[0] for module in own}
    problems = [f"{m} has no layer: give it one in LAYERS" for m, part in parts.items() if part not in LAYER_OF]
    for module, targets in own.items():
        above = LAYER_OF.get(parts[module], 99)
        higher = [target for target in targets if LAYER_OF.get(target.split(".")[0], 99) > above]
        problems += [f"{module} imports {target}, which lies above it" for target in higher]
    callbacks = {"callbacks.step", "callbacks.export", "callbacks.monitor"}
    problems += [f"{one} imports another callback" for one in sorted(callbacks) if own[one] & (callbacks | {"callbacks"})]
    roots = {module: {name.split(".")[0] for name in names} for module, names in foreign.items()}
    knowing = [m for m, names in roots.items() if names & {"lightning", "pytorch_lightning"}]
    problems += [f"{module} imports Lightning" for module in knowing if parts[module] not in KNOWS_LIGHTNING]
    try:
        graphlib.TopologicalSorter(own).prepare()
    except graphlib.CycleError as error:
        problems.append(f"a circle: {' -> '.join(error.args[1])}")
    return problems


def check_examples(folder):
    public = {name: set(importlib.import_module(name).__all__) for name in PUBLIC}
    problems = []
    for path in sources(folder):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for module, name in imported(tree, ""):
            if module.split(".")[0] == NAME and (module not in public or (name is not None and name not in public[module])):
                problems.append(f"{path.name} imports {name or module} from {module}, which is not public")
        uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == NAME]
        bad = [n.attr for n in uses if n.attr not in public[NAME] and f"{NAME}.{n.attr}" not in public]
        problems += [f"{path.name} uses {NAME}.{name}, which is not public" for name in bad]
    return problems


def check_lengths(folder):
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(folder)}
    return [f"{path.name} has {length} lines" for path, length in lengths.items() if length > MAX_LINES]


def check_machine_paths(folder):
    places = "|".join(["home", "root", "work", "tmp", "mnt", "Users", "private"])
    pattern = re.compile(rf"(?<![\w.~)}}-])(/(?:{places})/\w|[A-Z]:\\\\?\w)")
    lines = ((path, line) for path in sources(folder) for line in path.read_text(encoding="utf-8").splitlines())
    return [f"{path.name}: {line.strip()}" for path, line in lines if pattern.search(line)]


class AtLoad(ast.NodeTransformer):
    """Leaves of a source what runs when it is loaded."""

    def visit_FunctionDef(self, node):
        return None

    def visit_If(self, node):
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def check_extras(package):
    """Extras are imported in the function that needs them."""
    problems = []
    for path in sources(package):
        tree = AtLoad().visit(ast.parse(path.read_text(encoding="utf-8")))
        extras = {module.split(".")[0] for module, _ in imported(tree, "")} & EXTRAS
        problems += [f"{module_of(path, package)} imports {extra} when it is loaded" for extra in sorted(extras)]
    return problems


def test_imports_go_only_downwards():
    assert check_layers(PACKAGE) == []


def test_examples_use_public_names_only():
    assert sources(ROOT / "examples")
    assert check_examples(ROOT / "examples") == []


@pytest.mark.parametrize("folder", [PACKAGE, ROOT / "examples", ROOT / "tests"], ids=lambda folder: folder.name)
def test_files_are_short_and_know_no_machine(folder):
    assert check_lengths(folder) + check_machine_paths(folder) == []


def test_extras_are_imported_where_they_are_needed():
    assert check_extras(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "problem"),
    [
        (
            "functional/mask.py",
            "from lightning_step.recipes import STEP",
            "functional.mask imports recipes, which lies above",
        ),
        ("pattern.py", "import lightning_step.functional.mask", "pattern imports functional.mask, which lies above"),
        ("hooks.py", "def f():\n    from lightning_step import strip", "hooks imports __init__, which lies above"),
        ("optim/adam.py", "from ..wiring import switches", "optim.adam imports wiring, which lies above"),
        ("sparsifier.py", "def f():\n    import lightning.pytorch as pl", "sparsifier imports Lightning"),
        ("globs.py", "from . import targets", "a circle: "),
        ("callbacks/step.py", "from lightning_step.callbacks.export import SparseExport", "callbacks.step imports another"),
        ("callbacks/export.py", "from .step import STEPSparsityCallback", "callbacks.export imports another callback"),
        ("callbacks/step.py", "from lightning_step.callbacks import SparsityMonitor", "callbacks.step imports another"),
        ("plots.py", "", "plots has no layer"),
    ],
)
def test_a_planted_import_is_found(file, line, problem, tmp_path):
    package = shutil.copytree(PACKAGE, tmp_path / NAME, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    assert any(found.startswith(problem) for found in check_layers(package)), check_layers(package)


@pytest.mark.parametrize(
    "line",
    [
        "from lightning_step.masking import MaskSet",
        "from lightning_step import masking",
        "from lightning_step.functional import _pairwise",
        "def f():\n    import lightning_step.hooks",
        "import lightning_step\nlightning_step.hooks",
    ],
)
def test_a_private_name_in_an_example_is_found(line, tmp_path):
    (tmp_path / "good.py").write_text(
        "import lightning_step\nfrom lightning_step.export import read_manifest\nlightning_step.STEP\n"
    )
    assert check_examples(tmp_path) == []
    (tmp_path / "bad.py").write_text(line)
    assert [problem.split()[0] for problem in check_examples(tmp_path)] == ["bad.py"]


def test_long_files_machine_paths_and_early_extras_are_found(tmp_path):
    (tmp_path / "good.py").write_text("x = 'out/root/a https://x.org/home/a'\ndef f():\n    import onnx\n" + "\n" * 397)
    assert check_lengths(tmp_path) + check_machine_paths(tmp_path) + check_extras(tmp_path) == []
    (tmp_path / "bad.py").write_text(
        f"try:\n    import onnx.helper\nexcept ImportError:\n    x = '{os.sep}root{os.sep}a'\n" + "\n" * 397
    )
    assert check_lengths(tmp_path) == ["bad.py has 401 lines"]
    assert check_machine_paths(tmp_path) == [f"bad.py: x = '{os.sep}root{os.sep}a'"]
    assert check_extras(tmp_path) == ["bad imports onnx when it is loaded"]


PROBE = """
import importlib, sys
_, base, targets, extras = sys.argv
for name in base.split():
    importlib.import_module(name)
before = set(sys.modules)
for name in targets.split():
    importlib.import_module(name)
import torch
print(*sorted(set(extras.split()) & (set(sys.modules) - before)), *["CUDA"] * torch.cuda.is_initialized())
"""


def loaded(targets, *, base, path):
    """What loading modules brings in of the extras, beyond what Lightning itself has loaded; and CUDA, if initialized."""
    command = [sys.executable, "-c", PROBE, base, targets, " ".join(EXTRAS)]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True).stdout.split()


def test_importing_the_package_loads_no_extra_and_no_cuda():
    modules = f"{NAME} {NAME}.cli {NAME}.reports"
    assert loaded(modules, base="lightning.pytorch safetensors.torch", path=PACKAGE.parent) == []


def test_the_probe_sees_an_extra_and_cuda(tmp_path):
    (tmp_path / "planted.py").write_text("import jsonargparse, torch\ntorch.cuda._initialized = True\n")
    assert loaded("planted", base="torch", path=tmp_path) == ["jsonargparse", "CUDA"]
