"""Reports on labels against phones: by hand, gathered over batches and processes, and at the edges."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing

from hmm_speech.data.unitfile import Phone
from hmm_speech.errors import UserError
from hmm_speech.evaluate.labels import LabelReport, UniformReport, joint_counts, label_report, uniform_report

RATE = 50.0
NO_BOUNDARY = dict.fromkeys(("precision", "recall", "f1", "r_value"))


def corpus(seed: int, utterances: int) -> tuple[list[np.ndarray], list[list[Phone]]]:
    rng = np.random.default_rng(seed)
    labels, phones = [], []
    for _ in range(utterances):
        ends = np.cumsum(rng.integers(30, 150, rng.integers(1, 12))) / 1000
        starts = np.r_[0, ends[:-1]]
        phones.append([Phone("abcd"[rng.integers(4)], float(s), float(e)) for s, e in zip(starts, ends, strict=True)])
        labels.append(rng.integers(0, 6, int(ends[-1] * RATE)).astype(np.int32))
    return labels, phones


def test_by_hand():
    # Frames are 20 ms. Reference boundaries at 60 and 100 ms; labels change at 40, 80 and 120 ms: 40 finds 60,
    # 80 finds 100, and 120 is left over.
    phones = [Phone("a", 0.0, 0.06), Phone("b", 0.06, 0.1), Phone("a", 0.1, 0.16)]
    labels = np.array([5, 5, 2, 2, 5, 5, 9, 9])
    got = label_report([labels], [phones], RATE)
    assert got["boundary"]["precision"] == pytest.approx(2 / 3)
    assert got["boundary"]["recall"] == 1
    # Phones by frame: a a a b b a a a. Label 5: a a b a; label 2: a b; label 9: a a.
    assert got["phone_purity"] == pytest.approx((3 + 1 + 2) / 8)
    assert got["cluster_purity"] == pytest.approx((3 + 1) / 8)
    phone_entropy = -(6 / 8 * np.log2(6 / 8) + 2 / 8 * np.log2(2 / 8))
    conditional = 4 / 8 * -(3 / 4 * np.log2(3 / 4) + 1 / 4 * np.log2(1 / 4)) + 2 / 8 * 1
    assert got["pnmi"] == pytest.approx(1 - conditional / phone_entropy)


def test_a_transcript_scores_one():
    phones = [("a", 0.0, 0.1), ("b", 0.1, 0.2), ("a", 0.2, 0.3)]
    got = label_report([np.repeat([7, 3, 7], 5)], [phones], RATE)
    assert got == {
        "pnmi": pytest.approx(1),
        "phone_purity": 1,
        "cluster_purity": 1,
        "boundary": {"precision": 1, "recall": 1, "f1": 1, "r_value": 1},
    }


def test_names_of_labels_do_not_matter():
    labels, phones = corpus(0, 10)
    renamed = np.array([1_000_000, 3, 17, 0, 8, 5])
    got = label_report([renamed[x] for x in labels], phones, RATE)
    assert got == {**label_report(labels, phones, RATE), "pnmi": pytest.approx(got["pnmi"])}


def test_what_lies_outside_the_phones_is_ignored():
    phones = [Phone("a", 0.04, 0.1), Phone("b", 0.1, 0.16)]
    inside = np.array([0, 0, 0, 1, 1, 1])
    padded = np.concatenate([[3, 4], inside, [5, 6, 5, 6]])
    got = label_report([padded], [phones], RATE)
    assert got["boundary"] == {"precision": 1, "recall": 1, "f1": 1, "r_value": 1}
    assert got["pnmi"] == pytest.approx(1)


def test_utterances_without_phones_are_left_out():
    labels, phones = corpus(1, 6)
    mixed = label_report([labels[0], *labels], [None, *phones], RATE)
    assert mixed == label_report(labels, phones, RATE)
    assert uniform_report([None, [], *phones], RATE) == uniform_report(phones, RATE)


def test_no_phones_at_all_is_null():
    expected = {"pnmi": None, "phone_purity": None, "cluster_purity": None, "boundary": NO_BOUNDARY}
    for phones in ([None, None], [[], None]):
        assert label_report([np.array([0, 1]), np.array([2])], phones, RATE) == expected
        assert uniform_report(phones, RATE) == {"boundary": NO_BOUNDARY}
    assert label_report([], [], RATE) == expected


def test_empty_and_one_frame_utterances():
    phones = [Phone("a", 0.0, 0.02)]
    got = label_report([np.zeros(0, np.int32), np.array([4])], [phones, phones], RATE)
    assert got == {"pnmi": None, "phone_purity": 1, "cluster_purity": 1, "boundary": NO_BOUNDARY}
    missed = label_report([np.zeros(0, np.int32)], [[Phone("a", 0.0, 0.1), Phone("b", 0.1, 0.2)]], RATE)
    assert missed["boundary"]["recall"] == 0
    assert missed["boundary"]["precision"] == 0


def test_accepts_lists_and_tensors():
    labels, phones = corpus(2, 4)
    expected = label_report(labels, phones, RATE)
    assert label_report([x.tolist() for x in labels], phones, RATE) == expected
    assert label_report([torch.from_numpy(x) for x in labels], phones, RATE) == expected


def test_batches_add_up_and_reset_forgets():
    labels, phones = corpus(3, 9)
    report, uniform = LabelReport(6, ["a", "b", "c", "d"], RATE), UniformReport(RATE)
    for start in range(0, 9, 2):
        report.update(labels[start : start + 2], phones[start : start + 2])
        uniform.update(phones[start : start + 2])
    assert report.compute() == label_report(labels, phones, RATE)
    assert uniform.compute() == uniform_report(phones, RATE)
    report.reset()
    uniform.reset()
    report.update(labels[:1], phones[:1])
    uniform.update(phones[:1])
    assert report.compute() == label_report(labels[:1], phones[:1], RATE)
    assert uniform.compute() == uniform_report(phones[:1], RATE)


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    labels, phones = corpus(4, 9)
    report, uniform = LabelReport(6, ["a", "b", "c", "d"], RATE), UniformReport(RATE)
    report.update(labels[rank::2], phones[rank::2])
    uniform.update(phones[rank::2])
    Path(folder, f"{rank}.json").write_text(json.dumps([report.compute(), uniform.compute()]))
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    multiprocessing.spawn(one_process, (str(tmp_path),), nprocs=2)
    labels, phones = corpus(4, 9)
    expected = [label_report(labels, phones, RATE), uniform_report(phones, RATE)]
    assert json.loads((tmp_path / "0.json").read_text()) == expected
    assert json.loads((tmp_path / "1.json").read_text()) == expected


def test_joint_counts():
    phones = [Phone("b", 0.0, 0.04), Phone("a", 0.04, 0.08)]
    counts, inventory = joint_counts([np.array([0, 2, 2, 2, 1])], [phones], RATE, 4)
    assert inventory == ["a", "b"]
    np.testing.assert_array_equal(counts, [[0, 1], [0, 0], [2, 1], [0, 0]])


def test_bad_input_is_named():
    phones = [[Phone("a", 0.0, 0.1)]]
    with pytest.raises(UserError, match="labels: 2 utterances, but phones: 1"):
        label_report([[0], [1]], phones, RATE)
    with pytest.raises(UserError, match=r"labels\[0\]: frame 1 has label -1"):
        label_report([np.array([0, -1])], phones, RATE)
    with pytest.raises(UserError, match=r"phones\[0\]: phone 0"):
        label_report([[0]], [[Phone("a", 0.1, 0.0)]], RATE)
    with pytest.raises(UserError, match="frame_rate"):
        label_report([[0]], phones, -1)
    with pytest.raises(UserError, match=r"labels\[0\]: frame 0 has label 7, but the vocabulary is 6"):
        LabelReport(6, ["a"], RATE).update([[7]], phones)
