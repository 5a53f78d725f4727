import hashlib
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.data.parquet import ROWS_PER_GROUP, unit_writer
from hmm_speech.data.unitfile import Phone, UnitCorpus, Utterance, read_units, write_units
from hmm_speech.errors import UserError


def utterance(name="a", split="train", units=(0, 1, 2), **more):
    return Utterance(name, "s", split, np.array(units, np.int32), **more)


def three(**more):
    return [utterance("a", "train", **more), utterance("b", "valid", **more), utterance("c", "test", **more)]


@st.composite
def corpora(draw):
    vocabulary = draw(st.integers(1, 300))
    names = draw(st.lists(st.text(min_size=1, max_size=8).filter(str.strip), min_size=1, max_size=6, unique=True))
    width = draw(st.integers(0, 3))
    utterances = []
    for name in names:
        units = np.array(draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=9)), np.int32)
        times = sorted(draw(st.lists(st.integers(0, 10**6), max_size=4)))
        phones = [Phone("x", a / 1000, b / 1000) for a, b in itertools.pairwise(times)]
        frames = np.arange(len(units) * width, dtype=np.float32).reshape(len(units), width) if width else None
        has_phones, has_audio = draw(st.booleans()), draw(st.booleans())
        split = draw(st.sampled_from(["train", "valid", "test"]))
        utterances.append(
            Utterance(name, "s", split, units, phones if has_phones else None, "f.wav" if has_audio else None, frames)
        )
    extra = [
        utterance("train one", "train", [0]),
        utterance("valid one", "valid", [0]),
        utterance("test one", "test", [0]),
    ]
    return UnitCorpus(utterances + extra, draw(st.sampled_from([50.0, 62.5, 100.0])), vocabulary, {"features": "mfcc"})


@settings(max_examples=60, deadline=None)
@given(corpora())
def test_round_trip(tmp_path_factory, corpus):
    path = tmp_path_factory.mktemp("units") / "u.parquet"
    write_units(corpus, path)
    got = read_units(path)
    assert (got.frame_rate, got.vocabulary, got.made) == (corpus.frame_rate, corpus.vocabulary, corpus.made)
    assert len(got.utterances) == len(corpus.utterances)
    for left, right in zip(got.utterances, corpus.utterances, strict=True):
        assert (left.id, left.speaker, left.split, left.audio) == (right.id, right.speaker, right.split, right.audio)
        assert left.units.dtype == np.int32
        np.testing.assert_array_equal(left.units, right.units)
        if right.phones is None:
            assert left.phones is None
        else:
            assert [p.label for p in left.phones] == [p.label for p in right.phones]
            np.testing.assert_allclose([p[1:] for p in left.phones], [p[1:] for p in right.phones], rtol=1e-6)
        if right.frames is None:
            assert left.frames is None
        else:
            np.testing.assert_array_equal(left.frames, right.frames)


def test_schema_is_the_documented_one(tmp_path):
    rows = three(phones=[Phone("ah", 0.0, 0.164)], audio="x/a.wav", frames=np.zeros((3, 2), np.float32))
    write_units(UnitCorpus(rows, 50.0, 100, {"features": "mfcc"}), tmp_path / "u.parquet")
    schema = pq.read_schema(tmp_path / "u.parquet")
    assert schema.metadata == {b"frame_rate": b"50.0", b"vocabulary": b"100", b"features": b"mfcc"}
    phone = pa.struct([("label", pa.string()), ("start", pa.float32()), ("end", pa.float32())])
    expected = {
        "id": pa.string(),
        "speaker": pa.string(),
        "split": pa.string(),
        "units": pa.list_(pa.int32()),
        "phones": pa.list_(phone),
        "audio": pa.string(),
        "frames": pa.list_(pa.list_(pa.float32())),
    }
    assert {field.name: field.type for field in schema} == expected
    assert read_units(tmp_path / "u.parquet").utterances[0].phones == [Phone("ah", 0.0, 0.164)]


def test_columns_that_nothing_fills_are_left_out(tmp_path):
    write_units(UnitCorpus(three(), 50.0, 3), tmp_path / "u.parquet")
    assert pq.read_schema(tmp_path / "u.parquet").names == ["id", "speaker", "split", "units"]


