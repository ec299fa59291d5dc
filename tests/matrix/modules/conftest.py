"""Small models of the kinds people train, with what has to be masked in each written down by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, GPT2Config, LlamaConfig, ResNetConfig, T5Config, ViTConfig
from transformers.models.bert.modeling_bert import BertForSequenceClassification
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.resnet.modeling_resnet import ResNetForImageClassification
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration
from transformers.models.vit.modeling_vit import ViTForImageClassification

from lightning_step import NMPattern

TWO_FOUR = NMPattern(2, 4)
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    outputs: Callable[[nn.Module], torch.Tensor]  # of a batch that is always the same
    dense: tuple[str, ...] = ()  # globs of the matrices that stay dense
    dim0: tuple[str, ...] = ()  # globs of the tensors that are grouped along dim 0; the others along dim 1
    select: dict[str, object] = field(default_factory=dict)

    def build(self) -> nn.Module:
        torch.manual_seed(1)
        return self.make()

    def loss(self, model: nn.Module, t: int) -> torch.Tensor:
        torch.manual_seed(t)  # dropout
        return self.outputs(model).square().mean()

    def dims(self, model: nn.Module) -> dict[str, int]:
        """Name to group dimension of all that has to be masked."""
        matrices = [name for name, p in model.named_parameters() if p.dim() > 1]
        masked = [name for name in matrices if not any(fnmatchcase(name, glob) for glob in self.dense)]
        return {name: 0 if any(fnmatchcase(name, glob) for glob in self.dim0) else 1 for name in masked}


def tokens(size: int = 6) -> torch.Tensor:
    return torch.arange(2 * size).reshape(2, size) % 11 + 2


def pixels(channels: int) -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * channels * 64).reshape(2, channels, 8, 8).sin()


def wave(*shape: int) -> torch.Tensor:
    return torch.linspace(0, 9, math.prod(shape)).sin().reshape(shape)


def logits(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**inputs).logits


class Recurrent(nn.Module):
    """Every recurrent layer and cell, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, bidirectional=True, proj_size=4, dropout=0.1)
        self.gru, self.rnn = nn.GRU(8, 8, batch_first=True), nn.RNN(8, 8, bias=False)
        self.cells = nn.ModuleList([nn.LSTMCell(8, 8), nn.GRUCell(8, 8), nn.RNNCell(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rnn(self.gru(self.lstm(x)[0])[0])[0][-1]
        for cell in self.cells:
            state = cell(x, cell(x))
            x = state[0] if isinstance(state, tuple) else state
        return x


class Convolutions(nn.Module):
    """Grouped, depthwise, pointwise, dilated, transposed and grouped transposed, in one to three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, padding_mode="circular")
        self.pointwise = nn.Conv2d(16, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 16, 2, stride=2)
        self.up_grouped = nn.ConvTranspose2d(16, 8, 3, groups=2)
        self.one = nn.Sequential(nn.Conv1d(8, 8, 3, dilation=2), nn.ReLU(), nn.ConvTranspose1d(8, 4, 3))
        self.three = nn.Conv3d(4, 4, (1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.pointwise(self.depthwise(self.grouped(self.stem(x)))).relu())
        x = self.one(self.up_grouped(self.up(x)).flatten(2))
        return self.three(x[..., None, None])


class Tied(nn.Module):
    """An embedding tied to the head, one module called twice, and one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.again = self.body
        self.side = nn.Linear(8, 8)
        self.side.weight = self.body.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.side(self.again(self.body(self.embedding(x)).tanh()).tanh()))


class Scaled(nn.Linear):
    """A subclass that computes with its weight by itself."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,oi->bo", x, self.weight * self.scale[:, None]) + self.bias


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.use_reentrant = nn.Linear(8, 8), use_reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 8)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant) if self.training else block(x)
        return x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=12, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.own(x, x, x, need_weights=False)[0]
        return self.cross(x, wave(2, 3, 4), wave(2, 3, 12))[0]


def gpt2(**changes: object) -> nn.Module:
    config = {"vocab_size": 16, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, **changes}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=1, **config))


def gpt2_checkpointed() -> nn.Module:
    model = gpt2(n_layer=2)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # a hook of theirs that cannot be pickled, and that nothing here needs
    return model


def llama() -> nn.Module:
    rope = {"vocab_size": 16, "num_key_value_heads": 1, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **rope))


def t5() -> nn.Module:
    sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SIZES, vocab_size=16, max_position_embeddings=8))


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=4))


def resnet() -> nn.Module:
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[16, 16], depths=[1, 1]))


TEXT = {"input_ids": tokens()}
CASES = {
    "GPT-2": Case(gpt2, partial(logits, **TEXT), dense=("*.wte.*", "*.wpe.*"), dim0=("*.h.*",)),
    "GPT-2 with its tied head": Case(
        gpt2, partial(logits, **TEXT), dense=("*.wpe.*",), dim0=("*.h.*",), select={"include": ["transformer.h", "lm_head"]}
    ),
    "GPT-2 with checkpoints": Case(gpt2_checkpointed, partial(logits, **TEXT), dense=("*.w?e.*",), dim0=("*.h.*",)),
    "BERT": Case(bert, partial(logits, **TEXT), dense=("*embeddings*",)),
    "Llama": Case(llama, partial(logits, **TEXT), dense=("*.embed_tokens.*", "lm_head.*"), select={"exclude": ["lm_head"]}),
    "T5": Case(t5, partial(logits, **TEXT, labels=tokens(4)), dense=("shared.*", "*.relative_attention_bias.*")),
    "ViT": Case(vit, partial(logits, pixel_values=pixels(4)), dense=("*.cls_token", "*.position_embeddings")),
    "ResNet": Case(resnet, partial(logits, pixel_values=pixels(3)), dense=("*.embedder.embedder.*",)),
    "Transformer": Case(
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), lambda model: model(wave(2, 3, 8), wave(2, 4, 8))
    ),
    "attention": Case(Attention, lambda model: model(wave(2, 5, 8)), dense=("*.bias_?",)),
    "recurrent": Case(Recurrent, lambda model: model(wave(5, 3, 8))),
    "convolutions": Case(
        Convolutions, lambda model: model(pixels(3)), dense=("stem.*", "depthwise.*"), dim0=("up*", "one.2.*")
    ),
    "tied": Case(Tied, lambda model: model(tokens()), dense=("embedding.*",)),
    "Linear subclass": Case(lambda: nn.Sequential(Scaled(8), nn.Tanh(), Scaled(8)), lambda model: model(wave(3, 8))),
    "reentrant checkpoints": Case(lambda: Checkpointed(True), lambda model: model(wave(3, 8))),
    "checkpoints": Case(lambda: Checkpointed(False), lambda model: model(wave(3, 8))),
}


def mask_by_sorting(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """2:4, group by group, as Python lists; the sort is stable, so equal magnitudes keep the lower place."""
    moved = weight.detach().movedim(dim, -1)
    rows = [[-abs(w) for w in group] for group in moved.reshape(-1, 4).tolist()]
    kept = [sorted(range(4), key=row.__getitem__)[:2] for row in rows]
    mask = torch.tensor([[i in places for i in range(4)] for places in kept])
    return mask.reshape(moved.shape).movedim(-1, dim)


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="session")
def by_sorting() -> Callable[[torch.Tensor, int], torch.Tensor]:
    return mask_by_sorting
