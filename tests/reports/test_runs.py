from __future__ import annotations

from pathlib import Path

import pytest

from lightning_step.errors import ConfigurationError, FileFormatError
from lightning_step.reports.runs import MAX_RUNS, read_runs
from tests.reports.conftest import Write

LOSS = {"loss": {1: 1.0}}


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["dense/lightning_logs/version_0", "step/lightning_logs/version_0"], ["dense", "step"]),
        (["logs/version_2", "logs/version_10"], ["version_2", "version_10"]),
        (["a/version_0"], ["a/version_0"]),
        (["a/mine"], ["mine"]),
        (["dense/version_0", "step/version_3"], ["dense/version_0", "step/version_3"]),
    ],
)
def test_names_are_what_differs_between_the_folders(folders: list[str], names: list[str], write: Write) -> None:
    assert [run.name for run in read_runs([str(write(folder, LOSS)) for folder in folders])] == names


def test_names_that_are_given_and_a_folder_named_twice(write: Write) -> None:
    folder = write("a=b", LOSS)
    assert [run.name for run in read_runs([str(folder), f"x={folder}", f"x={folder}"])] == ["a=b", "x", "x (2)"]


def test_a_folder_above_the_runs_stands_for_all_of_them(write: Write, tmp_path: Path) -> None:
    for version in (0, 2, 10):
        write(f"logs/version_{version}", LOSS)
    assert [run.name for run in read_runs([str(tmp_path)])] == ["version_0", "version_2", "version_10"]
    assert next(run.name for run in read_runs([f"x={tmp_path}"])) == "x/logs/version_0"


@pytest.mark.parametrize("folder", ["nowhere", "null\0byte", "x" * 5000])
def test_a_folder_that_is_none(folder: str) -> None:
    with pytest.raises(FileFormatError, match="Expected a folder of a run, but got"):
        read_runs([folder])


def test_a_folder_without_event_files(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"Expected event files .* in .* or below, but got none\. Train with a Tensor"):
        read_runs([str(tmp_path)])


def test_too_many_runs(write: Write, tmp_path: Path) -> None:
    for i in range(MAX_RUNS + 1):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "events.out.tfevents.1").touch()
    with pytest.raises(ConfigurationError, match=f"Expected at most {MAX_RUNS} runs, but got {MAX_RUNS + 1} below"):
        read_runs([str(tmp_path)])


def test_a_file_needs_a_run_when_there_are_several(write: Write) -> None:
    folders = [str(write("dense", LOSS)), str(write("step", LOSS))]
    for value in ("model.safetensors", "nobody=model.safetensors"):
        with pytest.raises(ConfigurationError, match=r"Expected `--file RUN=FILE` with one of the runs \['dense', 'step'\]"):
            read_runs(folders, [value])
    with pytest.raises(FileFormatError, match="Expected a readable file"):
        read_runs(folders[:1], ["model.safetensors"])


def test_a_run_whose_event_file_is_empty_says_so(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1").touch()
    [run] = read_runs([str(tmp_path)])
    assert (run.last_step, run.problems) == (0, ["no scalars could be read from its event files"])
