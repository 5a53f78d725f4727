"""Transitions and emissions with structure, against the enumeration of all paths of the chains they stand for."""

import pytest
import torch
from hypothesis import given, settings

from hmm_speech.hmm import HMM, use_backend
from tests.hmm.structured import KINDS, leaves, structured, structured_problems
from tests.oracle import enumerate_paths, path_score

BACKENDS = ("native", "reference")
COMBINATIONS = [
    ("dense", "active"), ("low-rank", "dense"), ("banded", "dense"), ("chunked", "dense"),
    ("low-rank", "active"), ("banded", "active"), ("chunked", "active"),
]  # fmt: skip


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=tolerance, equal_nan=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("transition", "emission"), COMBINATIONS)
def test_inference(backend, transition, emission):
    @settings(max_examples=40, deadline=None)
    @given(pair=structured_problems((transition,), (emission,)))
    def check(pair):
        arguments, plain = pair
        expected = enumerate_paths(**plain)
        with use_backend(backend):
            hmm = HMM(**arguments)
            close(hmm.log_partition(), expected.log_partition)
            close(hmm.marginals(), expected.marginals)
            close(hmm.edge_marginals(), expected.edges)
            close(hmm.transition_counts(), expected.edges.sum(1))
            viterbi, top, samples = hmm.viterbi(), hmm.topk(2), hmm.sample(3)
        close(viterbi.score, expected.best, 1e-8)
        close(top.score[0], expected.best, 1e-8)
        pieces = {name: x for name, x in plain.items() if name != "lengths"}
        time = plain["emission"].shape[1]
        for b, paths in enumerate(expected.paths):
            length = time if plain["lengths"] is None else int(plain["lengths"][b])
            for states in [viterbi.states[b], *samples[:, b]]:
                path = tuple(states.tolist())
                assert set(path[length:]) <= {-1}
                assert path[:length] in paths or (not paths and set(path) <= {-1})
            if paths:
                best = tuple(viterbi.states[b].tolist())[:length]
                assert path_score(best, b, **pieces) == pytest.approx(float(expected.best[b]), rel=1e-9, abs=1e-8)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("transition", "emission"), COMBINATIONS)
def test_gradients_equal_those_of_the_dense_chain(backend, transition, emission, kind):
    """The dense gradients, taken by autograd through log(exp(left) exp(right)), diagonals and scattered scores."""
    arguments, _ = structured(transition, emission, 3, 6, 5, kind, seed=2, lengths="ragged")
    arguments["lengths"] = torch.tensor([6, 0, 4])
    inputs = leaves(arguments)
    weight = torch.tensor([1.5, 1.0, -0.5], dtype=torch.float64)
    with use_backend(backend):
        hmm = HMM(**arguments)
        found = torch.autograd.grad((hmm.log_partition() * weight).sum(), list(inputs.values()))
        plain = hmm._chain.dense().log_partition()
        expected = torch.autograd.grad((plain * weight).sum(), list(inputs.values()))
    for name, mine, theirs in zip(inputs, found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("transition", "emission"), COMBINATIONS)
@pytest.mark.parametrize("method", ["log_partition", "marginals", "transition_counts", "entropy"])
def test_first_and_second_derivatives(backend, transition, emission, method):
    arguments, _ = structured(transition, emission, 2, 4, 3, "shared", seed=2)
    arguments["lengths"] = torch.tensor([4, 2])
    inputs = leaves(arguments)

    def function(*values):
        new = dict(zip(inputs, values, strict=True))
        changed = {}
        for name, x in arguments.items():
            if hasattr(x, "tensors"):
                mine = iter([new[key] for key in x.tensors()])
                changed[name] = x.map(lambda _, mine=mine: next(mine)) if x.tensors() else x
            else:
                changed[name] = new.get(name, x)
        return getattr(HMM(**changed), method)()

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, tuple(inputs.values()))
        assert torch.autograd.gradgradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize(("transition", "emission"), COMBINATIONS)
def test_entropies(transition, emission):
    arguments, plain = structured(transition, emission, 3, 4, 3, seed=4)
    other, other_plain = structured(transition, emission, 3, 4, 3, seed=4, scale=2.0)
    other["lengths"], other_plain["lengths"] = arguments["lengths"], plain["lengths"]
    p, q, dense_p, dense_q = HMM(**arguments), HMM(**other), HMM(**plain), HMM(**other_plain)
    close(p.entropy(), dense_p.entropy())
    close(p.cross_entropy(q), dense_p.cross_entropy(dense_q))
    close(p.kl_divergence(dense_q), dense_p.kl_divergence(dense_q))
    close(p.smooth_viterbi(0.3), dense_p.smooth_viterbi(0.3))
