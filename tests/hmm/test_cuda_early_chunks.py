"""Transitions that do not vary, in chunks that begin early, by the kernels for GPUs (csrc/cuda/scaled_chunks.h)."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmm_speech.hmm import cuda, library
from tests.hmm.problems import INF, problem
from tests.hmm.test_contract import left_to_right
from tests.hmm.test_cuda_kernels import BOTH_ENDS, REDONE, compare

SCALED = 0  # enum hmm_method: what is done in chunks
SHAPES = [
    (1, 3),
    (2, 1),
    (7, 12),
    (32, 9),
    (33, 10),
    (50, 7),
    (65, 9),
    (96, 10),
    (128, 4),
    (129, 4),
    (200, 10),
    (256, 7),
]
SHAPES = [(*shape, dtype) for dtype in (torch.float32, torch.float64) for shape in SHAPES
          if dtype == torch.float32 or shape[0] <= 96]  # fmt: skip
NAMES = ("initial", "transition", "emission", "lengths", "final")


@pytest.fixture
def chunks(on_cpu, monkeypatch):
    """Sets the frames of a chunk, and those that it begins early."""
    return lambda frames, early=0: monkeypatch.setattr(cuda, "early_chunks", lambda *shape: (frames, early))


def scores_of(arguments):
    return [arguments[k] for k in NAMES]


def random_chain(time, states, lengths, kind="shared", dtype=torch.float32, seed=1, **options):
    arguments = problem(len(lengths), time, states, kind, seed, dtype, **options)
    return arguments | {"lengths": torch.tensor(lengths)}


def sticky(states, time, stay):
    """A chain that takes long to forget: it stays, or goes anywhere, and emissions say little."""
    transition = torch.full((states, states), (1 - stay) / (states - 1)).fill_diagonal_(stay).log()
    emission = 0.01 * torch.randn(3, time, states, generator=torch.Generator().manual_seed(1))
    initial = torch.full((states,), -30.0)
    initial[0] = 0
    return {"initial": initial, "transition": transition, "emission": emission,
            "lengths": torch.tensor([time, time - 1, 2]), "final": torch.linspace(0, 30, states)}  # fmt: skip


@pytest.mark.parametrize("kind", ["shared", "per-sequence"])
@pytest.mark.parametrize("states, frames, dtype", SHAPES)
def test_chunks(chunks, monkeypatch, kind, states, frames, dtype):
    """Against the reference, and against both ends, with grad of every sign and size; lengths about a chunk's."""
    early = 60 if dtype == torch.float64 else 30
    time = early + 3 * frames + 2
    lengths = [time, 0, 1, frames, frames + 1, time - 1, 2 * frames]
    arguments = random_chain(time, states, lengths, kind, dtype, states, forbidden=0.1 if states > 30 else 0.0)
    arguments["transition"] *= 0.6
    compare(arguments)
    chunks(frames, early)
    compare(arguments, torch.linspace(1, -2, 7, dtype=torch.float64))
    outside = torch.arange(time) >= arguments["lengths"][:, None]
    arguments["emission"][outside] = float("nan")
    scores, grad = scores_of(arguments), torch.tensor([1.0, 2.0, -1.0, 0.0, -3.0, 1e-20, 1e4], dtype=dtype)
    found = cuda.forward(*scores)
    feasible = found[0].isfinite() & (arguments["lengths"] > 0)
    assert feasible.sum() > 4 and (found[4][feasible] == SCALED).all()
    state, edge = cuda.backward(grad, *scores, *found, True)
    assert (state[outside] == 0).all()
    monkeypatch.setenv("HMM_SCHEDULE", "1")
    again = cuda.forward(*scores)
    assert all(torch.equal(found[k], again[k]) for k in (0, 1, 3, 4))
    assert all(
        torch.equal(x, y) for x, y in zip((state, edge), cuda.backward(grad, *scores, *again, True), strict=True)
    )
    chunks(0)
    both = cuda.forward(*scores)
    torch.testing.assert_close(found[0], both[0], rtol=2e-6, atol=2e-6)
    state_of_both, edge_of_both = cuda.backward(grad, *scores, *both, True)
    assert ((state - state_of_both).abs() <= 1e-5 * grad.abs().view(-1, 1, 1)).all()
    torch.testing.assert_close(edge, edge_of_both, rtol=1e-5, atol=1e-5)


