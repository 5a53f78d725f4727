import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hmm_speech.data.unitfile import read_units
from hmm_speech.units.extract import extract_units

ROOT = Path(__file__).resolve().parents[2]
specification = importlib.util.spec_from_file_location(
    "speechocean762_prepare", ROOT / "recipes" / "speechocean762" / "prepare.py"
)
prepare = importlib.util.module_from_spec(specification)
specification.loader.exec_module(prepare)
CORPUS = Path(os.environ.get("HMM_SPEECH_SPEECHOCEAN762", ROOT.parent / "shared" / "data" / "speechocean762"))


@pytest.fixture
def corpus(tmp_path):
    """The corpus' layout with two speakers a split and three utterances each."""
    root, number = tmp_path / "corpus", 0
    for split in ("train", "test"):
        tables = {name: [] for name in ("wav.scp", "utt2spk", "text", "spk2gender", "spk2age")}
        for speaker in ("01", "02") if split == "train" else ("03", "04"):
            tables["spk2gender"].append(f"{speaker} m")
            tables["spk2age"].append(f"{speaker}\t2{speaker[1]}")
            for _ in range(3):
                number += 1
                utt, audio = f"{speaker}{number:03d}", f"WAVE/SPEAKER{speaker}/{speaker}{number:03d}.WAV"
                tables["wav.scp"].append(f"{utt}\t{audio}")
                tables["utt2spk"].append(f"{utt} {speaker}")
                tables["text"].append(f"{utt}\tSAY  WORD {number}")
                (root / audio).parent.mkdir(parents=True, exist_ok=True)
                samples = 0.1 * np.random.default_rng(number).standard_normal(16000)
                soundfile.write(root / audio, samples, 16000, format="WAV")
        (root / split).mkdir()
        for name, lines in tables.items():
            (root / split / name).write_text("\n".join(lines) + "\n")
    return root


def run(corpus, out, *more):
    return prepare.main([str(corpus), "--out", str(out), "--clusters", "8", *more])


def test_the_download_becomes_a_table_and_a_unit_file(corpus, tmp_path):
    assert run(corpus, tmp_path / "out") == 0
    lines = (tmp_path / "out" / "meta.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["utt", "speaker", "split", "text", "gender", "age", "audio"]
    assert lines[1].split("\t") == [
        "01001", "01", "train", "SAY WORD 1", "m", "21", "../corpus/WAVE/SPEAKER01/01001.WAV"
    ]  # fmt: skip
    units = read_units(tmp_path / "out" / "logmel.parquet")
    assert len(units.utterances) == 12
    assert {u.speaker for u in units.split("test")} == {"03", "04"}
    assert units.utterances[0].audio == "WAVE/SPEAKER01/01001.WAV"
    assert units.utterances[0].phones is None
    # the table alone is enough for the command
    report = extract_units(tmp_path / "out" / "meta.tsv", tmp_path / "again.parquet", features="logmel", clusters=8)
    again = read_units(report.out)
    assert [u.units.tolist() for u in again.utterances] == [u.units.tolist() for u in units.utterances]


def test_missing_and_broken_files_are_named_and_the_rest_goes_on(corpus, tmp_path, capsys):
    (corpus / "WAVE" / "SPEAKER01" / "01002.WAV").unlink()
    (corpus / "WAVE" / "SPEAKER03" / "03008.WAV").write_bytes(b"")
    assert run(corpus, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "not on disk (1 of 12):\n  WAVE/SPEAKER01/01002.WAV" in err
    assert "WAVE/SPEAKER03/03008.WAV: empty file" in err
    ids = {u.id for u in read_units(tmp_path / "out" / "logmel.parquet").utterances}
    assert len(ids) == 10
    assert "01002" not in (tmp_path / "out" / "meta.tsv").read_text()


def test_alignments_and_other_features(corpus, tmp_path):
    (tmp_path / "align.tsv").write_text("utt\tstart\tend\tphone\n01001\t0\t1\tah\n")
    assert run(corpus, tmp_path / "out", "--features", "mfcc", "--alignments", str(tmp_path / "align.tsv")) == 0
    units = read_units(tmp_path / "out" / "mfcc.parquet")
    assert [u.id for u in units.utterances if u.phones] == ["01001"]


def test_another_layout_is_refused(tmp_path, capsys):
    assert run(tmp_path, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "utt2spk" in err
    assert "the corpus' own download" in err


def test_nothing_on_disk_is_refused(corpus, tmp_path, capsys):
    (corpus / "WAVE").rename(corpus / "AUDIO")
    assert run(corpus, tmp_path / "out") == 1
    assert "none of the 12 files" in capsys.readouterr().err


@pytest.mark.skipif(not (CORPUS / "meta.tsv").exists(), reason=f"no prepared speechocean762 at {CORPUS}")
def test_the_prepared_subset_goes_through_the_command(tmp_path):
    keep = [line.split("\t") for line in (CORPUS / "meta.tsv").read_text().splitlines()]
    place = {name: keep[0].index(name) for name in ("utt", "speaker", "split")}
    rows = [[row[place[name]] for name in place] for row in keep[1:]][::25]
    audio = [f"{row[0]}\t{CORPUS / 'audio' / row[0]}.flac\t{row[1]}\t{row[2]}" for row in rows]
    (tmp_path / "list.tsv").write_text("\n".join(["utt\taudio\tspeaker\tsplit", *audio]) + "\n")
    report = extract_units(tmp_path / "list.tsv", tmp_path / "u.parquet", clusters=20, alignments=CORPUS / "align.tsv")
    assert not report.failed
    assert report.aligned == report.utterances == len(rows)
    for utterance in read_units(report.out).utterances:
        assert abs(utterance.phones[-1].end - len(utterance.units) / 50) < 0.1
