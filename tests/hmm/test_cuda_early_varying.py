"""Transitions that vary over time in chunks that begin early, by the kernels for GPUs (csrc/cuda/early_chunks.h)."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmm_speech.hmm import cuda
from tests.hmm.problems import INF, problem
from tests.hmm.test_cuda_early_chunks import random_chain, scores_of
from tests.hmm.test_cuda_kernels import BOTH_ENDS, compare

IN_LOG_SPACE = 2  # enum hmm_method: what is done in chunks
DTYPES = [torch.float32, torch.float64]
LONG = {torch.float32: 30, torch.float64: 60}  # frames in which random chains forget


@pytest.fixture
def chunks(on_cpu, monkeypatch):
    """Sets the frames of a chunk, and those that it begins early; 0 for whole sequences."""
    monkeypatch.setattr(cuda, "chunk_frames", lambda *shape: 0)
    return lambda frames, early=0: monkeypatch.setattr(cuda, "early_varying_chunks", lambda *shape: (frames, early))


def varying(time, states, lengths, dtype=torch.float32, seed=1, **options):
    return random_chain(time, states, lengths, "time-varying", dtype, seed, **options)


def both_passes(arguments, grad):
    scores = scores_of(arguments)
    found = cuda.forward(*scores)
    return found, cuda.backward(grad, *scores, *found, True)


@pytest.mark.parametrize(
    "states, frames, dtype",
    [(1, 3, torch.float32), (2, 1, torch.float32), (33, 4, torch.float32), (65, 5, torch.float32),
     (1, 1, torch.float64), (7, 12, torch.float64), (33, 9, torch.float64)],
)  # fmt: skip
def test_chunks(chunks, monkeypatch, states, frames, dtype):
    """Against the reference and both ends, with grad of every sign and size; lengths about a chunk's, NaN behind them;
    the same bits in another order of threads."""
    time = LONG[dtype] + 3 * frames + 2
    lengths = [time, 0, 1, frames, frames + 1, time - 1, 2 * frames]
    arguments = varying(time, states, lengths, dtype, states, forbidden=0.1 if states > 30 else 0.0)
    outside = torch.arange(time) >= arguments["lengths"][:, None]
    arguments["emission"][outside] = float("nan")
    arguments["transition"][outside[:, 1:]] = float("nan")
    grad = torch.tensor([1.0, 2.0, -1.0, 0.0, -3.0, 1e-20, 1e4], dtype=dtype)
    chunks(frames, LONG[dtype])
    found, (state, edge) = both_passes(arguments, grad)
    feasible = found[0].isfinite() & (arguments["lengths"] > 0)
    assert feasible.sum() > 4 and (found[4][feasible] == IN_LOG_SPACE).all()
    assert (state[outside] == 0).all() and (edge[outside[:, 1:]] == 0).all()
    monkeypatch.setenv("HMM_SCHEDULE", "1")
    again, gradients = both_passes(arguments, grad)
    assert all(torch.equal(x, y) for x, y in zip((*found, state, edge), (*again, *gradients), strict=True))
    compare(arguments | {"emission": arguments["emission"].masked_fill(outside[..., None], 0.0),
                         "transition": arguments["transition"].masked_fill(outside[:, 1:, None, None], 0.0)},
            torch.linspace(1, -2, 7, dtype=torch.float64))  # fmt: skip
    chunks(0)
    both, (state_of_both, edge_of_both) = both_passes(arguments, grad)
    torch.testing.assert_close(found[0], both[0], rtol=2e-6, atol=2e-6)
    size = grad.abs().view(-1, 1, 1)
    assert ((state - state_of_both).abs() <= 1e-5 * size).all()
    assert ((edge - edge_of_both).abs() <= 1e-5 * size.unsqueeze(-1)).all()


@pytest.mark.parametrize("states, dtype", [(130, torch.float32), (130, torch.float64), (515, torch.float32)])
def test_rows_in_tiles(chunks, states, dtype):
    """And more columns than threads. Scores that hardly differ are forgotten at once."""
    arguments = varying(33, states, [33], dtype, scale=0.01)
    chunks(14, 6 if dtype == torch.float32 else 12)
    found, (state, edge) = both_passes(arguments, torch.ones(1, dtype=dtype))
    assert found[4] == IN_LOG_SPACE
    chunks(0)
    both, (state_of_both, edge_of_both) = both_passes(arguments, torch.ones(1, dtype=dtype))
    torch.testing.assert_close(found[0], both[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(state, state_of_both, rtol=0, atol=5e-6)
    torch.testing.assert_close(edge, edge_of_both, rtol=0, atol=5e-6)


@given(
    states=st.integers(1, 9), time=st.integers(33, 50), frames=st.integers(1, 49), early=st.integers(1, 40),
    seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 1.0, 10.0, 300.0]),
    shift=st.sampled_from([0.0, 1000.0, -1000.0]), forbidden=st.sampled_from([0.0, 0.3, 0.6]),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
# Operators stay those of cuda.py from example to example.
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_chunks_meet_with(on_cpu, states, time, frames, early, seed, scale, shift, forbidden, dtype):
    """Where they do not, sequences are walked from their ends: numbers are always right."""
    arguments = problem(3, time, states, "time-varying", seed, dtype, scale=scale, shift=shift, forbidden=forbidden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "chunk_frames", lambda *shape: 0)
        patch.setattr(cuda, "early_varying_chunks", lambda *shape: (min(frames, time - 1), early))
        # Scores of 1,000 have a spacing of 6e-5 in float32, and log posteriors errors of some such, without chunks too.
        compare(arguments, marginals=5e-6 if scale < 300 or dtype == torch.float64 else 1e-3)


def test_chains_that_do_not_forget(chunks):
    """Are done as without chunks, to the bit: one that stays where it is, one from left to right."""
    time, states = 50, 5
    stays = torch.eye(states).mul(0.99).add(0.002).log()
    to_the_right = torch.full((states, states), -INF).masked_fill(torch.ones(states, states).tril(1).triu() > 0, 0.0)
    for transition in (stays, to_the_right):
        arguments = varying(time, states, [time, time - 1, 30])
        arguments["transition"] = transition.expand(3, time - 1, states, states).contiguous()
        arguments["emission"] *= 0.01
        passes = []
        for frames in (0, 10):
            chunks(frames, 8)
            found, gradients = both_passes(arguments, torch.linspace(-1, 1, 3))
            assert (found[4] == BOTH_ENDS).all()
            passes.append([found[0], found[1], *gradients])
        assert all(torch.equal(x, y) for x, y in zip(*passes, strict=True))
        compare(arguments)
    chunks(10, 60)  # each walk begins where the sequence does
    arguments["transition"] = stays.expand(3, time - 1, states, states).contiguous()
    assert (both_passes(arguments, torch.ones(3))[0][4] == IN_LOG_SPACE).all()
    compare(arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", ["free", "forbidden"])
def test_a_part_that_no_path_comes_to(chunks, dtype, end):
    """Two parts without a way between them, alike. A walk from ones comes to both, and to one as it should."""
    time, states = 120, 4
    parts = torch.tensor([0, 0, 1, 1])
    arguments = varying(time, states, [time, time - 7], dtype)
    arguments["transition"][..., 2:, 2:] = arguments["transition"][..., :2, :2]
    arguments["transition"].masked_fill_(parts[:, None] != parts, -INF)
    arguments["emission"][..., 2:] = arguments["emission"][..., :2]
    arguments["initial"] = torch.tensor([0, 0, -INF, -INF], dtype=dtype)
    arguments["final"] = torch.tensor([-INF, -INF, 0, 0] if end == "forbidden" else [0.0] * 4, dtype=dtype)
    chunks(20, 16)
    compare(arguments)
    assert (cuda.forward(*scores_of(arguments))[4] == BOTH_ENDS).all()


def test_posteriors_that_do_not_meet(on_cpu, monkeypatch):
    """Where messages did: posteriors from the end, of all frames."""
    arguments = varying(60, 6, [60, 50, 11])
    ways = iter([(10, 30), (10, 2)])
    monkeypatch.setattr(cuda, "chunk_frames", lambda *shape: 0)
    monkeypatch.setattr(cuda, "early_varying_chunks", lambda *shape: next(ways))
    compare(arguments)
    assert next(ways, None) is None
    ways = iter([(10, 30)])
    assert (cuda.forward(*scores_of(arguments))[4] == IN_LOG_SPACE).all()


@pytest.mark.parametrize("frame", [3, 25, 39, 40, 59])  # of the first chunk; of a warm-up, its last; of a chunk
def test_sequences_of_a_batch_are_done_in_chunks_or_not(chunks, frame):
    """One without a path, one with NaN, one with +inf; their neighbours stay in chunks."""
    arguments = varying(60, 6, [60] * 5)
    arguments["emission"][1, frame] = -INF
    arguments["emission"][2, frame, 3] = float("nan")
    arguments["emission"][3, frame, 3] = INF
    chunks(20, 30)
    found, (state, edge) = both_passes(arguments, torch.ones(5))
    assert found[4].tolist() == [IN_LOG_SPACE, *[BOTH_ENDS] * 3, IN_LOG_SPACE]
    assert found[0][1] == -INF and found[0][2:4].isnan().all() and found[0][[0, 4]].isfinite().all()
    for posterior in (state, edge):
        assert (posterior[1] == 0).all() and posterior[2:4].isnan().all() and posterior[[0, 4]].isfinite().all()
    kept = [0, 4]
    batched = ("emission", "lengths", "final", "transition")
    compare({k: x[kept] if k in batched else x for k, x in arguments.items()})


def test_without_emissions_or_final_scores(chunks):
    arguments = varying(60, 6, [60, 41], final=False)
    chunks(10, 30)
    compare(arguments)
    without = arguments | {"emission": None}
    assert (cuda.forward(*scores_of(without))[4] == IN_LOG_SPACE).all()
    compare(without, torch.ones(2, dtype=torch.float64))


def test_many_chunks(chunks):
    """Errors do not add up from chunk to chunk."""
    arguments = varying(2001, 3, [2001, 1500])
    for frames in (7, 700):
        chunks(frames, 40)
        assert (cuda.forward(*scores_of(arguments))[4] == IN_LOG_SPACE).all()
        compare(arguments, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_in_chunks(chunks, dtype):
    """Are those of messages that begin in the first frame."""
    arguments = varying(80, 7, [80, 41, 0, 11], dtype)
    uniform = torch.rand(20, 4, 80, generator=torch.Generator().manual_seed(0), dtype=dtype)
    scores = scores_of(arguments)
    chunks(0)
    expected = cuda.sample(*scores, uniform)
    chunks(10, LONG[dtype])
    assert torch.equal(cuda.sample(*scores, uniform), expected)


def test_what_chunks_save():
    def chosen(batch, time, states, dtype=torch.float32, multiprocessors=132, rate=25e3, both_ends=True):
        memory = multiprocessors * rate
        return cuda.early_varying_chunks(batch, time, states, dtype, multiprocessors, memory, both_ends)

    assert chosen(8, 3000, 128) == (375, 128) and chosen(8, 1000, 128) == (125, 62)  # H100
    assert chosen(8, 3000, 50, torch.float64) == (188, 256) and chosen(8, 200, 128) == (0, 0)
    assert chosen(8, 200, 128, both_ends=False) == (25, 32)  # for samples
    assert chosen(8, 3000, 128, multiprocessors=68, rate=8e3) == (0, 0)  # memory is what both ends wait for
    assert chosen(1, 3000, 128, multiprocessors=68, rate=8e3) == (273, 128)
    assert chosen(66, 3000, 128) == (0, 0) and chosen(1, 30, 128) == (0, 0)
    assert not any(any(chosen(*shape, 50)) for shape in ((0, 100), (0, 3000), (1, 0), (1, 1), (1, 2), (1000, 1000)))


def test_which_chunks_are_taken(on_cpu, monkeypatch):
    """By transfer matrices in float32 up to 64 states, but for samples; early ones else."""

    def shared(states, dtype, both_ends=True, time=500):
        call = cuda.Call(*scores_of(varying(time, states, [time], dtype)))
        call.share(both_ends)
        return call.problem.chunk_frames > 0, call.problem.warm_up

    assert shared(5, torch.float32) == (True, 0) and shared(5, torch.float32, both_ends=False) == (True, 32)
    assert shared(65, torch.float32) == (True, 32) and shared(5, torch.float64) == (True, 64)
    assert shared(65, torch.float32, time=30) == (False, 0)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 3)
    assert shared(65, torch.float32) == (False, 0)
