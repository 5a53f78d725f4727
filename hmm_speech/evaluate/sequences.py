"""Checks shared by the evaluation: what counts as a sequence of labels, and as an utterance's phones."""

from collections.abc import Sequence

import numpy as np

from hmm_speech.errors import UserError

PhoneSegments = Sequence[tuple[str, float, float]]
"""One utterance's phones: (label, start, end) with times in seconds, as ``hmm_speech.data.unitfile.Phone``."""


def as_labels(sequence: object, name: str, vocabulary: int | None = None) -> np.ndarray:
    """One utterance's labels as an int64 array (T,); T may be 0.

    Takes numpy arrays, lists and torch tensors (on any device). ``name`` says in errors which argument and
    utterance it is.

    Raises:
        UserError: not one-dimensional, not integers, negative, or not below ``vocabulary``.
    """
    if hasattr(sequence, "detach"):
        sequence = sequence.detach().cpu()
    labels = np.asarray(sequence)
    if labels.ndim != 1:
        raise UserError(f"{name}: expected one label a frame, an array of shape (T,), but its shape is {labels.shape}")
    if labels.size == 0:
        return np.zeros(0, dtype=np.int64)
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{name}: expected integer labels, but they are {labels.dtype}")
    labels = labels.astype(np.int64)
    if labels.min() < 0:
        raise UserError(
            f"{name}: frame {int(labels.argmin())} has label {labels.min()}, expected 0 or more; cut padding off first"
        )
    if vocabulary is not None and labels.max() >= vocabulary:
        raise UserError(
            f"{name}: frame {int(labels.argmax())} has label {labels.max()}, but the vocabulary is {vocabulary} "
            f"(labels 0 to {vocabulary - 1}); set the vocabulary that the labels were made with"
        )
    return labels


def as_sequences(sequences: Sequence[object], name: str, vocabulary: int | None = None) -> list[np.ndarray]:
    """Every utterance of ``sequences`` through :func:`as_labels`."""
    return [as_labels(sequence, f"{name}[{index}]", vocabulary) for index, sequence in enumerate(sequences)]


def phone_times_us(phones: PhoneSegments, name: str = "phones") -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of an utterance's phones in whole microseconds, int64 (P,), in order of time.

    Times are compared as integers everywhere: 0.1 + 0.2 - 0.3 is not 0 in floating point, and a boundary that lies
    exactly at the tolerance must count on every machine.

    Raises:
        UserError: a time that is not finite, an end before its start, or phones that are not in order of their start.
    """
    times = np.array([(start, end) for _, start, end in phones], dtype=np.float64).reshape(-1, 2)
    bad = ~np.isfinite(times).all(axis=1) | (times[:, 1] < times[:, 0])
    if bad.any():
        label, start, end = phones[int(bad.argmax())]
        raise UserError(
            f"{name}: phone {int(bad.argmax())} ({label!r}) runs from {start} to {end} s; expected finite times, "
            "the end not before the start"
        )
    starts_us, ends_us = np.rint(times.T * 1e6).astype(np.int64)
    backwards = np.flatnonzero(np.diff(starts_us) < 0)
    if backwards.size:
        index = int(backwards[0]) + 1
        raise UserError(
            f"{name}: phone {index} ({phones[index][0]!r}) starts at {phones[index][1]} s, before the one ahead of it; "
            "sort the phones by their start"
        )
    return starts_us, ends_us


def check_frame_rate(frame_rate: float) -> float:
    """``frame_rate`` in Hz as a float; a UserError unless it is positive and finite."""
    if not (np.isfinite(frame_rate) and frame_rate > 0):
        raise UserError(f"frame_rate: expected a positive number of frames a second, but it is {frame_rate}")
    return float(frame_rate)
