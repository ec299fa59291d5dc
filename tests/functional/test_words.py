"""Groups moved as words: the same bits as weight by weight, whatever they are and wherever they lie."""

import itertools

import pytest
import torch

from lightning_step import NMPattern
from lightning_step.errors import ViolationError
from lightning_step.functional import pack_nm, packing, unpack_nm
from lightning_step.functional.words import mask_numbers, suits_words

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
]
PATTERNS = [NMPattern(n, m) for m in (2, 4, 8) for n in range(1, m + 1)]
SUITED = [(pattern, dtype) for pattern in PATTERNS for dtype in DTYPES if suits_words(pattern, dtype.itemsize)]


def every_mask(pattern, dtype):
    """Each mask with at most n places, filled with random bits, several times; minus zeros and NaN among them."""
    kept = [c for k in range(pattern.n + 1) for c in itertools.combinations(range(pattern.m), k)] * 3
    rows = torch.zeros(len(kept), pattern.m * dtype.itemsize, dtype=torch.uint8)
    lanes = rows.view(len(kept), pattern.m, dtype.itemsize)
    torch.manual_seed(0)
    for row, places in enumerate(kept):
        lanes[row, list(places)] = torch.randint(0, 256, (len(places), dtype.itemsize), dtype=torch.uint8)
    return rows.view(dtype)


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).tolist()


def test_which_groups_are_moved_as_words():
    assert {(str(p), d.itemsize) for p, d in SUITED} >= {
        ("2:4", 2),
        ("2:4", 4),
        ("1:8", 4),
        ("2:4", 8),
        ("4:8", 1),
        ("4:8", 2),
    }
    assert not any(suits_words(NMPattern(*nm), 2) for nm in ((1, 16), (3, 6), (1, 3), (8, 16)))
    assert not suits_words(NMPattern(4, 8), 4)


@pytest.mark.parametrize("m", [2, 4, 8])
def test_every_mask_has_its_number(m):
    masks = torch.tensor(list(itertools.product([False, True], repeat=m)))
    expected = [sum(bit << i for i, bit in enumerate(row)) for row in masks.tolist()]
    assert mask_numbers(masks).tolist() == expected
    assert mask_numbers(masks[:0]).tolist() == []


@pytest.mark.parametrize(("pattern", "dtype"), SUITED, ids=str)
def test_words_give_the_bits_that_gathering_gives(pattern, dtype, monkeypatch):
    weight = every_mask(pattern, dtype)
    fast = pack_nm(weight, pattern)
    back = unpack_nm(fast, pattern, tuple(weight.shape))
    monkeypatch.setattr(packing, "suits_words", lambda pattern, itemsize: False)
    slow = pack_nm(weight, pattern)
    assert (raw(fast.values), raw(fast.index)) == (raw(slow.values), raw(slow.index))
    assert raw(back) == raw(weight) == raw(unpack_nm(fast, pattern, tuple(weight.shape)))


@pytest.mark.parametrize(("pattern", "dtype"), SUITED, ids=str)
def test_one_weight_too_many_is_found(pattern, dtype):
    if pattern.n == pattern.m:
        return
    for places in itertools.combinations(range(pattern.m), pattern.n + 1):
        weight = torch.zeros(3, pattern.m).to(dtype)
        weight[1, list(places)] = torch.ones(len(places)).to(dtype)
        with pytest.raises(ViolationError, match=rf"but got {len(places)} in group \(1, 0\)"):
            pack_nm(weight, pattern)


def test_minus_zeros_without_room_are_dropped_and_others_kept():
    weight = torch.tensor([[-0.0, 1.0, -0.0, 2.0], [-0.0, 0.0, 3.0, 0.0]])
    back = unpack_nm(pack_nm(weight, NMPattern(2, 4)), NMPattern(2, 4), (2, 4))
    assert back.tolist() == weight.tolist()
    assert back.signbit().tolist() == [[False] * 4, [True, False, False, False]]


@pytest.mark.parametrize("start", range(1, 8))
def test_a_weight_that_begins_in_the_middle_of_a_word_is_copied(start):
    flat = torch.zeros(72, dtype=torch.bfloat16)
    flat[start::4] = 1.5
    weight = flat[start : start + 64].view(8, 8)
    assert torch.equal(unpack_nm(pack_nm(weight, NMPattern(2, 4)), NMPattern(2, 4), (8, 8)), weight)
    strided = flat[:64].view(8, 8).t()
    assert torch.equal(unpack_nm(pack_nm(strided, NMPattern(2, 4), 0), NMPattern(2, 4), (8, 8), 0), strided)
    every_other = flat[: 2 * (72 // 2) - 8 : 2][: 4 * (28 // 4)]
    assert torch.equal(
        unpack_nm(pack_nm(every_other, NMPattern(2, 4)), NMPattern(2, 4), tuple(every_other.shape)), every_other
    )
