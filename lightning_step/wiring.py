"""What a driver needs to know of a recipe, a model and an optimizer before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_step.errors import TargetError
from lightning_step.freezing import FrozenStep
from lightning_step.functional import Layer
from lightning_step.masking import MaskSet, parameter_of
from lightning_step.naming import plain_name
from lightning_step.optim import SecondMomentAdapter, adapter_for
from lightning_step.optim.refused import check_holds_zeros
from lightning_step.rates import check_rates
from lightning_step.recipes import AtStep, Clock, Moment, Recipe, Switch, given_rate
from lightning_step.sharding import Reduce, any_sharded, local
from lightning_step.targets import LeftOut, Target, Targets
from lightning_step.watching import Role

__all__ = ["adapter_of", "check_plan", "clock_of", "frozen_step", "held_by", "needs_adapter", "only_makes_state", "switches"]


def adapter_of(recipe: Recipe, optimizer: Optimizer) -> SecondMomentAdapter | None:
    """What answers for the second moment of an optimizer, if a recipe asks.

    Args:
        recipe: The recipe.
        optimizer: The optimizer.

    Returns:
        The adapter; None if any optimizer will do.

    Raises:
        OptimizerError: If the optimizer cannot serve the recipe.

    Example:
        >>> import torch
        >>> from lightning_step import STE
        >>> adapter_of(STE(), torch.optim.SGD([torch.zeros(1)])) is None
        True
    """
    if recipe.plan().gradient.fixed:
        check_holds_zeros(optimizer)
    if recipe.plan().rate is not given_rate:
        check_rates(optimizer)
    return adapter_for(optimizer) if needs_adapter(recipe) else None


def check_plan(recipe: Recipe, targets: Sequence[Target], total_steps: int | None) -> None:
    """Refuse what a recipe cannot do for these tensors, or in a run of this length, before anything is changed.

    Args:
        recipe: The recipe.
        targets: The tensors to mask.
        total_steps: Optimizer steps of the whole run, if known.

    Raises:
        ConfigurationError: If a fraction is of nobody knows what, or a budget is too small.

    Example:
        >>> from lightning_step import STE
        >>> check_plan(STE(), [], None)
    """
    plan, moment = recipe.plan(), Moment(0, None, total_steps)
    plan.fade(moment)
    for target in targets:
        plan.pattern(target.name, target.pattern, moment)
        plan.rate(target.pattern, 0.0, moment)
    if plan.allocate is not None:  # whatever the weights will be
        plan.allocate([t.name for t in targets], [Layer(t.shape, t.pattern) for t in targets])


def needs_adapter(recipe: Recipe) -> bool:
    """Whether a recipe has to read the second moment; if not, any torch optimizer will do.

    Args:
        recipe: The recipe.

    Returns:
        True if it freezes the second moment or samples it to find a switch.

    Example:
        >>> from lightning_step import SRSTE, STEP
        >>> needs_adapter(STEP()), needs_adapter(SRSTE())
        (True, False)
    """
    plan = recipe.plan()
    return plan.freeze is not None or not (plan.masks is None or isinstance(plan.masks, AtStep))


def switches(recipe: Recipe) -> dict[Role, Switch]:
    """What each switch of a recipe begins.

    Args:
        recipe: The recipe.

    Returns:
        Role to switch.

    Example:
        >>> from lightning_step import STE
        >>> switches(STE())
        {'masks': AtStep(step=0)}
    """
    plan = recipe.plan()
    switches: dict[Role, Switch] = {}
    if plan.masks is not None:
        switches["masks"] = plan.masks
    if plan.freeze is not None:
        switches["freeze"] = plan.freeze.when
    return switches


def frozen_step(
    recipe: Recipe, adapter: SecondMomentAdapter | None, optimizer: Optimizer, model: nn.Module, masks: MaskSet
) -> FrozenStep | None:
    """What takes the preconditioned steps of a recipe.

    Args:
        recipe: The recipe.
        adapter: The optimizer's adapter, if the recipe needs one.
        optimizer: The optimizer.
        model: The model.
        masks: The masked tensors.

    Returns:
        The frozen step, nothing frozen yet; None if the recipe never freezes.

    Example:
        >>> import torch
        >>> from lightning_step import STE
        >>> frozen_step(STE(), None, torch.optim.SGD([torch.zeros(1)]), nn.Linear(4, 4), None) is None
        True
    """
    freeze = recipe.plan().freeze
    if freeze is None or adapter is None:
        return None
    scope = masks.parameters if freeze.scope == "masked" else _names(optimizer, model)
    return FrozenStep(optimizer, adapter, freeze, scope)


def _names(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Every parameter the optimizer holds, by its name in the model (or its place, if it is of another model)."""
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {names.get(id(p), f"param_groups[{i}]"): p for i, p in enumerate(held)}


