"""A folder that transformers loads by itself, offline: the masked weights, the same outputs, and no word of sparsity."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from lightning_step import NMPattern, apply_nm_masks, find_targets, load_sparse, nm_masks, strip
from lightning_step.errors import ConfigurationError, ViolationError
from lightning_step.export import export_folder, read_manifest
from lightning_step.functional import find_violation

TWO_FOUR = NMPattern(2, 4)


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(**sizes, vocab_size=32, max_position_embeddings=16))


def gpt2():
    """Its head is tied to its embedding, and stored once."""
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0)
    )


LOADERS = {"bert": (bert, AutoModel), "gpt2": (gpt2, AutoModelForCausalLM)}


@pytest.fixture(params=LOADERS)
def made(request, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    make, loader = LOADERS[request.param]
    return make().eval(), loader


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_loads_the_folder_with_the_same_outputs(dtype, made, tmp_path):
    model, loader = made
    model.to(dtype)
    apply_nm_masks(model, TWO_FOUR)
    exported = export_folder(model, tmp_path / "out", info={"recipe": "STEP"})
    again, report = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert type(again) is type(model)
    assert again.dtype == dtype
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens)[0], model(tokens)[0])
    plain = dict(again.named_parameters())
    assert len(exported.manifest.sparse) == len({id(mask) for mask in nm_masks(model).values()})
    for name, entry in exported.manifest.sparse.items():
        assert find_violation(plain[name], entry.pattern, entry.dim) is None
    assert read_manifest(exported.path).info == {"recipe": "STEP"}
    assert load_sparse(exported.path, again) is again


def test_the_config_is_the_models_own_and_says_nothing_of_sparsity(made, tmp_path):
    model, _ = made
    apply_nm_masks(model, TWO_FOUR)
    export_folder(model, tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "spars" not in text
    assert "quantization" not in text
    config = json.loads(text)
    assert config["architectures"] == [type(model).__name__]
    assert config["model_type"] == model.config.model_type
    expected = {"config.json", "model.safetensors"} | ({"generation_config.json"} if model.can_generate() else set())
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_a_model_that_breaks_its_pattern_changes_nothing(made, tmp_path):
    model, _ = made
    targets = find_targets(model, TWO_FOUR)
    with pytest.raises(ViolationError, match="Export never prunes"):
        export_folder(model, tmp_path, targets=targets)
    assert list(tmp_path.iterdir()) == []
    apply_nm_masks(model, TWO_FOUR)
    strip(model)
    assert len(export_folder(model, tmp_path, targets=targets).manifest.sparse) == len(targets.masked)


def test_what_has_no_config_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"with a `config`, but got Sequential\. Pass the model itself"):
        export_folder(nn.Sequential(bert()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "adapter_config.json"])
def test_a_folder_with_other_weights_is_refused(name, tmp_path):
    model = bert()
    apply_nm_masks(model, TWO_FOUR)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigurationError, match=f"'{name}', which would be loaded instead"):
        export_folder(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
