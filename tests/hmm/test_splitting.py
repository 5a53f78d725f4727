"""Sequences walked from both ends by two threads: the same numbers, whatever the threads of either pass."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.hmm import HMM, backend, log_partition, ops, use_backend
from tests.hmm.problems import INF, doubled, problem, solve
from tests.hmm.test_contract import compare, gaussian_chain, left_to_right

SCALED, REDONE, BOTH_ENDS = 0, 1, 3  # enum hmm_method


@pytest.fixture(autouse=True)
def always_from_both_ends(monkeypatch):
    monkeypatch.setattr(ops, "_BOTH_ENDS_FROM", 0)


@contextlib.contextmanager
def threads(count):
    saved = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(saved)


def methods(arguments):
    return torch.ops.hmm_speech.forward(*arguments.values())[4].tolist()


def passes(arguments, grad, forward, backward):
    """log Z with `forward` threads; the posteriors and counts times grad with `backward` threads."""
    scores = tuple(arguments.values())
    with threads(forward):
        messages = torch.ops.hmm_speech.forward(*scores)
    with threads(backward):
        state, edge = torch.ops.hmm_speech.backward(grad, *scores, *messages, True)
    return messages[0], state, edge, messages[4]


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    count=st.integers(1, 4),
    time=st.integers(1, 30),
    states=st.sampled_from([1, 2, 3, 15, 16, 17, 33, 64, 65, 70]),
    kind=st.sampled_from(["shared", "per-sequence"]),
    seed=st.integers(0, 1000),
    forbidden=st.sampled_from([0.0, 0.2, 0.5]),
    scale=st.sampled_from([0.3, 1.0, 30.0]),
)
def test_few_sequences_on_any_threads(batch, count, time, states, kind, seed, forbidden, scale):
    # Scores of 30 nats a frame: log Z may cancel below the rounding of the scores themselves.
    tolerance = 2e-6 if scale <= 1 else 1e-5
    with threads(count):
        compare(
            problem(batch, time, states, kind, seed, torch.float32, scale=scale, forbidden=forbidden),
            log_partition=tolerance,
        )


@pytest.mark.parametrize("states", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 300])
@pytest.mark.parametrize("batch", [1, 2, 5, 8, 13])
def test_every_tile_edge_from_both_ends(batch, states):
    arguments = problem(batch, 7, states, "shared", batch, torch.float32)
    with threads(2):
        compare(arguments)
        assert BOTH_ENDS in methods(arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("forward", "backward"), [(2, 1), (1, 2), (2, 2), (4, 3), (3, 4), (2, 5)])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 11])
def test_backward_with_other_threads_than_forward(batch, forward, backward, dtype):
    arguments = problem(batch, 23, 20, "shared", 3, dtype)
    arguments["lengths"] = torch.tensor([23, 0, 1, 2, 3, 22, 5, 4, 23, 1, 2])[:batch]
    grad = torch.linspace(-1, 1.5, batch, dtype=dtype)
    expected = passes(doubled(arguments), grad.double(), 1, 1)
    found = passes(arguments, grad, forward, backward)
    assert set(found[3].tolist()) == ({BOTH_ENDS} if forward > 1 else {SCALED})
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (1e-11, 1e-11)
    for x, y in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=atol)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_results_are_deterministic_for_the_same_threads(batch):
    arguments, grad = problem(batch, 200, 40, "shared", 5, torch.float32), torch.ones(batch)
    for count in (2, 3):
        first, again = passes(arguments, grad, count, count), passes(arguments, grad, count, count)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_every_short_length():
    arguments = problem(6, 5, 4, "shared", 1, torch.float32)
    arguments["lengths"] = torch.tensor([0, 1, 2, 3, 4, 5])
    with threads(2):
        compare(arguments)
        assert set(methods(arguments)) == {BOTH_ENDS}


def test_padding_is_never_read():
    arguments = problem(3, 9, 5, "shared", 2, torch.float32)
    arguments["lengths"] = torch.tensor([9, 1, 4])
    clean = passes(arguments, torch.ones(3), 2, 2)
    arguments["emission"][torch.arange(9) >= arguments["lengths"][:, None]] = float("nan")
    assert all(torch.equal(x, y) for x, y in zip(clean, passes(arguments, torch.ones(3), 2, 2), strict=True))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("gap", [1.0, 50.0, 500.0])
@pytest.mark.parametrize("end", [None, "last"])
def test_left_to_right_chains(gap, end, batch):
    arguments = left_to_right(12, 60, gap)
    arguments["emission"], arguments["lengths"] = arguments["emission"][:batch], torch.tensor([60, 59, 12])[:batch]
    if end:
        arguments["final"] = torch.full((12,), -INF)
        arguments["final"][-1] = 0
    with threads(2):
        compare(arguments)


@pytest.mark.parametrize("gap", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("batch", [1, 5])
def test_gaussian_chains(gap, batch):
    with threads(2):
        before = backend().redone
        compare(gaussian_chain(6, 3, batch, 40, gap))
        assert (backend().redone > before) == (gap > 1)


@pytest.mark.parametrize("hard", ["first", "second"])
@pytest.mark.parametrize("batch", [1, 4])
def test_one_half_that_cannot_be_certified(hard, batch):
    """Frames of one half are hundreds of nats apart: the sequence is redone as a whole, others beside it are not."""
    arguments = gaussian_chain(6, 3, batch, 40, 1.0)
    arguments["lengths"] = torch.full((batch,), 40)
    frames = slice(2, 18) if hard == "first" else slice(22, 38)
    arguments["emission"][0, frames] *= 60
    with threads(2):
        compare(arguments)
        assert methods(arguments) == [REDONE] + [BOTH_ENDS] * (batch - 1)


def test_halves_that_meet_in_nothing_are_infeasible():
    """Each half has paths; no arc leads from where the first can be to where the second must begin."""
    transition = torch.full((2, 2), -INF).fill_diagonal_(0)
    emission = torch.zeros(1, 6, 2)
    emission[0, 0, 1] = emission[0, 5, 0] = -INF
    arguments = {
        "initial": torch.zeros(2),
        "transition": transition,
        "emission": emission,
        "lengths": torch.tensor([6]),
        "final": None,
    }
    with threads(2):
        assert log_partition(**arguments).item() == -INF and methods(arguments) == [REDONE]
        assert (HMM(**arguments).marginals() == 0).all()


@pytest.mark.parametrize("depth", [10, 17, 25, 60])
def test_halves_that_hardly_agree(depth):
    """One half prefers a state, the other another, and neither may change: what decides is small in both."""
    transition = torch.full((2, 2), -INF).fill_diagonal_(0)
    emission = torch.zeros(1, 2 * depth, 2)
    emission[0, :depth, 0], emission[0, depth:, 1] = 3.5, 3.5
    emission[0, 0, 1] += 0.3
    arguments = {
        "initial": torch.zeros(2),
        "transition": transition,
        "emission": emission,
        "lengths": torch.tensor([2 * depth]),
        "final": None,
    }
    with threads(2):
        compare(arguments)
        assert methods(arguments) == [BOTH_ENDS if depth < 20 else REDONE]


@pytest.mark.parametrize("bits", [20, 40, 50, 60, 70, 77])
def test_what_scaling_makes_up_from_the_end_does_not_come_back(bits):
    """The first hard case of test_hard_cases.py, read from its end."""
    ln2 = 0.6931471805599453
    transition = torch.zeros(4, 4)
    transition[0, 0] = -47.9 * ln2
    transition[0, 2] = transition[3, 2] = -bits * ln2
    emission = torch.full((1, 9, 4), -1000.0)
    emission[0, 4:, 0] = 0
    emission[0, :4, 2], emission[0, :4, 3] = 0, -47.9 * ln2
    arguments = {
        "initial": torch.zeros(4),
        "transition": transition.T.contiguous(),
        "emission": emission,
        "lengths": torch.tensor([9]),
        "final": torch.tensor([0.0, -1000.0, -1000.0, -1000.0]),
    }
    with threads(2):
        compare(arguments)


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e7, 1e30])
def test_upstream_gradients_of_any_size(scale):
    arguments = problem(2, 20, 6, "shared", 2, torch.float32, lengths="full")
    _, expected = solve(arguments, torch.ones(2))
    with threads(2):
        _, found = solve(arguments, torch.full((2,), scale))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double() / scale, expected[name].double(), rtol=1e-5, atol=1e-5)


def test_a_hundred_thousand_frames():
    arguments = problem(1, 100_000, 4, "shared", 7, torch.float32, lengths="full")
    grad = torch.ones(1)
    exact = passes(doubled(arguments | {"lengths": torch.tensor([100_000])}), grad.double(), 1, 1)
    found = passes(arguments | {"lengths": torch.tensor([100_000])}, grad, 2, 2)
    assert found[3].tolist() == [BOTH_ENDS]
    torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=0, atol=5e-6)
    torch.testing.assert_close(found[2].double(), exact[2], rtol=5e-6, atol=1e-5)


def test_samples_do_not_depend_on_the_threads():
    arguments = problem(2, 50, 6, "shared", 1, torch.float32)
    drawn = []
    for count in (1, 2, 4):
        with threads(count):
            drawn.append(HMM(**arguments).sample(20, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_second_derivatives_from_both_ends():
    arguments = problem(2, 5, 3, "shared", 1, lengths="full")
    arguments["lengths"] = torch.tensor([5, 4])
    inputs = [x.requires_grad_() for x in arguments.values() if x.is_floating_point()]

    def function(initial, transition, emission, final):
        return log_partition(initial, transition, emission, arguments["lengths"], final)

    with threads(2), use_backend("native"):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
