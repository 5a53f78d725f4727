"""edge_marginals, topk, smooth_viterbi, entropy, cross_entropy and kl_divergence against the enumeration."""

import math

import pytest
import torch
from hypothesis import given, settings

from hmm_speech.hmm import HMM, HMMLayer, use_backend
from tests.hmm.problems import INF, KINDS, problem, small_problems
from tests.oracle import enumerate_paths, path_score, scores_of

BACKENDS = ("native", "reference")


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(arguments=small_problems())
def test_edge_marginals(backend, arguments):
    with use_backend(backend):
        close(HMM(**arguments).edge_marginals(), enumerate_paths(**arguments).edges)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 30])
@settings(max_examples=40, deadline=None)
@given(arguments=small_problems(most_paths=256))
def test_topk(backend, k, arguments):
    expected = enumerate_paths(**arguments)
    with use_backend(backend):
        found = HMM(**arguments).topk(k)
    for b, paths in enumerate(expected.paths):
        pieces = scores_of(b, **{name: x for name, x in arguments.items() if name != "lengths"})
        scores = sorted((path_score(path, *pieces) for path in paths), reverse=True)[:k]
        scores += [-INF] * (k - len(scores))
        close(found.score[:, b], torch.tensor(scores, dtype=torch.float64), 1e-8)
        seen = set()
        for score, path in zip(found.score[:, b].tolist(), found.states[:, b].tolist(), strict=True):
            if score == -INF:
                assert set(path) <= {-1}
                continue
            length = len(path) if arguments["lengths"] is None else int(arguments["lengths"][b])
            assert set(path[length:]) <= {-1} and tuple(path[:length]) not in seen
            seen.add(tuple(path[:length]))
            assert path_score(tuple(path[:length]), *pieces) == pytest.approx(score, rel=1e-9, abs=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["cross_entropy", "kl_divergence"])
