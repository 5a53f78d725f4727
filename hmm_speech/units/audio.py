"""Finding audio files and reading them as 16 kHz mono."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hmm_speech.errors import UserError
from hmm_speech.units.tables import read_table

if TYPE_CHECKING:
    import torch

SAMPLE_RATE = 16000
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
_UNKNOWN_SIZE = 0x7FFF0000  # what writes a wav to a pipe puts a size from here on into its header
_BLOCK = 1 << 20  # samples a channel read at a time, so that many channels are never all in memory


class AudioError(UserError):
    """A file that cannot be used; the message is the reason alone, without the file's name."""


@dataclass(frozen=True)
class AudioFile:
    """An audio file of a corpus."""

    id: str
    path: Path
    relative: str
    """The path as the unit file keeps it: relative to the folder or the list, with forward slashes."""


@dataclass
class AudioList:
    """The audio of a corpus, in a fixed order."""

    files: list[AudioFile]
    skipped: list[Path] = field(default_factory=list)
    """Files of the folder that are no audio by their suffix."""
    rows: dict[str, dict[str, str]] | None = None
    """Where a TSV with a header lists the files: its row for each id, which may hold speaker and split."""


def list_audio(path: str | os.PathLike[str]) -> AudioList:
    """List the audio of a folder (recursively, sorted) or of a TSV.

    The TSV is one with a header and a column `audio` (paths relative to the TSV; `utt`, `speaker` and `split` where
    known), a fairseq manifest (first line the root, then path and number of samples), or one path a line. An
    utterance's id is its file's stem, or the column `utt`. Raises UserError for duplicate ids and where there is no
    audio at all; whether files exist and can be read is seen when they are read.
    """
    path = Path(path)
    if path.is_dir():
        found = _list_folder(path)
    elif path.is_file() and path.suffix.lower() in SUFFIXES:
        raise UserError(f"{path}: is one audio file; expected a folder of audio, or a TSV that lists files")
    elif path.is_file():
        found = _list_tsv(path)
    else:
        raise UserError(f"{path}: no such folder or file; expected a folder of audio, or a TSV that lists files")
    if not found.files:
        raise UserError(f"{path}: no audio found; expected {', '.join(SUFFIXES)} files")
    owner: dict[str, AudioFile] = {}
    for file in found.files:
        if file.id in owner:
            raise UserError(
                f"{path}: {owner[file.id].relative} and {file.relative} both have the id {file.id!r}; ids (the files' "
                "stems) must be unique, so rename one, or list the files in a TSV with columns utt and audio"
            )
        owner[file.id] = file
    return found


def _list_folder(folder: Path) -> AudioList:
    files, skipped = [], []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if path.suffix.lower() in SUFFIXES:
                files.append(AudioFile(path.stem, path, relative))
            else:
                skipped.append(path)
    return AudioList(sorted(files, key=lambda file: file.relative), sorted(skipped))


def _list_tsv(path: Path) -> AudioList:
    with open(path, encoding="utf-8", errors="replace") as lines:
        first = lines.readline().rstrip("\r\n").split("\t")
    if "audio" in first:
        table = read_table(path, ("audio",))
        files = [_listed(path.parent, row["audio"], row.get("utt")) for row in table]
        return AudioList(files, rows={file.id: row for file, row in zip(files, table, strict=True)})
    if "utt" in first:
        raise UserError(
            f"{path}: the header {first} has no column 'audio'; expected one with the path of each file, or give the "
            "folder of audio here and this file as --metadata"
        )
    with open(path, encoding="utf-8", errors="replace") as lines:
        rows = [line.rstrip("\r\n").split("\t") for line in lines if line.strip()]
    root = path.parent
    if rows and len(rows[0]) == 1 and all(len(row) == 2 and row[1].strip().isdigit() for row in rows[1:]):
        root = root / rows.pop(0)[0]  # a fairseq manifest
    return AudioList([_listed(root, row[0], None) for row in rows])


def _listed(root: Path, name: str, utt: str | None) -> AudioFile:
    return AudioFile(utt or Path(name).stem, root / name, Path(name).as_posix())


def _is_truncated(log: str) -> bool:
    """Whether libsndfile's log of a header tells that the file ends early, which it otherwise passes over."""
    if "lacks an end-of-stream bit" in log:
        return True
    wav = re.search(r"^data : (\d+) \(should be \d+\)", log, re.MULTILINE)
    return wav is not None and 0 < int(wav[1]) < _UNKNOWN_SIZE


def read_audio(path: str | os.PathLike[str]) -> tuple[torch.Tensor, list[str]]:
    """Read a file as mono float32 at 16 kHz, and tell what was converted.

    Channels are averaged; another rate is resampled (torchaudio's windowed sinc). Returns the samples (n,) and notes
    such as "2 channels averaged". Raises AudioError, with the reason, for a file that is missing, empty, broken, no
    audio, or holds samples that are not finite.
    """
    import soundfile
    import torch

    path = Path(path)
    if not path.is_file():
        raise AudioError("no such file")
    if path.stat().st_size == 0:
        raise AudioError("empty file (0 bytes)")
    try:
        with soundfile.SoundFile(path) as sound:
            rate, channels, promised = sound.samplerate, sound.channels, sound.frames
            truncated = _is_truncated(sound.extra_info)
            blocks = []
            while len(block := sound.read(_BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block[:, 0] if channels == 1 else block.mean(axis=1))
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        reason = str(error).replace(str(path), "file")
        if "does not exist" in reason:  # libsndfile's words for content that it does not know
            reason = "unknown or broken format"
        raise AudioError(f"cannot be read as audio: {reason}") from None
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if len(samples) == 0:
        raise AudioError("holds no samples")
    if truncated or (0 < promised < 1 << 40 and len(samples) < promised):
        raise AudioError(f"broken: ends early, after {len(samples)} samples")
    if not np.isfinite(samples).all():
        raise AudioError("holds samples that are NaN or infinite")
    notes = [f"{channels} channels averaged"] if channels > 1 else []
    wave = torch.from_numpy(np.ascontiguousarray(samples))
    if rate != SAMPLE_RATE:
        from torchaudio.functional import resample

        wave = resample(wave, rate, SAMPLE_RATE)
        notes.append(f"resampled from {rate} Hz")
    return wave, notes
