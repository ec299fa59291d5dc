"""What is logged, read back with TensorBoard's own reader and compared with what the test sees for itself."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_step.monitoring
from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    AutoSwitch,
    Dense,
    Recipe,
    SparsityMonitor,
    STEPSparsityCallback,
)

SWITCHING = STEP(AutoSwitch(window=3, threshold=1e-30, t_min=0, t_max=9), lam=1e-3)
RECIPES = [Dense(), ASP(AtStep(9)), STE(), SRSTE(lam=1e-3), SWITCHING]
NAMES = ["net.0.weight", "net.2.weight", "head.weight"]
LR, BETA2, EPS, STEPS = 1e-2, 0.99, 1e-8, 20


def scalars(events: EventAccumulator, tag: str) -> dict[int, float]:
    tag = f"sparsity/{tag}"
    points = [(e.step, e.value) for e in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []
    assert len(dict(points)) == len(points), "every step once"
    return dict(points)


def rows(logger: CSVLogger) -> dict[int, dict[str, float]]:
    with open(logger.experiment.metrics_file_path) as file:
        found = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return {int(row["step"]): row for row in found if any(key.startswith("sparsity/") for key in row)}


def scheduled(module: Any) -> Any:
    """Gives the tiny module a rate that falls with every step, and an input that is always zero: there, v stays zero."""

    def configure() -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=LR, betas=(0.9, BETA2), eps=EPS, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module.configure_optimizers = configure
    module.net.register_forward_pre_hook(lambda _, args: (args[0] * (torch.arange(8) != 5),))
    return module


def two_of_four(weight: np.ndarray) -> np.ndarray:
    groups = -np.abs(weight).reshape(-1, 4)
    kept = np.zeros_like(groups, dtype=bool)
    np.put_along_axis(kept, np.argsort(groups, axis=1, kind="stable")[:, :2], True, axis=1)
    return kept.reshape(weight.shape)


def latent(module: Any, name: str) -> torch.nn.Parameter:
    return dict(module.named_parameters())[name]


class Witness(pl.Callback):
    """Computes from weights and gradients alone what ought to be logged after every step."""

    def __init__(self, masks_at: int | None, frozen_at: int | None, lam: float = 0.0) -> None:
        self.masks_at, self.frozen_at, self.lam = masks_at, frozen_at, lam
        self.seen: list[dict[str, Any]] = []
        self.weights: list[dict[str, np.ndarray]] = []
        self.v: dict[str, np.ndarray] = {}
        self.change: list[float] = []

    def weights_of(self, module: Any) -> dict[str, np.ndarray]:
        return {name: latent(module, name).detach().double().numpy().copy() for name in NAMES}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.before = self.weights_of(module)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.grads = {name: latent(module, name).grad.double().numpy().copy() for name in NAMES}

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        t, w = trainer.global_step, self.weights_of(module)
        on = self.masks_at is not None and t >= self.masks_at
        masks, old = ({n: two_of_four(x) for n, x in of.items()} for of in (w, self.before))
        if self.masks_at is not None and t > self.masks_at:
            self.grads = {n: g + self.lam * ~old[n] * self.before[n] for n, g in self.grads.items()}
        if self.frozen_at is None or t <= self.frozen_at:
            moved = {n: (1 - BETA2) * (g**2 - self.v.get(n, 0)) for n, g in self.grads.items()}
            self.v = {n: self.v.get(n, 0) + d for n, d in moved.items()}
            self.change.append(float(np.mean(np.concatenate([np.abs(d).ravel() for d in moved.values()]))))
        if t == self.frozen_at:  # coordinates that Adam would divide by eps are given the mean of their tensor
            dead = {n: np.sqrt(v / (1 - BETA2**t)) <= EPS for n, v in self.v.items()}
            self.v = {n: np.where(dead[n], np.maximum(v, v.mean()), v) for n, v in self.v.items()}

        def pooled(parts: dict[str, np.ndarray]) -> np.ndarray:
            return np.concatenate([parts[n].ravel() for n in NAMES])

        def numbers(pick: Any) -> dict[str, float]:
            v, x, mask = pick(self.v), np.abs(pick(w)), pick(masks)
            flips = {"flip_rate": (mask != pick(old)).mean()} if on and t > (self.masks_at or 0) else {}
            return {
                "v_l1": v.sum(),
                "v_l2": (v**2).sum() ** 0.5,
                "kept_magnitude": x[mask].sum() / x.sum(),
                **flips,
            }

        live = self.frozen_at is None or t < self.frozen_at
        near = {"v_near_zero": (np.sqrt(pooled(self.v) / (1 - BETA2**t)) <= EPS).mean()} if live else {}
        self.seen.append(
            {
                **numbers(pooled),
                **near,
                "phase": 1.0 + on,
                "density": pooled(masks).mean() if on else 1.0,
                "lr": LR * 0.9**t,
                "layers": {n: numbers(lambda parts, n=n: parts[n].ravel()) for n in NAMES},
            }
        )
        self.weights.append(w)


def begins(recipe: Recipe) -> tuple[int | None, int | None]:
    masks = {"Dense": None, "ASP": 9, "STE": 0, "SRSTE": 0, "STEP": 9}[type(recipe).__name__]
    return masks, 9 if isinstance(recipe, STEP) else None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_every_scalar_is_what_the_weights_and_gradients_say(
    recipe: Recipe, tiny: Any, make_trainer: Any, board: Any, read: Any, tmp_path: Path
) -> None:
    table, witness = CSVLogger(tmp_path, "csv"), Witness(*begins(recipe), lam=getattr(recipe, "lam", 0.0))
    callbacks = [STEPSparsityCallback(recipe=recipe, read_every=1), SparsityMonitor(per_layer=True, figure=False), witness]
    make_trainer(*callbacks, steps=STEPS, logger=[board, table]).fit(scheduled(tiny()))
    logged = rows(table)
    assert sorted(logged) == list(range(1, STEPS + 1))
    for t, expected in enumerate(witness.seen, 1):
        layers = expected.pop("layers")
        expected |= {f"layer/{n}/{key}": value for n, values in layers.items() for key, value in values.items()}
        own = {key.removeprefix("sparsity/"): value for key, value in logged[t].items() if key.startswith("sparsity/")}
        sampled = {key: own.pop(key) for key in ("variance_change", "window_mean", "threshold", "ratio") if key in own}
        assert own == pytest.approx(expected, rel=2e-4, abs=1e-15), t
        if not isinstance(recipe, STEP) or t > 9:
            assert sampled == {}
            continue
        full = {"window_mean": np.mean(witness.change[t - 3 : t])} if t >= 3 else {}
        shown = {"variance_change": witness.change[t - 1], "threshold": 1e-30, **full}
        shown |= {"ratio": full["window_mean"] / 1e-30} if full else {}
        assert sampled == pytest.approx(shown, rel=1e-4), t
    events = read(board)
    for tag in {key for row in logged.values() for key in row if key.startswith("sparsity/")}:
        in_table = {t: row[tag] for t, row in logged.items() if tag in row}
        assert scalars(events, tag.removeprefix("sparsity/")) == pytest.approx(in_table, rel=1e-6, abs=1e-37)


def test_the_tables_of_scalars_list_exactly_what_a_run_logs(tiny: Any, make_trainer: Any, board: Any, read: Any) -> None:
    callbacks = [STEPSparsityCallback(recipe=SWITCHING), SparsityMonitor(per_layer=True, figure=False)]
    make_trainer(*callbacks, logger=board).fit(tiny())
    tags = {tag.removeprefix("sparsity/") for tag in read(board).Tags()["scalars"] if tag.startswith("sparsity/")}
    tags = {re.sub("|".join(map(re.escape, NAMES)), "NAME", tag) for tag in tags}
    page = (Path(__file__).parents[2] / "docs" / "tensorboard.md").read_text(encoding="utf-8")
    page = page.partition("## Scalars\n")[2].partition("\n## ")[0]
    texts = [page, lightning_step.monitoring.__doc__ or ""]
    listed = [re.findall(r"^\| `([\w/]+)` \| (.+) \|$", text, re.MULTILINE) for text in texts]
    assert listed[0] == listed[1], "docs and docstring say the same"
    assert sorted(name for name, _ in listed[0]) == sorted(tags)


def test_one_chart_of_logarithms_with_the_switch_as_an_upright_line(
    tiny: Any, make_trainer: Any, board: Any, read: Any
) -> None:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    make_trainer(STEPSparsityCallback(recipe=SWITCHING, read_every=1), logger=board).fit(tiny())
    events = read(board)
    (tensor,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(tensor.tensor_proto.string_val[0])
    (chart,) = layout.category[0].chart
    shown = [[tag for tag in events.Tags()["scalars"] if re.match(regex, tag)] for regex in chart.multiline.tag]
    names = ["variance_change", "window_mean", "threshold"]
    assert shown == [[f"sparsity/log10/{name}"] for name in [*names, "switch"]]
    heights = []
    for name in names:
        values = scalars(events, name)
        assert scalars(events, f"log10/{name}") == pytest.approx({t: np.log10(v) for t, v in values.items()}, rel=1e-5)
        heights += [np.log10(value) for value in values.values()]
    mark = [(event.step, event.value) for event in events.Scalars("sparsity/log10/switch")]
    assert mark == [(8, pytest.approx(min(heights), rel=1e-5)), (9, pytest.approx(max(heights), rel=1e-5))]


def test_histograms_hold_every_coordinate_in_its_bin(tiny: Any, make_trainer: Any, board: Any, read: Any) -> None:
    witness = Witness(9, 9)
    monitor = SparsityMonitor(histograms_every=5, figure=False)
    make_trainer(STEPSparsityCallback(recipe=SWITCHING), monitor, witness, logger=board).fit(scheduled(tiny()))
    events = read(board)
    assert sorted(events.Tags()["histograms"]) == sorted(f"sparsity/{k}/{n}" for k in ("v", "kept", "pruned") for n in NAMES)
    for name in NAMES:
        for kind in ("kept", "pruned"):
            shown = events.Histograms(f"sparsity/{kind}/{name}")
            assert [event.step for event in shown] == [5, 9, 10, 15, 20], "at the interval and at the switch"
            for event in shown:
                weight = witness.weights[event.step - 1][name]
                own = np.abs(weight[two_of_four(weight) == (kind == "kept")])
                check_histogram(event.histogram_value, own)
        before = events.Histograms(f"sparsity/v/{name}")[0].histogram_value
        assert before.num == witness.weights[0][name].size
        zeros = before.bucket[0] if before.bucket_limit[0] < -39 else 0
        assert zeros == (16 if name == "net.0.weight" else 0), "a whole input that is always zero"
    last = events.Histograms("sparsity/v/head.weight")[-1].histogram_value
    check_histogram(last, np.log10(witness.v["head.weight"].ravel()))


def check_histogram(shown: Any, values: np.ndarray) -> None:
    counts, _ = np.histogram(values, [shown.min, *shown.bucket_limit])
    assert (shown.bucket, shown.num) == (counts.tolist(), len(values))
    assert shown.sum == pytest.approx(values.sum(), rel=0.06, abs=1e-6)


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated")  # TensorBoard's own
def test_the_text_panel_has_recipe_layers_and_the_reason_of_the_switch(
    tiny: Any, make_trainer: Any, board: Any, read: Any
) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    make_trainer(STEPSparsityCallback(recipe=SWITCHING, exclude=["head"]), SparsityMonitor(figure=False), logger=board).fit(
        tiny()
    )
    panels = read(board).Tensors("sparsity/recipe/text_summary")
    assert [event.step for event in panels] == [0, 9]
    first, second = (event.tensor_proto.string_val[0].decode() for event in panels)
    assert "STEP(switch=AutoSwitch(mean='arithmetic', window=3, threshold=1e-30" in first
    assert "net.0.weight  Linear  (16, 8)  2:4" in first
    assert "excluded by 'head'" in first
    assert "- not yet" in first
    assert re.search(r"- optimizer step 9: masks on, second moment frozen \(2 tensors\); t_max reached: ", second)
    html = markdown_to_safe_html(second)
    assert html.count("<h3>") == 3
    assert "<pre><code>N:M masks on 2 of 6 tensors" in html


@pytest.mark.parametrize("steps", [9, 12], ids=["switch at the end", "switch before the end"])
def test_the_variance_curve_is_drawn_once_at_the_switch_and_at_the_end(
    steps: int, tiny: Any, make_trainer: Any, board: Any, read: Any
) -> None:
    make_trainer(STEPSparsityCallback(recipe=SWITCHING), logger=board, steps=steps).fit(tiny())
    pictures = read(board).Images("sparsity/variance")
    assert [(p.step, p.width, p.height) for p in pictures] == [(step, 1200, 675) for step in sorted({9, steps})]
    assert all(p.encoded_image_string.startswith(b"\x89PNG") for p in pictures)


def test_a_logger_with_a_prefix_finds_its_chart_and_its_metrics(
    tiny: Any, make_trainer: Any, tmp_path: Path, read: Any
) -> None:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    logger = TensorBoardLogger(tmp_path, name="tb", prefix="mine")
    make_trainer(STEPSparsityCallback(recipe=SWITCHING), logger=logger).fit(tiny())
    events = read(logger)
    ours = {tag for kind in ("scalars", "histograms", "images") for tag in events.Tags()[kind] if "sparsity" in tag}
    assert all(tag.startswith("mine-sparsity/") for tag in ours)
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    regexes = layout.category[0].chart[0].multiline.tag
    assert all(sum(bool(re.match(regex, tag)) for tag in ours) == 1 for regex in regexes)
