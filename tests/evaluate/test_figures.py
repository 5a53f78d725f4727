"""Figures: they show the numbers given, sorted as they say, and survive every edge."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from hmm_speech.errors import UserError
from hmm_speech.evaluate import figures
from hmm_speech.evaluate.phoneset import phone_class, sort_phones

PHONES = [("pau", 0.0, 0.1), ("iy", 0.1, 0.25), ("s", 0.25, 0.4)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look into."""
    kept = []
    save = figures._save

    def keep(figure, path):
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "_save", keep)
    return kept


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n") and [f.name for f in path.parent.iterdir()] == [path.name]


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_transition_matrix_shows_probabilities(tmp_path, drawn):
    p_NN = np.array([[0.5, 0.5, 0.0], [0.0, 0.9, 0.1], [1.0, 0.0, 0.0]])
    with np.errstate(divide="ignore"):
        figures.transition_matrix(torch.from_numpy(np.log(p_NN)).requires_grad_(), tmp_path / "a.png")
    assert is_png(tmp_path / "a.png")
    image = drawn[0].axes[0].images[0]
    np.testing.assert_allclose(image.get_array(), np.maximum(p_NN, figures.FLOOR))
    assert image.norm.vmax == 1
    assert drawn[0].axes[0].get_xlabel() == "to state"


def test_transition_matrix_sorts_by_phone(tmp_path, drawn):
    p_NN = np.arange(1, 17, dtype=float).reshape(4, 4) / 100
    figures.transition_matrix(np.log(p_NN), tmp_path / "a.png", names=["s", "pau", "iy", "pau"])
    axes = drawn[0].axes[0]
    order = [1, 3, 2, 0]
    np.testing.assert_allclose(axes.images[0].get_array(), p_NN[np.ix_(order, order)])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["pau", "iy", "s"]
    np.testing.assert_allclose(axes.get_yticks(), [0.5, 2, 3])


def test_label_transitions_lump_a_chain():
    rng = np.random.default_rng(0)
    p_NN = rng.dirichlet(np.ones(5), size=5)
    labels = np.array([0, 1, 0, 2, 1])
    got = np.exp(figures.label_transitions(np.log(p_NN), labels))
    values, vectors = np.linalg.eig(p_NN.T)
    stationary = np.real(vectors[:, np.argmax(values.real)])
    stationary /= stationary.sum()
    for a in range(3):
        for b in range(3):
            flow = sum(
                stationary[i] * p_NN[i, j] for i in range(5) for j in range(5) if (labels[i], labels[j]) == (a, b)
            )
            assert got[a, b] == pytest.approx(flow / stationary[labels == a].sum(), abs=1e-7)
    np.testing.assert_allclose(got.sum(axis=1), 1)


def test_label_transitions_of_one_state_a_label_are_the_transitions():
    p_NN = np.array([[0.0, 1.0], [1.0, 0.0]])  # periodic
    with np.errstate(divide="ignore"):
        got = figures.label_transitions(torch.from_numpy(np.log(p_NN)), torch.tensor([1, 0]))
    np.testing.assert_allclose(np.exp(got), p_NN)


def test_label_phones():
    counts = np.array([[1, 5, 0], [0, 0, 0], [2, 0, 9]])
    assert figures.label_phones(counts, ["a", "b", "c"]) == ["b", figures.UNUSED, "c"]


def test_states_against_phones_shows_a_diagonal(tmp_path, drawn):
    # Labels 0..3 belong to s, pau, (nobody), iy; phones are given out of order.
    counts = np.array([[8, 0, 2], [0, 5, 0], [0, 0, 0], [0, 3, 9]])
    figures.states_against_phones(counts, ["s", "pau", "iy"], tmp_path / "a.png")
    assert is_png(tmp_path / "a.png")
    axes = drawn[0].axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["pau", "iy", "s"]
    expected = np.array([[1, 0, 0], [0.25, 0.75, 0], [0, 0.2, 0.8]]).T
    np.testing.assert_allclose(axes.images[0].get_array(), expected)
    assert "(1 of 4 never used)" in axes.get_xlabel()


def test_utterance_shows_segments_and_boundaries(tmp_path, drawn):
    states = np.repeat([4, 1, 2], [5, 8, 7])
    units = torch.from_numpy(np.repeat([9, 8, 9, 7], 5))
    figures.utterance(states, units, PHONES, 50.0, tmp_path / "a.png", title="id")
    assert is_png(tmp_path / "a.png")
    tracks = drawn[0].axes
    assert [axes.get_ylabel() for axes in tracks] == ["states", "units", "phones"]
    assert [texts(axes) for axes in tracks] == [["4", "1", "2"], ["9", "8", "9", "7"], ["pau", "iy", "s"]]
    edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in tracks[0].patches]
    np.testing.assert_allclose(edges, [(0, 0.1), (0.1, 0.26), (0.26, 0.4)])
    assert [line.get_xdata()[0] for line in tracks[0].lines] == [0.1, 0.25]
    assert tracks[0].get_title() == "id"


