import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_step import NMPattern, apply_nm_masks, nm_masks
from lightning_step.export import Manifest, SparseTensor, accelerations, format_accelerations, short_form
from lightning_step.export.acceleration import of_file

TIED = nn.ModuleDict({"embedding": nn.Embedding(64, 64), "head": nn.Linear(64, 64)})
TIED["head"].weight = TIED["embedding"].weight


class Own(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


@pytest.mark.parametrize(
    ("layer", "nm", "dtype", "takes", "reason"),
    [
        (nn.Linear(64, 64), (2, 4), torch.bfloat16, (True, True, True), ""),
        (nn.Linear(64, 64), (1, 4), torch.float16, (True, True, True), ""),  # holds 2:4 as well
        (nn.Linear(64, 64), (1, 2), torch.float16, (True, True, True), ""),
        (nn.Linear(64, 64), (2, 8), torch.float16, (True, True, True), ""),
        (nn.Linear(64, 64), (3, 8), torch.float16, (False, False, False), "3:8 is not 2:4"),
        (nn.Linear(60, 64), (1, 3), torch.float16, (False, False, False), "1:3 is not 2:4"),
        (nn.Linear(48, 16), (2, 4), torch.float16, (True, False, True), "cutlass needs multiples of 32x64"),
        (nn.Linear(8, 8), (2, 4), torch.float16, (False, False, True), "multiples of 16x16"),
        (nn.Linear(64, 64), (2, 4), torch.float32, (False, False, True), "takes no float32"),
        (nn.Conv2d(64, 64, 3), (2, 4), torch.float16, (False, False, True), "Linear layers only"),
        (nn.Conv2d(64, 64, 3, groups=2), (2, 4), torch.float16, (False, False, False), "a grouped convolution never"),
        (nn.ConvTranspose2d(64, 64, 3), (2, 4), torch.float16, (False, False, None), "transposed convolution"),
        (Conv1D(64, 64), (2, 4), torch.float16, (True, True, True), ""),
        (Conv1D(32, 64), (2, 4), torch.float16, (True, True, True), ""),  # packed as (out, in) = (32, 64)
        (Conv1D(64, 32), (2, 4), torch.float16, (True, False, True), "cutlass needs multiples of 32x64"),
        (nn.LSTM(64, 64), (2, 4), torch.float16, (False, False, None), "nothing is documented of a LSTM"),
        (Own(64, 64), (2, 4), torch.float16, (False, False, None), "this is a Own"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_every_layer_gets_a_verdict_and_a_reason(layer, nm, dtype, takes, reason):
    apply_nm_masks(layer, NMPattern(*nm))
    row = accelerations(layer, dtype)[0]
    assert tuple(verdict.takes for verdict in row.verdicts.values()) == takes
    assert reason in " ".join(verdict.reason for verdict in row.verdicts.values())
    assert all(bool(verdict.reason) != bool(verdict.takes) for verdict in row.verdicts.values())


def test_a_head_tied_to_an_embedding_is_not_packed():
    apply_nm_masks(TIED, NMPattern(2, 4), include=["embedding", "head"])
    [row] = accelerations(TIED, torch.float16)
    assert (row.layer, row.nowhere) == ("tied embedding", True)
    assert set(nm_masks(TIED)) == {"embedding.weight", "head.weight"}


def test_the_short_form_counts_and_the_table_numbers_its_reasons():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 24), nn.Linear(24, 24))
    apply_nm_masks(model, NMPattern(2, 4))
    rows = accelerations(model, torch.bfloat16)
    assert short_form(rows) == (
        "can run sparse as bfloat16: torch cuSPARSELt 1 of 3 tensors (cusparselt needs multiples of 16x16 for bfloat16), "
        "torch CUTLASS 1, TensorRT 3"
    )
    assert [line.split() for line in format_accelerations(rows).splitlines()[2:4]] == [
        ["1.weight", "linear", "no", "[1]", "no", "[2]", "yes"],
        ["2.weight", "linear", "no", "[1]", "no", "[2]", "yes"],
    ]


@pytest.mark.parametrize(
    ("shape", "dim", "nm", "layer", "takes"),
    [
        ((64, 64), 1, (2, 4), "linear?", (None, None, None)),
        ((64, 72), 1, (2, 4), "linear?", (False, False, None)),  # what speaks against it is sure
        ((64, 64), 0, (2, 4), "HF Conv1D?", (None, None, None)),
        ((64, 64, 3, 3), 1, (2, 4), "convolution?", (False, False, None)),
        ((64, 64, 3, 3), 1, (3, 8), "convolution?", (False, False, False)),
        ((64, 64, 3), 0, (2, 4), "transposed convolution?", (False, False, None)),
    ],
)
def test_a_file_that_does_not_name_its_layers_gets_no_yes(shape, dim, nm, layer, takes):
    sparse = {"weight": SparseTensor(*nm, dim, shape)}
    [row] = of_file(Manifest("dense", sparse), {"weight": torch.float16})
    assert (row.layer, tuple(verdict.takes for verdict in row.verdicts.values())) == (layer, takes)
    if layer == "convolution?" and takes[2] is None:
        assert row.verdicts["tensorrt"].reason == "yes, if its convolution is not grouped; the file does not name its layers"


def test_a_file_that_names_its_layers_is_believed():
    sparse = {name: SparseTensor(2, 4, 1, (64, 64, 3)) for name in ("a", "b")}
    manifest = Manifest("dense", sparse, info={"layers": {"a": "convolution", "b": "grouped convolution"}})
    rows = of_file(manifest, dict.fromkeys(sparse, torch.float16))
    assert [(row.layer, row.verdicts["tensorrt"].takes) for row in rows] == [
        ("convolution", True),
        ("grouped convolution", False),
    ]
