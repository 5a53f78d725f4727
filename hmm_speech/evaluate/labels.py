"""Reports on discrete labels of frames against phones, in the keys of ``metrics.json``.

:class:`LabelReport` and :class:`UniformReport` gather over batches and processes; :func:`label_report` and
:func:`uniform_report` take all utterances at once and give the same numbers.
"""

from collections.abc import Sequence

import numpy as np
import torch

from hmm_speech.errors import UserError
from hmm_speech.evaluate.clustering import PhoneClustering, frame_phones, phone_inventory
from hmm_speech.evaluate.segmentation import (
    BoundaryScores,
    label_boundaries,
    phone_boundaries,
    uniform_boundaries,
)
from hmm_speech.evaluate.sequences import PhoneSegments, as_labels, as_sequences, check_frame_rate, phone_times_us

Report = dict[str, float | dict[str, float | None] | None]


class LabelReport(torch.nn.Module):
    """PNMI, purities and boundary scores of frame labels, gathered over batches and processes.

    Args:
        num_labels: L; labels are 0 .. L - 1. Chains of substates are scored by their label.
        inventory: every phone that may come, the same list in every process (:func:`phone_inventory` of all splits).
        frame_rate: in Hz; label t covers [t, t + 1) / frame_rate.

    Utterances without phones (None or an empty list) are left out. Frames whose centre lies in no phone are left out
    of PNMI and purities; changes of label at or before the first phone's start, and at or past the last phone's end,
    are left out of the boundaries.
    """

    def __init__(self, num_labels: int, inventory: Sequence[str], frame_rate: float) -> None:
        super().__init__()
        self.inventory = list(inventory)
        self.frame_rate = check_frame_rate(frame_rate)
        self.clustering = PhoneClustering(num_labels, len(self.inventory))
        self.boundaries = BoundaryScores()

    def update(self, labels: Sequence[np.ndarray], phones: Sequence[PhoneSegments | None]) -> None:
        """Add utterances: for each, its labels, an int array (T,) without padding, and its phones."""
        if len(labels) != len(phones):
            raise UserError(f"labels: {len(labels)} utterances, but phones: {len(phones)}; expected one list of each")
        frames, classes, predicted, reference = [], [], [], []
        for index, (sequence, segments) in enumerate(zip(labels, phones, strict=True)):
            if not segments:
                continue
            name = f"phones[{index}]"
            label_T = as_labels(sequence, f"labels[{index}]", self.clustering.num_labels)
            frames.append(label_T)
            classes.append(frame_phones(segments, len(label_T), self.frame_rate, self.inventory, name))
            starts_us, ends_us = phone_times_us(segments, name)
            changes_us = label_boundaries(label_T, self.frame_rate)
            predicted.append(changes_us[(changes_us > starts_us[0]) & (changes_us < ends_us.max())])
            reference.append(phone_boundaries(segments, name))
        nothing = np.zeros(0, dtype=np.int64)
        self.clustering.update(*(torch.from_numpy(np.concatenate([nothing, *arrays])) for arrays in (frames, classes)))
        self.boundaries.update(predicted, reference)

    def compute(self) -> Report:
        """``{"pnmi", "phone_purity", "cluster_purity", "boundary": {...}}``; None where undefined."""
        return _nulls({**self.clustering.compute(), "boundary": self.boundaries.compute()})

    def reset(self) -> None:
        """Forget all utterances."""
        self.clustering.reset()
        self.boundaries.reset()


class UniformReport(torch.nn.Module):
    """Boundary scores of equal segments, as many as the reference has: what knowing the rate alone brings.

    Args:
        frame_rate: in Hz; the segments begin and end at frames, as those of the labels that they are compared with.
    """

    def __init__(self, frame_rate: float) -> None:
        super().__init__()
        self.frame_rate = check_frame_rate(frame_rate)
        self.boundaries = BoundaryScores()

    def update(self, phones: Sequence[PhoneSegments | None]) -> None:
        """Add utterances by their phones; None and empty lists are left out."""
        present = [(f"phones[{index}]", segments) for index, segments in enumerate(phones) if segments]
        self.boundaries.update(
            [uniform_boundaries(segments, self.frame_rate, name) for name, segments in present],
            [phone_boundaries(segments, name) for name, segments in present],
        )

    def compute(self) -> Report:
        """``{"boundary": {"precision", "recall", "f1", "r_value"}}``; None where undefined."""
        return _nulls({"boundary": self.boundaries.compute()})

    def reset(self) -> None:
        """Forget all utterances."""
        self.boundaries.reset()


def label_report(labels: Sequence[np.ndarray], phones: Sequence[PhoneSegments | None], frame_rate: float) -> Report:
    """Score the labels of utterances against their phones.

    Args:
        labels: for each utterance an int array (T,), 0 or more, without padding.
        phones: for each utterance its (label, start, end) segments in seconds, in order; None where unknown.
        frame_rate: in Hz; label t covers [t, t + 1) / frame_rate.

    Returns:
        ``{"pnmi", "phone_purity", "cluster_purity", "boundary": {"precision", "recall", "f1", "r_value"}}`` with None
        where undefined. Definitions: :func:`~hmm_speech.evaluate.clustering.clustering_scores`,
        :func:`~hmm_speech.evaluate.segmentation.boundary_scores`, :class:`LabelReport`.

    Raises:
        UserError: lists of different length, labels that are negative or no integers, phones out of order.
    """
    checked = as_sequences(labels, "labels")
    used = np.unique(np.concatenate(checked)) if checked else np.zeros(0)
    report = LabelReport(max(len(used), 1), phone_inventory(phones), frame_rate)
    report.update([np.searchsorted(used, sequence) for sequence in checked], phones)
    return report.compute()


def uniform_report(phones: Sequence[PhoneSegments | None], frame_rate: float) -> Report:
    """``{"boundary": {...}}`` of equal segments over each utterance's phones; see :class:`UniformReport`."""
    report = UniformReport(frame_rate)
    report.update(phones)
    return report.compute()


def joint_counts(
    labels: Sequence[np.ndarray], phones: Sequence[PhoneSegments | None], frame_rate: float, num_labels: int
) -> tuple[np.ndarray, list[str]]:
    """Counts of frames by label and phone, int64 (num_labels, P), and the P phones; frames outside phones left out."""
    inventory = phone_inventory(phones)
    report = LabelReport(num_labels, inventory, frame_rate)
    report.update(labels, phones)
    return report.clustering.joint_LP.numpy(), inventory


def _nulls(report: Report) -> Report:
    """NaN, which JSON lacks, becomes None."""
    return {
        key: _nulls(value) if isinstance(value, dict) else None if np.isnan(value) else float(value)
        for key, value in report.items()
    }
