"""Schedules against lists written by hand."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_step import NMPattern
from lightning_step.functional import decay_frames, mask_decay, structure_decay

patterns = st.integers(2, 40).flatmap(lambda m: st.builds(NMPattern, st.integers(1, m), st.just(m)))


@pytest.mark.parametrize(
    ("pattern", "frames"),
    [
        ((1, 2), ["1:2"]),
        ((2, 4), ["3:4", "2:4"]),
        ((1, 4), ["3:4", "2:4", "1:4"]),
        ((3, 4), ["3:4"]),
        ((4, 4), ["4:4"]),
        ((1, 5), ["4:5", "2:5", "1:5"]),
        ((1, 8), ["7:8", "4:8", "2:8", "1:8"]),
        ((3, 8), ["7:8", "4:8", "3:8"]),
        ((5, 8), ["7:8", "5:8"]),
        ((1, 16), ["15:16", "8:16", "4:16", "2:16", "1:16"]),
        ((2, 32), ["31:32", "16:32", "8:32", "4:32", "2:32"]),
    ],
)
def test_frames_as_written_by_hand(pattern, frames):
    assert [str(frame) for frame in decay_frames(NMPattern(*pattern))] == frames


@given(patterns)
def test_frames_halve_from_nearly_all_down_to_the_end(pattern):
    frames = [frame.n for frame in decay_frames(pattern)]
    assert frames[-1] == pattern.n
    assert frames == sorted(set(frames), reverse=True)
    assert {frame.m for frame in decay_frames(pattern)} == {pattern.m}
    assert set(frames[1:-1]) == {pattern.m // 2**i for i in range(1, 9) if pattern.n < pattern.m // 2**i < pattern.m - 1}


@given(patterns, st.integers(1, 60))
def test_frames_are_of_one_length_but_for_rounding(pattern, length):
    shown = [structure_decay(pattern, t, length) for t in range(-3, length + 4)]
    frames = decay_frames(pattern)
    assert shown[:3] == ([frames[0]] * 3)
    assert shown[-4:] == [pattern] * 4
    assert [frames.index(now) for now in shown] == sorted(frames.index(now) for now in shown)
    lengths = [shown[3:-4].count(frame) for frame in frames[:-1]]
    assert not lengths or max(lengths) - min(lengths) <= 1


def test_frames_begin_where_counting_says():
    begun = {}
    for t in range(100):
        begun.setdefault(str(structure_decay(NMPattern(1, 8), t, 45)), t)
    assert begun == {"7:8": 0, "4:8": 15, "2:8": 30, "1:8": 45}


@pytest.mark.parametrize("length", [0, -5])
def test_a_decay_without_a_length_is_over(length):
    assert structure_decay(NMPattern(1, 8), 0, length) == NMPattern(1, 8)
    assert mask_decay(0, length) == 0


def test_the_factor_falls_in_a_line_or_by_the_same_share_every_step():
    line = [mask_decay(t, 8) for t in range(-2, 11)]
    assert line == [1, 1, *[1 - t / 8 for t in range(8)], 0, 0, 0]
    steep = [mask_decay(t, 8, "exponential", last=1e-4) for t in range(9)]
    assert steep[0] == 1
    assert steep[8] == 0
    shares = [b / a for a, b in itertools.pairwise(steep[:8])]
    assert shares == pytest.approx([10 ** (-4 / 8)] * 7, rel=1e-12)
    assert math.isclose(steep[7], 1e-4 / shares[0])
