"""A two-layer net, and every recipe written down a second time: no autograd, no code of the package, float64."""

import math

import pytest
import torch
from torch import nn

MASKED = ("0.weight", "2.weight")


def make_net(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def make_batch(t, dtype=torch.float64):
    """The data of the step after ``t`` steps: a function of ``t`` alone, so that a resumed run sees the same."""
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3].abs(), x[:, 4]], dim=1).to(dtype)


def fit(model, optimizer, steps, start=0, scale=lambda t: 1.0):
    """The plainest loop there is."""
    dtype = next(model.parameters()).dtype
    for t in range(start, steps):
        x, y = make_batch(t, dtype)
        (nn.functional.mse_loss(model(x), y) * scale(t)).backward()
        optimizer.step()
        optimizer.zero_grad()


def mask_by_sorting(weight, n, m):
    """Sorts every group as a Python list; the sort is stable, so equal magnitudes keep the lower place."""
    groups = weight.reshape(-1, m).tolist()
    kept = [sorted(range(m), key=lambda i, group=group: -abs(group[i]))[:n] for group in groups]
    rows = [[float(i in places) for i in range(m)] for places in kept]
    return torch.tensor(rows, dtype=weight.dtype).reshape(weight.shape)


def gradients_by_hand(weights, x, y):
    """Backpropagation through ``tanh`` and the mean squared error, worked out on paper."""
    hidden = torch.tanh(x @ weights["0.weight"].T + weights["0.bias"])
    out = 2 * (hidden @ weights["2.weight"].T + weights["2.bias"] - y) / y.numel()
    inner = (out @ weights["2.weight"]) * (1 - hidden**2)
    return {"0.weight": inner.T @ x, "0.bias": inner.sum(0), "2.weight": out.T @ hidden, "2.bias": out.sum(0)}


class AdamByHand:
    def __init__(self, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=True):
        self.lr, self.betas, self.eps, self.decay, self.decoupled = lr, betas, eps, weight_decay, decoupled
        self.m, self.v, self.t, self.frozen = {}, {}, 0, {}

    def freeze(self, names):
        for name in names:
            root = (self.v[name] / (1 - self.betas[1] ** self.t)).sqrt()
            assert (root > self.eps).all()  # dead coordinates have a test of their own
            self.frozen[name] = root + self.eps

    def __call__(self, weights, grads):
        b1, b2 = self.betas
        self.t += 1
        bound = max(1, (1 - b1) / math.sqrt(1 - b2))
        for name, grad in grads.items():
            grad = grad if self.decoupled else grad + self.decay * weights[name]
            self.m[name] = b1 * self.m.get(name, 0) + (1 - b1) * grad
            move = self.m[name] / (1 - b1**self.t)
            if name in self.frozen:
                move = (move / self.frozen[name]).clamp(-bound, bound)
            else:
                self.v[name] = b2 * self.v.get(name, 0) + (1 - b2) * grad**2
                move = move / ((self.v[name] / (1 - b2**self.t)).sqrt() + self.eps)
            shrunk = weights[name] * (1 - self.lr * self.decay) if self.decoupled else weights[name]
            weights[name] = shrunk - self.lr * move


class MomentumByHand:
    def __init__(self, lr=0.05, momentum=0.9, weight_decay=0.0):
        self.lr, self.momentum, self.decay, self.velocity = lr, momentum, weight_decay, {}

    def __call__(self, weights, grads):
        for name, grad in grads.items():
            self.velocity[name] = self.momentum * self.velocity.get(name, 0) + grad + self.decay * weights[name]
            weights[name] = weights[name] - self.lr * self.velocity[name]


def train_by_hand(
    net, update, steps, n=2, m=4, masks_at=None, freeze_at=None, lam=0.0, frozen=MASKED, fixed=False, leak=lambda t: 0.0
):
    """What a recipe does, step by step; returns the latent weights after every step. ``n`` may be a function of the step."""
    weights, history, held = {k: v.detach().clone() for k, v in net.named_parameters()}, [], {}
    for t in range(steps):
        on = masks_at is not None and t >= masks_at
        kept = n(t) if callable(n) else n
        if on and fixed and (not held or callable(n)):
            held = {name: mask_by_sorting(weights[name], kept, m) for name in MASKED}
            weights |= {name: weights[name] * held[name] for name in MASKED}
        if t == freeze_at:
            update.freeze(frozen)
        masks = held or {name: mask_by_sorting(weights[name], kept, m) for name in MASKED}
        strength = {name: mask + leak(t) * (1 - mask) for name, mask in masks.items()}
        seen = {k: w * strength[k] if on and k in masks else w for k, w in weights.items()}
        grads = gradients_by_hand(seen, *make_batch(t))
        for name in MASKED if on else ():
            grads[name] = grads[name] * masks[name] if fixed else grads[name] + lam * (1 - masks[name]) * weights[name]
        update(weights, grads)
        weights |= {name: weights[name] * held[name] for name in held}
        history.append(dict(weights))
    return history


@pytest.fixture
def net():
    return make_net


@pytest.fixture
def batch():
    return make_batch


@pytest.fixture
def train():
    return fit


@pytest.fixture
def by_sorting():
    return mask_by_sorting


@pytest.fixture
def by_hand():
    """`by_hand.train(net, by_hand.adam(...), steps, ...)`: the oracle of every recipe."""

    class ByHand:
        adam, momentum, train = AdamByHand, MomentumByHand, staticmethod(train_by_hand)

    return ByHand
