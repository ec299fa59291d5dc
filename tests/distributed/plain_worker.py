"""Trains a small net in a plain loop: alone, under DDP and under FSDP2. Writes what came out, one file per subject."""

from __future__ import annotations

import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    AutoSwitch,
    Dense,
    NMPattern,
    Sparsifier,
    apply_nm_masks,
    nm_masks,
    strip,
)
from lightning_step.export import export_model
from lightning_step.recipes import Concentration, Layerwise, MaskDecay, StructureDecay

STEPS = 14
RECIPES = {
    "Dense": Dense(),
    "ASP": ASP(AtStep(5)),
    "STE": STE(),
    "SRSTE": SRSTE(lam=1e-2),
    "STEP": STEP(AutoSwitch(window=4, threshold=2.5e-4, t_min=2, t_max=12), lam=1e-2),
    "STEP, geometric, all": STEP(AutoSwitch("geometric", window=3, threshold=1e-9, t_min=0, t_max=7), scope="all"),
    "decays, by drift": StructureDecay(MaskDecay(STEP(Concentration(2.7, window=4, t_min=6, t_max=12)), end=13), end=12),
    "layer by layer": Layerwise(StructureDecay(SRSTE(lam=1e-2), end=9), by="magnitude"),
}
FOLDER = Path(sys.argv[-1])
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Net(nn.Module):
    """Twelve rows for two ranks, five (one holds more), and one (one holds nothing)."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.uneven, self.single = nn.Linear(8, 12), nn.Linear(12, 5), nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.even(x).tanh()
        return self.uneven(hidden) + self.single(hidden)


def make_net() -> Net:
    torch.manual_seed(7)
    return Net().double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x[:, :5].sin()


def part(rows: Tensor, share: bool) -> Tensor:
    return rows[RANK::WORLD] if share else rows


def loss_of(model: nn.Module, step: int, share: bool) -> Tensor:
    x, y = (part(rows, share) for rows in batch(step))
    return nn.functional.mse_loss(model(x), y)


def adam(model: nn.Module, **arguments: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.02, "betas": (0.9, 0.9), **arguments})


def sharded(masks_first: bool = True, **arguments: Any) -> Net:
    net = make_net()
    if masks_first:
        apply_nm_masks(net, NMPattern(2, 4), enabled=False)
    for layer in (net.even, net.uneven):
        fully_shard(layer, **arguments)
    return fully_shard(net, **arguments)  # `single` belongs to the root, which keeps it gathered after forward


def train(model: nn.Module, recipe: Any, steps: range = range(STEPS), share: bool = True, **arguments: Any) -> Any:
    optimizer = adam(model)
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    sparsifier = Sparsifier(plain, optimizer, 2, 4, recipe=recipe, read_every=1, measure_every=1, **arguments)
    gauges = []
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, share).backward()
        optimizer.step()
        gauges.append(sparsifier.gauges())
    return optimizer, sparsifier, gauges


def everything(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def outcome(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier, gauges: Any) -> dict[str, Any]:
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        return {
            "weights": {name: everything(value).clone() for name, value in plain.state_dict().items()},
            "moments": [everything(state["exp_avg_sq"]).clone() for state in states],
            "state": sparsifier.state_dict(),
            "gauges": gauges,
            "output": model(batch(99)[0]).clone(),
        }


def save(name: str, value: Any) -> None:
    torch.save(value, FOLDER / f"{name}.{RANK}.pt")


def raised(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def alone() -> None:
    for name, recipe in RECIPES.items():
        net = make_net()
        save(f"alone, {name}", outcome(net, *train(net, recipe, share=False)))


def together() -> None:
    for name, recipe in RECIPES.items():
        ddp = DistributedDataParallel(make_net(), gradient_as_bucket_view=True)
        save(f"DDP, {name}", outcome(ddp, *train(ddp, recipe)))
        for order, masks_first in (("before", True), ("after", False)):
            net = sharded(masks_first)
            save(f"FSDP2, masks {order}, {name}", outcome(net, *train(net, recipe)))


def subset() -> None:
    """Few coordinates, at odd places: those that one process alone would read."""
    recipe = STEP(AutoSwitch(window=50, t_min=0, t_max=12))
    net = make_net()
    _, _, gauges = train(net, recipe, range(6), share=False, max_coordinates=34, reduce=lambda total: total)
    _, _, shared = train(sharded(), recipe, range(6), max_coordinates=34)
    save("subset", (gauges, shared))


def classes() -> None:
    """What fully_shard has put on top stays, whether masks come before or after it, and when they go."""
    before, after, never = sharded(), sharded(masks_first=False), make_net()
    for net in (before, after):
        train(net, SRSTE())
    for layer in (never.even, never.uneven):
        fully_shard(layer)
    fully_shard(never)
    seen: dict[str, Any] = {"masked": [[type(m).__name__ for m in net.modules()] for net in (before, after)]}
    weights = [{n: everything(w).clone() for n, w in net.state_dict().items()} for net in (before, after)]
    patterns = nm_masks(before)
    hard = [{n: (patterns[n].mask(w) * w if n in patterns else w) for n, w in each.items()} for each in weights]
    outputs = [net(batch(3)[0]).detach() for net in (before, after)]  # leaves the root's weights gathered
    seen["hardened"] = [strip(net) for net in (before, after)]
    seen["stripped"] = [
        [type(m).__mro__[1:] == type(n).__mro__[1:] for m, n in zip(net.modules(), never.modules(), strict=True)]
        for net in (before, after)
    ]
    seen["names"] = [[type(m).__name__ for m in net.modules()] for net in (before, after, never)]
    seen["same output"] = [torch.equal(net(batch(3)[0]), out) for net, out in zip((before, after), outputs, strict=True)]
    for net in (before, after):
        net.reshard()
    seen["zeros"] = [
        all(torch.equal(everything(w), expected[n]) for n, w in net.state_dict().items())
        for net, expected in zip((before, after), hard, strict=True)
    ]
    loss_of(before, 0, True).backward()  # still sharded, still training
    seen["trains"] = all(isinstance(p.grad, DTensor) for p in before.parameters())
    save("classes", seen)


def cut_groups() -> None:
    def make(rows: int, **arguments: Any) -> nn.Module:
        torch.manual_seed(1)
        net = nn.Sequential(nn.ConvTranspose1d(rows, 4, 1))
        return fully_shard(net, **arguments)

    def sparsify(net: nn.Module) -> None:
        Sparsifier(net, adam(net), recipe=SRSTE())

    wide = lambda p: Shard(1) if p.dim() > 1 else None  # noqa: E731
    whole, across = make(16), make(12, shard_placement_fn=wide)
    sparsify(across)
    dense = across.state_dict()["0.weight"].full_tensor()
    shown = nm_masks(across)["0.weight"].mask(across.state_dict()["0.weight"]).full_tensor()
    save(
        "cut groups",
        {
            "12 rows": raised(lambda: sparsify(make(12))),
            "16 rows": raised(lambda: sparsify(whole)),
            "12 rows, other dim": torch.equal(shown, nm_masks(across)["0.weight"].mask(dense)),
            "apply": raised(lambda: apply_nm_masks(make(12), NMPattern(2, 4))),
            "untouched": type(make(12)[0]).__name__,
        },
    )


def odd_gradients() -> None:
    """One process has no gradient, one has a bad one: all must see the same and none may wait for the others."""
    recipe, seen = STEP(AutoSwitch(window=50, t_min=0, t_max=12)), {}
    for name, spoil in {
        "no gradient on one": lambda grads: grads.clear() if RANK == 1 else None,
        "NaN on one": lambda grads: grads[0].fill_(float("nan")) if RANK == 1 else None,
    }.items():
        net = make_net()
        optimizer = adam(net)
        sparsifier = Sparsifier(net, optimizer, recipe=recipe, read_every=4, exclude=["single"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(8):
                optimizer.zero_grad()
                loss_of(net, step, True).backward()
                if step in (2, 5):
                    grads = [net.even.weight.grad, net.uneven.weight.grad]
                    spoil(grads)
                    if not grads:
                        net.even.weight.grad = net.uneven.weight.grad = None
                optimizer.step()
                if step == 3 and RANK == 0:
                    sparsifier.state_dict()  # the usual "if rank == 0: torch.save(...)"
        samples = sparsifier.state_dict()["open"]["masks"]["samples"]
        seen[name] = (samples, sparsifier.t, [str(w.message) for w in caught])
    # A rank's own shard is bad, after everything has been averaged.
    net = sharded()
    optimizer = adam(net)
    sparsifier = Sparsifier(net, optimizer, recipe=STEP(AtStep(3)), read_every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(5):
            optimizer.zero_grad()
            loss_of(net, step, True).backward()
            if step == 1 and RANK == 1:
                next(net.even.parameters()).grad.to_local()[0, 0] = float("inf")
            optimizer.step()
    seen["infinite v in one shard"] = (sparsifier.frozen, sparsifier.phase, [str(w.message) for w in caught])
    save("odd gradients", seen)


def loss_scaler() -> None:
    """A gradient that overflows in one shard is skipped by all, and counts as no step and no sample."""
    for kind in ("fused", "for-loop"):
        net = sharded()
        optimizer = adam(net, fused=kind == "fused")
        sparsifier = Sparsifier(
            net, optimizer, recipe=STEP(AutoSwitch(window=50, t_min=0, t_max=50), masks_from=AtStep(0)), read_every=1
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, step, True)).backward()
            if step == 2 and RANK == 1:
                next(net.even.parameters()).grad.to_local()[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        state = sparsifier.state_dict()
        save(f"loss scaler, {kind}", (state["t"], state["open"]["freeze"]["samples"], scaler.get_scale()))


def checkpoint(net: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier, path: Path) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_model_state_dict(net, options=options), get_optimizer_state_dict(net, optimizer, options=options)
    state = sparsifier.state_dict()
    if RANK == 0:
        torch.save({"weights": weights, "moments": moments, "sparsifier": state}, path)


def resume(net: nn.Module, recipe: Any, path: Path, share: bool) -> Any:
    dist_options = StateDictOptions(full_state_dict=True)
    saved = torch.load(path, weights_only=True)
    optimizer = adam(net)
    sparsifier = Sparsifier(net, optimizer, 2, 4, recipe=recipe, read_every=1, measure_every=1)
    set_model_state_dict(net, saved["weights"], options=dist_options)
    set_optimizer_state_dict(net, optimizer, saved["moments"], options=dist_options)
    sparsifier.load_state_dict(saved["sparsifier"])
    gauges = []
    for step in range(sparsifier.t, STEPS):
        optimizer.zero_grad()
        loss_of(net, step, share).backward()
        optimizer.step()
        gauges.append(sparsifier.gauges())
    return outcome(net, optimizer, sparsifier, gauges)


HALF = {"in phase I": 3, "in phase II": 9}
SAVED = [(name, when) for name in RECIPES for when in HALF if when == "in phase II" or name == "STEP"]


def save_alone() -> None:
    for name, when in SAVED:
        net = make_net()
        optimizer, sparsifier, _ = train(net, RECIPES[name], range(HALF[when]), share=False)
        checkpoint(net, optimizer, sparsifier, FOLDER / f"saved alone {when}, {name}")


def resume_alone() -> None:
    for name, when in SAVED:
        path = FOLDER / f"saved together {when}, {name}"
        save(f"together to alone {when}, {name}", resume(make_net(), RECIPES[name], path, share=False))


def save_and_resume_together() -> None:
    for name, when in SAVED:
        recipe, net = RECIPES[name], sharded()
        path, other = FOLDER / f"saved together {when}, {name}", FOLDER / f"saved alone {when}, {name}"
        optimizer, sparsifier, _ = train(net, recipe, range(HALF[when]))
        checkpoint(net, optimizer, sparsifier, path)
        dist.barrier()
        save(f"together to together {when}, {name}", resume(sharded(), recipe, path, share=True))
        save(f"alone to together {when}, {name}", resume(sharded(), recipe, other, share=True))


def state_making_step() -> None:
    """torch makes the state of a fresh optimizer by a step; that is none."""
    net = sharded()
    optimizer = adam(net)
    sparsifier = Sparsifier(net, optimizer, recipe=ASP(AtStep(1)), read_every=1)
    before = {n: everything(w).clone() for n, w in net.state_dict().items()}
    get_optimizer_state_dict(net, optimizer)
    after = {n: everything(w) for n, w in net.state_dict().items()}
    same = all(torch.equal(before[n], after[n]) for n in before)
    phase, warm = sparsifier.phase, adam(net, lr=0.0)
    counting = Sparsifier(net, warm, recipe=SRSTE())
    loss_of(net, 0, True).backward()
    warm.step()  # a warm-up that begins at rate 0 is a step
    save("state-making step", (sparsifier.t, phase, same, counting.t))


def exports() -> None:
    net = sharded()
    train(net, SRSTE(), range(4))
    seen: dict[str, Any] = {}
    for format in ("dense", "packed"):
        net(batch(0)[0])  # leaves the root's weights gathered
        exported = export_model(net, FOLDER / f"{format}.safetensors", format)  # type: ignore[arg-type]
        seen[format] = (exported.bytes, sorted(exported.manifest.sparse))
    masks = nm_masks(net)
    weights = {n: everything(w) for n, w in net.state_dict().items()}
    seen["expected"] = {n: masks[n].mask(w) * w if n in masks else w for n, w in weights.items()}
    seen["folder"] = raised(lambda: export_model(net, FOLDER))
    with small_disk() if RANK == 0 else nullcontext():  # the first process alone has no room
        seen["full disk"] = raised(lambda: export_model(net, FOLDER / "never.safetensors"))
    dist.barrier()  # all are still together
    save("exports", seen)


@contextmanager
def small_disk() -> Iterator[None]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if RANK == 0:
        alone()
        save_alone()
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    subjects = (together, subset, classes, cut_groups, odd_gradients, loss_scaler, save_and_resume_together)
    for subject in (*subjects, state_making_step, exports):
        subject()
    dist.barrier()
    dist.destroy_process_group()
    if RANK == 0:
        resume_alone()