@given(
    states=st.integers(1, 12), time=st.integers(33, 60), frames=st.integers(1, 59), early=st.integers(0, 40),
    kind=st.sampled_from(["shared", "per-sequence"]), seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 1.0, 10.0, 300.0]), shift=st.sampled_from([0.0, 1000.0, -1000.0]),
    forbidden=st.sampled_from([0.0, 0.3, 0.6]), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
# Operators stay those of cuda.py from example to example.
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_chunks_meet_with(on_cpu, states, time, frames, early, kind, seed, scale, shift, forbidden, dtype):
    """Where they do not, sequences are walked from their ends: numbers are always right."""
    arguments = problem(3, time, states, kind, seed, dtype, scale=scale, shift=shift, forbidden=forbidden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "early_chunks", lambda *shape: (min(frames, time - 1), early))
        compare(arguments, marginals=5e-6 if scale < 300 or dtype == torch.float64 else 2e-5)


def test_chains_that_do_not_forget(chunks):
    """Are done as without chunks, to the bit."""
    for arguments in (sticky(5, 60, 0.99), left_to_right(9, 60, 1.0), left_to_right(9, 60, 500.0)):
        scores = scores_of(arguments)
        grad = torch.linspace(-1, 1, len(arguments["lengths"]))
        passes = []
        for frames, early in ((0, 0), (10, 8)):
            chunks(frames, early)
            found = cuda.forward(*scores)
            passes.append([found[0], found[1], found[4], *cuda.backward(grad, *scores, *found, True)])
        long = arguments["lengths"] > 18
        assert (passes[1][2][long] != SCALED).all() and (passes[0][2] != SCALED).all()
        for x, y in zip(*passes[:2], strict=True):
            assert x.shape[0] != len(long) or torch.equal(x[long], y[long])
        compare(arguments)
    chunks(10, 60)  # each walk begins where the sequence does: those of any chain meet, but a state without a way in
    for arguments, method in ((sticky(5, 60, 0.99), SCALED), (left_to_right(9, 60, 1.0), BOTH_ENDS)):
        assert (cuda.forward(*scores_of(arguments))[4] == method).all()
        compare(arguments)


def test_posteriors_that_do_not_meet(on_cpu, monkeypatch):
    """Where messages did: posteriors from the end, of all frames."""
    arguments = random_chain(60, 6, [60, 50, 11])
    ways = iter([(10, 30), (10, 2)])
    monkeypatch.setattr(cuda, "early_chunks", lambda *shape: next(ways))
    compare(arguments)
    assert next(ways, None) is None
    ways = iter([(10, 30)] * 2)
    assert (cuda.forward(*scores_of(arguments))[4] == SCALED).all()


def test_sequences_of_a_batch_are_done_in_chunks_or_not(chunks):
    """One without a path, one with NaN, one whose emissions flush what matters; their neighbours stay in chunks."""
    arguments = random_chain(60, 6, [60] * 6)
    arguments["emission"][1, 30] = -INF
    arguments["emission"][2, 25, 3] = float("nan")
    arguments["emission"][3, 41, 3] = INF
    arguments["transition"][0, 1] = -INF
    arguments["emission"][4] *= 500
    chunks(10, 30)
    scores = scores_of(arguments)
    found = cuda.forward(*scores)
    assert found[4][[0, 5]].tolist() == [SCALED] * 2 and found[4][4] in (REDONE, BOTH_ENDS)
    assert found[0][1] == -INF and found[0][2:4].isnan().all() and found[0][[0, 4, 5]].isfinite().all()
    state, _ = cuda.backward(torch.ones(6), *scores, *found, True)
    assert (state[1] == 0).all() and state[2:4].isnan().all() and state[[0, 4, 5]].isfinite().all()
    kept = [0, 4, 5]
    batched = ("emission", "lengths", "final")
    compare({k: x[kept] if k in batched else x for k, x in arguments.items()})


