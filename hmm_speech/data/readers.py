"""Units as other tools write them: text lines, fairseq manifests with .km labels, folders of .npy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hmm_speech.data.splits import SPLITS
from hmm_speech.data.unitfile import UnitCorpus, Utterance
from hmm_speech.errors import UserError

FRAME_RATE = 50.0
"""Hz, for formats that do not say: the rate of HuBERT's units and of `hmm-speech units`."""
_SPLIT_OF = {**{name: name for name in SPLITS}, "dev": "valid", "val": "valid", "validation": "valid"}
_EXPECTED = (
    "a .parquet unit file, a folder of them, text lines `id u1 u2 ...`, a fairseq manifest (.tsv beside .km), or a "
    "folder of .npy"
)


def read_other(path: Path, frame_rate: float | None = None, vocabulary: int | None = None) -> UnitCorpus:
    """Read what is no Parquet. `frame_rate` is 50 Hz and `vocabulary` one more than the largest unit, unless given.

    - a file of lines `id u1 u2 ...`;
    - a fairseq manifest `NAME.tsv` (first line the root, then path and number of samples) with `NAME.km` beside it,
      either of the two given, or a folder with all such pairs; NAMEs train, valid, dev and test are splits;
    - a folder of `.npy` files of one integer array (T,) each, with folders train, valid, dev and test as splits.

    Ids are the stems of the audio or .npy files; speakers are unknown. Raises UserError naming the file and the
    utterance.
    """
    if path.is_dir():
        if arrays := sorted(path.rglob("*.npy")):
            rows = _npy(path, arrays)
        elif labels := sorted(path.glob("*.km")):
            rows = (row for file in labels for row in _fairseq(file))
        else:
            raise UserError(f"{path}: the folder holds no .parquet, .npy or .km; expected {_EXPECTED}")
    elif path.suffix in (".km", ".tsv"):
        rows = _fairseq(path.with_suffix(".km"))
    else:
        rows = _lines(path)
    utterances: list[Utterance] = []
    seen: dict[str, str] = {}
    for source, name, split, units in rows:
        if name in seen:
            raise UserError(
                f"{source}: id {name!r} comes twice (first in {seen[name]}); ids must be unique, rename one"
            )
        seen[name] = source
        utterances.append(Utterance(name, "", split, units))
    largest = max((int(utterance.units.max(initial=0)) for utterance in utterances), default=0)
    return UnitCorpus(
        utterances,
        FRAME_RATE if frame_rate is None else float(frame_rate),
        largest + 1 if vocabulary is None else vocabulary,
    )


def _text(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); expected {_EXPECTED}") from None


def _integers(words: list[str], where: str) -> np.ndarray:
    try:
        units = np.array([int(word) for word in words], dtype=np.int64)
    except (ValueError, OverflowError):
        wrong = next(word for word in words if not word.lstrip("+-").isdigit() or len(word) > 18)
        raise UserError(f"{where}: {wrong!r} is not a unit; expected whole numbers; {_EXPECTED}") from None
    if units.size and (units.min() < 0 or units.max() > np.iinfo(np.int32).max):
        wrong = units.min() if units.min() < 0 else units.max()
        raise UserError(f"{where}: {wrong} is not a unit; expected numbers from 0 that fit 32 bits")
    return units.astype(np.int32)


def _lines(path: Path) -> Iterator[tuple[str, str, str, np.ndarray]]:
    for number, line in enumerate(_text(path), start=1):
        words = line.split()
        if words:
            where = f"{path}: line {number}, utterance {words[0]!r}"
            yield str(path), words[0], "", _integers(words[1:], where)


def _fairseq(labels: Path) -> Iterator[tuple[str, str, str, np.ndarray]]:
    manifest = labels.with_suffix(".tsv")
    for file, missing in ((labels, "labels"), (manifest, "manifest")):
        if not file.exists():
            raise UserError(
                f"{file}: no such file; a fairseq manifest NAME.tsv needs its NAME.km beside it ({missing})"
            )
    names = [line.split("\t")[0].strip() for line in _text(manifest)[1:] if line.strip()]
    rows = _text(labels)
    while rows and not rows[-1].strip():
        rows.pop()
    if len(names) != len(rows):
        raise UserError(
            f"{labels}: has {len(rows)} lines of units, but {manifest.name} lists {len(names)} files after its first "
            "line (the root); expected as many"
        )
    split = _SPLIT_OF.get(labels.stem, "")
    for number, (name, row) in enumerate(zip(names, rows, strict=True), start=1):
        stem = Path(name).stem
        yield str(labels), stem, split, _integers(row.split(), f"{labels}: line {number}, utterance {stem!r}")


def _npy(folder: Path, files: list[Path]) -> Iterator[tuple[str, str, str, np.ndarray]]:
    for file in files:
        try:
            units = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{file}: cannot be read as .npy ({error}); expected one integer array (T,)") from None
        if units.ndim != 1 or units.dtype.kind not in "iu":
            raise UserError(
                f"{file}: utterance {file.stem!r} has shape {units.shape} and type {units.dtype}, expected integer "
                "units (T,); features must be quantized first, see `hmm-speech units`"
            )
        if units.size and (int(units.min()) < 0 or int(units.max()) > np.iinfo(np.int32).max):
            raise UserError(f"{file}: utterance {file.stem!r} has units that are negative or do not fit 32 bits")
        top = file.relative_to(folder).parts[0]
        yield str(file), file.stem, _SPLIT_OF.get(top, ""), units.astype(np.int32)
