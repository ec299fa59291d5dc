"""A net whose masks are kept while it trains, and every way to write into its weights."""

import torch
from torch import nn

from lightning_step import SRSTE, NMPattern, Sparsifier, latent_weights, nm_masks, parametrization, together
from lightning_step.freshness import drop_kept


def count_masks(monkeypatch):
    """A list that grows by the shape of every weight whose mask is computed."""
    shapes, compute, compute_all = [], parametrization.magnitude_mask, together.magnitude_masks

    def counting(weight, *args):
        shapes.append(tuple(weight.shape))
        return compute(weight, *args)

    def counting_all(weights, *args):
        shapes.extend(tuple(weight.shape) for weight in weights)
        return compute_all(weights, *args)

    monkeypatch.setattr(parametrization, "magnitude_mask", counting)
    monkeypatch.setattr(together, "magnitude_masks", counting_all)
    return shapes


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def trained(recipe=None, **arguments):
    """A net whose masks are on, and kept while it trains."""
    model = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **arguments)
    return model, optimizer, Sparsifier(model, optimizer, recipe=recipe or SRSTE(), total_steps=10)


def anew(model):
    """Every masked weight, computed without anything that is kept."""
    latents = dict(model.named_parameters())
    return {name: mask(latents[name]).detach() for name, mask in nm_masks(model).items()}


def read(model):
    return {name: model.get_submodule(name.rpartition(".")[0]).weight.detach() for name in nm_masks(model)}


def assert_fresh(model):
    ours, theirs = read(model), anew(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def other_memory_at_the_same_address(model):
    """As when the memory of a storage is given back, and comes again for the next one."""
    values = latent(model).detach().numpy()
    values[:] = torch.randn(16, 8).numpy()
    latent(model).data = torch.from_numpy(values)


def latent(model):
    return model[0]._parameters["weight"]


def fused(model):
    """A step of an optimizer that no driver has hooked, and whose writes torch 2.13 does not count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)
    latent(model).grad = torch.randn(16, 8)
    optimizer.step()


@torch.no_grad()
def in_place(model):
    latent(model).mul_(torch.randn(16, 8))


@torch.no_grad()
def initialized(model):
    with latent_weights(model):
        nn.init.normal_(model[0].weight)


@torch.inference_mode()
def in_inference_mode(model):
    latent(model).copy_(torch.randn(16, 8))


@torch.no_grad()
def by_foreach(model):
    torch._foreach_mul_([latent(model)], [torch.randn(16, 8)])


def other_pattern(model):
    nm_masks(model)["0.weight"].pattern = NMPattern(1, 4)


def other_leak(model):
    nm_masks(model)["0.weight"].leak = 0.5


def past_autograd_and_then(follow):
    def write(model):
        latent(model).data.copy_(torch.randn(16, 8))
        follow(model)

    write.__name__ = f"past_autograd_{follow.__name__}"
    return write


def back_and_forth(model):
    model.eval().train()


WRITES = [
    in_place,
    in_inference_mode,
    initialized,
    by_foreach,
    other_pattern,
    other_leak,
    fused,
    other_memory_at_the_same_address,
    past_autograd_and_then(nn.Module.train),
    past_autograd_and_then(nn.Module.eval),
    past_autograd_and_then(back_and_forth),
    past_autograd_and_then(drop_kept),
    lambda model: model.load_state_dict({name: torch.randn_like(p) for name, p in model.state_dict().items()}),
    lambda model: model.load_state_dict({n: torch.randn_like(p) for n, p in model.state_dict().items()}, assign=True),
    lambda model: setattr(latent(model), "data", torch.randn(16, 8)),
    lambda model: setattr(model[0], "weight", nn.Parameter(torch.randn(16, 8))),
    lambda model: nn.init.normal_(model.double()[0]._parameters["weight"]),
    lambda model: latent(model).detach().copy_(torch.randn(16, 8)),
    lambda model: model[0].register_parameter("weight", nn.Parameter(torch.randn(16, 8))),
]
