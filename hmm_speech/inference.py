"""What a trained model says of a unit file, and what it makes up: decode, evaluate and sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from hmm_speech.data.textgrid import write_textgrid
from hmm_speech.data.unitfile import Phone, UnitCorpus, Utterance, atomic_path, read_units
from hmm_speech.errors import UserError
from hmm_speech.nn.composition import reads_frames

if TYPE_CHECKING:
    from hmm_speech.module import SpeechHMM

FORMATS = ("parquet", "textgrid")


class Decoded(NamedTuple):
    """The Viterbi path of one utterance."""

    utterance: Utterance
    states: np.ndarray
    """(T,) int32."""
    labels: np.ndarray
    """(T,) int32: the label that each state belongs to."""
    score: float
    """Log-probability of units and path, in nats."""
    log_likelihood: float
    """Log-probability of the units over all paths, in nats."""


def read_corpus(module: SpeechHMM, path: str | PathLike[str]) -> UnitCorpus:
    """A unit file for a model.

    Raises:
        UserError: its units are not those that the model was trained on, or the model reads frames that it lacks.
    """
    corpus = read_units(path)
    parts = [part for part in (module.emission, module.context) if part is not None]
    if any(reads_frames(part) for part in parts):
        check_frames(corpus, module.hparams.dimension, str(path))
    if all(reads_frames(part) for part in parts):
        return corpus
    vocabulary = module.hparams.vocabulary
    if corpus.vocabulary != vocabulary:
        raise UserError(
            f"{path}: has a vocabulary of {corpus.vocabulary} units, the model was trained on {vocabulary}; make the "
            "units with the quantizer of the model's data (hmm-speech units --quantizer)"
        )
    made = module.hparams.get("quantizer"), corpus.made.get("quantizer")
    if None not in made and made[0] != made[1]:
        raise UserError(
            f"{path}: its units were made by quantizer {made[1]}, those that the model was trained on by {made[0]}, so "
            "they do not mean the same; make the units with the quantizer of the model's data (hmm-speech units "
            "--quantizer)"
        )
    return corpus


def check_frames(corpus: UnitCorpus, dimension: int, source: str) -> None:
    """Raise a UserError where an utterance has no frames, or frames of another dimension."""
    for utterance in corpus.utterances:
        width = None if utterance.frames is None else utterance.frames.shape[1]
        if width != dimension:
            found = "no frames" if width is None else f"frames of {width} numbers"
            raise UserError(
                f"{source}: utterance {utterance.id!r} has {found}, the model reads frames of {dimension}; make "
                "the unit file with the features of the model's data (hmm-speech units --keep-frames)"
            )


def decode(module: SpeechHMM, utterances: Sequence[Utterance], batch_size: int = 16) -> Iterator[Decoded]:
    """Viterbi paths, in the order of the utterances."""
    from hmm_speech.data.batching import collate

    for start in range(0, len(utterances), batch_size):
        rows = utterances[start : start + batch_size]
        batch = collate(list(enumerate(rows)))
        with torch.no_grad():
            hmm = module(batch)
            score, states = hmm.viterbi()
            likelihood = hmm.log_partition()
        labels = module.topology.label_of(states)
        for k, utterance in enumerate(rows):
            length = len(utterance.units)
            path, names = (x[k, :length].numpy().astype(np.int32) for x in (states, labels))
            yield Decoded(utterance, path, names, float(score[k]), float(likelihood[k]))


def segments(labels: np.ndarray, frame_rate: float) -> list[Phone]:
    """Runs of equal labels as (label, start, end) in seconds; frame t covers t / rate to (t + 1) / rate."""
    if not len(labels):
        return []
    starts = np.flatnonzero(np.diff(labels, prepend=labels[0] - 1))
    ends = np.append(starts[1:], len(labels))
    return [Phone(str(labels[a]), a / frame_rate, b / frame_rate) for a, b in zip(starts, ends, strict=True)]


def write_parquet(decoded: Sequence[Decoded], corpus: UnitCorpus, path: Path) -> None:
    """One row an utterance: id, speaker, split, units, states, labels, segments, score, log_likelihood."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    segment = pa.struct([("label", pa.string()), ("start", pa.float32()), ("end", pa.float32())])
    columns = {
        "id": pa.array([x.utterance.id for x in decoded], pa.string()),
        "speaker": pa.array([x.utterance.speaker for x in decoded], pa.string()),
        "split": pa.array([x.utterance.split for x in decoded], pa.string()),
        "units": pa.array([x.utterance.units for x in decoded], pa.list_(pa.int32())),
        "states": pa.array([x.states for x in decoded], pa.list_(pa.int32())),
        "labels": pa.array([x.labels for x in decoded], pa.list_(pa.int32())),
        "segments": pa.array(
            [[s._asdict() for s in segments(x.labels, corpus.frame_rate)] for x in decoded], pa.list_(segment)
        ),
        "score": pa.array([x.score for x in decoded], pa.float64()),
        "log_likelihood": pa.array([x.log_likelihood for x in decoded], pa.float64()),
    }
    table = pa.table(columns).replace_schema_metadata({"frame_rate": repr(corpus.frame_rate)})
    with atomic_path(path) as beside:
        pq.write_table(table, beside, compression="zstd")


