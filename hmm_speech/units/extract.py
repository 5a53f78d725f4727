"""The road from audio to a unit file, in memory that does not grow with the corpus."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hmm_speech.data.parquet import unit_writer
from hmm_speech.data.splits import assign_splits
from hmm_speech.data.unitfile import Utterance
from hmm_speech.errors import UserError
from hmm_speech.units.alignments import read_alignments
from hmm_speech.units.audio import SAMPLE_RATE, AudioError, AudioFile, AudioList, list_audio, read_audio
from hmm_speech.units.features import Extractor, SpeakerStatistics, make_extractor
from hmm_speech.units.quantize import SAMPLE, Quantizer, fit_centroids
from hmm_speech.units.tables import check_splits, read_metadata

Progress = Callable[[str, int, int], None]
"""Told the stage, how much of it is done, and how much there is."""
_MOST_WORKERS = 4


@dataclass
class Report:
    """What became of the files."""

    out: Path
    quantizer: Path
    extractor: Extractor
    utterances: int = 0
    frames: int = 0
    seconds: float = 0.0
    speakers: int = 0
    vocabulary: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    aligned: int | None = None
    """Utterances with phones; None where no alignments were given."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """File and reason."""
    converted: list[tuple[str, str]] = field(default_factory=list)
    """File and what was done to it."""
    skipped: list[str] = field(default_factory=list)
    """Files that are no audio by their suffix."""
    without_row: list[str] = field(default_factory=list)
    """Utterances that the metadata does not list."""
    without_audio: list[str] = field(default_factory=list)
    """Utterances of the metadata for which there is no audio."""


class FrameStore:
    """Frames spilled to an unnamed temporary file, which the system removes however the process ends."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by close)
        self._places: list[tuple[int, int, int]] = []

    def append(self, frames: np.ndarray) -> None:
        """Keep frames (T, D) as the next item."""
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(np.ascontiguousarray(frames, dtype=np.float32))
        self._places.append((place, *frames.shape))

    def __getitem__(self, index: int) -> np.ndarray:
        place, count, width = self._places[index]
        self._file.seek(place)
        frames = np.empty((count, width), np.float32)
        self._file.readinto(frames)
        return frames

    def length(self, index: int) -> int:
        """Number of frames of an item."""
        return self._places[index][1]

    def close(self) -> None:
        self._file.close()


def _settings(extractor: Extractor, seed: int) -> dict[str, str]:
    return {
        "features": extractor.name,
        "hop_ms": f"{extractor.hop_ms:g}",
        "normalisation": extractor.normalisation,
        "seed": str(seed),
    }


def choose_features(
    features: str | None, hop_ms: float | None, clusters: int | None, quantizer: Quantizer | None
) -> tuple[Extractor, int]:
    """The extractor and the number of clusters: what was asked for, else what the quantizer has, else the defaults.

    UserError where something was asked for that the quantizer was not made with.
    """
    if quantizer is None:
        count = 100 if clusters is None else clusters
        if count < 2:
            raise UserError(f"--clusters: got {count}, expected at least 2")
        return make_extractor(features or "mfcc", 20.0 if hop_ms is None else hop_ms), count
    kept = quantizer.settings
    if features is None and kept["features"].startswith("checkpoint "):
        raise UserError(
            f"--quantizer: was fitted on the features {kept['features']}; give that checkpoint, --features FILE:LAYER"
        )
    extractor = make_extractor(features or kept["features"], float(kept["hop_ms"]) if hop_ms is None else hop_ms)
    size = len(quantizer.centroids)
    asked = {**_settings(extractor, 0), "clusters": str(size if clusters is None else clusters)}
    for name, value in {**kept, "clusters": str(size)}.items():
        if name != "seed" and asked[name] != value:
            raise UserError(
                f"--quantizer: was made with {name} {value}, but {asked[name]} was asked for; leave that option out, "
                "or fit another quantizer"
            )
    return extractor, size


