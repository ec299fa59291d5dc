"""Whole training steps: dense, phase I, phase II, and SR-STE as its reference does it."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from masking_speed import by_argsort
from side_by_side import Row, Settings, Work, medians, peak_bytes, ratios, wait
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_step import STEP, AtStep, NMPattern, RateScale, Recipe, Sparsifier, find_targets

KINDS = ("dense", "phase I", "phase II", "SR-STE's reference")
Made = tuple[nn.Module, Callable[[nn.Module], Tensor]]


class ArgsortSTE(torch.autograd.Function):
    """A mask in every forward pass; the decay term in every backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        """Prune."""
        mask = by_argsort(weight, 2, 4)
        ctx.save_for_backward(weight)
        ctx.mask = mask
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Pass straight through, and pull pruned weights to zero."""
        (weight,) = ctx.saved_tensors
        decay: Tensor = 2e-4 * (1 - ctx.mask) * weight
        return grads[0] + decay


class Reference(nn.Module):
    """The same as a parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        """Prune."""
        pruned: Tensor = ArgsortSTE.apply(weight)  # type: ignore[no-untyped-call]
        return pruned


def gpt(settings: Settings) -> Made:
    """Width 512, sequence 256, batch 8."""
    from transformers import GPT2Config, GPT2LMHeadModel

    width, length, batch = (32, 16, 2) if settings.quick else (512, 256, 8)
    config = GPT2Config(
        n_embd=width, n_layer=2 if settings.quick else 4, n_head=4, vocab_size=1024, n_positions=length,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(0, 1024, (batch, length), device=settings.device)
    return GPT2LMHeadModel(config), lambda model: model(tokens, labels=tokens).loss


def bert(settings: Settings) -> Made:
    """Four layers of width 256."""
    from transformers import BertConfig, BertForSequenceClassification

    width, length, batch = (32, 16, 2) if settings.quick else (256, 128, 16)
    config = BertConfig(
        hidden_size=width, num_hidden_layers=2 if settings.quick else 4, num_attention_heads=4,
        intermediate_size=4 * width, vocab_size=1024, max_position_embeddings=length,
    )  # fmt: skip
    tokens = torch.randint(0, 1024, (batch, length), device=settings.device)
    labels = torch.zeros(batch, dtype=torch.long, device=settings.device)
    return BertForSequenceClassification(config), lambda model: model(tokens, labels=labels).loss


def resnet(settings: Settings) -> Made:
    """ResNet-18 on images of 32 x 32."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = [8, 8, 16, 16] if settings.quick else [64, 128, 256, 512]
    config = ResNetConfig(embedding_size=sizes[0], hidden_sizes=sizes, depths=[2, 2, 2, 2], layer_type="basic")
    batch = 2 if settings.quick else 16
    images = torch.randn(batch, 3, 32, 32, device=settings.device)
    labels = torch.zeros(batch, dtype=torch.long, device=settings.device)
    return ResNetForImageClassification(config), lambda model: model(pixel_values=images, labels=labels).loss


def recipe_of(kind: str) -> Recipe:
    """Phase I without an end; or phase II of the default recipe, which has come at once."""
    return RateScale(STEP(AtStep(1), masks_from=AtStep(0))) if kind == "phase II" else STEP(AtStep(10**9))


def sparse_of(kind: str, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of a model and its optimizer, which train as asked."""
    model = copy.deepcopy(model)
    if kind == KINDS[3]:
        for target in find_targets(model, NMPattern(2, 4)).masked:
            module, _, name = target.name.rpartition(".")
            parametrize.register_parametrization(model.get_submodule(module), name, Reference())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    if kind in KINDS[1:3]:
        Sparsifier(model, optimizer, 2, 4, recipe=recipe_of(kind), total_steps=10**9)
    return model, optimizer


def step_of(kind: str, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Work:
    """A training step; one of phase II has switched already."""
    model, optimizer = sparse_of(kind, model)

    def step() -> None:
        loss(model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    return step


def steps(settings: Settings) -> list[Row]:
    """Time and memory of every kind for three models; memory is what a step allocates beyond what is there."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        print("training steps are left out: transformers is not installed")
        return []
    rows: list[Row] = []
    few = settings._replace(repeats=max(1, settings.repeats // 3))
    for name, make in {"GPT": gpt, "BERT": bert, "ResNet-18": resnet}.items():
        torch.manual_seed(0)
        model, loss = make(settings)
        model.to(settings.device)
        works = {kind: step_of(kind, model, loss) for kind in KINDS}
        seconds = medians(works, few, warm=1)
        rows += ratios("training step", seconds, "dense", f"{name}, ")
        ours = {kind: seconds[kind] for kind in KINDS[2:]}
        rows += ratios("training step", ours, KINDS[2], f"{name}, ")
        peaks = {kind: float(peak_bytes(work, settings.device)) for kind, work in works.items()}
        rows += [row._replace(seconds=None) for row in ratios("peak memory", peaks, "dense", f"{name}, ")]
    return rows


def layers(settings: Settings) -> list[Row]:
    """What our own Python costs for each of many small layers, in microseconds a step."""
    count = 50 if settings.quick else 1000
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(count)))
    for parameter in model.parameters():
        if parameter.dim() == 2:  # or gradients vanish on the way, and a second moment of zero is not frozen
            nn.init.orthogonal_(parameter)
    model.to(settings.device)
    x = torch.randn(2, 8, device=settings.device)

    def loss(net: nn.Module) -> Tensor:
        value: Tensor = net(x).square().mean()
        return value

    found = medians({kind: step_of(kind, model, loss) for kind in KINDS}, settings)
    dense = found["dense"]
    rows = [Row("layers", f"dense step, of {count} layers", "us a layer", dense / count * 1e6, dense)]
    rows += [
        Row("layers", f"{kind}, over dense", "us a layer", (found[kind] - dense) / count * 1e6, found[kind])
        for kind in KINDS[1:]
    ]
    extra = stages(model, loss, settings)
    return rows + [
        Row("layers", f"phase II, over dense, {stage}", "us a layer", (ours - plain) / count * 1e6, ours)
        for stage, (plain, ours) in extra.items()
    ]


def stages(model: nn.Module, loss: Callable[[nn.Module], Tensor], settings: Settings) -> dict[str, tuple[float, float]]:
    """Seconds of each stage of a step, of dense training and of phase II."""
    trained = {kind: sparse_of(kind, model) for kind in ("dense", "phase II")}
    found: dict[str, list[list[float]]] = {kind: [] for kind in trained}
    for _ in range(2 + settings.repeats):
        for kind, (net, optimizer) in trained.items():
            times = [stamp(settings)]
            value = loss(net)
            times.append(stamp(settings))
            value.backward()  # type: ignore[no-untyped-call]
            times.append(stamp(settings))
            optimizer.step()
            times.append(stamp(settings))
            optimizer.zero_grad()
            found[kind].append([after - before for before, after in pairwise(times)])
    dense, ours = ([statistics.median(each) for each in zip(*times[2:], strict=True)] for times in found.values())
    return dict(zip(("forward pass", "backward pass", "optimizer"), zip(dense, ours, strict=True), strict=True))


def stamp(settings: Settings) -> float:
    """The time when a device has done what it was given."""
    wait(settings.device)
    return time.perf_counter()


def half(settings: Settings) -> list[Row]:
    """GPT-2 small in bf16-mixed, compiled, on a GPU: phases against dense."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(use_cache=False, n_layer=2 if settings.quick else 12)
    tokens = torch.randint(0, config.vocab_size, (8, 1024), device=settings.device)
    model: nn.Module = GPT2LMHeadModel(config)
    model.to(settings.device)

    def loss(net: nn.Module) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            value: Tensor = net(tokens, labels=tokens).loss
        return value

    works: dict[str, Work] = {}
    for kind in KINDS[:3]:
        start = time.perf_counter()
        net = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
        if kind != "dense":
            Sparsifier(net, optimizer, 2, 4, recipe=recipe_of(kind), total_steps=10**9)
        fast = torch.compile(net)

        def step(fast: Any = fast, optimizer: torch.optim.Optimizer = optimizer) -> None:
            loss(fast).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):
            step()
        works[kind] = step
        print(f"GPT-2 small, {kind}: ready after {time.perf_counter() - start:.0f} s")
    return ratios("bf16-mixed, compiled", medians(works, settings, warm=3), "dense", "GPT-2 small, ")
