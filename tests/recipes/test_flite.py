import importlib.util
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from hmm_speech.data.unitfile import read_units

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "flite"
specification = importlib.util.spec_from_file_location("flite_prepare", FOLDER / "prepare.py")
prepare = importlib.util.module_from_spec(specification)
specification.loader.exec_module(prepare)
needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed (apt-get install flite)")


@pytest.fixture(scope="module")
def shipped():
    return {name: read_units(FOLDER / f"{name}.parquet") for name in ("logmel", "mfcc")}


@pytest.mark.parametrize("name", ["logmel", "mfcc"])
def test_what_ships_is_what_the_documents_say(shipped, name):
    assert (FOLDER / f"{name}.parquet").stat().st_size < 500_000
    corpus = shipped[name]
    assert (corpus.frame_rate, corpus.vocabulary, corpus.made["features"]) == (50.0, 100, name)
    frames = sum(len(u.units) for u in corpus.utterances)
    assert 26 < frames / 50 / 60 < 30  # minutes
    assert len(np.unique(np.concatenate([u.units for u in corpus.utterances]))) == 100
    assert [u.id for u in corpus.split("test")] == [u.id for u in corpus.utterances[9::10]]
    assert len(corpus.split("valid")) > 20
    assert len({u.speaker for u in corpus.split("test")}) == len(prepare.VARIANTS)
    for utterance in corpus.utterances:
        assert utterance.phones[0].start == 0
        assert abs(utterance.phones[-1].end - len(utterance.units) / 50) < 0.03
        assert all(a.end == b.start for a, b in zip(utterance.phones, utterance.phones[1:], strict=False))


def test_no_sentence_is_said_twice():
    speeches = prepare.plan()
    counts = Counter(speech.text for speech in speeches)
    test = {speech.text for speech in speeches if speech.split == "test"}
    assert not test & {speech.text for speech in speeches if speech.split == "train"}
    assert max(counts.values()) == 1


def test_splits_text_at_punctuation_and_keeps_every_word():
    text = (
        "`Well!' thought Alice to herself, `after such a fall as this, I shall think nothing of "
        "tumbling down stairs!'\n"
        "She took the waistcoat-\npocket--oh dear (which was VERY odd)."
    )
    assert prepare.split_text(text) == [
        "well, thought alice to herself, after such a fall as this.",
        "i shall think nothing of tumbling down stairs.",
        "she took the waistcoat-pocket, oh dear which was very odd.",
    ]
    whole = (FOLDER / "alice.txt").read_text()
    lines = prepare.split_text(whole)
    assert all(line.count(".") == 1 and line.endswith(".") for line in lines)
    assert max(len(line.split()) for line in lines) <= prepare.LONGEST + prepare.SHORTEST
    words = [word for line in lines for word in line.split()]
    assert 4000 < len(words) < 4500


def test_without_flite_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prepare.main(["--out", str(tmp_path / "out"), "--units", str(tmp_path)]) == 1
    assert "apt-get install flite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_flite
def test_a_few_utterances_come_out_as_they_ship(tmp_path, shipped):
    speeches = prepare.plan()
    by_id = {u.id: u for u in shipped["logmel"].utterances}
    assert [(s.id, s.speaker, s.split == "test") for s in speeches] == [
        (u.id, u.speaker, u.split == "test") for u in shipped["logmel"].utterances
    ]
    for speech in speeches[:: len(speeches) // 12]:
        assert prepare.speak(speech, tmp_path) == by_id[speech.id].phones


@needs_flite
@pytest.mark.slow
def test_the_script_makes_what_ships(tmp_path, shipped):
    assert prepare.main(["--out", str(tmp_path / "one"), "--units", str(tmp_path / "units")]) == 0
    for name, corpus in shipped.items():
        made = read_units(tmp_path / "units" / f"{name}.parquet")
        for left, right in zip(made.utterances, corpus.utterances, strict=True):
            assert (left.id, left.speaker, left.split, left.phones) == (
                right.id,
                right.speaker,
                right.split,
                right.phones,
            )
            assert len(left.units) == len(right.units)
        # on another processor, rounding may decide otherwise at the start of k-means: other clusters, as good
        units = [np.concatenate([u.units for u in c.utterances]) for c in (made, corpus)]
        assert normalized_mutual_info_score(*units) > 0.75
    frames = read_units(tmp_path / "one" / "logmel_frames.parquet")
    assert frames.vocabulary == 50 and not (tmp_path / "units" / "logmel_frames.parquet").exists()
    for left, right in zip(frames.utterances, shipped["logmel"].utterances, strict=True):
        assert left.id == right.id and left.frames.shape == (len(right.units), 40)
    # on one machine the bytes are the same, wherever the files lie
    (tmp_path / "one").rename(tmp_path / "two")
    prepare.make_units(tmp_path / "two", tmp_path / "again", ["mfcc"])
    first, second = (tmp_path / folder / "mfcc.parquet" for folder in ("units", "again"))
    assert first.read_bytes() == second.read_bytes()