def held_by(optimizer: Optimizer, model: nn.Module, targets: Targets) -> Targets:
    """Leave out the targets whose parameter an optimizer does not hold.

    Args:
        optimizer: The optimizer.
        model: The model the targets were found in.
        targets: What could be masked.

    Returns:
        What this optimizer can train masks for.

    Raises:
        TargetError: If that is nothing.

    Example:
        >>> import torch
        >>> from lightning_step import NMPattern, find_targets
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> targets = find_targets(model, NMPattern(2, 4))
        >>> [t.name for t in held_by(torch.optim.SGD(model[0].parameters()), model, targets).masked]
        ['0.weight']
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    holds = {t.name: id(parameter_of(model, t)) in held for t in targets.masked}
    masked = tuple(t for t in targets.masked if holds[t.name])
    others = tuple(LeftOut(t.name, t.shape, "the optimizer does not hold it") for t in targets.masked if not holds[t.name])
    if not masked:
        raise TargetError(
            f"Expected the optimizer to hold at least one tensor to mask, but got none of {len(targets.masked)} (the first "
            f"is {targets.masked[0].name!r}). Make the optimizer from the parameters of the same model."
        )
    return Targets(masked, targets.left_out + others)


def clock_of(adapter: SecondMomentAdapter | None, optimizer: Optimizer, total_steps: int | None) -> Clock:
    """What a recipe's switches may know of the run.

    Args:
        adapter: The optimizer's adapter, if there is one.
        optimizer: The optimizer.
        total_steps: Optimizer steps of the whole run, if known.

    Returns:
        The clock.

    Example:
        >>> import torch
        >>> clock_of(None, torch.optim.SGD([torch.zeros(1)]), 100)
        Clock(total_steps=100, beta2=None, eps=None)
    """
    if adapter is None:
        return Clock(total_steps)
    # Groups may differ: the longest memory sets the window, the strictest eps the threshold.
    moments = [adapter.moments(group) for group in optimizer.param_groups]
    return Clock(total_steps, max(m.beta2 for m in moments), min(m.eps for m in moments))


def only_makes_state(optimizer: Optimizer, reduce: Reduce) -> bool:
    """Whether a step is none, but made at rate 0 with zero gradients so that the optimizer makes its state.

    ``torch.distributed.checkpoint`` takes such a step before it loads or saves an optimizer that has no state yet. All
    that it must not do is count.

    Args:
        optimizer: The optimizer, about to step.
        reduce: Adds a tensor up over all processes.

    Returns:
        True if it is no step of training.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> weight.grad = torch.zeros(1)
        >>> [only_makes_state(torch.optim.Adam([weight], lr=lr), lambda total: total) for lr in (0.0, 0.1)]
        [True, False]
    """
    if optimizer.state or any(float(group.get("lr", 1)) for group in optimizer.param_groups):
        return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    moved = torch.stack([local(grad).count_nonzero().to(local(grads[0]).device) for grad in grads]).sum()
    # One process may hold nothing but zeros of a gradient: what it is, is said by all.
    return not bool(reduce(moved) if any_sharded(grads) else moved)
