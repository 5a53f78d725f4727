"""How well discrete labels of frames tell phones: PNMI and purities (Hsu et al. 2021, "HuBERT", section IV-C)."""

from collections.abc import Sequence

import numpy as np
import torch
from torchmetrics import Metric

from hmm_speech.errors import UserError
from hmm_speech.evaluate.sequences import PhoneSegments, check_frame_rate, phone_times_us


def clustering_scores(joint_LP: np.ndarray) -> dict[str, float]:
    """PNMI, phone purity and cluster purity of a table of joint counts.

    With p(z, y) = joint_LP / joint_LP.sum() over labels z and phones y:

        pnmi           = I(y; z) / H(y): the share of the phones' entropy that the label removes
        phone_purity   = sum_z max_y p(z, y): frame accuracy if each label is read as its most frequent phone
        cluster_purity = sum_y max_z p(z, y): the share of frames under their phone's most frequent label

    PNMI and phone purity grow with the number of labels, so compare equal numbers. Cluster purity falls.

    Args:
        joint_LP: counts of frames by label and phone, shape (L, P).

    Returns:
        The three as floats. NaN where undefined: without frames all three, with a single phone (H(y) = 0) the PNMI.
    """
    joint_LP = np.asarray(joint_LP, dtype=np.float64)
    total = joint_LP.sum()
    if total == 0:
        return {"pnmi": float("nan"), "phone_purity": float("nan"), "cluster_purity": float("nan")}
    p_LP = joint_LP / total
    phone_entropy = _entropy(p_LP.sum(axis=0))
    information = _entropy(p_LP.sum(axis=1)) + phone_entropy - _entropy(p_LP.ravel())
    several_phones = np.count_nonzero(p_LP.sum(axis=0)) > 1
    return {
        "pnmi": float(np.clip(information / phone_entropy, 0.0, 1.0)) if several_phones else float("nan"),
        "phone_purity": float(p_LP.max(axis=1).sum()),
        "cluster_purity": float(p_LP.max(axis=0).sum()),
    }


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def phone_inventory(phones: Sequence[PhoneSegments | None]) -> list[str]:
    """The phone labels that occur, sorted."""
    return sorted({label for utterance in phones for label, _, _ in utterance or ()})


def nmi(joint_LP: np.ndarray) -> float:
    """2 I(label; phone) / (H(label) + H(phone)) of joint counts."""
    p_LP = joint_LP / joint_LP.sum()
    labels, phones, pairs = (_entropy(p) for p in (p_LP.sum(1), p_LP.sum(0), p_LP))
    return 2 * (labels + phones - pairs) / (labels + phones)


def frame_phones(
    phones: PhoneSegments, num_frames: int, frame_rate: float, inventory: Sequence[str], name: str = "phones"
) -> np.ndarray:
    """The phone at the centre of each frame, as an index into ``inventory``, int64 (num_frames,).

    Frame t covers [t, t + 1) / frame_rate and has its centre at (t + 0.5) / frame_rate. A phone covers
    [start, end); -1 marks frames that lie in none, as before the first phone, past the last, and in gaps.

    Raises:
        UserError: a phone that the inventory lacks, or times that make no sense.
    """
    starts_us, ends_us = phone_times_us(phones, name)
    if not len(starts_us):
        return np.full(num_frames, -1, dtype=np.int64)
    number = {label: index for index, label in enumerate(inventory)}
    missing = [label for label, _, _ in phones if label not in number]
    if missing:
        raise UserError(
            f"{name}: phone {missing[0]!r} is not in the inventory of {len(number)}; build it from all splits"
        )
    indices = np.array([number[label] for label, _, _ in phones], dtype=np.int64)
    centres_us = np.rint((np.arange(num_frames) + 0.5) * (1e6 / check_frame_rate(frame_rate))).astype(np.int64)
    segment_T = np.searchsorted(starts_us, centres_us, side="right") - 1
    inside_T = (segment_T >= 0) & (centres_us < ends_us[segment_T])
    return np.where(inside_T, indices[segment_T], -1)


class PhoneClustering(Metric):
    """PNMI and purities over many updates: ``update(labels (F,), phones (F,))``, ``compute()`` -> dict of floats.

    The state is the table of joint counts, summed over processes, so that any number of them gives what one gives.

    Args:
        num_labels: L, the size of the label set.
        num_phones: P, the size of the phone inventory.
    """

    full_state_update = False
    joint_LP: torch.Tensor

    def __init__(self, num_labels: int, num_phones: int) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.num_phones = num_phones
        self.add_state("joint_LP", torch.zeros(num_labels, num_phones, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, labels: torch.Tensor, phones: torch.Tensor) -> None:
        """Count frames: label 0 .. L - 1 and phone 0 .. P - 1 of each, int64 (F,); phone -1 leaves the frame out."""
        if labels.shape != phones.shape:
            raise UserError(f"labels: shape {tuple(labels.shape)}, but phones: shape {tuple(phones.shape)}")
        labels, phones = (x.to(self.joint_LP.device, torch.int64)[phones >= 0] for x in (labels, phones))
        if not labels.numel():
            return
        for name, values, size in (("labels", labels, self.num_labels), ("phones", phones, self.num_phones)):
            if values.min() < 0 or values.max() >= size:
                raise UserError(
                    f"{name}: {int(values.min())} to {int(values.max())}, but there are {size} (0 to {size - 1})"
                )
        counts = torch.bincount(labels * self.num_phones + phones, minlength=self.joint_LP.numel())
        self.joint_LP += counts.view_as(self.joint_LP)

    def compute(self) -> dict[str, float]:
        """``{"pnmi", "phone_purity", "cluster_purity"}``; see :func:`clustering_scores`."""
        return clustering_scores(self.joint_LP.cpu().numpy())
