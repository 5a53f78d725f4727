"""Samples on more states than one vector holds: against the posteriors by chi-square, and one walk beside many."""

import pytest
import torch

from hmm_speech.hmm import HMM
from tests.hmm.problems import problem


def statistic(counts, expected):
    """Chi-square over cells (..., K) of at least 5 expected draws, in standard deviations from its mean, (...)."""
    kept = expected >= 5
    rest = [torch.where(kept, 0, x).sum(-1, keepdim=True) for x in (counts, expected)]
    counts, expected = (
        torch.cat([torch.where(kept, x, 0), r], -1) for x, r in zip((counts, expected), rest, strict=True)
    )
    freedom = (expected >= 5).sum(-1) - 1
    square = torch.where(expected >= 5, (counts - expected) ** 2 / expected.clamp(min=5), 0).sum(-1)
    return (square - freedom) / (2 * freedom).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["shared", "per-sequence", "time-varying"])
@pytest.mark.parametrize("forbidden", [0.0, 0.3])
def test_samples_of_seventy_states(kind, dtype, forbidden):
    """Of states, and of neighbours hashed to 70 cells; 7 standard deviations, 60 statistics, fixed seed."""
    num, states = 10_000, 70
    arguments = problem(3, 6, states, kind, 4, dtype, 1.5, forbidden=forbidden, lengths="full")
    hmm = HMM(**arguments)
    samples = hmm.sample(num, generator=torch.Generator().manual_seed(2))
    assert hmm.score(samples[0]).isfinite().all()
    counts = torch.nn.functional.one_hot(samples, states).sum(0).double()
    expected = hmm.marginals().double() * num
    assert (counts[expected == 0] == 0).all()
    assert statistic(counts, expected).max() < 7
    cell = (torch.arange(states)[:, None] * 11 + torch.arange(states)) % states
    pairs = torch.nn.functional.one_hot(cell[samples[:, :, :-1], samples[:, :, 1:]], states).sum(0).double()
    edges = hmm.edge_marginals().double().flatten(-2) * num
    hashed = torch.zeros_like(pairs).index_add_(-1, cell.flatten(), edges)
    assert statistic(pairs, hashed).max() < 7


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-24])
def test_what_has_no_weight_is_not_drawn(number):
    """The lowest and the highest number there is: the first and the last state that can be."""
    states, allowed = 70, torch.tensor([18, 40, 53])
    emission = torch.full((1, 5, states), float("-inf"))
    emission[..., allowed] = 0
    scores = torch.zeros(states), torch.zeros(states, states), emission, torch.tensor([5]), None
    drawn = torch.ops.hmm_speech.sample(*scores, torch.full((40, 1, 5), number))
    assert (drawn == allowed[int(number * 3)]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("states", [15, 16, 17, 64, 70, 300])
def test_the_numbers_choose_the_path(states, dtype):
    """Same numbers, same path, with and without a table of columns (few frames have none), beside whatever others."""
    arguments = problem(2, 3, states, "shared", 5, dtype, lengths="full")
    arguments["lengths"] = torch.tensor([3, 2])
    uniform = torch.rand(19, 2, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
    many = torch.ops.hmm_speech.sample(*arguments.values(), uniform)
    alone = torch.cat([torch.ops.hmm_speech.sample(*arguments.values(), u[None]) for u in uniform])
    assert (many == alone).double().mean() > 0.95  # the two round differently
    again = torch.ops.hmm_speech.sample(*arguments.values(), uniform)
    assert torch.equal(many, again)
