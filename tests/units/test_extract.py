import shutil

import numpy as np
import pytest
import soundfile
import torch

from hmm_speech.data.unitfile import Phone, read_units
from hmm_speech.errors import UserError
from hmm_speech.units.audio import list_audio, read_audio
from hmm_speech.units.extract import FrameStore, extract_units
from hmm_speech.units.features import make_extractor
from hmm_speech.units.quantize import Quantizer


def run(corpus, name="u.parquet", audio="audio", **options):
    options = {"clusters": 8, "metadata": corpus / "meta.tsv"} | options
    report = extract_units(corpus / audio, corpus / "out" / name, **options)
    return report, read_units(corpus / "out" / name)


def test_frames_come_back_from_the_store(tmp_path):
    store = FrameStore(tmp_path)
    arrays = [np.random.default_rng(n).normal(size=(n + 1, 5)).astype(np.float32) for n in range(4)]
    for array in arrays:
        store.append(array)
    for n in (2, 0, 3, 1):
        np.testing.assert_array_equal(store[n], arrays[n])
        assert store.length(n) == n + 1
    store.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("features", ["mfcc", "logmel"])
def test_the_road(corpus, features):
    report, units = run(corpus, features=features, alignments=corpus / "align.tsv", keep_frames=True)
    assert (report.utterances, report.frames, report.speakers, report.aligned) == (12, 600, 2, 12)
    assert report.seconds == pytest.approx(12)
    assert not report.failed
    assert (units.frame_rate, units.vocabulary) == (50.0, 8)
    assert units.made["features"] == features
    assert [u.id for u in units.split("test")] == ["utt10", "utt11"]
    assert len(units.split("valid")) >= 1
    quantizer = Quantizer.load(report.quantizer)
    assert units.made["quantizer"] == quantizer.fingerprint
    for utterance in units.utterances:
        assert utterance.phones == [Phone("ah", 0.0, 0.5), Phone("sh", 0.5, 1.0)]
        assert utterance.audio == f"{utterance.speaker}/{utterance.id}.wav"
        np.testing.assert_array_equal(quantizer.assign(utterance.frames), utterance.units)
    for speaker in ("s0", "s1"):
        frames = np.concatenate([u.frames for u in units.utterances if u.speaker == speaker])
        np.testing.assert_allclose(frames.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(frames.std(0), 1, atol=1e-3)


def test_same_input_same_bytes_wherever_it_lies(corpus, tmp_path):
    first, _ = run(corpus, alignments=corpus / "align.tsv")
    copy = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(corpus / "audio", copy / "audio")
    for name in ("meta.tsv", "align.tsv"):
        shutil.copy(corpus / name, copy / name)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    second, _ = run(copy, "another.parquet", alignments=copy / "align.tsv")
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert first.out.read_bytes() == second.out.read_bytes()
    assert first.quantizer.read_bytes() == second.quantizer.read_bytes()
    third, _ = run(corpus, "third.parquet", alignments=corpus / "align.tsv", seed=1)
    assert first.out.read_bytes() != third.out.read_bytes()
    assert str(tmp_path).encode() not in first.out.read_bytes()


def test_the_quantizer_is_fitted_on_train_only(corpus, write_tone):
    before, _ = run(corpus)
    write_tone(corpus / "audio" / "s2" / "utt99.wav", seconds=2, seed=99)
    (corpus / "meta.tsv").open("a").write("utt99\ts2\ttest\n")
    after, _ = run(corpus, "more.parquet")
    assert before.quantizer.read_bytes() == after.quantizer.read_bytes()
    # and train counts: the same file there changes it
    (corpus / "meta.tsv").write_text((corpus / "meta.tsv").read_text().replace("utt99\ts2\ttest", "utt99\ts2\ttrain"))
    assert run(corpus, "train.parquet")[0].quantizer.read_bytes() != before.quantizer.read_bytes()


def test_the_drawn_valid_split_is_kept_from_the_quantizer(corpus):
    _, units = run(corpus, "all.parquet")
    drawn = {u.id: u.split for u in units.utterances}
    assert "valid" in drawn.values()
    rows = "".join(f"{u.id}\t{u.speaker}\t{u.split}\n" for u in units.utterances)
    (corpus / "said.tsv").write_text("utt\tspeaker\tsplit\n" + rows)
    run(corpus, "said.parquet", metadata=corpus / "said.tsv")
    assert (corpus / "out" / "said.parquet").read_bytes() == (corpus / "out" / "all.parquet").read_bytes()


def test_a_quantizer_used_again_gives_the_same_units(corpus):
    report, units = run(corpus, features="logmel", hop_ms=10, clusters=5)
    again, same = run(corpus, "again.parquet", quantizer=report.quantizer, clusters=None)
    assert (again.extractor.name, again.extractor.hop_ms, again.vocabulary) == ("logmel", 10.0, 5)
    assert again.out.read_bytes() == report.out.read_bytes()
    assert not (corpus / "out" / "again.quantizer.npz").exists()
    assert same.vocabulary == units.vocabulary


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": "mfcc"}, "features logmel, but mfcc"),
        ({"hop_ms": 10}, "hop_ms 20, but 10"),
        ({"clusters": 9}, "clusters 8, but 9"),
    ],
)
def test_options_that_a_quantizer_was_not_made_with_are_refused(corpus, options, words):
    report, _ = run(corpus, features="logmel")
    with pytest.raises(UserError, match=words):
        run(corpus, "again.parquet", **({"quantizer": report.quantizer, "clusters": None} | options))