def test_utterance_names_states_and_cuts_long_ones(tmp_path, drawn):
    names = ["pau", "s"]
    figures.utterance([0] * 50 + [1] * 50, None, None, 50.0, tmp_path / "a.png", names=names, max_seconds=1.5)
    (track,) = drawn[0].axes
    assert texts(track) == ["0\npau", "1\ns"]
    assert track.patches[1].get_width() == pytest.approx(0.5)
    assert "first 1.5 of 2.0 s" in track.get_title()


@pytest.mark.parametrize("phones", [None, [], PHONES, [("unheard-of", 0.0, 0.01)]])
@pytest.mark.parametrize("states", [[], [3], [3, 3, 1]])
@pytest.mark.parametrize("with_units", [True, False])
def test_utterance_edges(tmp_path, phones, states, with_units):
    figures.utterance(states, states if with_units else None, phones, 50.0, tmp_path / "a.png")
    assert is_png(tmp_path / "a.png")


def test_learning_curve_reads_csv_logger_files(tmp_path, drawn):
    folder = tmp_path / "logs"
    folder.mkdir()
    header = "epoch,step,train/bits_per_frame,valid/bits_per_frame,lr"
    rows = ["0,9,5.0,,", "0,19,4.0,,", "0,19,,4.2,", ",19,,,0.1", "1,39,,3.5,", "1,39,3.0,,"]
    (folder / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    path = tmp_path / "figures" / "a.png"
    figures.learning_curve(folder / "metrics.csv", path, baselines={"bigram": 4.0, "unigram": 60.0, "trigram": None})
    assert is_png(path)
    axes = drawn[0].axes[0]
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines[:2]}
    assert curves == {"train": [[0, 4.5], [1, 3.0]], "valid": [[0, 4.2], [1, 3.5]]}
    assert [text.strip() for text in texts(axes)] == ["bigram, test 4.000"]  # the unigram lies far above the curves
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "bits per frame")


def test_learning_curve_of_one_epoch_and_of_one_split(tmp_path):
    figures.learning_curve([{"epoch": 0, "valid/bits_per_frame": 3.0}], tmp_path / "a.png", baselines={"bigram": 3.0})
    assert is_png(tmp_path / "a.png")


def test_bad_input_is_named(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(UserError, match=r"log_transition: expected a square matrix, but its shape is \(2, 3\)"):
        figures.transition_matrix(np.zeros((2, 3)), path)
    with pytest.raises(UserError, match="names: 1 names for 2 states"):
        figures.transition_matrix(np.zeros((2, 2)), path, names=["a"])
    with pytest.raises(UserError, match="labels: 1 labels for 2 states"):
        figures.label_transitions(np.zeros((2, 2)), [0])
    with pytest.raises(UserError, match="phones: 1 phones, but joint_LP has 2 columns"):
        figures.states_against_phones(np.zeros((3, 2)), ["a"], path)
    with pytest.raises(UserError, match="joint_LP: all counts are 0"):
        figures.states_against_phones(np.zeros((3, 2)), ["a", "b"], path)
    with pytest.raises(UserError, match="frame_rate"):
        figures.utterance([0], [0], None, 0, path)
    with pytest.raises(UserError, match=r"no numbers under .* it holds the columns \['epoch', 'loss'\]"):
        figures.learning_curve([{"epoch": 0, "loss": 1.0}], path)
    with pytest.raises(UserError, match="but no epoch"):
        figures.learning_curve([{"valid/bits_per_frame": 1.0}], path)
    with pytest.raises(UserError, match=r"nothing\.csv cannot be read"):
        figures.learning_curve(tmp_path / "nothing.csv", path)
    assert list(tmp_path.iterdir()) == []


def test_phones_sort_by_class():
    given = ["t", "zz", "IY1", "s", "pau", "n", "ch", "w", "aa", "iy"]
    assert sort_phones(given) == ["pau", "IY1", "iy", "aa", "w", "n", "s", "ch", "t", "zz"]
    assert [phone_class(p) for p in ("SIL", "AH0", "ŋ", "zz")] == ["silence", "vowel", "nasal", "other"]


def test_drawing_code_is_imported_late():
    code = "import sys, hmm_speech.evaluate, hmm_speech.evaluate.figures, hmm_speech.evaluate.report; "
    code += (
        "print([m for m in ('matplotlib', 'torch', 'torchmetrics', 'pyarrow', 'sklearn', 'rich') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
