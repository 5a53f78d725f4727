import numpy as np
import pytest

from hmm_speech.data.unitfile import read_units
from hmm_speech.errors import UserError


def as_dict(corpus):
    return {u.id: u.units.tolist() for u in corpus.utterances}


def test_lines(tmp_path):
    (tmp_path / "units.txt").write_text("utt-1 3 3 7\n\nutt-2\t0 1\r\nutt-3 2\n")
    corpus = read_units(tmp_path / "units.txt")
    assert as_dict(corpus) == {"utt-1": [3, 3, 7], "utt-2": [0, 1], "utt-3": [2]}
    assert (corpus.frame_rate, corpus.vocabulary) == (50.0, 8)
    assert {u.split for u in corpus.utterances} == {"train", "valid", "test"}
    assert corpus.utterances[0].units.dtype == np.int32


def test_frame_rate_and_vocabulary_can_be_given(tmp_path):
    (tmp_path / "units.km.txt").write_text("a 1 2\n")
    corpus = read_units(tmp_path / "units.km.txt", frame_rate=25, vocabulary=500)
    assert (corpus.frame_rate, corpus.vocabulary) == (25.0, 500)
    with pytest.raises(UserError, match=r"'a'.*unit 2 is not in the vocabulary 0 \.\. 1"):
        read_units(tmp_path / "units.km.txt", vocabulary=2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a 1 x 2\n", ["line 1", "'a'", "'x'"]),
        ("a 1\nb 1.5\n", ["line 2", "'b'", "'1.5'"]),
        ("a 1\nb -2\n", ["'b'", "-2"]),
        ("a 1\na 2\n", ["'a'", "twice"]),
        ("a 1\nb\n", ["'b'", "no units"]),
        ("a 99999999999\n", ["'a'", "32 bits"]),
        ("a 99999999999999999999999\n", ["'a'"]),
        ("", ["no utterances"]),
    ],
)
def test_lines_that_are_wrong_are_refused_by_name(tmp_path, text, words):
    (tmp_path / "units.txt").write_text(text)
    with pytest.raises(UserError) as error:
        read_units(tmp_path / "units.txt")
    assert all(word in str(error.value) for word in ["units.txt", *words]), str(error.value)


def test_binary_is_not_lines(tmp_path):
    (tmp_path / "units.bin").write_bytes(b"\xff\xfe\x00\x9c")
    with pytest.raises(UserError, match=r"units\.bin"):
        read_units(tmp_path / "units.bin")


def fairseq(folder, name, count):
    (folder / f"{name}.tsv").write_text("/root\n" + "".join(f"sub/{name}{n}.flac\t{1600 * n}\n" for n in range(count)))
    (folder / f"{name}.km").write_text("".join(f"{n} {n + 1}\n" for n in range(count)))


@pytest.mark.parametrize("given", ["train.tsv", "train.km"])
def test_fairseq_pair(tmp_path, given):
    fairseq(tmp_path, "train", 30)
    fairseq(tmp_path, "valid", 2)
    corpus = read_units(tmp_path / given)
    assert as_dict(corpus) == {f"train{n}": [n, n + 1] for n in range(30)}
    assert corpus.split("valid")
    assert corpus.split("test")


def test_fairseq_folder_has_the_splits_of_its_names(tmp_path):
    for name, count in (("train", 5), ("dev", 2), ("test", 3)):
        fairseq(tmp_path, name, count)
    corpus = read_units(tmp_path)
    assert {name: len(corpus.split(name)) for name in ("train", "valid", "test")} == {"train": 5, "valid": 2, "test": 3}


def test_fairseq_files_that_do_not_match_are_refused(tmp_path):
    fairseq(tmp_path, "train", 3)
    (tmp_path / "train.km").write_text("1\n2\n")
    with pytest.raises(UserError, match=r"train\.km: has 2 lines .* lists 3 files"):
        read_units(tmp_path / "train.tsv")
    (tmp_path / "train.km").unlink()
    with pytest.raises(UserError, match=r"train\.km: no such file"):
        read_units(tmp_path / "train.tsv")


def test_folder_of_npy(tmp_path):
    for name, units in (("train/a", [1, 2]), ("train/b", [3]), ("dev/c", [0]), ("test/d", [9, 9])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / f"{name}.npy", np.array(units, np.int16))
    corpus = read_units(tmp_path)
    assert as_dict(corpus) == {"c": [0], "d": [9, 9], "a": [1, 2], "b": [3]}
    assert {u.id: u.split for u in corpus.utterances} == {"a": "train", "b": "train", "c": "valid", "d": "test"}
    assert corpus.vocabulary == 10


@pytest.mark.parametrize(
    "array", [np.zeros((4, 39), np.float32), np.zeros(4), np.array([-1, 2]), np.array([None, {}], dtype=object)]
)
def test_npy_that_is_no_units_is_refused_by_name(tmp_path, array):
    np.save(tmp_path / "utt7.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=r"utt7\.npy"):
        read_units(tmp_path)


def test_npy_of_the_same_name_are_refused(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", np.array([1]))
    with pytest.raises(UserError, match="'a' comes twice"):
        read_units(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.parquet"):
        read_units(tmp_path)