def test_without_metadata_each_utterance_is_normalised_alone_and_splits_are_drawn(corpus):
    report, units = run(corpus, metadata=None, keep_frames=True)
    assert report.speakers == 0
    assert all(count > 0 for count in report.splits.values())
    for utterance in units.utterances:
        np.testing.assert_allclose(utterance.frames.mean(0), 0, atol=1e-4)


def test_bad_files_are_named_and_the_rest_goes_on(corpus, write_tone):
    audio = corpus / "audio"
    (audio / "empty.wav").touch()
    (audio / "text.wav").write_text("this is no audio")
    write_tone(audio / "short.wav", seconds=0.02)
    soundfile.write(audio / "none.wav", np.zeros(0, np.float32), 16000)
    cut = write_tone(audio / "cut.flac", seconds=3)
    cut.write_bytes(cut.read_bytes()[:9000])
    write_tone(audio / "stereo.wav", channels=2)
    write_tone(audio / "rate.ogg", rate=44100)
    (audio / "notes.txt").write_text("hello")
    with (corpus / "meta.tsv").open("a") as meta:
        meta.write("gone\ts0\ttrain\n")
    report, units = run(corpus)
    reasons = dict(report.failed)
    assert set(reasons) == {"empty.wav", "text.wav", "short.wav", "none.wav", "cut.flac"}
    assert "empty file" in reasons["empty.wav"]
    assert "too short: 20.0 ms" in reasons["short.wav"]
    assert dict(report.converted) == {"stereo.wav": "2 channels averaged", "rate.ogg": "resampled from 44100 Hz"}
    assert [name for name in report.skipped if name.endswith("notes.txt")] == report.skipped
    assert report.skipped
    assert report.without_audio == ["gone"]
    assert {"stereo", "rate"} <= set(report.without_row)
    assert {u.id for u in units.utterances} == {f"utt{n:02d}" for n in range(12)} | {"stereo", "rate"}
    assert report.utterances == 14


def test_a_tsv_that_lists_files_is_its_own_metadata(corpus):
    rows = [
        f"utt{n:02d}\taudio/s{n % 2}/utt{n:02d}.wav\tvoice{n % 2}\t{'test' if n > 9 else 'train'}" for n in range(12)
    ]
    rows.append("lost\taudio/lost.wav\tvoice0\ttrain")
    (corpus / "list.tsv").write_text("\n".join(["utt\taudio\tspeaker\tsplit", *rows]) + "\n")
    report, units = run(corpus, audio="list.tsv", metadata=None)
    assert report.failed == [("audio/lost.wav", "no such file")]
    assert {u.speaker for u in units.utterances} == {"voice0", "voice1"}
    assert units.utterances[0].audio == "audio/s0/utt00.wav"


def test_units_follow_the_nearest_centroid_of_normalised_features(corpus):
    # the whole road once more, by hand, for one utterance
    report, units = run(corpus, features="logmel")
    extractor = make_extractor("logmel")
    frames = {f.id: extractor(read_audio(f.path)[0]) for f in list_audio(corpus / "audio").files}
    mine = np.concatenate([frames[f"utt{n:02d}"] for n in range(0, 12, 2)])
    normal = (frames["utt04"] - mine.mean(0)) / mine.std(0)
    centroids = Quantizer.load(report.quantizer).centroids
    expected = ((normal[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(next(u for u in units.utterances if u.id == "utt04").units, expected)


def test_a_local_model_and_its_quantizer(corpus, small_model):
    torch.save(small_model()[1].state_dict(), corpus / "m.pt")
    features = f"{corpus / 'm.pt'}:2"
    report, units = run(corpus, features=features)
    assert str(corpus) not in str(units.made)
    _, again = run(corpus, "again.parquet", quantizer=report.quantizer, features=features, clusters=None)
    assert [u.units.tolist() for u in again.utterances] == [u.units.tolist() for u in units.utterances]
    with pytest.raises(UserError, match="give that checkpoint"):
        run(corpus, "b.parquet", quantizer=report.quantizer, clusters=None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": 1}, "--clusters: got 1"),
        ({"clusters": 5000}, "--clusters: got 5000, but the train split has"),
        ({"features": "plp"}, "'plp'"),
        ({"hop_ms": 0}, "--hop-ms"),
        ({"quantizer": "missing.npz", "clusters": None}, r"missing\.npz"),
        ({"metadata": "missing.tsv"}, r"missing\.tsv"),
        ({"alignments": "missing.tsv"}, r"missing\.tsv"),
        ({"name": "u.txt"}, r"\.parquet"),
        ({"audio": "nowhere"}, "nowhere"),
    ],
)
def test_options_that_cannot_be_are_refused_and_leave_nothing(corpus, options, words):
    with pytest.raises(UserError, match=words):
        run(corpus, **options)
    assert not list(corpus.glob("out/*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speaker\tsplit\na\ttrain\n", "expected tab-separated columns with utt"),
        ("utt\tsplit\nutt00\tholdout\n", "'utt00' has split 'holdout'"),
        ("utt\tsplit\nutt00\ttrain\nutt00\ttest\n", "'utt00' comes twice"),
        ("utt\tsplit\nutt00\n", "line 2 has 1 columns"),
        ("utt\tsplit\n" + "".join(f"utt{n:02d}\ttest\n" for n in range(12)), "no utterance .* train"),
    ],
)
def test_metadata_that_is_wrong_is_refused(corpus, text, words):
    (corpus / "wrong.tsv").write_text(text)
    with pytest.raises(UserError, match=words):
        run(corpus, metadata=corpus / "wrong.tsv")


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    (tmp_path / "a.wav").touch()
    with pytest.raises(UserError, match=r"none of the 1 files can be used \(a\.wav: empty file"):
        extract_units(tmp_path, tmp_path / "u.parquet")
