import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from hmm_speech.data.unitfile import read_units
from hmm_speech.units.command import units


@pytest.fixture
def invoke():
    app = typer.Typer()
    app.command()(units)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_writes_a_unit_file_and_a_table(corpus, invoke):
    result = invoke(
        corpus / "audio", "--out", corpus / "u.parquet", "--clusters", 6, "--metadata", corpus / "meta.tsv",
        "--alignments", corpus / "align.tsv", "--hop-ms", 10, "--features", "logmel", "--keep-frames", "--seed", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    got = read_units(corpus / "u.parquet")
    assert (got.vocabulary, got.frame_rate) == (6, 100.0)
    assert got.made["seed"] == "3"
    assert got.utterances[0].frames.shape == (100, 40)
    assert "logmel, 10 ms" in result.stdout
    assert "1200 of a vocabulary of 6" in result.stdout
    assert (corpus / "u.quantizer.npz").exists()


def test_a_bad_file_is_named_and_the_code_tells(corpus, invoke, write_tone):
    (corpus / "audio" / "empty.wav").touch()
    write_tone(corpus / "audio" / "stereo.wav", channels=2)
    (corpus / "audio" / "notes.txt").write_text("hello")
    result = invoke(corpus / "audio", "--out", corpus / "u.parquet", "--clusters", 6)
    assert result.exit_code == 1
    assert "empty.wav: empty file" in result.stderr
    assert "stereo.wav: 2 channels averaged" in result.stderr
    assert "notes.txt" in result.stderr
    assert "1 of 14 files" in result.stdout
    assert len(read_units(corpus / "u.parquet").utterances) == 13


def test_a_mistake_is_one_line_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "hmm_speech.cli", "units", str(tmp_path), "--out", str(tmp_path / "u.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "no audio found" in done.stderr
