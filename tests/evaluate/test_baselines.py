"""N-gram baselines: normalised, equal to a slow reference, tuned, and honest about the first frame."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.errors import UserError
from hmm_speech.evaluate.baselines import NGram, ngram_baselines


def markov(seed: int, vocabulary: int, utterances: int, frames: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(vocabulary, 0.1), size=vocabulary)
    sequences = []
    for _ in range(utterances):
        sequence = [int(rng.integers(vocabulary))]
        while len(sequence) < frames:
            sequence.append(int(rng.choice(vocabulary, p=table[sequence[-1]])))
        sequences.append(np.array(sequence, dtype=np.int32))
    return sequences


def slow_levels(train, history, symbol, vocabulary, weight_of):
    """p_0 .. p_n by dictionaries, straight from the definition; weight_of(order, total, types) gives w."""
    order = len(history) + 1
    levels = [1 / vocabulary]
    for k in range(1, order + 1):
        counts = defaultdict(Counter)
        for sequence in train:
            padded = [vocabulary] * (k - 1) + [int(x) for x in sequence]
            for t in range(len(sequence)):
                counts[tuple(padded[t : t + k - 1])][padded[t + k - 1]] += 1
        seen = counts[tuple(history[len(history) - k + 1 :])]
        total = sum(seen.values())
        weight = weight_of(k, total, len(seen)) if total else 0.0
        frequency = seen[symbol] / total if total else 0.0
        levels.append(weight * frequency + (1 - weight) * levels[-1])
    return levels


SEQUENCES = st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(train=SEQUENCES, valid=SEQUENCES, test=SEQUENCES, order=st.integers(1, 3))
def test_equals_slow_reference_and_is_normalised(train, valid, test, order):
    train, valid, test = ([np.array(s, dtype=np.int64) for s in split] for split in (train, valid, test))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hmm_speech.evaluate.baselines.FRAMES_A_BUCKET", 2)  # several buckets on little data
        model = NGram(order, 4).fit(train).tune(valid)

    def weight_of(k, total, types):
        bucket = 1 + np.searchsorted(model._edges[k - 1], total / types, side="right")
        return model._weights[k - 1][bucket]

    got = iter(model.probabilities(test))
    for sequence in test:
        padded = [4] * (order - 1) + sequence.tolist()
        for t, symbol in enumerate(sequence):
            expected = slow_levels(train, padded[t : t + order - 1], int(symbol), 4, weight_of)[-1]
            assert next(got) == pytest.approx(expected, rel=1e-12)
            assert model.distribution(sequence[:t])[symbol] == pytest.approx(expected, rel=1e-12)
    assert next(got, None) is None
    for history in ([], [0], [3, 1], [2, 2, 0]):
        distribution = model.distribution(history)
        assert distribution.shape == (4,)
        assert (distribution > 0).all()
        assert distribution.sum() == pytest.approx(1, rel=1e-12)


def test_hand_computed_bigram():
    # c(start 0) = 2 of 2, c(00) = 1 of 3, c(01) = 2 of 3; untuned weights are 1/2; unigram counts 3 and 2 of 5.
    model = NGram(2, 2).fit([np.array([0, 0, 1]), np.array([0, 1])])
    unigram = 0.5 * np.array([3, 2]) / 5 + 0.5 / 2
    np.testing.assert_allclose(model.distribution([]), 0.5 * np.array([1, 0]) + 0.5 * unigram)
    np.testing.assert_allclose(model.distribution([0]), 0.5 * np.array([1, 2]) / 3 + 0.5 * unigram)
    np.testing.assert_allclose(model.distribution([1]), unigram)  # training never showed what follows 1
    expected = -np.log2([model.distribution([])[1], model.distribution([1])[0]]).mean()
    assert model.bits_per_frame([np.array([1, 0])]) == pytest.approx(expected)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_weights_are_a_local_optimum_on_valid(order, monkeypatch):
    # Without the prior and run to the end, EM stops where no weight can improve on valid.
    for name, value in {"PSEUDOCOUNT": 1e-9, "TOLERANCE": 1e-13, "MAX_ITERATIONS": 20_000}.items():
        monkeypatch.setattr(f"hmm_speech.evaluate.baselines.{name}", value)
    train, valid = markov(0, 6, 20, 60), markov(0, 6, 30, 60)[20:]
    model = NGram(order, 6).fit(train).tune(valid)
    tuned = model.bits_per_frame(valid)
    untuned = NGram(order, 6).fit(train).bits_per_frame(valid)
    assert tuned < untuned
    for weights in model._weights:
        for bucket in range(1, len(weights)):
            best = weights[bucket]
            for other in (best - 0.05, best + 0.05):
                if 0 < other < 1:
                    weights[bucket] = other
                    # The prior and EM's stopping rule leave a little room; a wrong M-step misses by far more.
                    assert model.bits_per_frame(valid) > tuned - 2e-4
            weights[bucket] = best


def test_weights_are_tuned_on_valid_and_not_on_test():
    train, valid, test = markov(0, 6, 5, 60), markov(0, 6, 12, 60)[5:], markov(9, 6, 5, 60)
    got = ngram_baselines(train, valid, test, 6)
    for order, bits in enumerate(got.values(), start=1):
        assert bits == NGram(order, 6).fit(train).tune(valid).bits_per_frame(test)
        assert bits > NGram(order, 6).fit(train).tune(test).bits_per_frame(test) + 0.1


def test_recovers_the_entropy_rate_of_a_markov_chain():
    vocabulary = 8
    sequences = markov(3, vocabulary, 200, 200)
    table = np.random.default_rng(3).dirichlet(np.full(vocabulary, 0.1), size=vocabulary)
    train, valid, test = sequences[:140], sequences[140:160], sequences[160:]
    got = ngram_baselines(train, valid, test, vocabulary)
    true = np.concatenate([[-np.log2(1 / vocabulary), *(-np.log2(table[s[:-1], s[1:]]))] for s in test]).mean()
    counts = np.bincount(np.concatenate(test), minlength=vocabulary) / sum(map(len, test))
    entropy = -(counts[counts > 0] * np.log2(counts[counts > 0])).sum()
    assert got["bigram"] == pytest.approx(true, abs=0.01)
    assert got["trigram"] == pytest.approx(true, abs=0.02)
    assert got["unigram"] == pytest.approx(entropy, abs=0.02)
    assert list(got) == ["unigram", "bigram", "trigram"]


def test_a_trigram_that_cannot_help_falls_back_to_the_bigram():
    rng = np.random.default_rng(0)
    splits = [[rng.integers(0, 50, 100) for _ in range(n)] for n in (30, 10, 10)]
    got = ngram_baselines(*splits, 50)
    for bits in got.values():
        assert bits == pytest.approx(np.log2(50), abs=0.03)


def test_more_context_helps_where_there_is_structure():
    period_three = [np.tile([0, 0, 1], 20) for _ in range(20)]
    got = ngram_baselines(period_three[:15], period_three[15:18], period_three[18:], 2)
    assert got["unigram"] > got["bigram"] + 0.2
    assert got["bigram"] > got["trigram"] + 0.4
    assert got["trigram"] < 0.05


def test_several_buckets_beat_one_where_histories_differ_in_count(monkeypatch):
    train, test = markov(5, 40, 40, 100), markov(5, 40, 90, 100)[40:]
    several = NGram(3, 40).fit(train).tune(test[:25])
    monkeypatch.setattr("hmm_speech.evaluate.baselines.MAX_BUCKETS", 1)
    one = NGram(3, 40).fit(train).tune(test[:25])
    assert len(one._weights[2]) == 2 < len(several._weights[2])
    assert several.bits_per_frame(test[25:]) < one.bits_per_frame(test[25:])


def test_first_frame_is_scored_with_the_start_as_history():
    train = [np.array([3, 0, 1, 2, 0, 1])] * 20
    model = NGram(2, 4).fit(train).tune(train)
    assert len(model.probabilities([np.array([3])])) == 1
    assert model.distribution([])[3] > 0.9
    assert model.distribution([0])[3] < 0.1


def test_units_that_training_lacks_stay_possible():
    got = ngram_baselines([np.zeros(500, int)], [np.zeros(500, int)], [np.array([7, 7])], 8)
    assert all(np.isfinite(bits) for bits in got.values())


def test_accepts_lists_one_frame_and_empty_utterances():
    with_empty = ngram_baselines([[0, 1, 1], []], [[1]], [[], [0], [1, 0]], 2)
    without = ngram_baselines([[0, 1, 1]], [[1]], [[0], [1, 0]], 2)
    assert with_empty == without


def test_order_of_utterances_does_not_matter():
    sequences = markov(1, 10, 30, 40)
    one = ngram_baselines(sequences[:20], sequences[20:25], sequences[25:], 10)
    two = ngram_baselines(sequences[19::-1], sequences[24:19:-1], sequences[:24:-1], 10)
    assert one == pytest.approx(two, rel=1e-9)


def test_large_vocabulary_needs_no_table():
    rng = np.random.default_rng(0)
    splits = [[rng.integers(0, 2_000_000, 50)] for _ in range(3)]
    got = ngram_baselines(*splits, 2_000_000)
    assert got["trigram"] == pytest.approx(np.log2(2_000_000), abs=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": [[0, 5]]}, r"train\[0\]: frame 1 has label 5, but the vocabulary is 5"),
        ({"test": [[0], [-1]]}, r"test\[1\]: frame 0 has label -1"),
        ({"valid": [[0.5]]}, r"valid\[0\]: expected integer labels"),
        ({"valid": [[[0]]]}, r"valid\[0\]: expected one label a frame"),
        ({"valid": [[]]}, "valid: the n-gram baselines need frames"),
        ({"test": []}, "test: the n-gram baselines need frames"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"train": [[0, 1]], "valid": [[0, 1]], "test": [[0, 1]], "vocabulary": 5} | change
    with pytest.raises(UserError, match=message):
        ngram_baselines(**arguments)


def test_misuse_of_ngram_is_named():
    with pytest.raises(UserError, match="order"):
        NGram(0, 5)
    with pytest.raises(UserError, match="vocabulary"):
        NGram(2, 0)
    with pytest.raises(UserError, match="63 bits"):
        NGram(3, 3_000_000)
    with pytest.raises(UserError, match="fit"):
        NGram(2, 5).probabilities([[0]])
    with pytest.raises(UserError, match="no frames"):
        NGram(2, 5).fit([[0]]).bits_per_frame([[]])