@pytest.mark.parametrize("where", ["initial", "transition", "emission", "final"])
def test_an_infinite_one_leaves_the_gradients_of_others_alone(backend, method, where):
    """q forbids what p allows in the first sequence."""
    gradients = []
    for forbids in (True, False):
        p, q = problem(2, 4, 3, "per-sequence", 1, lengths="full"), problem(2, 4, 3, "per-sequence", 2, lengths="full")
        leaves = [p["initial"], p["transition"], p["emission"], q["transition"]]
        for name in ("initial", "final"):
            q[name] = q[name].expand(2, -1).clone()
        for x in leaves:
            x.requires_grad_()
        if forbids:
            q[where] = q[where].clone()
            q[where].detach()[0].view(-1)[:5] = -INF
        with use_backend(backend):
            found = getattr(HMM(**p), method)(HMM(**q))
        assert (found == INF).tolist() == [forbids, False]
        gradients.append(torch.autograd.grad(found[1], leaves, retain_graph=True))
        if forbids:
            assert not any(x.any() for x in torch.autograd.grad(found[0], leaves))
    for found, expected in zip(*gradients, strict=True):
        close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_topk_begins_with_viterbi_and_is_differentiable(kind):
    arguments = problem(3, 8, 4, kind, 2)
    arguments["emission"].requires_grad_()
    hmm = HMM(**arguments)
    top = hmm.topk(3)
    assert torch.equal(top.states[0], hmm.viterbi().states)
    close(top.score[0], hmm.viterbi().score)
    top.score[1].sum().backward()
    path = top.states[1]
    expected = torch.nn.functional.one_hot(path.clamp(min=0), 4).double() * (path >= 0).unsqueeze(-1)
    close(arguments["emission"].grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(arguments=small_problems(most_paths=1024))
def test_entropy(backend, arguments):
    expected = [
        -math.fsum(p * math.log(p) for p in paths.values() if p) for paths in enumerate_paths(**arguments).paths
    ]
    with use_backend(backend):
        close(HMM(**arguments).entropy(), torch.tensor(expected, dtype=torch.float64), 1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", [(a, b) for a in KINDS for b in KINDS])
@pytest.mark.parametrize("forbidden", [(0.0, 0.0), (0.3, 0.0), (0.3, 0.1)])
def test_cross_entropy_and_kl(backend, kinds, forbidden):
    p = problem(4, 4, 3, kinds[0], 1, forbidden=forbidden[0])
    q = {**problem(4, 4, 3, kinds[1], 2, forbidden=forbidden[1], final=False), "lengths": p["lengths"]}
    crosses, divergences = [], []
    for one, two in zip(enumerate_paths(**p).paths, enumerate_paths(**q).paths, strict=True):
        cross = sum(x * -math.log(two[path]) if two.get(path) else INF for path, x in one.items() if x)
        crosses.append(float(cross))
        divergences.append(cross + sum(x * math.log(x) for x in one.values() if x))
    with use_backend(backend):
        close(HMM(**p).cross_entropy(HMM(**q)), torch.tensor(crosses, dtype=torch.float64))
        close(HMM(**p).kl_divergence(HMM(**q)), torch.tensor(divergences, dtype=torch.float64))
        close(HMM(**p).kl_divergence(HMM(**p)), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["entropy", "edge_marginals", "smooth_viterbi", "kl_divergence"])
def test_derivatives(backend, kind, method):
    arguments = problem(2, 4, 3, kind, 1)
    arguments["lengths"] = torch.tensor([4, 2])
    names = [k for k, x in arguments.items() if x is not None and x.is_floating_point()]
    other = HMM(**{**problem(2, 4, 3, "shared", 6), "lengths": arguments["lengths"]})
    extra = {"smooth_viterbi": (0.7,), "kl_divergence": (other,)}.get(method, ())

    def function(*values):
        hmm = HMM(**{**arguments, **dict(zip(names, values, strict=True))})
        return getattr(hmm, method)(*extra)

    with use_backend(backend):
        inputs = tuple(arguments[k].requires_grad_() for k in names)
        assert torch.autograd.gradcheck(function, inputs)
        if method == "smooth_viterbi":
            assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@settings(max_examples=40, deadline=None)
@given(arguments=small_problems(most_paths=256))
def test_smooth_viterbi_tends_to_the_maximum(arguments):
    hmm = HMM(**arguments)
    best, warm, cold = hmm.viterbi().score, hmm.smooth_viterbi(1.0), hmm.smooth_viterbi(1e-3)
    close(warm, hmm.log_partition())
    feasible = best > -INF
    assert (cold[feasible] >= best[feasible] - 1e-6).all()
    assert (cold[feasible] - best[feasible] <= 1e-3 * math.log(256) + 1e-6).all()


def test_entropy_of_long_float32_chains_does_not_cancel():
    arguments = problem(2, 3000, 5, "shared", 1, torch.float32, lengths="full")
    exact = HMM(**{k: x.double() if x is not None else x for k, x in arguments.items()}).entropy()
    torch.testing.assert_close(HMM(**arguments).entropy().double(), exact, rtol=1e-6, atol=0)


def test_bad_arguments():
    hmm = HMM(**problem(2, 4, 3, "shared", 1))
    for call, message in (
        (lambda: hmm.topk(0), "k: got 0"),
        (lambda: hmm.smooth_viterbi(0.0), "temperature: got 0.0"),
        (lambda: hmm.smooth_viterbi(float("nan")), "temperature: got nan"),
        (lambda: hmm.kl_divergence(HMM(**problem(2, 5, 3, "shared", 1))), r"other: has B, T, N = \(2, 5, 3\)"),
        (lambda: hmm.cross_entropy(HMM(**problem(2, 4, 3, "shared", 1, lengths="full"))), "other: has lengths"),
        (lambda: HMMLayer(0), "num_states: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="other: got int"):
        hmm.kl_divergence(3)


def test_the_module_learns_a_chain():
    """Two states that alternate: a few steps of maximum likelihood find it."""
    torch.manual_seed(0)
    layer = HMMLayer(2)
    emission = torch.zeros(4, 20, 2)
    emission[:, 0::2, 1] = emission[:, 1::2, 0] = -6
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        layer(emission).log_partition().mean().neg().backward()
        optimizer.step()
    assert (layer.transition.softmax(-1).diagonal() < 0.05).all() and layer.initial.softmax(-1)[0] > 0.9
    assert "2, normalised=True" in repr(layer)