@pytest.mark.parametrize("shift", [1000.0, -1000.0])
@pytest.mark.parametrize("final", [True, False])
def test_chunks_around_a_thousand(chunks, shift, final):
    arguments = random_chain(70, 10, [70, 60, 12, 4], shift=shift, final=final)
    chunks(10, 30)
    compare(arguments)
    assert (cuda.forward(*scores_of(arguments))[4] == SCALED).all()


def test_emissions_far_apart(chunks):
    """A hundred nats: the certificates of scaled.h hold within chunks, and messages are the same in every state."""
    arguments = random_chain(70, 10, [70, 60, 12])
    arguments["emission"] *= 40
    chunks(10, 30)
    compare(arguments)
    assert (cuda.forward(*scores_of(arguments))[4] == SCALED).all()


def test_many_chunks(chunks):
    """Errors do not add up from chunk to chunk, or over the frames of a long one."""
    arguments = random_chain(3001, 3, [3001, 2000])
    for frames in (7, 1000):
        chunks(frames, 40)
        assert (cuda.forward(*scores_of(arguments))[4] == SCALED).all()
        compare(arguments, torch.ones(2, dtype=torch.float64))


def test_samples_in_chunks(chunks):
    """Are those of messages that begin in the first frame."""
    arguments = random_chain(70, 10, [70, 41, 0, 11])
    uniform = torch.rand(20, 4, 70, generator=torch.Generator().manual_seed(0))
    scores = scores_of(arguments)
    chunks(0)
    expected = cuda.sample(*scores, uniform)
    chunks(10, 30)
    assert torch.equal(cuda.sample(*scores, uniform), expected)


def test_where_chunks_are_not_taken(chunks):
    """Where transitions vary, and for more states than one kernel takes."""
    chunks(3, 2)
    for kind, states, dtype in (("time-varying", 5, torch.float32), ("shared", 257, torch.float32),
                                ("shared", 97, torch.float64)):  # fmt: skip
        arguments = random_chain(9, states, [9, 8], kind, dtype)
        assert (cuda.forward(*scores_of(arguments))[4] == BOTH_ENDS).all()
        compare(arguments)


def test_what_chunks_save():
    def chosen(batch, time, states, multiprocessors, dtype=torch.float32, both_ends=True):
        return cuda.early_chunks(batch, time, states, dtype, multiprocessors, both_ends)

    assert chosen(8, 3000, 50, 68) == (177, 128) and chosen(8, 3000, 50, 132) == (91, 128)  # the seed's table
    assert (
        chosen(8, 1000, 50, 68) == (59, 62) and chosen(8, 200, 50, 68) == (16, 32) and chosen(8, 100, 50, 68) == (0, 0)
    )
    assert chosen(8, 100, 50, 68, both_ends=False) == (16, 32)  # for samples
    assert chosen(64, 3000, 50, 68) == (1500, 128) or chosen(64, 3000, 50, 68) == (0, 0)
    assert chosen(8, 3000, 256, 68) == (375, 128) and chosen(8, 100, 256, 68) == (0, 0)
    assert chosen(8, 3000, 257, 68) == (0, 0) and chosen(8, 3000, 97, 68, torch.float64) == (0, 0)
    assert chosen(8, 3000, 50, 68, torch.float64) == (375, 256)
    assert not any(any(chosen(*shape, 50, 132)) for shape in ((0, 100), (1, 0), (1, 1), (1, 2), (1000, 1000)))
    assert library.Problem().chunk_frames == library.Problem().warm_up == 0
