"""Every mistake is found at construction, at setup or at fit start, and its message says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_step import SRSTE, STEP, AtStep, AutoSwitch, SparseExport, STEPSparsityCallback, nm_masks
from lightning_step.errors import (
    ArgumentTypeError,
    ConfigurationError,
    OptimizerError,
    PatternError,
    TargetError,
)


@pytest.mark.parametrize("n", ["2:4", 2.0, True, None])
def test_n_that_is_no_integer(n: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"Expected `n` to be an integer, but got .*n=2 and m=4"):
        STEPSparsityCallback(n=n)


@pytest.mark.parametrize(("n", "m"), [(5, 4), (0, 4), (-1, 4)])
def test_n_out_of_range(n: int, m: int) -> None:
    with pytest.raises(
        PatternError, match=rf"Expected 1 <= n <= m, but got n={n} and m={m}\. n is the number of weights KEPT"
    ):
        STEPSparsityCallback(n=n, m=m)


def test_m_below_two() -> None:
    with pytest.raises(PatternError, match="Expected `m` >= 2, but got m=1"):
        STEPSparsityCallback(n=1, m=1)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_glob_that_matches_nothing(argument: str, tiny: Any, make_trainer: Any) -> None:
    callback = STEPSparsityCallback(**{argument: ["nett.*"]})
    with pytest.raises(
        TargetError, match=rf"every glob of `{argument}` to match .* but got 'nett\.\*'.*The model has: net, net\.0"
    ):
        make_trainer(callback).fit(tiny())


def test_an_override_that_matches_nothing(tiny: Any, make_trainer: Any) -> None:
    with pytest.raises(TargetError, match="every glob of `overrides`"):
        make_trainer(STEPSparsityCallback(overrides={"tail": [1, 4]})).fit(tiny())


def test_no_layer_eligible(tiny: Any, make_trainer: Any) -> None:
    with pytest.raises(
        TargetError, match=r"at least one tensor to mask, but got none: all 6 .*not divisible by m=7.*Widen `include`"
    ):
        make_trainer(STEPSparsityCallback(n=2, m=7)).fit(tiny())


def test_step_without_an_adam_like_optimizer(tiny: Any, make_trainer: Any) -> None:
    with pytest.raises(
        OptimizerError, match=r"but got torch\.optim\.sgd\.SGD\. .*SRSTE, STE, ASP, Dense.*register_adapter\(SGD"
    ):
        make_trainer(STEPSparsityCallback()).fit(tiny("SGD"))


@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "RMSprop", "NAdam", "Adadelta"])
def test_other_recipes_take_any_optimizer(optimizer: str, tiny: Any, make_trainer: Any) -> None:
    module = tiny(optimizer)
    make_trainer(STEPSparsityCallback(recipe=SRSTE())).fit(module)
    assert all(mask.enabled for mask in nm_masks(module).values())


def test_t_min_above_t_max() -> None:
    with pytest.raises(ConfigurationError, match=r"Expected `t_min` <= `t_max`, but got t_min=0\.6 and t_max=0\.5\."):
        STEP(AutoSwitch(t_min=0.6, t_max=0.5))


def test_t_min_above_t_max_once_steps_are_known(tiny: Any, make_trainer: Any) -> None:
    recipe = STEP(AutoSwitch(t_min=15, t_max=0.5))
    with pytest.raises(
        ConfigurationError, match=r"t_min=15 \(step 15\) and t_max=0\.5 \(step 10\) in a run of 20 optimizer steps"
    ):
        make_trainer(STEPSparsityCallback(recipe=recipe)).fit(tiny())


def test_fractional_limits_in_an_endless_run(tiny: Any, make_trainer: Any) -> None:
    trainer = make_trainer(STEPSparsityCallback(), steps=-1, max_time={"seconds": 5})
    with pytest.raises(
        ConfigurationError, match=r"known number of optimizer steps, because ramp=0\.2 is a fraction.*max_steps=-1"
    ):
        trainer.fit(tiny())


def test_two_callbacks_in_one_trainer(tiny: Any, make_trainer: Any) -> None:
    trainer = make_trainer(STEPSparsityCallback())
    trainer.callbacks.append(STEPSparsityCallback(n=1, m=4))
    with pytest.raises(
        ConfigurationError, match=r"Expected one STEPSparsityCallback per Trainer, but got 2\. .*`overrides`"
    ):
        trainer.fit(tiny())


def test_lightning_itself_refuses_two_at_construction(make_trainer: Any) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `STEPSparsityCallback`"):
        make_trainer(STEPSparsityCallback(), STEPSparsityCallback())


def test_an_optimizer_without_masked_tensors(tiny: Any, make_trainer: Any) -> None:
    module = tiny()
    module.configure_optimizers = lambda: torch.optim.AdamW([module.head.bias])  # type: ignore[method-assign]
    with pytest.raises(
        TargetError, match=r"an optimizer that holds one of the 3 tensors to mask, but got none among \['AdamW'\]"
    ):
        make_trainer(STEPSparsityCallback()).fit(module)


class Poison(pl.Callback):
    """One bad gradient, which a clip keeps away from the optimizer's own state in the good case."""

    def __init__(self, steps: set[int], value: float) -> None:
        self.steps, self.value = steps, value

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if trainer.global_step in self.steps:
            pl_module.net[0].weight.grad[0, 0] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_gradient_gives_one_warning_and_freezes_nothing(value: float, tiny: Any, make_trainer: Any) -> None:
    callback = STEPSparsityCallback(recipe=STEP(AutoSwitch(window=2, t_min=0, t_max=6)), read_every=1)
    module = tiny()
    with pytest.warns(UserWarning, match="Expected") as caught:
        make_trainer(callback, Poison({3}, value), steps=12).fit(module)
    messages = [str(warning.message) for warning in caught if "Expected" in str(warning.message)]
    assert len(messages) == 2, messages
    assert messages[0].startswith(
        "Expected finite gradients, but got NaN or infinity before optimizer step 4: no variance sample"
    )
    assert "Expected a finite second moment at the switch, but got NaN or infinity in 'net.0.weight'" in messages[1]
    assert callback.sparsifiers[0].frozen == []
    assert callback.sparsifiers[0].phase == 1


