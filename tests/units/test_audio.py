import os

import numpy as np
import pytest
import soundfile
import torch

from hmm_speech.errors import UserError
from hmm_speech.units.audio import AudioError, list_audio, read_audio


def test_reads_16_bit_samples_as_they_are(tmp_path):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 5000, dtype=np.int16)
    soundfile.write(tmp_path / "a.flac", samples, 16000)
    wave, notes = read_audio(tmp_path / "a.flac")
    assert wave.dtype == torch.float32
    np.testing.assert_array_equal(wave.numpy(), samples / np.float32(2**15))
    assert notes == []


def test_channels_are_averaged(tmp_path):
    stereo = np.random.default_rng(0).uniform(-0.5, 0.5, (3000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", stereo, 16000, subtype="FLOAT")
    wave, notes = read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(wave.numpy(), stereo.mean(axis=1), atol=1e-7)
    assert notes == ["2 channels averaged"]


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled(tmp_path, rate):
    time = np.arange(rate) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate, subtype="FLOAT")
    wave, notes = read_audio(tmp_path / "a.wav")
    assert notes == [f"resampled from {rate} Hz"]
    assert len(wave) == 16000
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(wave.numpy()[400:-400], expected[400:-400], atol=5e-3)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_every_format_is_read_and_a_cut_file_is_refused(tmp_path, write_tone, suffix):
    path = write_tone(tmp_path / f"a.{suffix}", seconds=3)
    assert len(read_audio(path)[0]) == 48000
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"broken|cannot be read"):
        read_audio(path)


def test_a_wav_that_came_through_a_pipe_has_no_size_and_is_whole(tmp_path, write_tone):
    path = write_tone(tmp_path / "a.wav")
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert len(read_audio(path)[0]) == 16000


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty file"), (b"hello, this is text", "cannot be read"), (None, "no such file")]
)
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_what_is_no_audio_says_why(tmp_path, suffix, content, reason):
    if content is not None:
        (tmp_path / f"a.{suffix}").write_bytes(content)
    with pytest.raises(AudioError, match=reason) as error:
        read_audio(tmp_path / f"a.{suffix}")
    assert "does not exist" not in str(error.value)


def test_no_samples_and_nan_say_why(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16000)
    with pytest.raises(AudioError, match="no samples"):
        read_audio(tmp_path / "none.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan], np.float32), 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN"):
        read_audio(tmp_path / "nan.wav")


def test_lists_a_folder_in_one_order(tmp_path):
    for name in ("b/2.WAV", "a.flac", "b/1.ogg", "c.mp3", "notes.txt", ".hidden.wav", ".git/x.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = list_audio(tmp_path)
    assert [(file.id, file.relative) for file in found.files] == [
        ("a", "a.flac"),
        ("1", "b/1.ogg"),
        ("2", "b/2.WAV"),
        ("c", "c.mp3"),
    ]
    assert found.skipped == [tmp_path / "notes.txt"]


def test_follows_links(tmp_path, write_tone):
    write_tone(tmp_path / "elsewhere" / "a.wav")
    (tmp_path / "audio").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "audio" / "link")
    assert [file.relative for file in list_audio(tmp_path / "audio").files] == ["link/a.wav"]


def test_lists_a_tsv_with_a_header(tmp_path):
    (tmp_path / "list.tsv").write_text("speaker\taudio\tutt\ns1\tx/a.wav\tfirst\ns2\tx/b.wav\tsecond\n")
    found = list_audio(tmp_path / "list.tsv")
    assert [(file.id, file.path) for file in found.files] == [
        ("first", tmp_path / "x/a.wav"),
        ("second", tmp_path / "x/b.wav"),
    ]
    assert found.rows["second"]["speaker"] == "s2"


def test_lists_a_fairseq_manifest_and_bare_paths(tmp_path):
    (tmp_path / "train.tsv").write_text("/data\nx/a.flac\t16000\nx/b.flac\t900\n")
    assert [str(file.path) for file in list_audio(tmp_path / "train.tsv").files] == ["/data/x/a.flac", "/data/x/b.flac"]
    (tmp_path / "bare.tsv").write_text("x/a.flac\nx/b.flac\n")
    assert [file.path for file in list_audio(tmp_path / "bare.tsv").files] == [
        tmp_path / "x/a.flac",
        tmp_path / "x/b.flac",
    ]


def test_mistakes_in_lists_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        list_audio(tmp_path / "missing")
    with pytest.raises(UserError, match="no audio found"):
        list_audio(tmp_path)
    for name in ("x/a.wav", "y/a.flac"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"x/a\.wav and y/a\.flac both have the id 'a'"):
        list_audio(tmp_path)
    with pytest.raises(UserError, match="one audio file"):
        list_audio(tmp_path / "x" / "a.wav")
    (tmp_path / "meta.tsv").write_text("utt\tspeaker\na\ts\n")
    with pytest.raises(UserError, match=r"no column 'audio'.*--metadata"):
        list_audio(tmp_path / "meta.tsv")
