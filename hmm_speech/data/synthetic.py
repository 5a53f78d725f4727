"""Corpora sampled from a random HMM, whose labels are known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from hmm_speech.data.unitfile import Phone, UnitCorpus, Utterance
from hmm_speech.errors import check_size


def sample_corpus(
    utterances: int = 60, frames: int = 80, vocabulary: int = 20, labels: int = 8, numbers: int = 0, seed: int = 0
) -> UnitCorpus:
    """Sample utterances from an HMM with Dirichlet-distributed tables and labels that last four frames on average.

    Lengths are uniform in [frames / 2, frames * 3 / 2]. The labels are given as phones ``p0``, ``p1``, ... at 50
    frames a second, the utterances go to train (two thirds), valid and test (one sixth each). With ``numbers``, frames
    of so many come from a Gaussian of variance 1 for each label.
    """
    sizes = {"utterances": utterances, "frames": frames, "vocabulary": vocabulary, "labels": labels, "numbers": numbers}
    for name, value in sizes.items():
        check_size(f"data.{name}", value, least={"utterances": 6, "numbers": 0}.get(name, 2))
    generator = np.random.default_rng(seed)
    transition = generator.dirichlet(np.full(labels, 0.3), size=labels)
    transition = 0.75 * np.eye(labels) + 0.25 * transition
    emission = generator.dirichlet(np.full(vocabulary, 0.2), size=labels)
    means = 2 * generator.standard_normal((labels, numbers))
    rows = []
    for number in range(utterances):
        length = int(generator.integers(max(frames // 2, 1), frames * 3 // 2 + 1))
        states = np.empty(length, dtype=np.int64)
        states[0] = generator.integers(labels)
        for t in range(1, length):
            states[t] = generator.choice(labels, p=transition[states[t - 1]])
        units = np.array([generator.choice(vocabulary, p=emission[state]) for state in states], dtype=np.int32)
        split = {0: "valid", 1: "test"}.get(number % 6, "train")
        observed = (means[states] + generator.standard_normal((length, numbers))).astype(np.float32)
        rows.append(
            Utterance(
                f"synthetic{number:04d}", f"speaker{number % 2}", split, units, _phones(states),
                frames=observed if numbers else None,
            )
        )  # fmt: skip
    return UnitCorpus(rows, 50.0, vocabulary, {"made_by": "a random HMM", "seed": str(seed)})


def _phones(states: np.ndarray, frame_rate: float = 50.0) -> list[Phone]:
    edges = [0, *(np.flatnonzero(np.diff(states)) + 1).tolist(), len(states)]
    return [Phone(f"p{states[start]}", start / frame_rate, end / frame_rate) for start, end in pairwise(edges)]
