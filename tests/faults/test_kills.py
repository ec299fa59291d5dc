"""SIGKILL at any moment: what is resumed from the newest checkpoint ends as if nothing had happened, bit for bit."""

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")

STEPS, SWITCH = 60, 30
SOURCE = random.Random(20)
CHECKPOINT = ["checkpoint-write", "checkpoint-before-rename", "checkpoint-after-rename", "checkpoint-torn"]
EXPORT = ["export-before-fsync", "export-before-rename", "export-timed", "export-timed", "export-after-rename"]


def some(kinds, first, last):
    return [(SOURCE.randint(first, last), kind) for kind in kinds]


def moments(*drawn):
    """In the order of the run; the export comes last."""
    ordered = sorted((moment for part in drawn for moment in part), key=lambda moment: moment[0])
    return [f"{kind}:{step}" for step, kind in ordered]


TWENTY = moments(
    some(["timed", "timed", "gradients", *CHECKPOINT[:2]], 1, SWITCH - 3),  # phase I
    [(SWITCH - 1, "gradients"), (SWITCH, "stepped"), (SWITCH, "timed")],  # the switch
    some(["timed", "timed", "timed", "gradients", "stepped", *CHECKPOINT[2:]], SWITCH + 1, STEPS - 6),  # phase II
    [(STEPS, kind) for kind in EXPORT],
)
FIVE = ["timed:11", "checkpoint-write:16", "stepped:30", "gradients:40", "export-timed:60"]
RECIPES = ["STEP", "SRSTE", "STE", "ASP", "Dense"]
PLANS = {recipe: [recipe, TWENTY if recipe == "STEP" else FIVE] for recipe in RECIPES}
PLANS |= {f"{recipe}, undisturbed": [recipe, []] for recipe in RECIPES}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """All runs, in one process that imports once and forks."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killing.py"), folder, json.dumps(PLANS)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
            "TMPDIR": str(folder / "tmp"),  # where fsspec writes a checkpoint first
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert (report["steps"], report["switch"]) == (STEPS, SWITCH)
    return report["reports"]


def died_at(death):
    """Optimizer steps that the process had seen the beginning of."""
    start = 0 if death["from"] == "None" else int(death["from"].split("=")[1].split("-")[0])
    return start + death["steps"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_was_killed_ends_as_one_that_was_not(recipe, reports):
    killed, undisturbed = reports[recipe], reports[f"{recipe}, undisturbed"]
    *deaths, last = killed["deaths"]
    planned = TWENTY if recipe == "STEP" else FIVE
    assert [(death["moment"], death["signal"]) for death in deaths] == [(moment, 9) for moment in planned], deaths
    assert (last["signal"], last["code"]) == (0, 0), last["tail"]
    assert killed["end"] == undisturbed["end"]
    assert killed["end"].keys() == {"weights", "optimizer", "ours"}
    assert last["out"]["digest"] == undisturbed["deaths"][-1]["out"]["digest"]
    assert last["out"]["tensors"] == (0 if recipe == "Dense" else 5)


def test_the_twenty_moments_lie_in_every_phase(reports):
    deaths = reports["STEP"]["deaths"][:-1]
    assert len(deaths) == 20
    steps = [died_at(death) for death in deaths if not death["moment"].startswith("export")]
    assert sum(step < SWITCH for step in steps) >= 5
    assert sum(SWITCH <= step <= SWITCH + 1 for step in steps) >= 2
    assert sum(step > SWITCH + 1 for step in steps) >= 5
    assert all(died_at(death) == STEPS for death in deaths if death["moment"].startswith("export"))


def test_no_half_of_an_export_was_ever_under_the_final_name(reports):
    """The harness loads whatever is there after each death, and fails on what is not whole."""
    deaths = reports["STEP"]["deaths"]
    whole = reports["STEP, undisturbed"]["deaths"][-1]["out"]["digest"]
    assert {death["out"]["digest"] for death in deaths} == {None, whole}
    before = [death["out"] for death in deaths if death["moment"].startswith(("export-before", "export-timed"))]
    assert any(out["left"] and not out["tensors"] for out in before), "no kill came while the export was written"


def test_only_a_checkpoint_that_moves_between_file_systems_can_be_torn(reports):
    """Lightning writes to the folder for temporary files and renames; where that is another disk, it copies."""
    deaths = reports["STEP"]["deaths"]
    torn = [before["moment"].partition(":")[0] for before, after in pairwise(deaths) if after["torn"]]
    assert torn[0] == "checkpoint-torn"
    others = [death for recipe in RECIPES[1:] for death in reports[recipe]["deaths"]]
    assert not any(death["torn"] for death in others)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_torn_checkpoint_is_known_when_it_is_loaded(share, tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"weight": torch.randn(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises((RuntimeError, EOFError, OSError)):
        torch.load(path, weights_only=True)
