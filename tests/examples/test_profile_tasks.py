"""The profile of the example tasks runs, at its smallest, and tells what is ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SPEED = Path(__file__).parents[2] / "examples" / "benchmarks" / "speed"
sys.path.insert(0, str(SPEED))

import profile_tasks  # noqa: E402
import torch  # noqa: E402
from profile_tasks import BATCHES, TASKS, main  # noqa: E402
from self_time import Share, kind_of, least, mark, owner, times_of  # noqa: E402


def test_a_quick_run_writes_a_page_and_its_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # other tests go on after this one
    monkeypatch.setattr(sys, "argv", ["profile_tasks.py", "--quick", "--only", "char", "--out", str(tmp_path)])
    calls = []

    def counting(events: Any) -> Any:
        calls.append(times_of([event(*(e.stack or ()), name=e.name, parent=e.cpu_parent, time=1.0) for e in events]))
        return times_of(events)

    monkeypatch.setattr(profile_tasks, "times_of", counting)
    main()
    (task,) = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert task["task"] == "char"
    assert min(task["dense"], task["phase_two"]) > 0
    assert 0 < task["python"] < task["ours"] < 0.6
    assert min(task["stock_dense"], task["stock"]) > 0
    dense, phase_two = (sum(each["stock optimizer"] for each in found.values()) for found in calls)  # seconds would vary
    assert dense > phase_two > 0, "phase II spares most of the stock step, not that of biases and norms"
    assert len(task["top"]) == 10
    matrices = [top for top in task["top"] if top["name"] in ("aten::mm", "aten::addmm")]
    assert [top["ours"] for top in matrices] == [0, 0], "forward and backward are not ours, though hooks are around them"
    page = (tmp_path / "results.md").read_text()
    assert page in capsys.readouterr().out
    assert page.count("\n| ") == 1 + 1 + 1 + 10


def event(*stack: str, name: str = "aten::mul", parent: Any = None, time: float = 0.0) -> Any:
    return SimpleNamespace(name=name, stack=list(stack), cpu_parent=parent, self_cpu_time_total=time)


def test_an_event_belongs_to_the_innermost_function_that_tells() -> None:
    hook, adam, trainer = (
        "lightning_step/hooks.py(74): call",
        "torch/optim/adam.py(2): step",
        "lightning/pytorch/a.py(1): b",
    )
    assert owner(event("torch/nn/functional.py(1): f", hook, adam, trainer)) == "ours"
    assert owner(event("torch/utils/a.py(1): f", adam, hook, trainer)) == "stock optimizer"
    assert owner(event("examples/a.py(1): f", trainer, hook, adam)) == "rest"
    assert owner(event()) == "rest"
    engine = event(name="autograd::engine::evaluate_function: MulBackward0")
    assert owner(event(hook, parent=event(name="MulBackward0", parent=engine))) == "rest"


def test_operations_stand_by_their_names_and_what_is_mostly_ours_is_marked() -> None:
    names = ["aten::mul", "MulBackward0", "autograd::engine::evaluate_function: a", "a.py(1): f", "<built-in method a>"]
    assert [kind_of(name) for name in names] == ["aten::mul", "autograd", "autograd", "Python", "Python"]
    assert [mark(Share("a", 0.1, ours, 0.0)) for ours in (0.06, 0.05, 0.0)] == ["**6.0%**", "5.0%", ""]


def test_what_disturbs_one_profile_is_left_out() -> None:
    ours = "lightning_step/a.py(1): f"
    found = [
        times_of([event(ours, time=5), event(ours, time=2), event(time=1)]),
        times_of([event(ours, time=8), event(time=0.5)]),
    ]
    assert least(found) == {"aten::mul": {"ours": 7, "stock optimizer": 0, "rest": 0.5}}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_have_the_shapes_that_a_task_takes(name: str) -> None:
    torch.manual_seed(0)
    model: Any = TASKS[name].make_model(1e-4, Path())
    model.log = lambda *args, **kwargs: None
    assert torch.isfinite(model.training_step(BATCHES[name](), 0))


def test_a_task_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["profile_tasks.py", "--only", "char,speed"])
    with pytest.raises(SystemExit, match=r"Expected tasks among char, .* but got 'speed'"):
        main()
