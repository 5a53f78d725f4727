"""Parquet in and out: what `hmm_speech.data.unitfile` describes, as bytes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hmm_speech.data.unitfile import (
    Phone,
    UnitCorpus,
    Utterance,
    atomic_path,
    check_corpus,
    check_settings,
    check_utterance,
)
from hmm_speech.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_PER_GROUP = 512  # bounds the writer's memory when frames are kept
_FOREIGN_METADATA = {"ARROW:schema", "pandas", "huggingface"}


def _lists(arrays: Sequence[np.ndarray | None], values: Any) -> pa.Array:
    """A list array over flat `values`; a None in `arrays` is a null."""
    import pyarrow as pa

    offsets = np.cumsum([0] + [0 if array is None else len(array) for array in arrays], dtype=np.int32)
    mask = pa.array([array is None for array in arrays])
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=mask)


def _phones_array(rows: Sequence[list[Phone] | None]) -> pa.Array:
    import pyarrow as pa

    flat = [phone for row in rows for phone in row or ()]
    values = pa.StructArray.from_arrays(
        [
            pa.array([phone.label for phone in flat], pa.string()),
            pa.array([phone.start for phone in flat], pa.float32()),
            pa.array([phone.end for phone in flat], pa.float32()),
        ],
        names=["label", "start", "end"],
    )
    return _lists(rows, values)


def _frames_array(rows: Sequence[np.ndarray | None]) -> pa.Array:
    import pyarrow as pa

    known = [np.ascontiguousarray(row, dtype=np.float32) for row in rows if row is not None]
    flat = np.concatenate([row.ravel() for row in known]) if known else np.zeros(0, np.float32)
    widths = np.concatenate([np.full(len(row), row.shape[1]) for row in known]) if known else np.zeros(0)
    offsets = np.concatenate([[0], np.cumsum(widths)]).astype(np.int32)
    return _lists(rows, pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)))


class UnitWriter:
    """Appends utterances to a unit file; made by `unit_writer`."""

    def __init__(self, path: Path, out: pq.ParquetWriter, schema: pa.Schema, vocabulary: int) -> None:
        self._path, self._out, self._schema, self._vocabulary = path, out, schema, vocabulary
        self._ids: set[str] = set()
        self._rows: list[Utterance] = []

    def add(self, utterance: Utterance) -> None:
        """Append an utterance; a UserError names the file and the id where it is not valid."""
        check_utterance(utterance, self._vocabulary, str(self._path))
        if utterance.id in self._ids:
            raise UserError(f"{self._path}: id {utterance.id!r} comes twice; ids must be unique, rename or remove one")
        self._ids.add(utterance.id)
        self._rows.append(utterance)
        if len(self._rows) >= ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last time as one row group."""
        import pyarrow as pa

        rows, self._rows = self._rows, []
        if not rows:
            return
        columns = []
        for field in self._schema:
            values = [getattr(row, field.name) for row in rows]
            if field.name == "units":
                array = _lists(values, pa.array(np.concatenate(values).astype(np.int32)))
            elif field.name == "phones":
                array = _phones_array(values)
            elif field.name == "frames":
                array = _frames_array(values)
            else:
                array = pa.array(values, pa.string())
            columns.append(array.cast(field.type))
        self._out.write_table(pa.Table.from_arrays(columns, schema=self._schema))


