"""Transitions that vary over time, walked from both ends by the kernels for GPUs (csrc/cuda/log_space.cu)."""

import pytest
import torch

from hmm_speech.hmm import cuda
from tests.hmm.problems import INF, problem
from tests.hmm.test_cuda_kernels import BOTH_ENDS, compare

LOG_SPACE = 2  # enum hmm_method
SHAPES = ((4, 1), (5, 2), (6, 3), (9, 17), (8, 32), (7, 50), (9, 64), (6, 127), (7, 128))


def varying(batch, time, states, seed, dtype, **options):
    """A problem with short and long sequences, and its scores."""
    arguments = problem(batch, time, states, "time-varying", seed, dtype, **options)
    arguments["lengths"] = torch.tensor([time, 0, 1, 2, 3, *range(time)])[:batch].clamp(max=time)
    return arguments, [arguments[k] for k in ("initial", "transition", "emission", "lengths", "final")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time, states", SHAPES)
def test_halves_of_transitions_that_vary(on_cpu, monkeypatch, time, states, dtype):
    """Against the reference, and against walks from the front, with grad of every sign and size."""
    arguments, scores = varying(7, time, states, time, dtype, forbidden=0.2 if time % 2 else 0.0)
    compare(arguments)
    compare(arguments, torch.linspace(1, -2, 7, dtype=torch.float64))
    both, one = cuda.forward(*scores), cuda.forward(*scores, both_ends=False)
    assert (both[4] == BOTH_ENDS).all() and (one[4] == LOG_SPACE).all()
    torch.testing.assert_close(both[0], one[0], rtol=2e-6, atol=2e-6)
    grad = torch.tensor([1.0, 2.0, -1.0, 0.0, -3.0, 1e-20, 1e4], dtype=dtype)
    (state, edge), (state_one, edge_one) = (cuda.backward(grad, *scores, *x, True) for x in (both, one))
    assert ((state - state_one).abs() <= 1e-5 * grad.abs().view(-1, 1, 1)).all()
    assert ((edge - edge_one).abs() <= 1e-5 * grad.abs().view(-1, 1, 1, 1)).all()
    assert torch.equal(cuda.backward(grad, *scores, *both, False)[0], state)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 13)  # for fewer than 14 halves
    assert all(torch.equal(x, y) for x, y in zip(cuda.forward(*scores)[:4], one[:4], strict=True))


@pytest.mark.parametrize("states", [129, 131, 200, 256, 300, 513])
def test_halves_of_many_states_that_vary(on_cpu, states):
    for dtype in (torch.float32, torch.float64) if states < 500 else (torch.float32,):
        arguments, scores = varying(1, 6, states, 1, dtype, forbidden=0.3)
        assert (cuda.forward(*scores)[4] == BOTH_ENDS).all()
        compare(arguments)


@pytest.mark.parametrize("shift", [1000.0, -1000.0])
@pytest.mark.parametrize("final", [True, False])
def test_halves_around_a_thousand(on_cpu, shift, final):
    arguments, _ = varying(9, 31, 10, 3, torch.float32, shift=shift, final=final)
    compare(arguments)


@pytest.mark.parametrize("where", [0, 1, 4, 5, 8])
def test_no_path_in_one_half(on_cpu, where):
    """A frame that forbids all, then arcs; also those that the halves meet at. NaN beats minus infinity."""
    arguments, scores = varying(6, 9, 7, 4, torch.float32)
    arguments["lengths"][:] = 9
    arguments["emission"][1, where] = -INF
    arguments["transition"][2, min(where, 7)] = -INF
    compare(arguments)
    messages = cuda.forward(*scores)
    assert (messages[0][1:3] == -INF).all() and (messages[4] == BOTH_ENDS).all()
    grad = torch.linspace(-1, 1, 6)
    state, edge = cuda.backward(grad, *scores, *messages, True)
    assert (state[1:3] == 0).all() and (edge[1:3] == 0).all()
    for bad in (INF, float("nan")):
        arguments["emission"][4, where, 3] = bad
        arguments["transition"][5, min(where, 7), 2, 2] = bad
        messages = cuda.forward(*scores)
        assert messages[0][4:].isnan().all() and messages[0][[0, 3]].isfinite().all()
        state, edge = cuda.backward(grad, *scores, *messages, True)
        assert state[4:].isnan().all() and edge[4:].isnan().all() and state[:4].isfinite().all()


def test_long_halves(on_cpu, monkeypatch):
    """Errors do not add up over time, on either side of the middle. Chunks would take less: not here."""
    monkeypatch.setattr(cuda, "chunk_frames", lambda *shape: 0)
    monkeypatch.setattr(cuda, "early_varying_chunks", lambda *shape: (0, 0))
    arguments, scores = varying(1, 5001, 3, 5, torch.float32)
    assert (cuda.forward(*scores)[4] == BOTH_ENDS).all()
    compare(arguments, torch.ones(1, dtype=torch.float64))
