"""The start table, letter for letter."""

import pytest
import torch
from torch import nn

from lightning_step import LeftOut, NMPattern, Target, Targets, find_targets
from lightning_step.summary import format_table, format_targets


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(50, 16)
        self.scale = nn.Parameter(torch.ones(1))
        self.stem = nn.Conv2d(3, 16, 3)
        self.blocks = nn.ModuleList(Block(16) for _ in range(12))
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.token.weight


# 12 blocks of 48*16 + 16*16 + 2*64*16 = 3,072 weights under 2:4, but blocks.0.up (1,024) keeps 256 and blocks.11.down 128.
TRANSFORMER = """\
N:M masks on 48 of 124 tensors: 36,864 of 40,225 weights (91.6 %), of which 17,792 are kept
masked                              layer                            shape     n:m  along  tensors
blocks.*.attention.in_proj_weight   MultiheadAttention               (48, 16)  2:4  dim 1       12
blocks.*.attention.out_proj.weight  NonDynamicallyQuantizableLinear  (16, 16)  2:4  dim 1       12
blocks.0.up.weight                  Linear                           (64, 16)  1:4  dim 1        1
blocks.*.down.weight                Linear                           (16, 64)  2:4  dim 1       11
blocks.*.up.weight                  Linear                           (64, 16)  2:4  dim 1       11
blocks.11.down.weight               Linear                           (16, 64)  1:8  dim 1        1
left dense         shape          tensors  why
biases and scales                      74  1-D (a bias or a scale)
token.weight       (50, 16)             1  tied to an embedding (name 'head.weight' in `include` to mask both)
stem.weight        (16, 3, 3, 3)        1  size 3 along dim 1 is not divisible by m=4"""


def test_equal_blocks_share_a_row_and_what_differs_has_its_own():
    targets = find_targets(Transformer(), NMPattern(2, 4), overrides={"blocks.0.up": (1, 4), "blocks.11.down": (1, 8)})
    assert format_targets(targets) == TRANSFORMER


def test_nothing_left_out_is_not_mentioned():
    assert format_targets(find_targets(nn.Linear(8, 4, bias=False), NMPattern(1, 4))) == (
        "N:M masks on 1 of 1 tensors: 32 of 32 weights (100.0 %), of which 8 are kept\n"
        "masked  layer   shape   n:m  along  tensors\n"
        "weight  Linear  (4, 8)  1:4  dim 1        1"
    )


def test_layers_left_out_for_one_reason_share_a_row_too():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(8, 4, bias=False) for _ in range(3)), "head": nn.Linear(6, 2)})
    assert format_targets(find_targets(model, NMPattern(2, 4), exclude=["blocks.[12]"])) == (
        "N:M masks on 1 of 5 tensors: 32 of 110 weights (29.1 %), of which 16 are kept\n"
        "masked           layer   shape   n:m  along  tensors\n"
        "blocks.0.weight  Linear  (4, 8)  2:4  dim 1        1\n"
        "left dense       shape   tensors  why\n"
        "blocks.*.weight  (4, 8)        2  excluded by 'blocks.[12]'\n"
        "head.weight      (2, 6)        1  size 6 along dim 1 is not divisible by m=4\n"
        "head.bias                      1  1-D (a bias or a scale)"
    )


@pytest.mark.parametrize(
    ("kept", "dense", "shown"),
    [
        (8, 8, "8 of 16 weights (50.0 %)"),
        (4, 2**20, "4 of 1,048,580 weights (0.0 %)"),
        (2000, 1, "2,000 of 2,001 weights (100.0 %)"),
    ],
)
def test_the_share_is_of_all_weights_of_the_model(kept, dense, shown):
    masked = (Target("a.weight", "Linear", (1, kept), 1, NMPattern(2, 4), (("a", "weight"),)),)
    text = format_targets(Targets(masked, (LeftOut("b.weight", (dense,), "1-D (a bias or a scale)"),)))
    assert text.splitlines()[0] == f"N:M masks on 1 of 2 tensors: {shown}, of which {kept // 2:,} are kept"


def test_only_whole_numbers_between_dots_are_layer_numbers():
    names = ["net.1.conv2.weight", "net.2.conv2.weight", "net.2.conv3.weight", "0.weight", "1.weight"]
    masked = tuple(Target(name, "Linear", (4, 4), 1, NMPattern(2, 4), ()) for name in names)
    rows = format_targets(Targets(masked, ())).splitlines()[2:]
    assert [(row.split()[0], row.split()[-1]) for row in rows] == [
        ("net.*.conv2.weight", "2"),
        ("net.2.conv3.weight", "1"),
        ("0.weight", "1"),
        ("1.weight", "1"),
    ]


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_with_text():
    assert format_table([["a", "number", "b"], ["long", "7", ""], ["", "1,000", "x"]], right=[1]) == [
        "a     number  b",
        "long       7",
        "       1,000  x",
    ]
