"""Inside of `kept_weights` every weight is masked once, and as it would be outside."""

import gc
import weakref

import pytest
import torch
from torch import nn

from lightning_step import kept_weights, nm_masks
from lightning_step.freshness import drop_kept
from tests.writes import WRITES, assert_fresh, count_masks, latent, read, trained


@pytest.fixture
def computed(monkeypatch):
    return count_masks(monkeypatch)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_after_a_write_among_kept_weights_the_weight_is_fresh(write, mode):
    model, _, _ = trained()
    model.eval()
    with kept_weights(model):
        with mode():
            before = read(model)
        write(model)
        model.eval()
        with mode():
            assert_fresh(model)
            assert not torch.equal(read(model)["0.weight"], before["0.weight"].to(latent(model).dtype))
    assert_fresh(model)


def test_tokens_are_generated_with_one_mask_each(computed):
    model, _, _ = trained()
    model.eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = [model(x * t) for t in range(5)]
    computed.clear()
    with kept_weights(model):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert all(torch.equal(model(x * t), one) for t, one in enumerate(expected))
        assert sorted(computed) == [(4, 16), (16, 8)]
        with torch.no_grad():
            model(x)
        assert len(computed) == 2
        model(x)  # with gradients: as ever
        assert len(computed) == 4
    with torch.no_grad():
        model(x)
    assert len(computed) == 6


def test_what_inference_mode_reads_first_serves_no_training():
    model, optimizer, _ = trained()
    with kept_weights(model):
        with torch.inference_mode():
            model(torch.ones(1, 8))
            model.eval()(torch.ones(1, 8))
        model(torch.ones(1, 8)).sum().backward()
        model.train()(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert_fresh(model)


@pytest.mark.parametrize("nested", [False, True])
def test_leaving_gives_the_memory_back(nested):
    model, _, _ = trained()

    @torch.no_grad()
    def evaluate():
        with kept_weights(model):
            seen.append(weakref.ref(model[0].weight))
            if nested:
                with kept_weights(model):
                    assert model[0].weight is seen[0]()
            assert seen[0]() is model[0].weight
            raise RuntimeError("as it must")

    seen = []
    model.eval()
    with pytest.raises(RuntimeError, match="as it must"):
        evaluate()
    gc.collect()
    assert seen[0]() is None
    assert model[0].weight is not model[0].weight


def test_no_parameter_is_kept_alive():
    model, _, _ = trained()
    model(torch.ones(1, 8))
    with kept_weights(model):
        parameter = weakref.ref(latent(model))
        for name in ("0.weight", "2.weight"):
            owner = model.get_submodule(name[0])
            owner.weight = nn.Parameter(torch.randn_like(owner._parameters["weight"]))
        gc.collect()
        # the optimizer holds its own; that is all there is
        assert parameter() is not None
        holders = [r for r in gc.get_referrers(parameter()) if isinstance(r, tuple)]
        assert holders == []


def test_a_compiled_model_knows_nothing_of_it():
    model, _, _ = trained()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled, x = torch.compile(model.eval(), backend=backend, fullgraph=True), torch.randn(3, 8)
    with torch.no_grad():
        expected = compiled(x)
        with kept_weights(model):
            assert torch.equal(compiled(x), expected)
            assert torch.equal(model(x), expected)
            latent(model).data.copy_(torch.randn(16, 8))
            changed = compiled(x)
        assert torch.equal(changed, model(x))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_models_without_masks_are_left_alone():
    with kept_weights(nn.Linear(4, 4)):
        pass
    drop_kept(nn.Linear(4, 4))


@torch.no_grad()
def test_a_mask_that_comes_on_slowly_is_followed():
    model, _, _ = trained()
    with kept_weights(model.eval()):
        for leak in (0.0, 0.5, 0.25):
            nm_masks(model)["0.weight"].leak = leak
            assert_fresh(model)
