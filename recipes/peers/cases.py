"""The hard cases: problems of one form for every library, and the truth about them in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hmm_speech.hmm import HMM, use_backend

INF = float("inf")


@dataclass
class Problem:
    """Scores in nats as ``hmm_speech.hmm.HMM`` takes them, float64; ``upstream`` (B,) weighs the log partitions."""

    name: str
    initial: Tensor  # (N,)
    transition: Tensor  # (N, N) or (B, T-1, N, N)
    emission: Tensor  # (B, T, N)
    lengths: Tensor  # (B,)
    upstream: Tensor  # (B,): gradients are those of (upstream * log Z).sum()
    final: Tensor | None = None  # (N,)

    @property
    def inside(self) -> Tensor:
        """(B, T): the frames before each length."""
        return torch.arange(self.emission.shape[1]) < self.lengths.unsqueeze(-1)


@dataclass
class Answer:
    """What a library says, in float64; None for what it does not offer."""

    log_partition: Tensor  # (B,)
    marginals: Tensor | None  # (B, T, N), 0 past the end
    gradient: Tensor | None  # (B, T, N), of (upstream * log Z).sum() by the emission scores


def _problem(name, initial, transition, emission, lengths=None, upstream=None, final=None) -> Problem:
    """With scores that float32 holds exactly: nobody is blamed for rounding them."""
    initial, transition, emission, final = (
        None if x is None else x.float().double() for x in (initial, transition, emission, final)
    )
    batch, time, _ = emission.shape
    lengths = torch.full((batch,), time) if lengths is None else lengths
    upstream = torch.ones(batch) if upstream is None else upstream
    return Problem(name, initial, transition, emission, lengths, upstream.double(), final)


def _random(states, batch, time, seed=0):
    """Log-probabilities of starting and of arcs, and standard normal emission scores."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return normal(states).log_softmax(-1), normal(states, states).log_softmax(-1), normal(batch, time, states)


def left_to_right(states, batch, time, spread, seed=0):
    """Stay or go on with one half each, from the first state to the last; emissions with the deviation `spread`."""
    _, _, emission = _random(states, batch, time, seed)
    slot = torch.arange(states)
    arcs = torch.full((states, states), -INF, dtype=torch.float64)
    arcs.diagonal().fill_(0.5).log_()
    arcs.diagonal(1).fill_(0.5).log_()
    arcs[-1, -1] = 0
    first, last = (torch.where(slot == s, 0.0, -INF).double() for s in (0, states - 1))
    return first, arcs, spread * emission, last


def _apart(nats, states=4, batch=2, time=7):
    """In each frame one state, drawn at random, is `nats` above the rest, whether or not the chain can be there."""
    first, arcs, emission, last = left_to_right(states, batch, time, 1.0)
    drawn = torch.randint(states, (batch, time, 1), generator=torch.Generator().manual_seed(2))
    emission = emission + nats * torch.zeros_like(emission).scatter(2, drawn, 1.0)
    return _problem(f"left-to-right, emissions {nats} nats apart", first, arcs, emission, final=last)


def cases(quick: bool = False, long: bool = False) -> Iterator[Problem]:
    """All problems, one after the other; with `quick`, small ones; with `long`, T=100,000 too."""
    size = (10, 2, 40) if quick else (50, 4, 200)
    first, arcs, emission, last = left_to_right(*size, 3.0)
    yield _problem("left-to-right, shared", first, arcs, emission, final=last)
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(size[1], size[2] - 1, size[0], size[0], generator=g, dtype=torch.float64)
    yield _problem("left-to-right, varying over time", first, arcs + 2 * noise, emission, final=last)
    yield _apart(200)
    yield _apart(500)

    initial, transition, emission = _random(4, 3, 6)
    dead = emission.clone()
    dead[1, 3] = -INF
    yield _problem("one infeasible sequence in the batch", initial, transition, dead)
    upstream = torch.tensor([1.0, 0.0, -2.0])
    yield _problem("positive scores, upstream 1, 0, -2", initial, transition.abs(), emission.abs() + 5, None, upstream)
    mixed = torch.tensor([6, 0, 1])
    yield _problem("lengths 6, 0 and 1", initial, transition, emission, mixed)
    padded = emission.clone()
    padded[1, 3:] = float("nan")
    yield _problem("NaN in the padding", initial, transition, padded, torch.tensor([6, 3, 6]))

    time = 200 if quick else 1000
    initial, transition, emission = _random(8, 2, time)
    for level in (1000, -1000):
        yield _problem(f"scores around {level:+d}, T={time}", initial, transition, emission + level)
    for time in (300,) if quick else (1000, 10_000, 100_000)[: 3 if long else 2]:
        initial, transition, emission = _random(8, 2, time)
        yield _problem(f"float32, benign, T={time}", initial, transition, emission)


def truth(problem: Problem) -> Answer:
    """The plain-torch reference in float64; small problems are enumerated too, and the two must agree."""
    emission = problem.emission.clone().requires_grad_()
    with use_backend("reference"):
        hmm = HMM(problem.initial, problem.transition, emission, problem.lengths, problem.final)
        z = hmm.log_partition()
        (marginals,) = torch.autograd.grad(z.sum(), emission)  # posteriors are the gradients
    answer = Answer(z.detach(), marginals, marginals * problem.upstream[:, None, None])
    _, time, states = problem.emission.shape
    if states**time <= 50_000:
        expected = enumerate_paths(problem)
        torch.testing.assert_close(answer.log_partition, expected.log_partition, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(answer.marginals, expected.marginals, rtol=1e-9, atol=1e-12)
    return answer


def enumerate_paths(problem: Problem) -> Answer:
    """Every path, its score, their sum: no recursion."""
    _, _, states = problem.emission.shape
    log_partition, marginals = torch.zeros(len(problem.lengths)).double(), torch.zeros_like(problem.emission)
    for b, length in enumerate(problem.lengths.tolist()):
        if length == 0:
            continue
        paths = torch.cartesian_prod(*[torch.arange(states)] * length).view(-1, length)
        score = problem.initial[paths[:, 0]].clone()
        for t in range(length):
            score += problem.emission[b, t, paths[:, t]]
        for t in range(1, length):
            arcs = problem.transition if problem.transition.dim() == 2 else problem.transition[b, t - 1]
            score += arcs[paths[:, t - 1], paths[:, t]]
        if problem.final is not None:
            score += problem.final[paths[:, -1]]
        log_partition[b] = score.logsumexp(0) if score.max() > -INF else -INF
        if score.max() > -INF:
            p = score.softmax(0)
            for t in range(length):
                marginals[b, t].index_add_(0, paths[:, t], p)
    return Answer(log_partition, marginals, marginals * problem.upstream[:, None, None])
