import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper

from lightning_step import (
    STEP,
    AtStep,
    NMPattern,
    Sparsifier,
    apply_nm_masks,
    export_model,
    find_targets,
    load_sparse,
    nm_masks,
    strip,
)
from lightning_step.naming import named_modules, plain_name, submodule

TWO_FOUR = NMPattern(2, 4)


def make():
    return nn.ModuleDict({"net": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "head": nn.Linear(8, 8)})


def compiled(model):
    model["net"] = torch.compile(model["net"], backend="eager")
    return model


def checkpointed(model):
    apply_activation_checkpointing(model, checkpoint_wrapper, check_fn=lambda module: isinstance(module, nn.Linear))
    return model


def both(model):
    return compiled(checkpointed(model))


WRAPPERS = {"compiled": compiled, "checkpointed": checkpointed, "both": both}


@pytest.fixture(params=WRAPPERS)
def pair(request):
    """A plain model, and an equal one in wrappers."""
    torch.manual_seed(1)
    plain = make()
    return plain, WRAPPERS[request.param](copy.deepcopy(plain))


def test_wrappers_do_not_show_in_names(pair):
    plain, wrapped = pair
    assert [name for name, _ in named_modules(wrapped)] == [name for name, _ in plain.named_modules()]
    for name, module in named_modules(wrapped):
        assert submodule(wrapped, name) is module
        assert type(module) is type(plain.get_submodule(name))
    assert [plain_name(name) for name, _ in wrapped.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_masks_globs_strip_and_files_of_a_wrapped_model_have_plain_names(pair, tmp_path):
    plain, wrapped = pair
    arguments = {"exclude": ["net.0"], "overrides": {"net.1.weight": (1, 4)}}
    targets = apply_nm_masks(wrapped, TWO_FOUR, **arguments)
    assert targets == find_targets(plain, TWO_FOUR, **arguments)
    assert list(nm_masks(wrapped)) == ["net.1.weight", "head.weight"]
    path = export_model(wrapped, tmp_path / "model.safetensors", "packed").path
    loaded = [load_sparse(path, model) for model in (plain, wrapped)]
    assert strip(wrapped) == ["net.1.weight", "head.weight"]
    x = torch.randn(3, 8)
    for layer in ("net", "head"):
        assert torch.equal(loaded[0][layer](x), loaded[1][layer](x))


def test_a_wrapped_run_is_resumed_by_a_plain_one_and_the_reverse(pair):
    runs = []
    for model in pair:
        optimizer = torch.optim.AdamW(model.parameters())
        runs.append(Sparsifier(model, optimizer, recipe=STEP(AtStep(1), scope="all"), total_steps=10))
        for _ in range(2):
            model["head"](model["net"](torch.ones(1, 8))).square().sum().backward()
            optimizer.step()
    assert len(runs[1].frozen) == 6
    assert runs[0].state_dict() == runs[1].state_dict()
    runs[0].load_state_dict(runs[1].state_dict())
    runs[1].load_state_dict(runs[0].state_dict())


def test_a_module_under_two_names_is_known_by_both(tmp_path):
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "rest": nn.Linear(8, 8)})
    model["alias"] = model["body"]
    (target,) = find_targets(model, TWO_FOUR, include=["alias"]).masked
    assert (target.name, target.owners) == ("body.weight", (("body", "weight"), ("alias", "weight")))
    assert find_targets(model, TWO_FOUR, exclude=["alias"]).left_out[0].reason == "excluded by 'alias'"
    apply_nm_masks(model, TWO_FOUR, overrides={"alias.*": (1, 4)})
    assert list(nm_masks(model)) == ["body.weight", "rest.weight", "alias.weight"]
    assert nm_masks(model)["body.weight"] is nm_masks(model)["alias.weight"]
    assert int(model["body"].weight.count_nonzero()) == 16
    exported = export_model(model, tmp_path / "model.safetensors")
    assert (list(exported.manifest.sparse), exported.manifest.aliases["alias.weight"]) == (
        ["body.weight", "rest.weight"],
        "body.weight",
    )
    assert strip(model) == ["body.weight", "rest.weight"]
    assert type(model["alias"]) is nn.Linear
