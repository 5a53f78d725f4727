"""Threads that take every step together: the numbers of one thread, whatever the threads of either pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.hmm import HMM, library, ops
from tests.hmm.problems import doubled, problem
from tests.hmm.test_contract import compare, gaussian_chain, left_to_right
from tests.hmm.test_splitting import BOTH_ENDS, REDONE, SCALED, methods, passes, threads


@pytest.fixture(autouse=True)
def always_in_lockstep(monkeypatch):
    monkeypatch.setattr(ops, "_STEPS_FROM", 0)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 9),
    count=st.integers(2, 5),
    time=st.integers(1, 30),
    states=st.sampled_from([1, 64, 65, 70, 128, 129, 200]),
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


@pytest.mark.parametrize("states", [63, 64, 65, 95, 97, 127, 128, 129, 192, 260, 520])
@pytest.mark.parametrize("batch", [1, 3, 7, 8, 13])
def test_every_tile_edge(batch, states):
    arguments = problem(batch, 7, states, "shared", batch, torch.float32)
    with threads(2):
        compare(arguments)
        assert BOTH_ENDS not in methods(arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("forward", "backward"), [(2, 1), (1, 2), (2, 2), (4, 3), (3, 4), (2, 9)])
@pytest.mark.parametrize("batch", [1, 3, 8, 11])
def test_one_two_and_more_threads(batch, forward, backward, dtype):
    arguments = problem(batch, 23, 140, "shared", 3, dtype)
    arguments["lengths"] = torch.tensor([23, 0, 1, 2, 3, 22, 5, 4, 23, 1, 2])[:batch]
    grad = torch.linspace(-1, 1.5, batch, dtype=dtype)
    expected = passes(doubled(arguments), grad.double(), 1, 1)
    found = passes(arguments, grad, forward, backward)
    assert set(found[3].tolist()) == {SCALED}
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (1e-11, 1e-11)
    for x, y in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=atol)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_results_are_deterministic_for_the_same_threads(batch):
    arguments, grad = problem(batch, 100, 200, "shared", 5, torch.float32), torch.ones(batch)
    for count in (2, 3):
        first = passes(arguments, grad, count, count)
        for _ in range(3):
            assert all(torch.equal(x, y) for x, y in zip(first, passes(arguments, grad, count, count), strict=True))


def test_counts_of_several_blocks():
    arguments = problem(8, 150, 130, "shared", 4, torch.float32, lengths="full")
    with threads(3):
        compare(arguments)


@pytest.mark.parametrize("lengths", [[0] * 4, [1] * 4, [0, 1, 2, 30], [30, 29, 1, 0], [30] * 4])
@pytest.mark.parametrize("grad", [[1.0] * 4, [0.0] * 4, [0.0, -2.0, 0.0, 1e-3]])
def test_every_length_and_idle_gradient(lengths, grad):
    arguments = problem(4, 30, 130, "shared", 1, torch.float32)
    arguments["lengths"] = torch.tensor(lengths)
    with threads(2):
        compare(arguments, torch.tensor(grad, dtype=torch.float64))


def test_padding_is_never_read():
    arguments = problem(3, 9, 130, "shared", 2, torch.float32)
    arguments["lengths"] = torch.tensor([9, 1, 4])
    clean = passes(arguments, torch.ones(3), 2, 2)
    arguments["emission"][torch.arange(9) >= arguments["lengths"][:, None]] = float("nan")
    assert all(torch.equal(x, y) for x, y in zip(clean, passes(arguments, torch.ones(3), 2, 2), strict=True))


@pytest.mark.parametrize("gap", [1.0, 50.0])
def test_left_to_right_chains(gap):
    arguments = left_to_right(130, 160, gap)
    with threads(2):
        compare(arguments)


@pytest.mark.parametrize(("gap", "redone"), [(0.3, False), (3.0, True), (10.0, True)])
@pytest.mark.parametrize("batch", [1, 5])
def test_gaussian_chains(gap, redone, batch):
    arguments = gaussian_chain(100, 3, batch, 40, gap)
    with threads(2):
        compare(arguments)
        found = methods(arguments)
    with threads(1):
        assert found == methods(arguments)
    assert (REDONE in found) == redone


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_one_sequence_that_cannot_be_certified(batch):
    arguments = gaussian_chain(100, 3, batch, 40, 0.3)
    arguments["lengths"] = torch.full((batch,), 40)
    arguments["emission"][0, 2:18] *= 60
    with threads(2):
        compare(arguments)
        assert methods(arguments) == [REDONE] + [SCALED] * (batch - 1)


def test_samples_from_messages_of_several_threads():
    arguments = problem(2, 50, 130, "shared", 1, torch.float32)
    drawn = []
    for count in (1, 2, 4):
        with threads(count):
            drawn.append(HMM(**arguments).sample(20, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_which_problems_are_shared_by_steps(monkeypatch):
    monkeypatch.undo()
    assert ops._sharing(8, 100, 1024, both_ends=True) == library.BY_STEPS
    assert ops._sharing(8, 100, 1024, both_ends=False) == library.BY_STEPS
    assert ops._sharing(8, 100, 50, both_ends=True) == library.BY_ENDS
    assert ops._sharing(8, 100, 50, both_ends=False) == library.BY_SEQUENCES
    assert ops._sharing(1, 10, 50, both_ends=True) == library.BY_SEQUENCES
