"""Viterbi and the k best paths on sizes that no enumeration reaches: the kernels beside the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.hmm import HMM, use_backend
from hmm_speech.hmm.chain import Chain
from tests.hmm.problems import INF, KINDS, doubled, problem

DTYPES = (torch.float32, torch.float64)


def compare(arguments, k):
    """Scores are the reference's, paths are worth what their scores say, and no path comes twice."""
    with use_backend("reference"):
        exact = HMM(**doubled(arguments))
        best, expected = exact.viterbi().score, exact.topk(k).score
    with use_backend("native"):
        viterbi, found = HMM(**arguments).viterbi(), HMM(**arguments).topk(k)
    tolerance = 2e-6 if arguments["transition"].dtype == torch.float32 else 1e-12
    # What is rounded is sums of scores: where they cancel, the error is relative to the largest of them.
    sizes = [arguments[name].nan_to_num(neginf=1.0).abs().flatten() for name in ("initial", "emission")]
    close = {"rtol": tolerance, "atol": tolerance * float(torch.cat([*sizes, torch.ones(1)]).max())}
    time = arguments["emission"].shape[1]
    lengths = torch.full_like(best, time, dtype=torch.int64) if arguments["lengths"] is None else arguments["lengths"]
    for score, states, wanted in [(viterbi.score, viterbi.states, best), *zip(*found, expected, strict=True)]:
        torch.testing.assert_close(score.double(), wanted, **close)
        inside = (torch.arange(time) < lengths[:, None]) & wanted.isfinite()[:, None]
        assert ((states >= 0) == inside).all() and (states < arguments["transition"].shape[-1]).all()
        worth = torch.where(wanted.isfinite(), exact.score(states.clamp(min=0)), -INF)
        torch.testing.assert_close(worth, wanted, **close)
    for b in range(len(lengths)):
        paths = [tuple(path) for path, score in zip(found.states[:, b].tolist(), found.score[:, b], strict=True)
                 if score > -INF]  # fmt: skip
        assert len(set(paths)) == len(paths)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 19),
    time=st.integers(1, 12),
    states=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    forbidden=st.sampled_from([0.0, 0.2, 0.6]),
    dtype=st.sampled_from(DTYPES),
    k=st.sampled_from([1, 2, 5, 9, 12]),
)
def test_any_problem(batch, time, states, kind, seed, scale, forbidden, dtype, k):
    if kind == "time-varying":
        time = max(1, min(time, 200_000 // (batch * states**2)))
    compare(problem(batch, time, states, kind, seed, dtype, scale, forbidden=forbidden), k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 300])
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 13])
def test_every_tile_edge(batch, states, dtype):
    compare(problem(batch, 5, states, "shared", batch, dtype), 2)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 9),
    time=st.sampled_from([2, 9, 80, 200]),
    states=st.sampled_from([128, 129, 159, 192, 260]),
    kind=st.sampled_from(["shared", "per-sequence"]),
    spread=st.sampled_from([0, 1, 10, 100]),
    forbidden=st.sampled_from([0.0, 0.3, 0.98]),
    values=st.sampled_from([1, 3, 1000]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_arcs_that_cannot_win_are_left_out_and_no_others(
    batch, time, states, kind, spread, forbidden, values, dtype, seed
):
    """Whole numbers, whose sums are exact: the paths are the reference's, ties and all. `spread` nats apart, few states
    are looked at; 0, most of them are."""
    arguments = problem(batch, time, states, kind, seed, dtype, forbidden=forbidden)
    for name, scale in (("initial", 3), ("transition", values), ("emission", spread)):
        scores = arguments[name]
        arguments[name] = torch.where(scores > -INF, (scale * scores).round(), -INF)
    arguments["final"] = None
    with use_backend("reference"):
        exact = HMM(**arguments).viterbi()
    found = HMM(**arguments).viterbi()
    assert torch.equal(found.score, exact.score)
    assert torch.equal(found.states, exact.states)


@pytest.mark.parametrize(("states", "k"), [(60, 4), (70, 4), (700, 100)])
def test_pointers_of_every_width(states, k):
    compare(problem(2, 4, states, "shared", 1, torch.float32, lengths="full"), k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_scores_around_a_thousand(kind, shift):
    compare(problem(5, 30, 9, kind, 3, torch.float32, shift=shift), 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_go_to_the_smallest_state(kind, dtype):
    """Few values, sums of which are exact: many paths tie, and the smallest states, read from the end, win."""
    g = torch.Generator().manual_seed(1)
    arguments = problem(9, 20, 37, kind, 3, dtype)
    for name in ("initial", "transition", "emission", "final"):
        arguments[name] = torch.randint(-2, 1, arguments[name].shape, generator=g).to(dtype)
    with use_backend("reference"):
        expected = HMM(**arguments).viterbi()
    found = HMM(**arguments).viterbi()
    assert torch.equal(found.states, expected.states) and torch.equal(found.score, expected.score)
    compare(arguments, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_infeasible_sequences_among_others(kind):
    arguments = problem(11, 9, 20, kind, 2, torch.float32)
    arguments["lengths"] = torch.tensor([9, 0, 1, 4, 9, 9, 2, 8, 9, 3, 5])
    arguments["emission"][4, 3] = -INF
    arguments["emission"][7, 7] = -INF
    clean = {k: x.clone() for k, x in arguments.items()}
    inside = torch.arange(9) < arguments["lengths"][:, None]
    arguments["emission"][~inside] = float("nan")
    if kind == "time-varying":
        arguments["transition"][~inside[:, 1:]] = float("nan")
    compare(clean, 4)
    for call in (lambda hmm: hmm.viterbi(), lambda hmm: hmm.topk(4)):
        for found, expected in zip(call(HMM(**arguments)), call(HMM(**clean)), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["shared", "per-sequence"])
@pytest.mark.parametrize("bad", [INF, float("nan")])
def test_bad_scores_give_nan(kind, bad):
    for where in ("emission", "transition", "initial"):
        arguments = problem(2, 4, 3, kind, 2, torch.float32, lengths="full", final=False)
        arguments[where].view(-1)[1] = bad
        hmm = HMM(**arguments)
        assert hmm.viterbi().score[0].isnan() and hmm.topk(2).score[:, 0].isnan().all()
        assert (hmm.viterbi().states[0] == -1).all() and (hmm.topk(2).states[:, 0] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_gives_the_same_bits(kind):
    arguments, saved, results = problem(11, 15, 40, kind, 5, torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            hmm = HMM(**arguments)
            results.append((*hmm.viterbi(), *hmm.topk(5)))
    finally:
        torch.set_num_threads(saved)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (0, 0, 5), (2, 1, 5)])
def test_little_to_do(kind, shape):
    compare(problem(*shape, kind, 1, torch.float32, lengths="full"), 3)


def test_the_score_of_a_long_chain_keeps_its_precision():
    arguments = problem(1, 20_000, 4, "shared", 7, torch.float32, lengths="full")
    exact = HMM(**doubled(arguments)).viterbi().score
    torch.testing.assert_close(HMM(**arguments).viterbi().score.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(HMM(**arguments).topk(2).score[0].double(), exact, rtol=1e-6, atol=0)


def test_scores_are_looked_up_along_the_path_where_autograd_asks_for_it_and_only_there(monkeypatch):
    looked_up, path_score = [], Chain.path_score
    monkeypatch.setattr(
        Chain, "path_score", lambda chain, states: looked_up.append(states) or path_score(chain, states)
    )
    arguments = problem(2, 9, 4, "shared", 0, torch.float32)
    for wanted in (False, True):
        arguments["emission"].requires_grad_(wanted)
        hmm = HMM(**arguments)
        with torch.no_grad():
            assert not hmm.viterbi().score.requires_grad and not hmm.topk(2).score.requires_grad
        assert not looked_up
        assert hmm.viterbi().score.requires_grad == hmm.topk(2).score.requires_grad == wanted == bool(looked_up)
