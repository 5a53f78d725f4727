"""NaN and +inf within the lengths: NaN out of every operation, and never a number or "infeasible"."""

import pytest
import torch

from hmm_speech.hmm import HMM, Active, Banded, Chunked, LowRank, use_backend
from tests.hmm.problems import INF

STATES, TIME = 9, 6
BAD = [INF, float("nan")]


def arcs(bad, shape, at, seed=1):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[at] = bad
    return x


def chains(bad):
    """Chains of two sequences, of which the first has one bad arc, or all have."""
    two, whole, state = (2, TIME - 1), (STATES, STATES), 4
    varying = arcs(bad, (*two, *whole), (0, 2, state, 1))
    yield "shared", arcs(bad, whole, (state, 1)), None
    yield "per-sequence", arcs(bad, (2, *whole), (0, state, 1)), None
    yield "time-varying", varying, None
    yield "chunked", Chunked(lambda first, last: varying[:, first:last], 2), None
    yield "banded", Banded(arcs(bad, (3, STATES), (1, state)), (-1, 0, 1)), None
    yield "banded, time-varying", Banded(arcs(bad, (*two, 3, STATES), (0, 2, 1, state)), (-1, 0, 1)), None
    yield "low-rank", LowRank(arcs(bad, (STATES, 2), (state, 1)), arcs(0.0, (2, STATES), (0, 0))), None
    runs = torch.arange(3, 7).expand(2, TIME, 4)
    yield "active, in runs", arcs(bad, whole, (state, 5)), runs
    yield "active", arcs(bad, whole, (state, 5)), runs[..., [2, 0, 3, 1]].contiguous()


NAMES = [name for name, *_ in chains(0.0)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("reachable", [True, False])
def test_a_bad_arc(name, bad, backend, reachable):
    """Also out of a state that no path comes to, as in a sum over all paths: NaN times nothing is not nothing."""
    _, transition, active = next(x for x in chains(bad) if x[0] == name)
    initial, emission = torch.zeros(STATES), arcs(0.0, (2, TIME, STATES), (0, 0, 0), seed=2)
    if not reachable and name in ("shared", "time-varying"):
        initial[4] = -INF
        emission[..., 4] = -INF
    hmm = HMM(initial, transition, emission if active is None else Active(active, emission[..., 3:7].contiguous()))
    with use_backend(backend):
        assert hmm.log_partition()[0].isnan() and hmm.marginals()[0].isnan().any()
        best = hmm.viterbi()
        assert best.score[0].isnan() and (best.states[0] == -1).all()
        scores, states = hmm.topk(2)
        assert scores[:, 0].isnan().all() and (states[:, 0] == -1).all()
        assert hmm.entropy()[0].isnan() and hmm.kl_divergence(hmm)[0].isnan()
        if name in ("per-sequence", "time-varying", "chunked", "banded, time-varying"):
            assert hmm.log_partition()[1].isfinite() and hmm.viterbi().score[1].isfinite()
            assert hmm.topk(2).score[:, 1].isfinite().all() and hmm.entropy()[1].isfinite()


@pytest.mark.parametrize("varies", [False, True])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_bad_arc_beside_the_only_path(varies, bad, backend):
    """A maximum that forgets a NaN forgets the path that came before it, too."""
    transition = torch.tensor([[0, -INF, -INF], [bad, 0, 0], [0, 0, 0]])
    if varies:
        transition = transition.expand(1, 3, 3, 3)
    hmm = HMM(torch.tensor([0, -INF, -INF]), transition, torch.zeros(1, 4, 3))
    with use_backend(backend):
        assert hmm.log_partition().isnan() and hmm.viterbi().score.isnan() and hmm.topk(1).score.isnan().all()
