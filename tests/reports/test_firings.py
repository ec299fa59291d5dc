"""A run that is dense until a criterion fires is, until then, the dense run: so the step a real run switched at is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_step import STEP, AutoSwitch, Dense, RelativeNorm, Staleness
from lightning_step.recipes import Switch
from lightning_step.reports.firings import Setting, setting_of, verdicts
from lightning_step.reports.groups import masked_groups
from lightning_step.reports.runs import read_runs
from tests.reports.conftest import BETA2, STEPS, Write, train

EARLY = AutoSwitch(window=5, threshold=1.0, t_min=0)


def of(folder: Path, beta2: float | None = None) -> tuple[Setting, dict[str, str]]:
    [run] = read_runs([str(folder)])
    [group] = masked_groups(run)
    setting = setting_of(group, beta2)
    return setting, {verdict.criterion.split(",")[0]: verdict.says for verdict in verdicts(group, setting)}


@pytest.mark.parametrize("switch", [RelativeNorm(), Staleness()], ids=lambda switch: type(switch).__name__)
def test_the_dense_run_tells_where_a_real_run_switched(switch: Switch, tmp_path: Path) -> None:
    setting, said = of(train(tmp_path, "dense", Dense()), BETA2)
    _, own = of(train(tmp_path, "switched", STEP(switch)), BETA2)
    [run] = read_runs([str(tmp_path / "switched")])
    step = masked_groups(run)[0].frozen
    assert setting.window == 5
    assert step is not None
    assert step > 1
    forced = " (T_max)" * (step == STEPS // 2 and "t_max" in str(run.files[0].info["switches"]))
    assert said[type(switch).__name__] == own[type(switch).__name__] == f"step {step}{forced}"


def test_the_rule_of_the_run_itself(tmp_path: Path) -> None:
    switch = AutoSwitch(threshold=1.0, t_min=0, t_max=20)
    folder = train(tmp_path, "run", STEP(switch))
    setting, said = of(folder)
    [run] = read_runs([str(folder)])
    assert setting == (STEPS, pytest.approx(BETA2), 5, "arithmetic", "T_w = 5, as the switch says")
    assert masked_groups(run)[0].frozen == 5
    assert said["AutoSwitch"] == "between steps 0 and 5", "of the geometric mean only the bound is known"
    [group] = masked_groups(run)
    own, other = verdicts(group, setting)[:2]
    assert (own.criterion, own.says) == ("AutoSwitch, arithmetic mean", "step 5")
    assert "at most the arithmetic one" in other.why


def test_a_geometric_run_is_told_as_such(tmp_path: Path) -> None:
    setting, _ = of(train(tmp_path, "run", STEP(AutoSwitch("geometric", threshold=1e-12, t_max=20))))
    assert setting.mean == "geometric"


@pytest.mark.parametrize(
    ("text", "beta2"),
    [
        ("betas: !!python/tuple\n- 0.9\n- 0.98\nlr: 1", 0.98),
        ("lr: 1\nbetas:\n  - 0.9\n  - 0.95", 0.95),
        ("adam_beta2: 0.97", 0.97),
        ("betas: !!python/object:evil\n- 0.9\n- 7.0", 0.999),
        ("lr: 1", 0.999),
    ],
)
def test_beta2_of_the_hyperparameters(text: str, beta2: float, write: Write) -> None:
    folder = write("run", {"sparsity/v_l2": {1: 1.0}})
    (folder / "hparams.yaml").write_text(text)
    setting, _ = of(folder)
    assert setting.beta2 == beta2
    assert of(folder, 0.5)[0].source == "β2 = 0.5, as given"


def test_after_the_freeze_nothing_is_judged(write: Write) -> None:
    """The norm of a frozen v does not change, and would make every criterion fire."""
    growing = {step: 4.0**step for step in range(1, 11)}
    scalars = {
        "sparsity/variance_change": dict.fromkeys(range(1, 11), 1.0),
        "sparsity/phase": {step: 1 + (step >= 10) for step in range(1, 41)},
        "sparsity/v_l2": growing | dict.fromkeys(range(11, 41), 4.0**10),
    }
    _, said = of(write("run", scalars), 0.9)
    assert said["RelativeNorm"] == "not as far as the log tells"
    del scalars["sparsity/variance_change"]
    _, live = of(write("live", scalars), 0.9)
    assert live["RelativeNorm"] == "step 11"
