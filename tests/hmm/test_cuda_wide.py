"""Shared transitions of 129 to 256 states on a GPU (csrc/cuda/wide.cu), executed on the CPU: arcs in registers, shared
memory and caches, for devices with more or less of these."""

import pytest
import torch

from hmm_speech.hmm import HMM, cuda
from tests.cpp.cuda import build
from tests.hmm.problems import INF, problem, solve
from tests.hmm.test_contract import left_to_right
from tests.hmm.test_cuda_kernels import BOTH_ENDS, REDONE, compare


@pytest.fixture(params=[(64, 68), (99, 68), (64, 1), (163, 1)], ids=str)
def device(request, handle):
    """Devices whose blocks hold more or fewer arcs, of one sequence or, with few multiprocessors, of two (wide.cu)."""
    build.imitate(handle, *request.param)
    yield
    build.imitate(handle)


@pytest.mark.parametrize("states", [129, 131, 160, 200, 255, 256])
def test_arcs_that_registers_do_not_hold(on_cpu, device, states):
    """wide.cu, with gradients of both signs, and padding that is not read; samples need messages of whole sequences."""
    for kind in ("shared", "per-sequence") if states == 200 else ("shared",):
        arguments = problem(5, 13, states, kind, states, torch.float32, forbidden=0.3 if states % 2 else 0.0)
        arguments["lengths"] = torch.tensor([13, 0, 1, 2, 12])
        inside = torch.arange(13) < arguments["lengths"][:, None]
        compare(arguments)
        arguments["emission"][~inside] = float("nan")
        scores = [arguments[k] for k in ("initial", "transition", "emission", "lengths", "final")]
        both, one = cuda.forward(*scores), cuda.forward(*scores, both_ends=False)
        assert (both[4] == BOTH_ENDS).all() and (one[4] == 0).all()
        torch.testing.assert_close(both[0], one[0], rtol=2e-6, atol=2e-6)
        grad = torch.linspace(-1, 1.5, 5)
        posteriors = [cuda.backward(grad, *scores, *x, True) for x in (both, one)]
        for x, y in zip(*posteriors, strict=True):
            torch.testing.assert_close(x, y, rtol=5e-6, atol=1e-5)
        assert (posteriors[0][0][~inside] == 0).all()
        assert (cuda.sample(*scores, torch.rand(3, 5, 13))[:, inside] >= 0).all()


def test_arcs_that_registers_do_not_hold_in_hard_cases(on_cpu, device):
    for shift in (1000.0, -1000.0):
        compare(problem(3, 6, 140, "shared", 1, torch.float32, shift=shift))
    for gap in (1.0, 50.0, 500.0):
        compare(left_to_right(130, 20, gap) | {"lengths": torch.tensor([20, 19, 2, 1])})
    lost = problem(5, 6, 150, "shared", 2, torch.float32, lengths="full")
    lost["emission"][1, 2] = -INF  # infeasible, beside others in the same block
    lost["emission"][2] *= 300  # what the arcs mix is kept
    compare(lost)
    assert HMM(**lost).log_partition()[1] == -INF
    lost["transition"][torch.rand(150, 150, generator=torch.Generator().manual_seed(0)) < 0.8] = -INF
    compare(lost)
    scores = [lost[k] for k in ("initial", "transition", "emission")]
    method = cuda.forward(*scores, torch.full((5,), 6), lost["final"])[4]
    assert [b for b in range(5) if method[b] == REDONE] == [1, 2]


def test_arcs_that_registers_do_not_hold_in_any_order_of_threads(on_cpu, handle, monkeypatch):
    arguments = problem(3, 5, 131, "shared", 3, torch.float32, forbidden=0.3, lengths="full")
    for multiprocessors in (68, 1):
        build.imitate(handle, multiprocessors=multiprocessors)
        found = []
        for order in ("0", "1", "2"):
            monkeypatch.setenv("HMM_SCHEDULE", order)
            compare(arguments)
            z, gradients = solve(arguments, torch.ones(3))
            found.append([z, *gradients.values()])
        assert all(torch.equal(x, y) for others in found[1:] for x, y in zip(found[0], others, strict=True))
    build.imitate(handle)
