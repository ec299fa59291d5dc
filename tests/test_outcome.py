"""The end table against weights that are counted by hand."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from lightning_step import ASP, SRSTE, STE, STEP, AtStep, Dense, NMPattern, Recipe, Sparsifier, strip
from lightning_step.functional import magnitude_mask
from lightning_step.outcome import sheet_of_outcome

RECIPES = [Dense(), ASP(AtStep(3)), STE(), SRSTE(), STEP(AtStep(3))]


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["fc"](x).tanh()
        return x

    def gradients(self, seed: int) -> None:
        self.zero_grad()
        self(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def driver(model: nn.Module, parameters: Iterable[Tensor], recipe: Recipe) -> tuple[torch.optim.Optimizer, Sparsifier]:
    """One of the three blocks has a pattern of its own."""
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    return optimizer, Sparsifier(model, optimizer, 2, 4, recipe=recipe, overrides={"blocks.1": (1, 4)}, measure_every=1)


def trained(recipe: Recipe) -> tuple[Blocks, Sparsifier]:
    model = Blocks()
    optimizer, sparsifier = driver(model, model.parameters(), recipe)
    for step in range(6):
        model.gradients(step)
        optimizer.step()
    return model, sparsifier


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_every_number_of_the_table(recipe: Recipe) -> None:
    model, sparsifier = trained(recipe)
    [section] = sheet_of_outcome([sparsifier]).sections
    header, *rows = section.rows
    on = sparsifier.phase == 2
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("weight")}
    kept = {n: w * magnitude_mask(w, NMPattern(1 if ".1." in n else 2, 4), 1) for n, w in weights.items()}
    rates = sparsifier.masks.flip_rates
    expected = []
    for pattern, names in (("2:4", ["blocks.0.fc.weight", "blocks.2.fc.weight"]), ("1:4", ["blocks.1.fc.weight"])):
        whole, part = (sum(float(w[name].abs().sum()) for name in names) for w in (weights, kept))
        density = sum(int(kept[name].count_nonzero()) for name in names) / (64 * len(names)) if on else 1
        name = "blocks.*.fc.weight" if len(names) > 1 else names[0]
        cells = [name, "Linear", pattern, percent(density), percent(part / whole)]
        cells += [percent(sum(rates[name] for name in names) / len(names), 3)] if on else []
        expected.append((*cells, str(len(names))))
    assert header == ("masked", "layer", "n:m", "density", "kept |w|", *["flip rate"] * on, "tensors")
    assert rows == expected
    if on:
        strip(model)
        assert sum(int(model.get_parameter(name).count_nonzero()) for name in weights) == 32 + 16 + 32


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_head_and_reasons(recipe: Recipe) -> None:
    _, sparsifier = trained(recipe)
    sheet = sheet_of_outcome([sparsifier])
    if isinstance(recipe, Dense):
        assert sheet.head == "6 optimizer steps, masks never came on"
        assert sheet.foot == ("masks off: kept |w| is what they would keep",)
    else:
        assert sheet.head == "6 optimizer steps, masks on: 80 of 192 weights in 3 tensors are kept"
        assert sheet.foot == tuple(str(event) for event in sparsifier.events)
        assert sheet.foot[0].startswith(f"optimizer step {0 if isinstance(recipe, (STE, SRSTE)) else 3}: masks on")


def test_a_run_that_ends_before_the_switch_says_so() -> None:
    _, sparsifier = trained(STEP(AtStep(100)))
    sheet = sheet_of_outcome([sparsifier])
    assert (sheet.head, sheet.foot) == (
        "6 optimizer steps, masks never came on",
        ("masks off: kept |w| is what they would keep",),
    )


def test_optimizers_are_told_apart() -> None:
    model = Blocks()
    parts = [list(model.blocks[:2].parameters()), list(model.blocks[2:].parameters())]
    one, other = (driver(model, part, STEP(AtStep(at))) for part, at in zip(parts, (3, 100), strict=True))
    for step in range(6):
        model.gradients(step)
        one[0].step()
        if step < 2:
            other[0].step()
    sheet = sheet_of_outcome([one[1], other[1]])
    assert sheet.head == "6 and 2 optimizer steps, masks on in part: 112 of 192 weights in 3 tensors are kept"
    assert sheet.foot == (f"optimizer 0, {one[1].events[0]}", "optimizer 1, masks off: kept |w| is what they would keep")
    assert [row[:4] for row in sheet.sections[0].rows[1:]] == [
        ("blocks.0.fc.weight", "Linear", "2:4", "50.0 %"),
        ("blocks.1.fc.weight", "Linear", "1:4", "25.0 %"),
        ("blocks.2.fc.weight", "Linear", "2:4", "100.0 %"),
    ]


def test_what_was_not_measured_has_no_column() -> None:
    model = nn.Linear(8, 4)
    sparsifier = Sparsifier(model, torch.optim.AdamW(model.parameters()), 2, 4, recipe=STE())
    assert "flip rate" not in sheet_of_outcome([sparsifier]).sections[0].rows[0]