@contextmanager
def _one_torch_thread(enabled: bool) -> Iterator[None]:
    """Parallel files, not parallel operations; also keeps the order of sums, and so the bytes, the same everywhere."""
    import torch

    before = torch.get_num_threads()
    if enabled:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _each(files: Sequence[AudioFile], extractor: Extractor) -> Iterator[tuple[AudioFile, Future]]:
    """Read files and compute frames in threads, a few ahead, in the files' order."""

    def work(file: AudioFile) -> tuple[np.ndarray, float, list[str]]:
        samples, notes = read_audio(file.path)
        return extractor(samples), len(samples) / SAMPLE_RATE, notes

    workers = min(_MOST_WORKERS, os.cpu_count() or 1) if extractor.parallel else 1
    pending: deque[tuple[AudioFile, Future]] = deque()
    with _one_torch_thread(extractor.parallel), ThreadPoolExecutor(workers) as pool:
        try:
            for file in files:
                pending.append((file, pool.submit(work, file)))
                if len(pending) > 2 * workers:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            for _, future in pending:
                future.cancel()


class _Run:
    """One extraction: the files that could be read, their frames and their speakers."""

    def __init__(self, store: FrameStore, report: Report, progress: Progress) -> None:
        self.store, self.report, self.progress = store, report, progress
        self.utterances: list[Utterance] = []
        self.statistics = SpeakerStatistics()

    def read(self, found: AudioList, rows: Mapping[str, Mapping[str, str]], extractor: Extractor) -> None:
        """First pass: frames to the store, sums to the statistics."""
        for done, (file, future) in enumerate(_each(found.files, extractor), start=1):
            try:
                frames, seconds, notes = future.result()
            except AudioError as error:
                self.report.failed.append((file.relative, str(error)))
            else:
                row = rows.get(file.id, {})
                utterance = Utterance(
                    file.id, row.get("speaker", ""), row.get("split", ""), np.zeros(0, np.int32), audio=file.relative
                )
                self.utterances.append(utterance)
                self.store.append(frames)
                if extractor.normalisation == "speaker":
                    self.statistics.add(self._voice(utterance), frames)
                self.report.seconds += seconds
                if notes:
                    self.report.converted.append((file.relative, ", ".join(notes)))
            self.progress("features", done, len(found.files))

    @staticmethod
    def _voice(utterance: Utterance) -> str:
        """Whose statistics apply: the speaker's, or where that is not known those of the utterance alone."""
        return f"speaker {utterance.speaker}" if utterance.speaker else f"utterance {utterance.id}"

    def frames(self, index: int) -> np.ndarray:
        """The frames of an utterance as k-means sees them."""
        frames = self.store[index]
        if self.report.extractor.normalisation != "speaker":
            return frames
        return self.statistics.normalise(self._voice(self.utterances[index]), frames)

    def sample(self, train: Sequence[int], size: int, rng: np.random.Generator) -> np.ndarray:
        """A uniform sample without replacement of the train split's frames, drawn file by file."""
        left = sum(self.store.length(index) for index in train)
        wanted = min(size, left)
        pieces = []
        for done, index in enumerate(train, start=1):
            count = self.store.length(index)
            drawn = wanted if count == left else int(rng.hypergeometric(count, left - count, wanted))
            if drawn:
                pieces.append(self.frames(index)[np.sort(rng.choice(count, drawn, replace=False))])
            wanted, left = wanted - drawn, left - count
            self.progress("sample", done, len(train))
        return np.concatenate(pieces)

    def fit(self, clusters: int, seed: int) -> Quantizer:
        """Second pass: the quantizer, on the train split alone."""
        train = [index for index, utterance in enumerate(self.utterances) if utterance.split == "train"]
        if not train:
            raise UserError(
                "the metadata puts no utterance that could be read in the train split; quantizers are fitted on train "
                "only, so add some, or give --quantizer FILE"
            )
        rng = np.random.default_rng(seed)
        total = sum(self.store.length(index) for index in train)
        sample = self.sample(train, SAMPLE, rng)
        shuffled = rng.permutation(train)
        self.progress("k-means", 0, total)
        centroids = fit_centroids(
            sample,
            lambda: (self.frames(int(index)) for index in shuffled),
            clusters,
            seed,
            lambda seen: self.progress("k-means", seen, total),
        )
        return Quantizer(centroids, _settings(self.report.extractor, seed))

    def write(self, quantizer: Quantizer, alignments: Path | None, keep_frames: bool) -> None:
        """Last pass: assign and write."""
        from threadpoolctl import threadpool_limits

        report = self.report
        phones = None if alignments is None else read_alignments(alignments)
        made = {
            **quantizer.settings,
            "clusters": str(len(quantizer.centroids)),
            "sample_rate": str(SAMPLE_RATE),
            "quantizer": quantizer.fingerprint,
        }
        optional = ["audio", *(["phones"] if phones else []), *(["frames"] if keep_frames else [])]
        report.vocabulary = len(quantizer.centroids)
        report.aligned = None if phones is None else 0
        with (
            threadpool_limits(1),
            unit_writer(report.out, report.extractor.frame_rate, report.vocabulary, made, optional) as writer,
        ):
            for index, utterance in enumerate(self.utterances):
                frames = self.frames(index)
                aligned = None if phones is None else phones.get(utterance.id)
                if report.aligned is not None:
                    report.aligned += aligned is not None
                report.frames += len(frames)
                # a copy, so that what it holds goes once it is written
                kept = frames if keep_frames else None
                writer.add(replace(utterance, units=quantizer.assign(frames), phones=aligned, frames=kept))
                self.progress("units", index + 1, len(self.utterances))


