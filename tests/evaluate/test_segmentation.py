"""Boundary scores: strict one-to-one matching, exact tolerance, published definitions."""

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.errors import UserError
from hmm_speech.evaluate.segmentation import (
    BoundaryScores,
    boundary_scores,
    label_boundaries,
    match_boundaries,
    phone_boundaries,
    uniform_boundaries,
)


def brute_force(predicted, reference, tolerance):
    """The size of a maximum matching, by trying every one."""
    few, many = sorted((predicted, reference), key=len)
    for size in range(len(few), 0, -1):
        for chosen in combinations(few, size):
            for partners in permutations(many, size):
                if all(abs(a - b) <= tolerance for a, b in zip(chosen, partners, strict=True)):
                    return size
    return 0


TIMES = st.lists(st.integers(0, 14), max_size=5).map(sorted)


@settings(max_examples=400, deadline=None)
@given(predicted=TIMES, reference=TIMES, tolerance=st.integers(0, 4))
def test_greedy_matching_is_maximum(predicted, reference, tolerance):
    got = match_boundaries(np.array(predicted, np.int64), np.array(reference, np.int64), tolerance)
    assert got == brute_force(predicted, reference, tolerance)


def test_each_reference_boundary_is_matched_once():
    assert match_boundaries(np.array([90, 100, 110]), np.array([100]), 20) == 1
    assert match_boundaries(np.array([100]), np.array([90, 100, 110]), 20) == 1
    assert match_boundaries(np.array([100, 130]), np.array([80, 110]), 20) == 2


@pytest.mark.parametrize(("offset", "expected"), [(0.02, 1), (-0.02, 1), (0.020002, 0), (-0.020002, 0)])
def test_exactly_the_tolerance_counts_whatever_the_rounding(offset, expected):
    # In floating point, abs(t / 50 - (t / 50 + 0.02)) <= 0.02 is false for many frames t.
    assert any(abs(t / 50 - (t / 50 + 0.02)) > 0.02 for t in range(1, 400))
    for frame in range(1, 400):
        labels = np.repeat([0, 1], [frame, 5])
        phones = [("a", -1.0, frame / 50 + offset), ("b", frame / 50 + offset, 99.0)]
        assert match_boundaries(label_boundaries(labels, 50.0), phone_boundaries(phones)) == expected


def test_label_boundaries_lie_at_changes():
    np.testing.assert_array_equal(label_boundaries(np.array([4, 4, 7, 7, 4]), 50), [40_000, 80_000])
    np.testing.assert_array_equal(label_boundaries(np.array([1, 2]), 100), [10_000])
    np.testing.assert_array_equal(label_boundaries(np.array([0, 0, 0, 1]), 1 / 0.03), [90_000])
    for labels in ([], [3], [3, 3]):
        assert label_boundaries(np.array(labels, np.int64), 50).size == 0


def test_reference_boundaries_are_all_starts_but_the_first():
    phones = [("a", 0.0, 0.1), ("a", 0.1, 0.2), ("b", 0.25, 0.3)]
    np.testing.assert_array_equal(phone_boundaries(phones), [100_000, 250_000])
    assert phone_boundaries([]).size == phone_boundaries(phones[:1]).size == 0


def test_uniform_boundaries_are_equal_segments_on_frames():
    phones = [("a", 0.0, 0.9), ("b", 0.9, 0.95), ("c", 0.95, 1.0), ("d", 1.0, 1.2)]
    np.testing.assert_array_equal(uniform_boundaries(phones, 50), [300_000, 600_000, 900_000])
    np.testing.assert_array_equal(uniform_boundaries(phones, 4), [250_000, 500_000, 1_000_000])
    crowded = [(str(i), i * 0.001, i * 0.001 + 0.001) for i in range(100)]
    np.testing.assert_array_equal(uniform_boundaries(crowded, 50), [20_000, 40_000, 60_000, 80_000])
    assert uniform_boundaries([], 50).size == uniform_boundaries(phones[:1], 50).size == 0


def test_scores_by_hand():
    # Räsänen et al. 2009: HR = 8/10, OS = HR / PRC - 1 = 16/10 - 1.
    got = boundary_scores(matched=8, predicted=16, reference=10)
    assert got["precision"] == 0.5
    assert got["recall"] == 0.8
    assert got["f1"] == pytest.approx(2 * 0.5 * 0.8 / 1.3)
    r1 = np.sqrt(0.2**2 + 0.6**2)
    r2 = (-0.6 + 0.8 - 1) / np.sqrt(2)
    assert got["r_value"] == pytest.approx(1 - (abs(r1) + abs(r2)) / 2)


def test_extremes():
    assert boundary_scores(5, 5, 5) == {"precision": 1, "recall": 1, "f1": 1, "r_value": 1}
    none = boundary_scores(0, 0, 5)
    assert (none["precision"], none["recall"], none["f1"]) == (0, 0, 0)
    assert none["r_value"] == pytest.approx(1 - np.sqrt(2) / 2)
    assert all(np.isnan(value) for value in boundary_scores(0, 3, 0).values())
    assert boundary_scores(10, 100, 10)["r_value"] < -5


@settings(max_examples=100, deadline=None)
@given(matched=st.integers(1, 20), more_predicted=st.integers(0, 50), more_reference=st.integers(0, 50))
def test_over_segmentation_is_recall_over_precision(matched, more_predicted, more_reference):
    got = boundary_scores(matched, matched + more_predicted, matched + more_reference)
    over = got["recall"] / got["precision"] - 1
    r2 = (-over + got["recall"] - 1) / np.sqrt(2)
    expected = 1 - (np.hypot(1 - got["recall"], over) + abs(r2)) / 2
    assert got["r_value"] == pytest.approx(expected)
    assert got["r_value"] <= 1


@pytest.mark.parametrize("cut", [0, 1, 3, 6])
def test_sum_over_processes_equals_one(cut):
    rng = np.random.default_rng(0)
    predicted, reference = ([np.sort(rng.integers(0, 10**6, n)) for n in rng.integers(0, 30, 6)] for _ in range(2))
    whole, first, second = BoundaryScores(), BoundaryScores(), BoundaryScores()
    whole.update(predicted, reference)
    first.update(predicted[:cut], reference[:cut])
    second.update(predicted[cut:], reference[cut:])
    assert whole._reductions["counts"].__name__ == "dim_zero_sum"
    summed = whole._reductions["counts"](torch.stack([first.counts, second.counts]))
    assert torch.equal(summed, whole.counts)


def test_bad_input_is_named():
    with pytest.raises(UserError, match="frame_rate"):
        label_boundaries(np.array([0, 1]), 0)
    with pytest.raises(UserError, match="sort the phones"):
        phone_boundaries([("a", 0.1, 0.2), ("b", 0.0, 0.1)])
    with pytest.raises(UserError, match=r"utterance 3: phone 0 \('a'\) runs from 0.2 to 0.1"):
        phone_boundaries([("a", 0.2, 0.1)], "utterance 3")
    with pytest.raises(UserError, match="finite"):
        phone_boundaries([("a", 0.0, float("nan"))])