def test_an_unwritable_path_is_found_at_setup(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    module = tiny()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    trainer = make_trainer(STEPSparsityCallback(), SparseExport(str(tmp_path / "file" / "model.safetensors")))
    with pytest.raises(
        ConfigurationError, match=r"Expected `path` to be writable, but got .*model\.safetensors.*Choose a folder"
    ):
        trainer.fit(module)
    assert trainer.global_step == 0
    assert all(torch.equal(before[name], weight) for name, weight in module.state_dict().items())


def test_a_folder_as_export_path(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Expected `path` to name a file, but got the folder"):
        make_trainer(STEPSparsityCallback(), SparseExport(str(tmp_path))).fit(tiny())


def test_an_unknown_format() -> None:
    with pytest.raises(ConfigurationError, match=r"Expected `format` to be one of \['dense', 'packed'\], but got 'onnx'"):
        SparseExport("model.safetensors", format="onnx")  # type: ignore[arg-type]


def test_a_submodule_that_does_not_exist(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    export = SparseExport(str(tmp_path / "model.safetensors"), module="body")
    with pytest.raises(ConfigurationError, match=r"name a submodule of TinyModule, but got 'body'\. It has: net, head"):
        make_trainer(STEPSparsityCallback(), export).fit(tiny())


def test_masks_of_another_pattern_are_on_the_model_already(tiny: Any, make_trainer: Any) -> None:
    module = tiny()
    make_trainer(STEPSparsityCallback(n=2, m=4, recipe=STEP(AtStep(3)))).fit(module)
    with pytest.raises(ConfigurationError, match=r"the pattern 1:4 along dim 1, but got 2:4 .*Call `strip\(model\)` first"):
        make_trainer(STEPSparsityCallback(n=1, m=4)).fit(module)


def test_the_error_leaves_the_model_usable(tiny: Any, make_trainer: Any) -> None:
    module = tiny()
    with pytest.raises(TargetError):
        make_trainer(STEPSparsityCallback(exclude=["nothing"])).fit(module)
    assert type(module.net[0]) is nn.Linear
    make_trainer(STEPSparsityCallback(recipe=SRSTE())).fit(module)
