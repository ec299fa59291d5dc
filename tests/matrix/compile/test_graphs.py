"""torch.compile: as many graphs as the plain model needs and one more at the switch, and the numbers of eager."""

import copy
import shutil

import pytest
import torch
from torch import nn

from lightning_step import (
    ASP,
    SRSTE,
    STE,
    STEP,
    AtStep,
    Dense,
    NMPattern,
    Sparsifier,
    apply_nm_masks,
    export_model,
    find_targets,
    load_sparse,
    nm_masks,
    strip,
)

TWO_FOUR = NMPattern(2, 4)
STEPS, SWITCH = 6, 3
# torch's own, of plain blocks too: Dynamo looks at what one block hands to the next.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
RECIPES = {
    "Dense": Dense(),
    "ASP": ASP(AtStep(SWITCH)),
    "STE": STE(),
    "SRSTE": SRSTE(lam=1e-2),
    "STEP": STEP(AtStep(SWITCH), lam=1e-2),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc, self.out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.out(self.fc(x).relu())


class Net(nn.Sequential):
    def __init__(self, blocks):
        super().__init__(nn.Linear(8, 8), *(Block() for _ in range(blocks)))


def whole(model, backend):
    return torch.compile(model, backend=backend)


def per_block(model, backend):
    for block in list(model)[1:]:
        block.compile(backend=backend)
    return model


class Run:
    """A model trained from the same start every time."""

    def __init__(self, blocks, recipe, compiled=lambda model: model):
        torch.manual_seed(1)
        self.model, self.history = Net(blocks), []
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.sparsifier = recipe and Sparsifier(self.model, optimizer, recipe=recipe, total_steps=STEPS)
        net = compiled(self.model)
        for t in range(STEPS):
            torch.manual_seed(t)
            x = torch.randn(3, 4, 8)
            loss = (net(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.history.append([loss.detach(), *(p.detach().clone() for p in self.model.parameters())])

    @property
    def switched(self):
        return any(event.masks and event.step == SWITCH for event in self.sparsifier.events)

    def mask(self, name):
        return nm_masks(self.model)[name].mask(dict(self.model.named_parameters())[name])


def assert_same_run(compiled, eager):
    """The same weights after every step, and the same masks."""
    torch.testing.assert_close(compiled.history, eager.history, rtol=1e-5, atol=1e-6)
    for target in compiled.sparsifier.targets.masked:
        assert torch.equal(*(run.mask(target.name) for run in (compiled, eager))), target.name


@every_recipe
@pytest.mark.parametrize(("how", "blocks"), [(whole, 1), (per_block, 12)])
def test_no_graph_more_than_the_plain_model_needs_and_one_at_the_switch(counter, recipe, how, blocks):
    plain = counter("eager")
    Run(blocks, None, lambda model: how(model, plain))
    assert (plain.graphs, plain.breaks, plain.skipped) == (1, {}, 0)
    torch._dynamo.reset()
    ours = counter("eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        run = Run(blocks, recipe, lambda model: how(model, ours))
    assert run.switched == (type(recipe) in (ASP, STEP))
    assert (ours.graphs, ours.breaks, ours.skipped) == (1 + run.switched, {}, 0)
    assert_same_run(run, Run(blocks, recipe))


@pytest.mark.parametrize("recipe", ["ASP", "STEP"])
def test_compiled_forward_and_backward_train_to_the_weights_of_eager(counter, recipe):
    backend = counter("aot_eager")
    run = Run(1, RECIPES[recipe], lambda model: whole(model, backend))
    assert (backend.graphs, run.switched) == (2, True)
    assert_same_run(run, Run(1, RECIPES[recipe]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("gradient", ["straight_through", "masked"])
def test_a_masked_weight_traces_without_a_break_and_gives_the_bits_of_eager(counter, backend, gradient):
    layer = nn.Linear(8, 8, bias=False)
    weight = torch.randn(8, 8)
    weight[0], weight[1, :4] = torch.tensor([-0.0, 0, 1, -1] * 2), torch.tensor([torch.inf, -torch.inf, torch.nan, 2])
    layer.weight = nn.Parameter(weight)
    apply_nm_masks(layer, TWO_FOUR)
    nm_masks(layer)["weight"].gradient = gradient
    upstream = torch.randn(8, 8)
    upstream[2] = -0.0

    def read():
        return layer.weight * 1  # the product keeps every bit, of NaN too

    results = []
    for function in (read, torch.compile(read, backend=counter(backend), fullgraph=True)):
        layer.zero_grad()
        output = function()
        output.backward(upstream)
        results.append((output.detach().view(torch.int32), layer._parameters["weight"].grad.view(torch.int32)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_masks_that_come_after_compiling_and_calling_are_seen(counter):
    backend, x = counter("eager"), torch.randn(2, 4, 8)
    model = Net(2)
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    apply_nm_masks(model, TWO_FOUR)
    masked = compiled(x)
    strip(model)
    assert torch.equal(compiled(x), masked)
    assert torch.equal(model(x), masked)
    assert (backend.breaks, backend.skipped) == ({}, 0)


def test_a_mask_switched_off_and_on_again_uses_the_graphs_there_are(counter):
    backend, x = counter("eager"), torch.randn(2, 4, 8)
    model = Net(1)
    apply_nm_masks(model, TWO_FOUR)
    compiled = torch.compile(model, backend=backend)
    outputs = []
    for enabled in (False, True, False, True):
        for mask in nm_masks(model).values():
            mask.enabled = enabled
        with torch.compiler.set_stance("fail_on_recompile" if len(outputs) >= 2 else "default"):
            outputs.append(compiled(x))
    assert backend.graphs == 2
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


def test_layers_with_other_patterns_cost_graphs_only_where_code_is_shared(counter):
    backend = counter("eager")
    model = Net(4)
    apply_nm_masks(model, TWO_FOUR, overrides={"1": (1, 4), "2": (1, 4)})
    per_block(model, backend)
    model(torch.randn(2, 4, 8))
    assert (backend.graphs, backend.breaks) == (2, {})


@pytest.mark.filterwarnings("error:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_run_in_eager_as_plain_ones_do(counter, kind):
    backend, x = counter("eager"), torch.randn(3, 2, 8)
    model = nn.Sequential(nn.Linear(8, 8), kind(8, 8))
    apply_nm_masks(model, TWO_FOUR)
    compiled, graphs = torch.compile(model, backend=backend), []
    for enabled in (True, False) * 3:
        for mask in nm_masks(model).values():
            mask.enabled = enabled
        ours, theirs = compiled(x)[0], model(x)[0]
        assert torch.equal(ours, theirs)
        torch.autograd.grad(ours.sum(), model[1]._parameters["weight_hh_l0"])
        graphs.append(backend.graphs)
    assert graphs[2:] == [graphs[2]] * 4


def test_a_compiled_part_has_the_names_of_a_plain_one(counter, tmp_path):
    torch.manual_seed(1)
    plain = nn.ModuleDict({"net": Net(1), "head": nn.Linear(8, 8)})
    model = copy.deepcopy(plain)
    model["net"] = torch.compile(model["net"], backend=counter("eager"))
    chosen = {"include": ["net.1", "head"], "exclude": ["net.1.fc"], "overrides": {"net.1.out.*": (1, 4)}}
    targets = apply_nm_masks(model, TWO_FOUR, **chosen)
    assert targets == find_targets(plain, TWO_FOUR, **chosen)
    assert list(nm_masks(model)) == [t.name for t in targets.masked]
    exported = export_model(model, tmp_path / "model.safetensors")
    assert set(exported.manifest.sparse) == {t.name for t in targets.masked}
    for twin in (plain, model):
        load_sparse(exported.path, twin)
        assert int(twin["net"].get_submodule("1.out").weight.count_nonzero()) == 32
    assert strip(model) == [t.name for t in targets.masked]
    x = torch.randn(2, 4, 8)
    assert torch.equal(plain["net"](x), model["net"](x))


def test_masks_on_the_compiled_model_itself(counter):
    model = Net(1)
    compiled = torch.compile(model, backend=counter("eager"))
    targets = apply_nm_masks(compiled, TWO_FOUR)
    assert [t.name for t in targets.masked] == list(nm_masks(model))
    layer = torch.compile(nn.Linear(8, 8), backend=counter("eager"))
    assert [t.name for t in apply_nm_masks(layer, TWO_FOUR).masked] == ["weight"]
    assert int(layer.weight.count_nonzero()) == 32
    assert strip(layer) == ["weight"]


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning")
def test_inductor_compiles_masks_into_its_kernels(counter):
    torch.manual_seed(1)
    layer, backend = nn.Linear(8, 8), counter("inductor")
    apply_nm_masks(layer, TWO_FOUR)
    results = []
    for function in (layer, torch.compile(layer, backend=backend, fullgraph=True)):
        layer.zero_grad()
        output = function(torch.ones(2, 8))
        output.square().sum().backward()
        results.append([output.detach(), layer._parameters["weight"].grad])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert (backend.graphs, backend.breaks) == (1, {})