def extract_units(
    audio: str | os.PathLike[str] | AudioList,
    out: str | os.PathLike[str],
    *,
    features: str | None = None,
    hop_ms: float | None = None,
    clusters: int | None = None,
    quantizer: str | os.PathLike[str] | None = None,
    metadata: str | os.PathLike[str] | None = None,
    alignments: str | os.PathLike[str] | None = None,
    keep_frames: bool = False,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Turn a folder (or a TSV, or a list) of audio into a unit file; a quantizer that was fitted is saved beside it.

    Frames are computed once, in threads, and spilled to a temporary file in the folder of `out` (4 bytes a number:
    28 MB an hour for MFCC at 20 ms). Each speaker's frames get mean 0 and variance 1; where the speaker is not known,
    each utterance's. k-means is fitted on the train split only; a file whose split is not known is train, and where
    test or valid are empty they are drawn by a hash of the id, before the fit (`assign_splits`).

    The defaults are MFCC, 20 ms and 100 clusters. With `quantizer`, its settings apply instead. Files that cannot be
    used are in the report's `failed`, and the rest is written. The same audio, options and version give the same bytes
    on one machine; across machines, units may differ where rounding decides between two centroids.

    Raises UserError for options that cannot be, and where no file at all can be used.
    """
    out = Path(out)
    if out.suffix != ".parquet":
        raise UserError(f"--out: got {out}, expected a name that ends in .parquet")
    known = None if quantizer is None else Quantizer.load(quantizer)
    extractor, size = choose_features(features, hop_ms, clusters, known)
    found = audio if isinstance(audio, AudioList) else list_audio(audio)
    source = f"{len(found.files)} files" if isinstance(audio, AudioList) else str(audio)
    if found.rows is not None:
        check_splits(found.rows, source)
    rows = read_metadata(metadata) if metadata is not None else found.rows or {}
    if alignments is not None:
        read_alignments(alignments)  # before the work, so that a mistake shows at once
    beside = Path(quantizer) if quantizer is not None else out.with_name(f"{out.stem}.quantizer.npz")
    own = {Path(path).resolve() for path in (metadata, alignments, out, beside) if path is not None}
    report = Report(out, beside, extractor, skipped=[str(name) for name in found.skipped if name.resolve() not in own])
    if rows:
        ids = {file.id for file in found.files}
        report.without_row = [file.id for file in found.files if file.id not in rows]
        report.without_audio = [utt for utt in rows if utt not in ids]
    out.parent.mkdir(parents=True, exist_ok=True)
    store = FrameStore(out.parent)
    try:
        run = _Run(store, report, progress)
        run.read(found, rows, extractor)
        if not run.utterances:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in report.failed[:10])
            raise UserError(f"{source}: none of the {len(found.files)} files can be used ({reasons})")
        run.utterances = assign_splits(run.utterances)
        if known is None:
            known = run.fit(size, seed)
            known.save(beside)
        run.write(known, None if alignments is None else Path(alignments), keep_frames)
    finally:
        store.close()
    report.utterances = len(run.utterances)
    report.speakers = len({utterance.speaker for utterance in run.utterances} - {""})
    report.splits = {
        name: sum(utterance.split == name for utterance in run.utterances) for name in ("train", "valid", "test")
    }
    return report