def write_textgrids(decoded: Sequence[Decoded], corpus: UnitCorpus, folder: Path) -> None:
    """ID.TextGrid for each utterance, with the tiers states, units and, where known, phones."""
    for x in decoded:
        tiers = {
            "states": segments(x.labels, corpus.frame_rate),
            "units": segments(np.asarray(x.utterance.units), corpus.frame_rate),
        }
        if x.utterance.phones:
            tiers["phones"] = x.utterance.phones
        end = max([len(x.labels) / corpus.frame_rate, *(p.end for p in x.utterance.phones or [])])
        write_textgrid(folder / f"{x.utterance.id}.TextGrid", tiers, end)


def evaluate(module: SpeechHMM, corpus: UnitCorpus) -> dict[str, Any]:
    """The metrics.json object for the test split of a corpus; the paths that it scores are left in module.test_result.

    Raises:
        UserError: a split is empty: the baselines are fitted on train and tuned on valid.
    """
    from hmm_speech.module import TestResult
    from hmm_speech.report import test_metrics

    test = corpus.split("test")
    for name in ("train", "valid", "test"):
        if not corpus.split(name):
            raise UserError(
                f"the unit file has no {name} utterance; baselines are fitted on train and tuned on valid, and the "
                "test split is evaluated: give the file that the model was trained on, or one with all three"
            )
    decoded = list(decode(module, test))
    bits = -math.fsum(x.log_likelihood for x in decoded) / math.log(2)
    frames = sum(len(x.labels) for x in decoded)
    module.test_result = TestResult(bits, frames, [x.labels for x in decoded], list(range(len(test))))
    return test_metrics(module, corpus)


def sample(module: SpeechHMM, num: int, frames: int, frame_rate: float = 50.0, seed: int = 0) -> UnitCorpus:
    """Utterances drawn from the model: z_0 from the initial, z_t from the transitions, x_t from the emission.

    The labels that produced the units stand where a unit file has phones. A checkpoint does not know how long its
    frames are: `frame_rate`, in Hz, turns them into seconds. Where the emission is over frames, the units are the
    labels and the frames are kept as such.

    Raises:
        UserError: `num`, `frames` or `frame_rate` is not positive.
    """
    from hmm_speech.nn.sampling import draw_sequences

    for name, value in (("--num", num), ("--frames", frames), ("--frame-rate", frame_rate)):
        if not value > 0:
            raise UserError(f"{name}: got {value}, expected more than 0")
    with torch.no_grad():
        drawn = draw_sequences(module, num, frames, torch.Generator().manual_seed(seed))
    labels = module.topology.label_of(drawn.states_BT).numpy().astype(np.int32)
    units = labels if drawn.units_BT is None else drawn.units_BT.numpy().astype(np.int32)
    utterances = [
        Utterance(
            f"sample{k:04d}", "", "test", units[k], phones=segments(labels[k], frame_rate),
            frames=None if drawn.frames_BTD is None else drawn.frames_BTD[k].numpy(),
        )
        for k in range(num)
    ]  # fmt: skip
    vocabulary = module.topology.labels if drawn.units_BT is None else module.hparams.vocabulary
    return UnitCorpus(utterances, frame_rate, vocabulary, {"sampled": "from a model"})
