"""Interpolated n-gram baselines in bits per frame.

A neural HMM's bits per frame mean something beside a unigram, a bigram and a trigram of the same units. The n-gram of
order n mixes the relative frequencies of all orders from n down to the uniform distribution (Jelinek and Mercer 1980):

    p_0(x)     = 1 / K
    p_k(x | h) = w_k(b(h)) c(h x) / c(h) + (1 - w_k(b(h))) p_{k-1}(x | h'),     k = 1 .. n,

where h holds the k - 1 preceding units, h' lacks the earliest of them, and c counts in the training split. A history
that training never showed has w_k = 0, so the lower order speaks alone. The other weights belong to buckets b(h) of
c(h) / |{x : c(h x) > 0}|, the mean count of the continuations seen, which tells a well-known history from a rare one
better than c(h) (Chen and Goodman 1998, section 3). EM chooses all weights of an n-gram together, to maximise the
likelihood of the valid split.

Every frame is scored and counted, the first ones too: they have the start of the utterance in their history. There is
no end symbol, so p_n sums to 1 over the K units and its figure compares with an HMM's, which has none either.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hmm_speech.errors import UserError
from hmm_speech.evaluate.sequences import as_sequences

NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}
MAX_BUCKETS = 12
FRAMES_A_BUCKET = 200  # valid frames behind each weight: fewer, and the weights fit the valid split's noise
PSEUDOCOUNT = 1.0  # of an even prior on each weight: keeps it inside (0, 1), so no unit ever has probability 0
MAX_ITERATIONS = 500
TOLERANCE = 1e-7  # bits per frame


def ngram_baselines(
    train: Sequence[np.ndarray], valid: Sequence[np.ndarray], test: Sequence[np.ndarray], vocabulary: int
) -> dict[str, float]:
    """Bits per frame of the tuned unigram, bigram and trigram on ``test``.

    Args:
        train: the utterances that are counted, each an int array (T,) with values 0 .. vocabulary - 1.
        valid: the utterances that tune the interpolation weights.
        test: the utterances that are scored; the figure is the mean over all of their frames.
        vocabulary: K, the number of units.

    Returns:
        ``{"unigram": bits, "bigram": bits, "trigram": bits}``.

    Raises:
        UserError: a split without frames, or units outside the vocabulary.
    """
    splits = {"train": train, "valid": valid, "test": test}
    checked = {name: as_sequences(split, name, vocabulary) for name, split in splits.items()}
    for name, split in checked.items():
        if not sum(map(len, split)):
            raise UserError(f"{name}: the n-gram baselines need frames in each split, but this one has none")
    return {
        name: NGram(order, vocabulary).fit(checked["train"]).tune(checked["valid"]).bits_per_frame(checked["test"])
        for order, name in NAMES.items()
    }


class NGram:
    """An interpolated n-gram over units 0 .. vocabulary - 1: ``NGram(3, 100).fit(train).tune(valid)``.

    Counts are kept for what occurs only, so a large vocabulary costs nothing: time is O(F log F) in the frames F.

    Args:
        order: n, 1 for a unigram. A frame's history is the n - 1 units ahead of it.
        vocabulary: K.
    """

    def __init__(self, order: int, vocabulary: int) -> None:
        if order < 1:
            raise UserError(f"order: expected 1 (unigram) or more, but it is {order}")
        if vocabulary < 1:
            raise UserError(f"vocabulary: expected 1 or more units, but it is {vocabulary}")
        if (vocabulary + 1) ** order >= 2**63:
            raise UserError(f"vocabulary: {vocabulary} units are too many for order {order}: codes exceed 63 bits")
        self.order = order
        self.vocabulary = vocabulary
        self._tables: list[_Table] = []
        self._edges: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []

    def fit(self, train: Sequence[np.ndarray]) -> "NGram":
        """Count the n-grams of all orders in ``train``; before :meth:`tune`, every weight is 1/2."""
        ngrams_FN = self._ngrams(as_sequences(train, "train", self.vocabulary))
        self._tables = [self._count(ngrams_FN[:, -order:]) for order in range(1, self.order + 1)]
        self._edges = [np.zeros(0) for _ in self._tables]
        self._weights = [np.array([0.0, 0.5]) for _ in self._tables]
        return self

    def tune(self, valid: Sequence[np.ndarray]) -> "NGram":
        """Choose the interpolation weights by EM on ``valid``.

        Unrolled, p_n is a mixture: stop at order k with probability w_k (1 - w_{k+1}) .. (1 - w_n). The E-step finds
        the posterior r_k that a frame which came down to order k stops there, w_k c(hx) / c(h) / p_k; the M-step sets
        the weight of a bucket to the share that stopped of those that came.
        """
        looked_up = self._look_up(self._ngrams(as_sequences(valid, "valid", self.vocabulary)))
        self._edges = [_bucket_edges(order.richness[order.total > 0]) for order in looked_up]
        self._weights = [np.r_[0.0, np.full(len(edges) + 1, 0.5)] for edges in self._edges]
        buckets = [_bucket(order, edges) for order, edges in zip(looked_up, self._edges, strict=True)]
        previous = np.inf
        for _ in range(MAX_ITERATIONS):
            levels = self._levels(looked_up)
            bits = -np.log2(levels[-1]).mean() if len(levels[-1]) else 0.0
            if previous - bits < TOLERANCE:
                break
            previous = bits
            arrived = np.ones(len(levels[0]))
            for k in reversed(range(self.order)):
                weights, bucket = self._weights[k], buckets[k]
                stopped = arrived * weights[bucket] * looked_up[k].frequency / levels[k + 1]
                numerator = np.bincount(bucket, stopped, len(weights)) + PSEUDOCOUNT / 2
                weights[1:] = (numerator / (np.bincount(bucket, arrived, len(weights)) + PSEUDOCOUNT))[1:]
                arrived = arrived - stopped
        return self

    def probabilities(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """p(x_t | history) of every frame, the utterances one after another, float64 (F,)."""
        ngrams_FN = self._ngrams(as_sequences(sequences, "sequences", self.vocabulary))
        return self._levels(self._look_up(ngrams_FN))[-1]

    def distribution(self, history: Sequence[int]) -> np.ndarray:
        """p(x | history) for every unit x, float64 (K,); ``history`` is all that the utterance holds so far."""
        context = [self.vocabulary] * (self.order - 1) + [int(unit) for unit in history]
        context = context[len(context) - self.order + 1 :]
        symbols = np.arange(self.vocabulary)
        ngrams_FN = np.column_stack([np.tile(np.array(context, np.int64), (self.vocabulary, 1)), symbols])
        return self._levels(self._look_up(ngrams_FN))[-1]

    def bits_per_frame(self, sequences: Sequence[np.ndarray]) -> float:
        """The mean of -log2 p(x_t | history) over all frames of ``sequences``."""
        probability_F = self.probabilities(sequences)
        if not len(probability_F):
            raise UserError("sequences: no frames to score; pass at least one utterance that is not empty")
        return float(-np.log2(probability_F).mean())

    def _ngrams(self, sequences: list[np.ndarray]) -> np.ndarray:
        """Each frame with its history, earliest first, int64 (F, n); the unit K stands for the start."""
        padding = np.full(self.order - 1, self.vocabulary, dtype=np.int64)
        windows = [
            np.lib.stride_tricks.sliding_window_view(np.concatenate([padding, sequence]), self.order)
            for sequence in sequences
            if len(sequence)
        ]
        return np.concatenate(windows) if windows else np.zeros((0, self.order), dtype=np.int64)

    def _code(self, ngrams_FN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One integer for each history and one for each n-gram."""
        history_F = np.zeros(len(ngrams_FN), dtype=np.int64)
        for column in ngrams_FN.T[:-1]:
            history_F = history_F * (self.vocabulary + 1) + column
        return history_F, history_F * (self.vocabulary + 1) + ngrams_FN[:, -1]

    def _count(self, ngrams_FN: np.ndarray) -> "_Table":
        history_F, ngram_F = self._code(ngrams_FN)
        histories, totals = np.unique(history_F, return_counts=True)
        ngrams, counts = np.unique(ngram_F, return_counts=True)
        _, types = np.unique(ngrams // (self.vocabulary + 1), return_counts=True)
        return _Table(histories, totals, types, ngrams, counts)

    def _look_up(self, ngrams_FN: np.ndarray) -> list["_Frames"]:
        if not self._tables:
            raise UserError("NGram: count the training split first, with fit(train)")
        return [table.look_up(*self._code(ngrams_FN[:, -k:])) for k, table in enumerate(self._tables, start=1)]

    def _levels(self, looked_up: list["_Frames"]) -> list[np.ndarray]:
        """p_0 .. p_n of every frame, each (F,)."""
        levels = [np.full(len(looked_up[0].total), 1 / self.vocabulary)]
        for order, edges, weights in zip(looked_up, self._edges, self._weights, strict=True):
            weight_F = weights[_bucket(order, edges)]
            levels.append(weight_F * order.frequency + (1 - weight_F) * levels[-1])
        return levels


class _Frames(NamedTuple):
    """What one order's counts say about each of F frames."""

    frequency: np.ndarray  # c(hx) / c(h), 0 where h is new
    total: np.ndarray  # c(h)
    richness: np.ndarray  # c(h) / |{x : c(hx) > 0}|, 0 where h is new


class _Table(NamedTuple):
    """The counts of one order; codes are sorted."""

    histories: np.ndarray
    totals: np.ndarray
    types: np.ndarray
    ngrams: np.ndarray
    counts: np.ndarray

    def look_up(self, history_F: np.ndarray, ngram_F: np.ndarray) -> _Frames:
        total_F = _find(self.histories, self.totals, history_F)
        types_F = np.maximum(_find(self.histories, self.types, history_F), 1)
        return _Frames(_find(self.ngrams, self.counts, ngram_F) / np.maximum(total_F, 1), total_F, total_F / types_F)


def _find(codes: np.ndarray, values: np.ndarray, wanted_F: np.ndarray) -> np.ndarray:
    """``values`` where ``codes`` (sorted) equals the wanted code, 0 where it is missing."""
    if not len(codes):
        return np.zeros(len(wanted_F), dtype=np.int64)
    index_F = np.minimum(np.searchsorted(codes, wanted_F), len(codes) - 1)
    return np.where(codes[index_F] == wanted_F, values[index_F], 0)


def _bucket_edges(richness_F: np.ndarray) -> np.ndarray:
    """Cut points between buckets that hold about equally many valid frames, at least FRAMES_A_BUCKET each."""
    buckets = int(np.clip(len(richness_F) // FRAMES_A_BUCKET, 1, MAX_BUCKETS))
    if buckets == 1:
        return np.zeros(0)
    edges = np.unique(np.quantile(richness_F, np.arange(1, buckets) / buckets))
    return edges[edges > richness_F.min()]  # an edge at the minimum would leave the bucket below it empty


def _bucket(order: _Frames, edges: np.ndarray) -> np.ndarray:
    """The bucket of each frame's history; bucket 0, of weight 0, is for histories that training never showed."""
    return np.where(order.total > 0, 1 + np.searchsorted(edges, order.richness, side="right"), 0)
