"""Packed tensors: bit-exact round trips, golden bytes, and a decoder that shares no code with the package."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_step import NMPattern
from lightning_step.errors import PatternError, ViolationError
from lightning_step.functional import Packed, index_bytes, index_width, pack_nm, unpack_nm

PATTERNS = [NMPattern(*nm) for nm in ((2, 4), (1, 4), (1, 8), (3, 8), (1, 16), (1, 32), (4, 4), (8, 16), (50, 100))]
WIDE = [NMPattern(*nm) for nm in ((32, 65), (33, 66), (65, 68), (99, 100), (127, 128))]
SMALL = [NMPattern(n, m) for m in range(2, 9) for n in range(1, m + 1)]
CARRIERS = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float64: torch.int64,
    torch.int8: torch.int8,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
}
DIMS = [(ndim, dim) for ndim in (2, 3, 4) for dim in range(ndim)]


def bits(tensor):
    return tensor.contiguous().view(CARRIERS[tensor.dtype])


def random_nm(pattern, ndim, dim, dtype=torch.float32, seed=0):
    """Random bit patterns (NaN, infinities and minus zeros among them) at random places, plus zeros elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [2, 3, 2, 3][:ndim]
    sizes[dim] = 3 * pattern.m
    moved = [*sizes[:dim], *sizes[dim + 1 :], sizes[dim]]
    places = torch.rand(math.prod(sizes) // pattern.m, pattern.m, generator=generator).argsort(1)
    info = torch.iinfo(CARRIERS[dtype])
    values = torch.randint(info.min, info.max, places.shape, generator=generator).to(CARRIERS[dtype])
    values[places >= pattern.n] = 0
    return values.reshape(moved).movedim(-1, dim).view(dtype)


def masks_in_order(pattern):
    """All masks of a group as their kept places, in colexicographic order: the place in this list is the rank."""
    return sorted(combinations(range(pattern.m), pattern.n), key=lambda places: places[::-1])


def decode(index, groups, pattern):
    """Kept places of every group, from the documented layout, with Python integers only."""
    masks = masks_in_order(pattern)
    width = math.ceil(math.log2(len(masks)))
    stream = int.from_bytes(bytes(index.tolist()), "little")
    return [list(masks[(stream >> (group * width)) & (2**width - 1)]) for group in range(groups)]


@pytest.mark.parametrize("pattern", [*PATTERNS, *WIDE], ids=str)
@pytest.mark.parametrize(("ndim", "dim"), DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_round_trip_along_every_dimension(pattern, ndim, dim, dtype):
    weight = random_nm(pattern, ndim, dim, dtype)
    for named in (dim, dim - ndim):
        back = unpack_nm(pack_nm(weight, pattern, named), pattern, tuple(weight.shape), named)
        assert torch.equal(bits(back), bits(weight))
        assert back.is_contiguous()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", CARRIERS, ids=str)
def test_round_trip_in_every_dtype(pattern, dtype):
    weight = random_nm(pattern, 2, 1, dtype)
    packed = pack_nm(weight, pattern)
    back = unpack_nm(packed, pattern, tuple(weight.shape))
    assert packed.values.dtype == back.dtype == dtype
    assert torch.equal(bits(back), bits(weight))


@pytest.mark.parametrize("dtype", [d for d in CARRIERS if d.is_floating_point], ids=str)
def test_special_values_keep_their_bits(dtype):
    weight = torch.tensor([[math.nan, 0.0, -0.0, 0.0], [0.0, -math.inf, 0.0, math.inf]]).to(dtype)
    packed = pack_nm(weight, NMPattern(2, 4))
    assert torch.equal(bits(packed.values), torch.stack([bits(weight)[0, [0, 2]], bits(weight)[1, [1, 3]]]))
    assert torch.equal(bits(unpack_nm(packed, NMPattern(2, 4), (2, 4))), bits(weight))


def test_a_minus_zero_beyond_the_kept_places_becomes_plus_zero():
    weight = torch.tensor([[-0.0, 3.0, -0.0, 5.0], [-0.0, -0.0, -0.0, 1.0]])
    back = unpack_nm(pack_nm(weight, NMPattern(2, 4)), NMPattern(2, 4), (2, 4))
    assert torch.equal(back, weight)
    assert back.signbit().tolist() == [[False, False, False, False], [True, False, False, False]]


# Bytes by hand. 2:4: places (2,3), (0,3), (1,3) have ranks 5, 3, 4 in 3 bits: 101 110 00|1, low bit first, = 29, 1.
# 1:4: places 3, 0, 2, 1, 2 in 2 bits: 3 + 0*4 + 2*16 + 1*64 = 99, then 2.
# 3:8: places (5,6,7), (0,1,2), (1,4,6) have ranks 5+15+35 = 55, 0, 1+6+20 = 27 in 6 bits: 55 + 27*4096 = 0x01B037.
# 4:4: one mask, no bits at all.
GOLDEN = [
    ("2:4", [[0, 0, 1, 2], [3, 0, 0, 4], [0, 5, 0, 6]], [[1, 2], [3, 4], [5, 6]], [29, 1]),
    ("1:4", [[0, 0, 0, 1], [2, 0, 0, 0], [0, 0, 3, 0], [0, 4, 0, 0], [0, 0, 5, 0]], [[1], [2], [3], [4], [5]], [99, 2]),
    (
        "3:8",
        [[0, 0, 0, 0, 0, 1, 2, 3], [4, 5, 6, 0, 0, 0, 0, 0], [0, 7, 0, 0, 8, 0, 9, 0]],
        [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        [0x37, 0xB0, 0x01],
    ),
    ("4:4", [[1, 2, 3, 4]], [[1, 2, 3, 4]], []),
    ("2:4", [[0, 0, 0, 0], [0, 0, 0, 1]], [[0, 0], [0, 1]], [0 + 3 * 8]),  # places (0,1) and (0,3): ranks 0 and 3
]


@pytest.mark.parametrize(("pattern", "weight", "values", "index"), GOLDEN)
def test_golden_bytes(pattern, weight, values, index):
    pattern = NMPattern(*map(int, pattern.split(":")))
    packed = pack_nm(torch.tensor(weight), pattern)
    assert packed.values.tolist() == values
    assert packed.index.tolist() == index
    assert packed.index.dtype == torch.uint8
    assert unpack_nm(packed, pattern, (len(weight), pattern.m)).tolist() == weight


def test_golden_bytes_of_stored_masks():
    packed = pack_nm(torch.tensor([[1] * 50 + [0] * 50, [0] * 50 + [1] * 50]), NMPattern(50, 100))
    masks = 2**50 - 1 + ((2**50 - 1) << 150)  # 100 bits a group: the low half of the first, the high half of the second
    assert bytes(packed.index.tolist()) == masks.to_bytes(25, "little")


@pytest.mark.parametrize("pattern", SMALL, ids=str)
def test_ranks_are_a_bijection(pattern):
    masks = masks_in_order(pattern)
    weight = torch.zeros(len(masks), pattern.m)
    for row, places in zip(weight, masks, strict=True):
        row[list(places)] = 1
    width = index_width(pattern)
    ranks = sum(rank << (group * width) for group, rank in enumerate(range(len(masks))))
    packed = pack_nm(weight, pattern)
    assert bytes(packed.index.tolist()) == ranks.to_bytes(math.ceil(len(masks) * width / 8), "little")
    assert torch.equal(unpack_nm(packed, pattern, tuple(weight.shape)), weight)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_an_independent_decoder_reads_what_was_packed(data):
    m = data.draw(st.integers(2, 12))
    pattern = NMPattern(data.draw(st.integers(1, m)), m)
    places = st.lists(st.integers(0, m - 1), min_size=pattern.n, max_size=pattern.n, unique=True).map(sorted)
    kept = data.draw(st.lists(places, min_size=0, max_size=7))
    weight = torch.zeros(len(kept), m)
    for group, row in enumerate(kept):
        weight[group, row] = torch.arange(1.0, pattern.n + 1)
    packed = pack_nm(weight, pattern)
    assert decode(packed.index, len(kept), pattern) == kept
    assert packed.values.tolist() == [[float(i + 1) for i in range(pattern.n)]] * len(kept)
    assert torch.equal(unpack_nm(packed, pattern, tuple(weight.shape)), weight)


@pytest.mark.parametrize(("ndim", "dim"), DIMS)
def test_groups_are_in_row_major_order_with_their_dimension_last(ndim, dim):
    weight = random_nm(NMPattern(1, 4), ndim, dim, torch.int8)
    rows = weight.movedim(dim, -1).reshape(-1, 4)
    assert pack_nm(weight, NMPattern(1, 4), dim).values.flatten().tolist() == rows.sum(1).tolist()


@pytest.mark.parametrize("pattern", [*PATTERNS, *WIDE], ids=str)
@pytest.mark.parametrize("groups", [0, 1, 7, 8])
def test_sizes(pattern, groups):
    least = next(width for width in range(200) if 2**width >= math.comb(pattern.m, pattern.n))
    width = least if least <= 62 else pattern.m
    assert index_width(pattern) == width
    assert index_bytes(pattern, groups) == math.ceil(groups * width / 8)
    packed = pack_nm(torch.zeros(groups, pattern.m), pattern)
    assert packed.index.shape == (math.ceil(groups * width / 8),)
    assert packed.values.shape == (groups, pattern.n)


def test_packing_leaves_the_weight_alone_and_outside_the_graph():
    weight = torch.tensor([[0.0, 5.0, 0.0, 7.0]], requires_grad=True)
    packed = pack_nm(weight, NMPattern(2, 4))
    packed.values.mul_(2)
    assert not packed.values.requires_grad
    assert weight.tolist() == [[0.0, 5.0, 0.0, 7.0]]


def test_a_tensor_that_breaks_its_pattern_is_refused():
    weight = torch.zeros(8, 2)
    weight[4:7, 1] = 1
    message = (
        r"^Expected at most 2 non-zero weights in every group of 4 along dim 0, but got 3 in group \(1, 1\) "
        r"\(1 groups in all\)\. Apply the mask before packing\.$"
    )
    with pytest.raises(ViolationError, match=message):
        pack_nm(weight, NMPattern(2, 4), 0)


def test_a_size_that_m_does_not_divide_is_refused():
    with pytest.raises(PatternError, match=r"^Expected m to divide .* size 6 along dim 1"):
        pack_nm(torch.zeros(4, 6), NMPattern(2, 4), 1)


@pytest.mark.parametrize(
    ("shape", "values", "index", "message"),
    [
        ((2, 4), (1, 2), 1, r"^Expected values of shape \(2, 2\) for a tensor of shape \(2, 4\) packed 2:4 along dim -1"),
        ((2, 4), (2, 3), 1, r"but got \(2, 3\)\. The file and its manifest do not belong together\.$"),
        ((4, 2), (2, 2), 1, r"^Expected values of shape \(2, 2\) for a tensor of shape \(4, 2\)"),
        ((2, 4), (2, 2), 2, r"^Expected 1 bytes of index for 2 groups of 2:4, but got 2\. The file and its manifest"),
        ((2, 4), (2, 2), 0, r"^Expected 1 bytes of index for 2 groups of 2:4, but got 0\."),
    ],
)
def test_sizes_that_do_not_fit_are_refused(shape, values, index, message):
    with pytest.raises(PatternError, match=message):
        unpack_nm(Packed(torch.ones(values), torch.zeros(index, dtype=torch.uint8)), NMPattern(2, 4), shape)


@pytest.mark.parametrize(("byte", "rank"), [(7, 7), (6, 6), (6 * 8 + 5, 6)])
def test_a_rank_that_names_no_mask_is_refused(byte, rank):
    packed = Packed(torch.ones(2, 2), torch.tensor([byte], dtype=torch.uint8))
    message = rf"^Expected mask ranks below 6 for 2:4, but got {rank}\. The index is damaged\.$"
    with pytest.raises(PatternError, match=message):
        unpack_nm(packed, NMPattern(2, 4), (2, 4))


@pytest.mark.parametrize("byte", [0, 12], ids=["one_fewer", "one_more"])
def test_a_stored_mask_with_another_number_of_bits_is_refused(byte):
    packed = pack_nm(torch.tensor([[1] * 50 + [0] * 50, [1] * 50 + [0] * 50]), NMPattern(50, 100))
    packed.index[byte] ^= 1
    with pytest.raises(PatternError, match=r"^Expected 50 set bits in every mask, .* The index is damaged\.$"):
        unpack_nm(packed, NMPattern(50, 100), (2, 100))


# The kept values of a group, (1, -2), in every dtype that training and quantization leave behind, as standards write them.
GOLDEN_VALUES = {
    torch.float32: "0000803f 000000c0",
    torch.float16: "003c 00c0",
    torch.bfloat16: "803f 00c0",
    torch.int8: "01 fe",
    torch.float8_e4m3fn: "38 c0",
    torch.float8_e5m2: "3c c0",
}


@pytest.mark.parametrize("dtype", GOLDEN_VALUES, ids=str)
def test_golden_bytes_of_every_dtype(dtype):
    weight = torch.tensor([[0.0, 1.0, 0.0, -2.0]]).to(dtype)
    packed = pack_nm(weight, NMPattern(2, 4))
    assert packed.values.view(torch.uint8).numpy().tobytes() == bytes.fromhex(GOLDEN_VALUES[dtype])
    assert packed.index.tolist() == [4]
    back = unpack_nm(packed, NMPattern(2, 4), (1, 4))
    assert torch.equal(bits(back), bits(weight))


LARGE = [NMPattern(*nm) for nm in ((2, 4), (1, 4), (4, 8), (3, 8), (1, 16), (8, 16), (1, 32))]


@pytest.mark.parametrize("pattern", LARGE, ids=str)
def test_many_slices_of_a_large_tensor_come_back_and_no_bit_is_spent(pattern):
    """More weights than are worked on at a time, and not a whole number of slices; tables and arithmetic agree."""
    rows = 2**20 // pattern.m + 13
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, pattern.m, generator=generator).bfloat16()
    weight[torch.rand(rows, pattern.m, generator=generator).argsort(1) >= pattern.n] = 0.0
    weight[::7] = 0.0
    weight[5::11] *= -0.0  # minus zeros everywhere, more than there is room for
    packed = pack_nm(weight, pattern)
    back = unpack_nm(packed, pattern, tuple(weight.shape))
    assert torch.equal(back, weight)
    ideal = rows * (pattern.n * 16 + math.ceil(math.log2(math.comb(pattern.m, pattern.n)))) / 8
    taken = packed.values.nbytes + packed.index.nbytes
    assert ideal <= taken < ideal + 1
    for start in (0, rows // 2 // 8 * 8, (rows - 40) // 8 * 8):  # a small tensor takes the arithmetic at m = 16
        part = pack_nm(weight[start : start + 40], pattern)
        assert torch.equal(bits(part.values), bits(packed.values[start : start + 40]))
        first = start * index_width(pattern) // 8
        whole_bytes = 40 * index_width(pattern) // 8 if start + 40 < rows else len(packed.index) - first
        assert torch.equal(part.index[:whole_bytes], packed.index[first : first + whole_bytes])


def test_a_violation_in_a_later_slice_is_named_by_its_place_in_the_tensor():
    weight = torch.zeros(2**17, 8)
    weight[100_000, 4:7] = 1.0
    with pytest.raises(ViolationError, match=r"but got 3 in group \(100000, 1\) \(1 groups in all\)"):
        pack_nm(weight, NMPattern(2, 4))
    minus = torch.full((2**17, 4), -0.0)
    assert unpack_nm(pack_nm(minus, NMPattern(2, 4)), NMPattern(2, 4), (2**17, 4)).signbit().sum() == 2**18
