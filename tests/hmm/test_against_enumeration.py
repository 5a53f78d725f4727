"""Both backends against the enumeration of all paths."""

import pytest
import torch
from hypothesis import given, settings

from hmm_speech.hmm import HMM, use_backend
from tests.hmm.problems import INF, KINDS, problem, small_problems, solve
from tests.oracle import enumerate_paths, path_score, scores_of

BACKENDS = ("native", "reference")


def close(found, expected, scale=1.0):
    """Absolute 1e-9 on probabilities; scores are compared relative to their size. float64 throughout."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9 * scale, equal_nan=False)


def oracle(arguments):
    return enumerate_paths(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None)
@given(arguments=small_problems())
def test_inference(backend, arguments):
    expected = oracle(arguments)
    with use_backend(backend):
        hmm = HMM(**arguments)
        close(hmm.log_partition(), expected.log_partition)
        close(hmm.marginals(), expected.marginals)
        close(hmm.transition_counts(), expected.edges.sum(1))
        viterbi = hmm.viterbi()
    close(viterbi.score, expected.best)
    for b, path in enumerate(viterbi.states.tolist()):
        length = len(path) if arguments["lengths"] is None else int(arguments["lengths"][b])
        if expected.best[b] == -INF:
            assert path == [-1] * len(path)
            continue
        assert path[length:] == [-1] * (len(path) - length)
        pieces = {k: v for k, v in arguments.items() if k != "lengths"}
        assert path_score(tuple(path[:length]), *scores_of(b, **pieces)) == pytest.approx(
            float(expected.best[b]), rel=1e-12, abs=1e-9
        )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=100, deadline=None)
@given(arguments=small_problems())
def test_gradients_are_posteriors_times_upstream(backend, arguments):
    expected = oracle(arguments)
    batch, time = arguments["emission"].shape[:2]
    grad = torch.linspace(-2, 3, batch, dtype=torch.float64)  # both signs, and 0 for some batch sizes
    grad = grad * (expected.log_partition > -INF)
    with use_backend(backend):
        _, found = solve(arguments, grad)
    weighted = expected.marginals * grad[:, None, None]
    close(found["emission"], weighted)
    edges = expected.edges * grad[:, None, None, None]
    shape = arguments["transition"].dim()
    close(found["transition"], edges if shape == 4 else edges.sum(1) if shape == 3 else edges.sum((0, 1)))
    close(found["initial"], weighted[:, 0] if arguments["initial"].dim() == 2 else weighted[:, 0].sum(0))
    if arguments["final"] is not None:
        lengths = torch.full((batch,), time) if arguments["lengths"] is None else arguments["lengths"]
        last = torch.stack(
            [weighted[b, n - 1] if n else torch.zeros_like(weighted[b, 0]) for b, n in enumerate(lengths)]
        )
        close(found["final"], last if arguments["final"].dim() == 2 else last.sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_posterior(backend, kind):
    """Chi-square against the enumerated distribution over paths: 6,000 samples, p above 1e-6, fixed seed."""
    from scipy.stats import chisquare

    arguments = problem(3, 3, 3, kind, seed=5, forbidden=0.1)
    arguments["lengths"] = torch.tensor([3, 0, 2])
    expected = oracle(arguments)
    with use_backend(backend):
        samples = HMM(**arguments).sample(6000, generator=torch.Generator().manual_seed(1))
    assert samples.shape == (6000, 3, 3)
    assert (samples[:, 1] == -1).all() and (samples[:, 2, 2:] == -1).all()
    for b, length in ((0, 3), (2, 2)):
        seen = {path: 0 for path in expected.paths[b]}
        for path in samples[:, b, :length].tolist():
            seen[tuple(path)] += 1  # a KeyError: a forbidden path was drawn
        likely = [path for path, p in expected.paths[b].items() if p * 6000 >= 5]
        counts = [seen[path] for path in likely] + [6000 - sum(seen[path] for path in likely)]
        probabilities = [expected.paths[b][path] for path in likely]
        rest = max(1 - sum(probabilities), 0.0)
        if rest * 6000 < 5:
            counts, probabilities = counts[:-1], probabilities
            total, mass = sum(counts), sum(probabilities)
        else:
            probabilities, total, mass = [*probabilities, rest], 6000, 1.0
        assert chisquare(counts, [p / mass * total for p in probabilities]).pvalue > 1e-6


def test_score_and_log_prob_of_every_path():
    arguments = problem(2, 3, 3, "per-sequence", seed=4)
    arguments["lengths"] = torch.tensor([3, 2])
    expected = oracle(arguments)
    hmm = HMM(**arguments)
    for b, length in ((0, 3), (1, 2)):
        for path, probability in expected.paths[b].items():
            states = torch.full((2, 3), -1)
            states[:, :] = 0
            states[b, :length] = torch.tensor(path)
            close(hmm.log_prob(states)[b].exp(), torch.tensor(probability, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_ties_go_to_the_smallest_state(backend, kind):
    arguments = problem(2, 4, 3, kind, 1, scale=0.0)
    arguments["lengths"] = torch.tensor([4, 2])
    with use_backend(backend):
        assert HMM(**arguments).viterbi().states.tolist() == [[0, 0, 0, 0], [0, 0, -1, -1]]


def test_viterbi_score_is_differentiable():
    arguments = problem(2, 4, 3, seed=3, lengths="full")
    arguments["emission"].requires_grad_()
    viterbi = HMM(**arguments).viterbi()
    viterbi.score.sum().backward()
    close(arguments["emission"].grad, torch.nn.functional.one_hot(viterbi.states, 3).double())
