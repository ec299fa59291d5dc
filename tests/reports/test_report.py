"""Whole pages, of real runs of every recipe and of runs that lack or break something."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, AutoSwitch, Dense
from lightning_step.errors import ConfigurationError
from lightning_step.reports import write_report
from tests.reports.conftest import NASTY, Write, colours, train
from tests.reports.test_html import Checker, check_page

SECTIONS = ["Summary", "The switch", "Loss by phase", "Masks", "Second moment", "Layers"]
RECIPES = {
    "dense": Dense(),
    "asp": ASP(AtStep(8)),
    "ste": STE(),
    "sr-ste": SRSTE(),
    "step": STEP(AutoSwitch(window=5, threshold=1.0, t_min=6, t_max=20)),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, recipe in RECIPES.items():
        train(root, name, recipe, every=2)
    return root


def made(folders: list[Path | str], out: Path, **options: object) -> tuple[str, Checker]:
    [page, *_] = write_report([str(folder) for folder in folders], out, **options)
    content = page.read_text(encoding="utf-8")
    return content, check_page(content)


def words_of(page: Checker) -> str:
    return " ".join(" ".join(page.words).split())


@pytest.mark.filterwarnings("ignore:.*dense:UserWarning")
def test_five_recipes_on_one_page(trained: Path, tmp_path: Path) -> None:
    content, page = made([trained], tmp_path / "report.html")
    assert page.headings == [*SECTIONS, "Comparison of the runs"]
    words = words_of(page)
    for text in ("STEP(switch=AutoSwitch(", "SRSTE()", "ASP(", "2:4 (2 tensors)", "step 8: masks on", "of dense"):
        assert text in words
    for name in RECIPES:
        assert f"{name}: kept magnitude of every layer" in words
    assert "No run logged" not in words
    assert {"variance-step", "loss-asp", "scalar-flip-rate", "scalar-v-l2", "layers-flip-rate-step"} <= set(page.ids)
    assert len(content) < 2_000_000


def test_what_is_said_of_step_is_what_happened(trained: Path, tmp_path: Path) -> None:
    _, page = made([trained / "step"], tmp_path / "report.html", figures_folder=tmp_path / "figures")
    words = words_of(page)
    assert page.headings == [*SECTIONS, "Other scalars"]
    names = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert {path.stem for path in (tmp_path / "figures").glob("*.svg")} == names
    assert {"variance-step", "loss-step", "scalar-v-l2", "layers-kept-magnitude-step"} <= names <= set(page.ids)
    assert [name for name in names if colours(tmp_path / "figures" / f"{name}.png") < 20] == [], "no blank picture"
    step = int(re.search(r"step (\d+): masks on, second moment frozen \(2 tensors\); window mean below", words)[1])
    assert f"masks on at step {step}; v frozen at step {step}" in words
    assert "T_w = 5, as the switch says" not in words, "a window that was given says nothing of beta2"


@pytest.mark.parametrize("optimizers", [2, 3])
def test_several_optimizers_on_one_page(optimizers: int, write: Write, tmp_path: Path) -> None:
    steps = range(5, 31, 5)
    scalars = {"d_loss": dict.fromkeys(steps, 1.0)}
    for i in range(optimizers):
        scalars[f"sparsity/{i}/variance_change"] = dict.fromkeys(range(5, 16, 5), 1e-8)
        scalars[f"sparsity/{i}/phase"] = {step: 1 + (step >= 10 + 5 * i) for step in steps}
        scalars[f"sparsity/{i}/v_l2"] = dict.fromkeys(steps, 1.0)
    _, page = made([write("gan", scalars)], tmp_path / "report.html")
    for i in range(optimizers):
        assert f"gan, optimizer {i}" in words_of(page)
        assert f"optimizer {i}: masks on at step {10 + 5 * i}" in words_of(page)
        assert f"variance-gan-optimizer-{i}" in page.ids


def test_a_run_without_sparsity_says_what_is_missing(write: Write, tmp_path: Path) -> None:
    _, page = made([write("dense", {"train_loss": {1: 2.0, 2: 1.0}, "accuracy": {2: 0.5}})], tmp_path / "report.html")
    words = words_of(page)
    assert "trained without STEPSparsityCallback" in words
    assert "SparsityMonitor(per_layer=True)" in words
    assert "No run logged masks. " in words
    assert page.headings == [*SECTIONS, "Other scalars"]


def test_a_run_without_any_loss_or_any_scalar(write: Write, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "events.out.tfevents.1").touch()
    _, page = made([write("acc", {"accuracy": {2: 0.5}}), empty], tmp_path / "report.html")
    assert "acc logged no scalar with “loss” in its name; --loss TAG names one." in words_of(page)
    assert "empty: no scalars could be read from its event files" in words_of(page)
    _, page = made([tmp_path / "acc"], tmp_path / "report.html", loss=["accuracy"])
    assert "loss-acc" in page.ids


def test_names_that_are_html_mathematics_or_markup(write: Write, tmp_path: Path) -> None:
    steps = {1: 1.0, 2: 0.5}
    scalars = {f"{NASTY} loss": steps, f"sparsity/layer/{NASTY}/flip_rate": steps, "sparsity/v_l2": steps}
    scalars |= {"sparsity/phase": steps, "sparsity/variance_change": steps}
    texts = {"sparsity/recipe": f"### Recipe\n\n`{NASTY}`\n\noptimizer step 1: masks on ({NASTY}"}
    folders = [f"{NASTY}={write('one', scalars, texts)}", f"<b>={write('two', scalars)}"]
    content, page = made(folders, tmp_path / "report.html", title=NASTY)
    assert "<script" not in content
    assert "<b>" in words_of(page)
    assert 'alert("x")' in words_of(page)


def test_values_that_are_not_finite_are_told_and_drawn_around(write: Write, tmp_path: Path) -> None:
    bad = {1: 1.0, 2: math.nan, 3: math.inf, 4: -math.inf, 5: 0.5}
    names = ("variance_change", "window_mean", "threshold", "v_l1", "v_l2", "flip_rate", "layer/a/kept_magnitude")
    scalars = {"val_loss": bad, "sparsity/phase": {1: 1, 5: 2}, **{f"sparsity/{name}": bad for name in names}}
    _, page = made([write("run", scalars)], tmp_path / "report.html")
    assert "run: val_loss was NaN or infinite 3 times, first at step 2" in words_of(page)
    nothing = {tag: dict.fromkeys((1, 2), math.nan) for tag in scalars}
    _, page = made([write("nothing", nothing)], tmp_path / "report.html")
    assert "No variance curve: this run logged no finite sample of Z." in words_of(page)


def test_a_damaged_event_file_is_told_and_the_rest_is_shown(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "step", tmp_path / "step")
    [path] = run.glob("*tfevents*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, page = made([run], tmp_path / "report.html")
    assert "it ends within a record" in words_of(page)
    assert "loss-step" in page.ids


def test_names_that_differ_in_signs_only_stay_apart(write: Write, tmp_path: Path) -> None:
    folders = [write(name, {"loss": {1: 1.0, 2: 0.5}}) for name in ("a b", "a.b")]
    _, page = made([*folders], tmp_path / "report.html", figures_folder=tmp_path / "figures")
    assert {"loss-a-b", "loss-a-b-1"} <= set(page.ids)
    assert (tmp_path / "figures" / "loss-a-b-1.png").exists()


def test_more_scalars_than_anybody_would_look_at(write: Write, tmp_path: Path) -> None:
    _, page = made([write("run", {f"metric_{i:03d}": {1: 1.0} for i in range(27)})], tmp_path / "report.html")
    assert "3 more scalars are not shown: metric_024, metric_025, metric_026." in words_of(page)


@pytest.mark.parametrize("beta2", [-0.1, 1.0, math.nan])
def test_a_beta2_that_is_none(beta2: float, write: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Expected 0 <= beta2 < 1, but got"):
        write_report([str(write("run", {"loss": {1: 1.0}}))], tmp_path / "report.html", beta2=beta2)
    assert not (tmp_path / "report.html").exists()


def test_without_matplotlib_nothing_is_written(write: Write, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from lightning_step.cli import main\n"
        "sys.modules['matplotlib.figure'] = None  # as if it could not be imported\n"
        f"sys.exit(main(['report', {str(write('run', {'loss': {1: 1.0}}))!r}, '--out', {str(tmp_path / 'a.html')!r}]))"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=False)
    assert run.returncode == 1
    assert "error: ConfigurationError: Expected matplotlib to be installed" in run.stderr
    assert not (tmp_path / "a.html").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_opens_it_without_a_word(trained: Path, tmp_path: Path) -> None:
    made([trained / "step", trained / "dense"], tmp_path / "report.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    url = (tmp_path / "report.html").as_uri()
    run = subprocess.run([*command, url], capture_output=True, text=True, timeout=120, check=True)
    assert "Comparison of the runs" in run.stdout
    assert [line for line in run.stderr.splitlines() if "CONSOLE" in line] == []
