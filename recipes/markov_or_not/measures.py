"""What a trained model's states know of phones, beside its likelihood: the numbers of one row of the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from hmm_speech.data.batching import collate
from hmm_speech.data.unitfile import UnitCorpus, Utterance
from hmm_speech.evaluate import joint_counts, label_report, phone_inventory
from hmm_speech.evaluate.clustering import frame_phones, nmi
from hmm_speech.module import SpeechHMM
from hmm_speech.nn.composition import observed, score_parts
from hmm_speech.objective.vq_apc import code_log_probs

BATCH = 16  # utterances
PROBE_STEPS = 200  # of the logistic regression's optimizer, at most


class Views(NamedTuple):
    """What a model makes of each utterance of a split."""

    nats: float
    """-log p(frames) of all utterances together."""
    context: list[np.ndarray]
    """(T, H): row s is the context that has frame s as its last, so that hops compare."""
    posterior: list[np.ndarray]
    """(T, N) p(z_t | all frames)."""
    codes: list[np.ndarray]
    """(T,) states of the best path."""
    past_codes: list[np.ndarray] | None
    """(T,) most probable states given the past alone, at the last frame they know, as VQ-APC has them."""


@torch.no_grad()
def views(model: SpeechHMM, utterances: Sequence[Utterance]) -> Views:
    """Run a model over utterances."""
    found = Views(0.0, [], [], [], [] if model.hparams.objective["_target_"].endswith("VQAPC") else None)
    nats, hop = 0.0, model.context.hop
    for start in range(0, len(utterances), BATCH):
        batch = collate(list(enumerate(utterances[start : start + BATCH])))
        hmm, lengths = model(batch), batch.lengths.tolist()
        nats -= float(hmm.log_partition().double().sum())
        # Causal, so that the frames put behind the end are read by nothing that is kept.
        later = batch._replace(
            units=F.pad(batch.units, (0, hop)), frames=F.pad(batch.frames, (0, 0, 0, hop)), lengths=batch.lengths + hop
        )
        context_BTH = model.context(observed(model.context, later))[:, hop:]
        pairs = [(found.context, context_BTH), (found.posterior, hmm.marginals()), (found.codes, hmm.viterbi().states)]
        if found.past_codes is not None:
            initial_N, drift, _ = score_parts(model, later)
            pairs.append((found.past_codes, code_log_probs(initial_N, drift.drift_BTN)[:, hop:].argmax(-1)))
        for rows, tensor in pairs:
            rows.extend(row[:length].numpy() for row, length in zip(tensor, lengths, strict=True))
    return found._replace(nats=nats)


def evaluate(model: SpeechHMM, corpus: UnitCorpus) -> dict[str, dict[str, float]]:
    """``{"model": measures}`` on the test split; for VQ-APC also ``"past codes"``, from h_t alone."""
    train, test = (views(model, corpus.split(split)) for split in ("train", "test"))
    targets = [frame_targets(corpus, split) for split in ("train", "test")]
    rows = {
        "model": {
            "parameters": model.num_parameters(),
            "nats": test.nats / sum(len(row) for row in test.codes),
            "probe_context": probe(train.context, test.context, *targets),
            "probe_posterior": probe(train.posterior, test.posterior, *targets),
            **code_measures(test.codes, corpus),
        }
    }
    if test.past_codes is not None:
        rows["past codes"] = code_measures(test.past_codes, corpus)
    return rows


def baseline(corpus: UnitCorpus, labels: int, seed: int) -> dict[str, float]:
    """What the frames themselves give: a probe on them, and k-means codes, as many as a model has states."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    train, test = ([utterance.frames for utterance in corpus.split(split)] for split in ("train", "test"))
    with threadpool_limits(1):
        model = KMeans(labels, n_init=1, random_state=seed).fit(np.concatenate(train))
        codes = [model.predict(x) for x in test]
    found = probe(train, test, *(frame_targets(corpus, split) for split in ("train", "test")))
    return {"probe_context": found, **code_measures(codes, corpus)}


def frame_targets(corpus: UnitCorpus, split: str) -> list[np.ndarray]:
    """(T,) the number of each frame's phone, -1 outside phones, for each utterance of a split."""
    inventory = phone_inventory([utterance.phones for utterance in corpus.utterances])
    return [frame_phones(u.phones or [], len(u.units), corpus.frame_rate, inventory, u.id) for u in corpus.split(split)]


def probe(
    train: Sequence[np.ndarray],
    test: Sequence[np.ndarray],
    train_targets: Sequence[np.ndarray],
    test_targets: Sequence[np.ndarray],
) -> float:
    """Share of test frames whose phone a linear classifier of a frame's numbers tells, fitted on the train split.

    Multinomial logistic regression on standardised numbers, L2 penalty of scikit-learn's default weight.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    x, y, x_test, y_test = (np.concatenate(list(rows)) for rows in (train, train_targets, test, test_targets))
    with threadpool_limits(1):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=PROBE_STEPS, tol=1e-3))
        classifier.fit(x[y >= 0], y[y >= 0])
        return float(classifier.score(x_test[y_test >= 0], y_test[y_test >= 0]))


def code_measures(codes: Sequence[np.ndarray], corpus: UnitCorpus) -> dict[str, float]:
    """Strict F1 and R-value of the codes' changes, phone purity, PNMI and NMI, on the test split."""
    phones = [utterance.phones for utterance in corpus.split("test")]
    report: Mapping[str, Any] = label_report(codes, phones, corpus.frame_rate)
    joint_LP, _ = joint_counts(codes, phones, corpus.frame_rate, int(max(row.max() for row in codes)) + 1)
    return {
        "f1": report["boundary"]["f1"],
        "r_value": report["boundary"]["r_value"],
        "purity": report["phone_purity"],
        "pnmi": report["pnmi"],
        "nmi": nmi(joint_LP),
        "codes": int((joint_LP.sum(1) > 0).sum()),
    }