@contextlib.contextmanager
def unit_writer(
    path: str | os.PathLike[str],
    frame_rate: float,
    vocabulary: int,
    made: Mapping[str, str] | None = None,
    optional: Iterable[str] = (),
) -> Iterator[UnitWriter]:
    """Write a unit file an utterance at a time, in memory that does not grow with it.

    `optional` names the columns among phones, audio and frames that the file has. The file appears, whole, when the
    block ends without an exception.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    check_settings(frame_rate, vocabulary, str(path))
    phone = pa.struct([("label", pa.string()), ("start", pa.float32()), ("end", pa.float32())])
    types = {"phones": pa.list_(phone), "audio": pa.string(), "frames": pa.list_(pa.list_(pa.float32()))}
    columns = [("id", pa.string()), ("speaker", pa.string()), ("split", pa.string()), ("units", pa.list_(pa.int32()))]
    columns += [(name, kind) for name, kind in types.items() if name in set(optional)]
    metadata = dict(sorted((made or {}).items()))
    metadata.update(frame_rate=repr(float(frame_rate)), vocabulary=str(int(vocabulary)))
    schema = pa.schema(columns, metadata=metadata)
    with (
        atomic_path(path) as beside,
        pq.ParquetWriter(beside, schema, compression="zstd", compression_level=9) as out,
    ):
        writer = UnitWriter(path, out, schema, vocabulary)
        yield writer
        writer.flush()


def _read_metadata(schema: pa.Schema, path: Path) -> tuple[float, int, dict[str, str]]:
    metadata = {key.decode(): value.decode("utf-8", "replace") for key, value in (schema.metadata or {}).items()}
    values = []
    for key, kind in (("frame_rate", float), ("vocabulary", int)):
        if key not in metadata:
            raise UserError(
                f"{path}: the schema metadata has no {key!r}, so this is not a unit file; make one with "
                "`hmm-speech units AUDIO --out FILE`"
            )
        try:
            values.append(kind(metadata[key]))
        except ValueError:
            raise UserError(f"{path}: schema metadata {key!r} is {metadata[key]!r}, expected a number") from None
    made = {
        key: value for key, value in metadata.items() if key not in _FOREIGN_METADATA | {"frame_rate", "vocabulary"}
    }
    return values[0], values[1], made


def _column(table: pa.Table, name: str, path: Path) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise UserError(f"{path}: has no column {name!r}, expected id, speaker, split and units; is this a unit file?")
    return table.column(name)


def _strings(table: pa.Table, name: str, path: Path) -> list[str]:
    import pyarrow as pa

    column = _column(table, name, path)
    if not any(check(column.type) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
        raise UserError(f"{path}: column {name!r} is of type {column.type}, expected string")
    return [value or "" for value in column.to_pylist()]


def _numpy_lists(column: pa.ChunkedArray, name: str, path: Path, ids: Sequence[str]) -> list[np.ndarray | None]:
    """The rows of a list<number> or list<list<number>> column as arrays, without a Python object a number."""
    rows: list[np.ndarray | None] = []
    try:
        for chunk in column.chunks:
            for row in chunk:
                if not row.is_valid:
                    rows.append(None)
                    continue
                values = row.values
                if hasattr(values, "flatten") and hasattr(values, "offsets"):
                    widths = np.diff(values.offsets.to_numpy())
                    flat = values.flatten().to_numpy(zero_copy_only=False)
                    rows.append(flat.reshape(len(widths), -1) if len(set(widths.tolist())) == 1 else None)
                    if rows[-1] is None:
                        raise ValueError("rows of different widths")
                else:
                    rows.append(values.to_numpy(zero_copy_only=False))
    except (ValueError, AttributeError, NotImplementedError) as error:
        raise UserError(
            f"{path}: utterance {ids[len(rows) - 1]!r}: column {name!r} of type {column.type} is not a list of numbers "
            f"({error})"
        ) from None
    return rows


def _phones(column: pa.ChunkedArray, path: Path) -> list[list[Phone] | None]:
    def seconds(value: float) -> float:
        return round(value, 6)  # what was 0.164 before it became a float32 is 0.164 again

    try:
        return [
            row and [Phone(str(phone["label"]), seconds(phone["start"]), seconds(phone["end"])) for phone in row]
            for row in column.to_pylist()
        ]
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}: column 'phones' is of type {column.type}, expected list<struct<label: string, start: float, "
            "end: float>>"
        ) from None


def read_parquet(path: str | os.PathLike[str]) -> UnitCorpus:
    """Read one Parquet unit file as it is, every utterance checked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}); make it again, or give another file") from None
    frame_rate, vocabulary, made = _read_metadata(table.schema, path)
    ids, speakers, splits = (_strings(table, name, path) for name in ("id", "speaker", "split"))
    units = _numpy_lists(_column(table, "units", path), "units", path, ids)
    blank = [None] * len(ids)
    phones = _phones(table.column("phones"), path) if "phones" in table.column_names else blank
    audio = table.column("audio").to_pylist() if "audio" in table.column_names else blank
    frames = _numpy_lists(table.column("frames"), "frames", path, ids) if "frames" in table.column_names else blank
    utterances = []
    for row in zip(ids, speakers, splits, units, phones, audio, frames, strict=True):
        unit_T = np.zeros(0, np.int32) if row[3] is None else row[3]
        frame_TD = None if row[6] is None else row[6].astype(np.float32)
        utterances.append(Utterance(row[0], row[1], row[2] or "train", unit_T, row[4], row[5], frame_TD))
    corpus = UnitCorpus(utterances, frame_rate, vocabulary, made)
    check_corpus(corpus, str(path))
    for utterance in corpus.utterances:  # only now, for a cast would wrap what is out of the vocabulary
        utterance.units = utterance.units.astype(np.int32)
    return corpus


def read_folder(folder: Path, files: Sequence[Path]) -> UnitCorpus:
    """A folder of Parquet unit files as one corpus."""
    corpora = [read_parquet(file) for file in files]
    first = corpora[0]
    owner: dict[str, Path] = {}
    for file, corpus in zip(files, corpora, strict=True):
        for name in ("frame_rate", "vocabulary"):
            if getattr(corpus, name) != getattr(first, name):
                raise UserError(
                    f"{folder}: {name} is {getattr(first, name)} in {files[0].name} but {getattr(corpus, name)} in "
                    f"{file.name}; the files of one folder must agree, so give one of them as the path, or make both "
                    "with the same --hop-ms and --quantizer"
                )
        if corpus.made.get("quantizer") != first.made.get("quantizer"):
            raise UserError(
                f"{folder}: {files[0].name} and {file.name} were made with different quantizers, so their units do not "
                "mean the same; make both with one --quantizer, or give one of them as the path"
            )
        for utterance in corpus.utterances:
            if utterance.id in owner:
                raise UserError(
                    f"{folder}: id {utterance.id!r} is in {owner[utterance.id].name} and in {file.name}; ids must be "
                    "unique in a folder, rename or remove one, or give one file as the path"
                )
            owner[utterance.id] = file
    made = {key: value for key, value in first.made.items() if all(c.made.get(key) == value for c in corpora)}
    return UnitCorpus([u for corpus in corpora for u in corpus.utterances], first.frame_rate, first.vocabulary, made)
