"""n:m patterns: what is refused, with which words, and what follows from two integers."""

import dataclasses
import itertools
import math

import pytest

from lightning_step import NMPattern
from lightning_step.errors import ArgumentTypeError, LightningStepError, PatternError

ALL_SMALL = [(n, m) for m in range(2, 13) for n in range(1, m + 1)]


@pytest.mark.parametrize(
    ("n", "m", "message"),
    [
        ("2:4", 4, r"^Expected `n` to be an integer, but got '2:4' of type str\. Write the pattern 2:4 as two integers"),
        (2.0, 4, r"^Expected `n` to be an integer, but got 2\.0 of type float\."),
        (True, 4, r"^Expected `n` to be an integer, but got True of type bool\."),
        (None, 4, r"^Expected `n` to be an integer, but got None of type NoneType\."),
        (2, "4", r"^Expected `m` to be an integer, but got '4' of type str\."),
        (2, 4.0, r"^Expected `m` to be an integer, but got 4\.0 of type float\."),
        (1, True, r"^Expected `m` to be an integer, but got True of type bool\."),
    ],
)
def test_anything_but_an_integer_is_a_type_error(n, m, message):
    with pytest.raises(ArgumentTypeError, match=message):
        NMPattern(n, m)


@pytest.mark.parametrize(
    ("n", "m", "message"),
    [
        (1, 1, r"^Expected `m` >= 2, but got m=1\. A group of fewer than two weights has nothing to choose from\.$"),
        (1, 0, r"^Expected `m` >= 2, but got m=0\."),
        (2, -4, r"^Expected `m` >= 2, but got m=-4\."),
        (0, 4, r"^Expected 1 <= n <= m, but got n=0 and m=4\. n is the number of weights KEPT in every group of m\.$"),
        (-2, 4, r"^Expected 1 <= n <= m, but got n=-2 and m=4\."),
        (5, 4, r"^Expected 1 <= n <= m, but got n=5 and m=4\."),
    ],
)
def test_a_pattern_that_does_not_exist_is_refused(n, m, message):
    with pytest.raises(PatternError, match=message):
        NMPattern(n, m)


@pytest.mark.parametrize(("error", "builtin"), [(ArgumentTypeError, TypeError), (PatternError, ValueError)])
def test_its_errors_are_ours_and_the_builtin_ones(error, builtin):
    assert issubclass(error, LightningStepError)
    assert issubclass(error, builtin)


@pytest.mark.parametrize("field", ["n", "m"])
def test_it_is_frozen(field):
    pattern = NMPattern(2, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(pattern, field, 3)
    assert (pattern.n, pattern.m) == (2, 4)


def test_equal_patterns_are_one_key_of_a_dict():
    counts = {NMPattern(2, 4): "a"}
    counts[NMPattern(2, 4)] = "b"
    counts[NMPattern(4, 8)] = "c"
    assert counts == {NMPattern(2, 4): "b", NMPattern(4, 8): "c"}


def test_patterns_sort_by_n_then_m():
    assert sorted([NMPattern(2, 8), NMPattern(2, 4), NMPattern(1, 16)]) == [
        NMPattern(1, 16),
        NMPattern(2, 4),
        NMPattern(2, 8),
    ]


@pytest.mark.parametrize(("n", "m", "text"), [(2, 4, "2:4"), (1, 32, "1:32"), (50, 100, "50:100")])
def test_it_prints_as_the_paper_writes_it(n, m, text):
    assert str(NMPattern(n, m)) == text


@pytest.mark.parametrize(("n", "m", "density"), [(2, 4, 0.5), (1, 8, 0.125), (3, 8, 0.375), (4, 4, 1.0)])
def test_density_is_the_share_of_weights_kept(n, m, density):
    assert NMPattern(n, m).density == density


@pytest.mark.parametrize(("n", "m"), ALL_SMALL)
def test_choices_counts_the_masks_of_a_group(n, m):
    assert NMPattern(n, m).choices == sum(1 for _ in itertools.combinations(range(m), n))


@pytest.mark.parametrize(("n", "m"), [*ALL_SMALL, (8, 16), (16, 32), (32, 65), (50, 100)])
def test_index_bits_is_the_least_number_that_names_every_mask(n, m):
    bits = NMPattern(n, m).index_bits
    masks = math.comb(m, n)
    assert 2**bits >= masks
    assert bits == 0 or 2 ** (bits - 1) < masks


@pytest.mark.parametrize(
    ("n", "m", "choices", "bits"),
    [(2, 4, 6, 3), (1, 4, 4, 2), (1, 8, 8, 3), (3, 8, 56, 6), (1, 16, 16, 4), (4, 4, 1, 0), (8, 16, 12870, 14)],
)
def test_choices_and_index_bits_of_known_patterns(n, m, choices, bits):
    pattern = NMPattern(n, m)
    assert (pattern.choices, pattern.index_bits) == (choices, bits)
