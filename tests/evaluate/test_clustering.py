"""PNMI and purities: against scikit-learn, by hand, and under what must not change them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from hmm_speech.errors import UserError
from hmm_speech.evaluate.clustering import PhoneClustering, clustering_scores, frame_phones, phone_inventory


def scores(labels, phones):
    metric = PhoneClustering(int(max(labels)) + 1, int(max(phones)) + 1)
    metric.update(torch.as_tensor(labels), torch.as_tensor(phones))
    return metric.compute()


FRAMES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(frames=FRAMES, data=st.data())
def test_equals_scikit_learn_and_ignores_names(frames, data):
    labels, phones = np.array(frames).T
    got = scores(labels, phones)
    entropy = mutual_info_score(phones, phones)
    if len(set(phones)) == 1:
        assert np.isnan(got["pnmi"])
    else:
        assert got["pnmi"] == pytest.approx(mutual_info_score(labels, phones) / entropy, abs=1e-12)
        assert 0 <= got["pnmi"] <= 1
    majority = sum(np.bincount(phones[labels == z]).max() for z in set(labels))
    assert got["phone_purity"] == pytest.approx(majority / len(labels))
    majority = sum(np.bincount(labels[phones == y]).max() for y in set(phones))
    assert got["cluster_purity"] == pytest.approx(majority / len(labels))
    renamed_labels = np.array(data.draw(st.permutations(range(5))))[labels]
    renamed_phones = np.array(data.draw(st.permutations(range(4))))[phones]
    assert scores(renamed_labels, renamed_phones) == pytest.approx(got, nan_ok=True)
    order = data.draw(st.permutations(range(len(labels))))
    assert scores(labels[order], phones[order]) == got or np.isnan(got["pnmi"])


def test_by_hand():
    # Label 0 holds phones a, a, b; label 1 holds b. H(phone) = 1 bit; I = 1 - 3/4 H(1/3).
    got = clustering_scores(np.array([[2, 1], [0, 1]]))
    third = -(np.log2(1 / 3) / 3 + 2 * np.log2(2 / 3) / 3)
    assert got["pnmi"] == pytest.approx(1 - 0.75 * third)
    assert got["phone_purity"] == 0.75
    assert got["cluster_purity"] == 0.75


def test_extremes():
    assert clustering_scores(np.eye(7)) == pytest.approx({"pnmi": 1, "phone_purity": 1, "cluster_purity": 1})
    independent = clustering_scores(np.outer([1, 2, 3], [5, 5]))
    assert independent["pnmi"] == pytest.approx(0, abs=1e-12)
    assert independent["phone_purity"] == 0.5
    one_phone = clustering_scores(np.array([[3.0], [1.0]]))
    assert np.isnan(one_phone["pnmi"])
    assert (one_phone["phone_purity"], one_phone["cluster_purity"]) == (1, 0.75)
    assert all(np.isnan(value) for value in clustering_scores(np.zeros((3, 2))).values())


def test_labels_and_phones_never_seen_change_nothing():
    seen = np.array([[4, 1], [2, 6]])
    padded = np.zeros((5, 4))
    padded[np.ix_([0, 3], [1, 2])] = seen
    assert clustering_scores(padded) == pytest.approx(clustering_scores(seen))


def test_phone_of_a_frame_is_the_one_at_its_centre():
    phones = [("a", 0.0, 0.03), ("b", 0.03, 0.05), ("a", 0.07, 0.11)]
    # Centres at 10, 30, 50, 70, 90, 110 ms: starts belong to a phone, ends do not.
    got = frame_phones(phones, 6, 50.0, ["a", "b"])
    np.testing.assert_array_equal(got, [0, 1, -1, 0, 0, -1])
    assert frame_phones(phones, 0, 50.0, ["a", "b"]).shape == (0,)
    np.testing.assert_array_equal(frame_phones([], 3, 50.0, []), [-1, -1, -1])
    late = frame_phones([("b", 0.025, 0.1)], 3, 50.0, ["a", "b"])
    np.testing.assert_array_equal(late, [-1, 1, 1])


def test_inventory():
    assert phone_inventory([[("b", 0, 1), ("a", 1, 2)], None, [], [("b", 0, 1)]]) == ["a", "b"]


def test_minus_one_leaves_a_frame_out():
    got = scores(np.array([0, 1, 2, 1]), np.array([0, 1, -1, -1]))
    assert got == pytest.approx(scores(np.array([0, 1]), np.array([0, 1])))
    nothing = PhoneClustering(2, 2)
    nothing.update(torch.tensor([0]), torch.tensor([-1]))
    assert np.isnan(nothing.compute()["phone_purity"])


def test_sum_over_processes_equals_one():
    rng = np.random.default_rng(0)
    labels, phones = (torch.from_numpy(rng.integers(0, 5, 100)) for _ in range(2))
    whole, first, second = (PhoneClustering(5, 5) for _ in range(3))
    whole.update(labels, phones)
    first.update(labels[:30], phones[:30])
    second.update(labels[30:70], phones[30:70])
    second.update(labels[70:], phones[70:])
    summed = whole._reductions["joint_LP"](torch.stack([first.joint_LP, second.joint_LP]))
    assert torch.equal(summed, whole.joint_LP)


@pytest.mark.parametrize(
    ("labels", "phones", "message"),
    [
        ([2], [0], "labels: 2 to 2, but there are 2"),
        ([-1], [0], "labels: -1"),
        ([0], [3], "phones: 3"),
        ([0, 1], [0], "shape"),
    ],
)
def test_bad_input_is_named(labels, phones, message):
    with pytest.raises(UserError, match=message):
        PhoneClustering(2, 3).update(torch.tensor(labels), torch.tensor(phones))


def test_a_phone_outside_the_inventory_is_named():
    with pytest.raises(UserError, match="'c' is not in the inventory"):
        frame_phones([("c", 0, 1)], 3, 50, ["a", "b"], "utterance")
