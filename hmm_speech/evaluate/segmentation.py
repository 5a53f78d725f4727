"""How well changes of label find phone boundaries: strict precision, recall, F1 and R-value.

Times are whole microseconds (int64), so that a boundary exactly at the tolerance counts on every machine.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torchmetrics import Metric

from hmm_speech.evaluate.sequences import PhoneSegments, check_frame_rate, phone_times_us

TOLERANCE_US = 20_000


def label_boundaries(labels: np.ndarray, frame_rate: float) -> np.ndarray:
    """Times of the changes of label, in microseconds, int64: t / frame_rate wherever labels[t] != labels[t - 1].

    Label t covers [t, t + 1) / frame_rate. The two ends of the utterance are no boundaries.
    """
    changes = np.flatnonzero(np.diff(labels)) + 1
    return np.rint(changes * (1e6 / check_frame_rate(frame_rate))).astype(np.int64)


def phone_boundaries(phones: PhoneSegments, name: str = "phones") -> np.ndarray:
    """Times of all phone starts but the first, in microseconds, int64.

    A phone that follows one of the same label starts a segment of its own all the same.
    """
    return phone_times_us(phones, name)[0][1:]


def uniform_boundaries(phones: PhoneSegments, frame_rate: float, name: str = "phones") -> np.ndarray:
    """Boundaries of equal segments over the phones' span, as many segments as there are phones, int64 microseconds.

    They lie at the nearest multiples of 1 / frame_rate, as those of frame labels do. That matters: where the reference
    is on a grid too (10 ms, say), 20 ms off is common and counts, so a grid finds more than exact times would
    (speechocean762: F1 .41 against .34), and the comparison with frame labels would be unfair. Where there are more
    phones than frames, boundaries coincide and count once.
    """
    starts_us, ends_us = phone_times_us(phones, name)
    if not len(starts_us):
        return starts_us
    frame_us = 1e6 / check_frame_rate(frame_rate)
    first, last = starts_us[0], ends_us.max()
    frames = np.unique(np.rint(np.linspace(first, last, len(starts_us) + 1)[1:-1] / frame_us))
    times_us = np.rint(frames * frame_us).astype(np.int64)
    return times_us[(times_us > first) & (times_us < last)]


def match_boundaries(predicted_us: np.ndarray, reference_us: np.ndarray, tolerance_us: int = TOLERANCE_US) -> int:
    """The most pairs (predicted, reference) within the tolerance such that no boundary is in two pairs.

    Args:
        predicted_us, reference_us: sorted times in whole microseconds.
        tolerance_us: the largest distance that counts, itself included.

    Greedy from left to right is a maximum matching. Take the earliest predicted p and the earliest reference r.
    If p < r - tolerance, then p is out of reach of every reference, all of which are no earlier than r: drop p; if
    r < p - tolerance, drop r likewise. Otherwise they match, and some maximum matching holds the pair (p, r): in a
    maximum matching M at least one of the two is paired, or the pair could be added. If exactly one is, say p with r',
    swap r' for r. If both are, as (p, r') and (p', r) with p' >= p and r' >= r, put (p, r) and (p', r') in their
    place: p' - r' <= p' - r <= tolerance and r' - p' <= r' - p <= tolerance. (All windows being equally wide is what
    makes this hold.) The same argument goes on for the rest.
    """
    matched = i = j = 0
    predicted, reference = predicted_us.tolist(), reference_us.tolist()
    while i < len(predicted) and j < len(reference):
        distance = predicted[i] - reference[j]
        if abs(distance) <= tolerance_us:
            matched += 1
            i += 1
            j += 1
        elif distance < 0:
            i += 1
        else:
            j += 1
    return matched


def boundary_scores(matched: int, predicted: int, reference: int) -> dict[str, float]:
    """Precision, recall, F1 and R-value of counts of boundaries.

        precision = matched / predicted          recall = matched / reference
        F1        = 2 matched / (predicted + reference)
        OS        = recall / precision - 1 = predicted / reference - 1             (over-segmentation)
        R-value   = 1 - (|r1| + |r2|) / 2,  r1 = sqrt((1 - recall)^2 + OS^2),  r2 = (recall - 1 - OS) / sqrt(2)

    (Rasanen, Laine and Altosaar 2009.) 1 is perfect; too many boundaries raise F1, but send the R-value below 0.

    Returns:
        The four as floats. Without reference boundaries all are NaN; without predicted ones the precision is 0.
    """
    if reference == 0:
        return dict.fromkeys(("precision", "recall", "f1", "r_value"), float("nan"))
    recall = matched / reference
    over_segmentation = predicted / reference - 1
    r1 = np.hypot(1 - recall, over_segmentation)
    r2 = (recall - 1 - over_segmentation) / np.sqrt(2)
    return {
        "precision": matched / predicted if predicted else 0.0,
        "recall": recall,
        "f1": 2 * matched / (predicted + reference),
        "r_value": float(1 - (abs(r1) + abs(r2)) / 2),
    }


class BoundaryScores(Metric):
    """Strict boundary scores over many utterances: ``update(predicted_us, reference_us)``, ``compute()`` -> dict.

    The states are three counts, summed over processes: utterances weigh by their boundaries.

    Args:
        tolerance: the largest distance that counts as found, in seconds, itself included.
    """

    full_state_update = False
    counts: torch.Tensor

    def __init__(self, tolerance: float = TOLERANCE_US / 1e6) -> None:
        super().__init__()
        self.tolerance_us = round(tolerance * 1e6)
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted_us: Sequence[np.ndarray], reference_us: Sequence[np.ndarray]) -> None:
        """Match the boundaries of each utterance: for each, sorted times in whole microseconds, int64 arrays."""
        counts = np.zeros(3, dtype=np.int64)
        for predicted, reference in zip(predicted_us, reference_us, strict=True):
            counts += match_boundaries(predicted, reference, self.tolerance_us), len(predicted), len(reference)
        self.counts += torch.from_numpy(counts).to(self.counts.device)

    def compute(self) -> dict[str, float]:
        """``{"precision", "recall", "f1", "r_value"}``; see :func:`boundary_scores`."""
        return boundary_scores(*self.counts.tolist())
