"""The unit file: utterances of discrete speech units in Parquet, with phones, audio paths and frames where known.

Columns: `id`, `speaker`, `split` (strings), `units` list<int32>, and where known `phones`
list<struct<label: string, start: float, end: float>> (seconds), `audio` (string, relative to the corpus) and `frames`
list<list<float>>. Schema metadata: `frame_rate` (Hz), `vocabulary` (size), and how the units were made.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hmm_speech.data.splits import SPLITS, assign_splits
from hmm_speech.errors import UserError


class Phone(NamedTuple):
    """A labelled stretch of time."""

    label: str
    start: float
    """Seconds."""
    end: float
    """Seconds."""


@dataclass
class Utterance:
    """One row of a unit file."""

    id: str
    speaker: str
    """The empty string where unknown."""
    split: str
    """`train`, `valid` or `test`."""
    units: np.ndarray
    """(T,) int32."""
    phones: list[Phone] | None = None
    audio: str | None = None
    """Path of the audio file, relative to the corpus."""
    frames: np.ndarray | None = None
    """(T, D) float32, the features themselves."""


@dataclass
class UnitCorpus:
    """The utterances of a unit file, or of a folder of them."""

    utterances: list[Utterance]
    frame_rate: float
    """Frames a second."""
    vocabulary: int
    """Units are in 0 .. vocabulary - 1."""
    made: dict[str, str] = field(default_factory=dict)
    """How the units were made."""

    def split(self, name: str) -> list[Utterance]:
        """The utterances of one split, in the file's order."""
        if name not in SPLITS:
            raise UserError(f"split: got {name!r}, expected one of {', '.join(SPLITS)}")
        return [utterance for utterance in self.utterances if utterance.split == name]


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to; renamed into place on success, removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _check_phones(phones: Sequence[Phone], where: str) -> None:
    previous = -np.inf
    for label, start, end in phones:
        if not (np.isfinite(start) and np.isfinite(end) and 0 <= start <= end) or start < previous:
            raise UserError(
                f"{where}: phone {label!r} from {start} to {end} s; expected finite times in ascending order, "
                "start before end; correct the alignment"
            )
        previous = start


def check_utterance(utterance: Utterance, vocabulary: int, source: str) -> None:
    """Raise a UserError that names the source and the id where an utterance does not fit the format."""
    if not utterance.id:
        raise UserError(f"{source}: an utterance has an empty id; every utterance needs a name of its own")
    where = f"{source}: utterance {utterance.id!r}"
    if utterance.split not in SPLITS:
        raise UserError(f"{where}: split is {utterance.split!r}, expected one of {', '.join(SPLITS)}")
    units = utterance.units
    if units.ndim != 1 or units.dtype.kind not in "iu":
        raise UserError(f"{where}: units have shape {units.shape} and type {units.dtype}, expected (T,) integers")
    if units.size == 0:
        raise UserError(f"{where}: has no units; remove it")
    if units.min() < 0 or units.max() >= vocabulary:
        wrong = int(units.min()) if units.min() < 0 else int(units.max())
        raise UserError(
            f"{where}: unit {wrong} is not in the vocabulary 0 .. {vocabulary - 1}; correct the units or the vocabulary"
        )
    if utterance.phones is not None:
        _check_phones(utterance.phones, where)
    frames = utterance.frames
    if frames is not None and (frames.ndim != 2 or len(frames) != len(units)):
        raise UserError(f"{where}: frames have shape {frames.shape}, expected ({len(units)}, D), one row a unit")


def check_settings(frame_rate: float, vocabulary: int, source: str) -> None:
    if not (np.isfinite(frame_rate) and frame_rate > 0):
        raise UserError(f"{source}: frame_rate is {frame_rate}, expected a positive number of frames a second")
    if vocabulary < 1:
        raise UserError(f"{source}: vocabulary is {vocabulary}, expected at least 1")


def check_corpus(corpus: UnitCorpus, source: str) -> None:
    """Raise a UserError where a corpus is empty, or an utterance is not valid or comes twice."""
    check_settings(corpus.frame_rate, corpus.vocabulary, source)
    if not corpus.utterances:
        raise UserError(f"{source}: holds no utterances; expected at least one")
    seen: set[str] = set()
    for utterance in corpus.utterances:
        check_utterance(utterance, corpus.vocabulary, source)
        if utterance.id in seen:
            raise UserError(f"{source}: id {utterance.id!r} comes twice; ids must be unique, rename or remove one")
        seen.add(utterance.id)


def write_units(corpus: UnitCorpus, path: str | os.PathLike[str]) -> None:
    """Write a corpus as one Parquet file: all of it or nothing, the same corpus giving the same bytes.

    Raises UserError, naming the file and the id, for a duplicate id, a unit out of the vocabulary, an unknown split,
    frames that do not match the units, or phones out of order.
    """
    check_corpus(corpus, str(path))
    from hmm_speech.data.parquet import unit_writer

    optional = [
        name
        for name in ("phones", "audio", "frames")
        if any(getattr(utterance, name) is not None for utterance in corpus.utterances)
    ]
    with unit_writer(path, corpus.frame_rate, corpus.vocabulary, corpus.made, optional) as writer:
        for utterance in corpus.utterances:
            writer.add(utterance)


def read_units(
    path: str | os.PathLike[str], *, frame_rate: float | None = None, vocabulary: int | None = None
) -> UnitCorpus:
    """Read units: a Parquet unit file, a folder of them, or what other tools write.

    The other formats (`hmm_speech.data.readers`) are text lines `id u1 u2 ...`, fairseq manifests (`.tsv`) with `.km`
    labels, and folders of `.npy`. These carry neither a frame rate nor a vocabulary: `frame_rate` is then 50 Hz and
    `vocabulary` one more than the largest unit, unless given. A Parquet file carries both; a value given here that
    differs from the file's is an error.

    Where no utterance is `valid` or `test`, `assign_splits` draws them from `train`.

    Raises UserError, naming the file and the utterance, for whatever cannot be read.
    """
    from hmm_speech.data.parquet import read_folder, read_parquet

    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a unit file (make one with `hmm-speech units`)")
    parquet = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    if not parquet:
        from hmm_speech.data.readers import read_other

        corpus = read_other(path, frame_rate, vocabulary)
        corpus.utterances = assign_splits(corpus.utterances)
        check_corpus(corpus, str(path))
    else:
        corpus = read_folder(path, parquet) if path.is_dir() else read_parquet(path)
        for name, given in (("frame_rate", frame_rate), ("vocabulary", vocabulary)):
            if given is not None and given != getattr(corpus, name):
                raise UserError(f"{path}: {name} {given} was asked for, but the file says {getattr(corpus, name)}")
        corpus.utterances = assign_splits(corpus.utterances)
    return corpus
