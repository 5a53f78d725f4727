"""Transitions and emissions with structure, against the enumeration of all paths of the chains they stand for."""

import pytest
import torch
from hypothesis import given, settings

from hmm_speech.hmm import HMM, use_backend
from tests.hmm.structured import KINDS, leaves, structured, structured_problems
from tests.oracle import enumerate_paths, path_score, scores_of

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
                assert path_score(best, *scores_of(b, **pieces)) == pytest.approx(
                    float(expected.best[b]), rel=1e-9, abs=1e-8
                )

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
    arguments, _ = structured(transition, emission, 2, 3, 3, "shared", seed=2)
    arguments["lengths"] = torch.tensor([3, 2])
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
        # In random directions: all numbers of all combinations take minutes.
        assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


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


@pytest.mark.parametrize(("transition", "emission"), [("dense", "dense"), *COMBINATIONS])
def test_half_precision_and_autocast(transition, emission):
    """bfloat16 scores are computed in float32; under autocast too, where products of torch would run in bfloat16."""
    arguments, _ = structured(transition, emission, 3, 20, 6, seed=4, dtype=torch.bfloat16)
    narrow = leaves(arguments)
    wide = {
        name: x.map(lambda t: t.detach().float())
        if hasattr(x, "map")
        else x.detach().float()
        if x.is_floating_point()
        else x
        for name, x in arguments.items()
    }
    expected = HMM(**wide).log_partition()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = HMM(**arguments).log_partition()
        marginals = HMM(**arguments).marginals()
    assert z.dtype == marginals.dtype == torch.float32
    torch.testing.assert_close(z, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(marginals, HMM(**wide).marginals(), rtol=0, atol=5e-6)
    for name, gradient in zip(narrow, torch.autograd.grad(z.sum(), list(narrow.values())), strict=True):
        assert gradient.dtype == torch.bfloat16 and gradient.shape == narrow[name].shape


@pytest.mark.parametrize("transition", ["low-rank", "banded"])
@pytest.mark.parametrize("emission", ["dense", "active"])
def test_compiles_without_a_graph_break(transition, emission):
    from hmm_speech.hmm import Active, Banded, LowRank

    arguments, _ = structured(transition, emission, 2, 5, 4, seed=2, dtype=torch.float32)
    scores, kept = leaves(arguments), arguments["transition"]

    def loss(initial, *tensors):
        *factors, values = tensors
        arcs = LowRank(*factors) if transition == "low-rank" else Banded(factors[0], kept.offsets)
        frames = Active(arguments["emission"].states, values) if emission == "active" else values
        return HMM(initial, arcs, frames, arguments["lengths"]).log_partition().sum()

    inputs = [x for name, x in scores.items() if name != "final"]
    expected = loss(*inputs)
    wanted = torch.autograd.grad(expected, inputs)
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(torch.autograd.grad(found, inputs), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_what_check_finds_in_structures():
    arguments, _ = structured("banded", "active", 2, 5, 6, seed=9)
    arguments["lengths"] = torch.tensor([5, 3])
    HMM(**arguments, check=True)
    arguments["emission"].states[0, 1, :2] = 3
    with pytest.raises(ValueError, match=r"states holds 3 twice in frame \(0, 1\)"):
        HMM(**arguments, check=True)
    arguments["emission"].states[1, 4, 0] = 99  # past the end
    HMM(**arguments)
    arguments["emission"].states[0, 4, 0] = 6
    with pytest.raises(ValueError, match=r"states holds 6 at \(0, 4, 0\), expected -1 to 5"):
        HMM(**arguments)


def test_bad_structures():
    from hmm_speech.hmm import Active, Banded, Chunked, LowRank

    z = torch.zeros
    for made, error, message in [
        (lambda: LowRank(z(4, 2), z(3, 4)), ValueError, r"left is \(4, 2\), right is \(3, 4\)"),
        (lambda: LowRank(z(4, 2), [1]), TypeError, "LowRank: right: got list"),
        (lambda: Banded(z(2, 4), (0, 1, 2)), ValueError, r"diagonals is \(2, 4\), expected \(..., 3, N\)"),
        (lambda: Banded(z(2, 4), (1, 1)), ValueError, "expected each diagonal once"),
        (lambda: Banded(z(1, 4), (0.5,)), ValueError, "expected one integer"),
        (lambda: Chunked(3, 4), TypeError, "function is int"),
        (lambda: Chunked(lambda a, b: None, 0), ValueError, "chunk is 0"),
        (lambda: Active(z(2, 3, 1), z(2, 3, 1)), TypeError, "states is torch.float32"),
        (lambda: Active(z(2, 3, 1).long(), z(2, 3, 2)), ValueError, r"scores is \(2, 3, 2\)"),
        (lambda: HMM(z(4), LowRank(z(4, 2), z(2, 4))), ValueError, "emission: None needs"),
        (lambda: HMM(z(4), Banded(z(3, 1, 4), (0,)), z(2, 5, 4)), ValueError, "expected B = 2 first"),
        (lambda: HMM(z(4), LowRank(z(4, 2).double(), z(2, 4)), z(2, 5, 4)), TypeError, "left is torch.float64"),
        (lambda: HMM(z(4), z(4, 4), LowRank(z(4, 2), z(2, 4))), TypeError, "emission: got LowRank, .* or Active"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            made()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["banded", "low-rank", "active", "chunked", "semi-Markov"])
def test_scores_computed_from_each_other(backend, kind):
    """All made from one parameter: posteriors are those of the numbers, gradients go through all of them."""
    from hmm_speech.hmm import Active, Banded, Chunked, LowRank, SemiMarkovHMM

    def marginals(table):
        emission = table[torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])]
        initial, arcs = emission[0, 0] * 2, table * emission.mean()
        if kind == "semi-Markov":
            return SemiMarkovHMM(initial, arcs, emission, arcs[:, :2]).marginals()
        transition = {"banded": Banded(arcs[:2], (0, 1)), "low-rank": LowRank(arcs, arcs.T), "active": arcs,
                      "chunked": Chunked(lambda a, b: arcs.expand(2, b - a, 3, 3), 2)}[kind]  # fmt: skip
        states = torch.tensor([0, 1, 2]).expand(2, 4, 3)
        return HMM(initial, transition, Active(states, emission) if kind == "active" else emission).marginals()

    table = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with use_backend("reference"):
        expected = marginals(table)
    close(expected.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    with use_backend(backend):
        close(marginals(table.requires_grad_()), expected)
        assert torch.autograd.gradcheck(marginals, (table,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("transition", "emission"), [("dense", "dense"), *COMBINATIONS])
@pytest.mark.parametrize("time", [0, 1])
def test_gradients_of_next_to_nothing(backend, transition, emission, time):
    """No frames, or none for some: zero gradients in place of errors."""
    arguments, _ = structured(transition, emission, 2, time, 3, seed=2, lengths="full")
    inputs = list(leaves(arguments).values())
    with use_backend(backend):
        hmm = HMM(**arguments)
        for method in ("log_partition", "marginals", "transition_counts", "entropy"):
            found = getattr(hmm, method)()
            if transition == "chunked" and method == "transition_counts":
                continue  # its function is not called at all, and the counts are constants
            first = torch.autograd.grad(found.sum(), inputs, allow_unused=True)
            assert all(g is None or (g.isfinite().all() and (time > 0 or not g.any())) for g in first)