def test_same_corpus_same_bytes_wherever_it_is_written(tmp_path):
    digests = set()
    for name in ("one.parquet", "folder/two.parquet"):
        made = {"seed": "0", "features": "mfcc"} if name.startswith("one") else {"features": "mfcc", "seed": "0"}
        write_units(UnitCorpus(three(phones=[Phone("a", 0, 0.02)]), 50.0, 3, made), tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_rows_beyond_one_group_keep_their_order(tmp_path):
    count = 2 * ROWS_PER_GROUP + 5
    rows = [utterance(f"u{n}", "train", [n % 7] * (1 + n % 3)) for n in range(count)]
    write_units(UnitCorpus(rows, 50.0, 7), tmp_path / "u.parquet")
    assert pq.ParquetFile(tmp_path / "u.parquet").num_row_groups == 3
    got = read_units(tmp_path / "u.parquet")
    assert [u.id for u in got.utterances] == [u.id for u in rows]
    assert all(np.array_equal(a.units, b.units) for a, b in zip(got.utterances, rows, strict=True))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([utterance("same"), utterance("same")], ["'same'", "twice"]),
        ([utterance(units=[0, 3])], ["'a'", "unit 3", "0 .. 2"]),
        ([utterance(units=[-1, 0])], ["'a'", "unit -1"]),
        ([utterance(units=[])], ["'a'", "no units"]),
        ([utterance(split="dev")], ["'a'", "'dev'", "train, valid, test"]),
        ([utterance("")], ["empty id"]),
        ([utterance(frames=np.zeros((2, 5), np.float32))], ["'a'", "(2, 5)"]),
        ([utterance(phones=[Phone("ah", 0.3, 0.2)])], ["'a'", "'ah'"]),
        ([utterance(phones=[Phone("x", 0.3, 0.4), Phone("ah", 0.1, 0.2)])], ["'a'", "'ah'", "ascending"]),
        ([], ["no utterances"]),
    ],
)
def test_what_is_not_valid_is_refused_by_name_and_leaves_nothing(tmp_path, rows, words):
    path = tmp_path / "u.parquet"
    with pytest.raises(UserError) as error:
        write_units(UnitCorpus(rows, 50.0, 3), path)
    assert all(word in str(error.value) for word in [str(path), *words])
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "u.parquet"
    write_units(UnitCorpus(three(), 50.0, 3), path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="twice"), unit_writer(path, 50.0, 3) as writer:
        writer.add(utterance("a"))
        writer.add(utterance("a"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def write_raw(path, metadata=None, **columns):
    table = {"id": ["a"], "speaker": ["s"], "split": ["train"], "units": [[0, 1]]} | columns
    metadata = {"frame_rate": "50.0", "vocabulary": "100"} if metadata is None else metadata
    pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}).replace_schema_metadata(metadata), path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"units": [[0, 100]]}, ["'a'", "unit 100"]),
        ({"units": [[0, 2**32]]}, ["'a'", "unit 4294967296"]),  # would wrap to 0 in 32 bits
        ({"units": [[0.5, 1.0]]}, ["'a'", "float64"]),
        ({"units": [["x"]]}, ["'a'", "units"]),
        ({"units": [3]}, ["units"]),
        ({"units": [None]}, ["'a'", "no units"]),
        ({"units": None}, ["no column 'units'"]),
        ({"id": [3]}, ["'id'", "int64"]),
        ({"id": [None]}, ["empty id"]),
        ({"phones": [[{"label": "x", "from": 0.0}]]}, ["phones", "start"]),
        ({"phones": [["x"]]}, ["phones"]),
        ({"metadata": {"vocabulary": "100"}}, ["frame_rate", "not a unit file"]),
        ({"metadata": {"frame_rate": "50.0", "vocabulary": "many"}}, ["vocabulary", "many"]),
        ({"metadata": {"frame_rate": "0", "vocabulary": "100"}}, ["frame_rate"]),
        ({"frames": [[[1.0], [1.0, 2.0]]]}, ["'a'", "frames"]),
        ({"frames": [[[1.0]]]}, ["'a'", "frames"]),
    ],
)
def test_a_file_that_others_wrote_wrongly_is_refused_by_name(tmp_path, change, words):
    write_raw(tmp_path / "bad.parquet", **change)
    with pytest.raises(UserError) as error:
        read_units(tmp_path / "bad.parquet")
    assert all(word in str(error.value) for word in ["bad.parquet", *words]), str(error.value)


def test_what_is_no_parquet_or_not_there_is_refused(tmp_path):
    (tmp_path / "no.parquet").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"no\.parquet.*Parquet"):
        read_units(tmp_path / "no.parquet")
    with pytest.raises(UserError, match="no such file"):
        read_units(tmp_path / "missing.parquet")


def test_reads_wider_integers_and_assigns_splits(tmp_path):
    names = [f"u{n}" for n in range(200)]
    write_raw(
        tmp_path / "u.parquet", id=names, speaker=[""] * 200, split=["train"] * 199 + [None], units=[[1, 2]] * 200
    )
    corpus = read_units(tmp_path / "u.parquet")
    assert corpus.utterances[0].units.dtype == np.int32
    assert all(len(corpus.split(name)) > 5 for name in ("train", "valid", "test"))
    with pytest.raises(UserError, match="dev"):
        corpus.split("dev")


def test_a_folder_is_one_dataset(tmp_path):
    made = {"features": "mfcc", "quantizer": "abc"}
    write_units(UnitCorpus([utterance("b", "test")], 50.0, 3, made | {"seed": "1"}), tmp_path / "2.parquet")
    write_units(UnitCorpus(three()[:1], 50.0, 3, made | {"seed": "0"}), tmp_path / "1.parquet")
    corpus = read_units(tmp_path)
    assert [u.id for u in corpus.utterances] == ["a", "b"]
    assert corpus.made == made


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (UnitCorpus([utterance("b")], 100.0, 3), ["frame_rate", "50.0", "100.0"]),
        (UnitCorpus([utterance("b")], 50.0, 4), ["vocabulary", "3", "4"]),
        (UnitCorpus([utterance("b")], 50.0, 3, {"quantizer": "x"}), ["different quantizers"]),
        (UnitCorpus([utterance("a")], 50.0, 3), ["'a'", "unique"]),
    ],
)
def test_a_folder_whose_files_do_not_agree_is_refused(tmp_path, other, words):
    write_units(UnitCorpus([utterance("a")], 50.0, 3), tmp_path / "1.parquet")
    write_units(other, tmp_path / "2.parquet")
    with pytest.raises(UserError) as error:
        read_units(tmp_path)
    assert all(word in str(error.value) for word in ["1.parquet", "2.parquet", *words])


def test_values_that_a_file_carries_cannot_be_overruled(tmp_path):
    write_units(UnitCorpus(three(), 50.0, 3), tmp_path / "u.parquet")
    assert read_units(tmp_path / "u.parquet", frame_rate=50, vocabulary=3).vocabulary == 3
    with pytest.raises(UserError, match="vocabulary 4"):
        read_units(tmp_path / "u.parquet", vocabulary=4)
