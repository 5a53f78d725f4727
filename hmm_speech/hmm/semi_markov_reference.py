"""Semi-Markov chains in plain torch: the specification of csrc/cpu/semi_markov.h, and the fallback without it.

Every function takes scores as :class:`hmm_speech.hmm.SemiMarkovHMM` documents them, already validated. All is computed
in float64, since the score of a window of frames is a number that float32 rounds too coarsely. Everything is
differentiable any number of times. Cost: B T (N^2 + N D) operations and, under autograd, memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference import INF, logsumexp


def bad_scores(initial, transition, emission, durations, lengths, final) -> Tensor:
    """Whether a score that a sequence uses is NaN or +inf, (B,)."""

    def bad(x: Tensor) -> Tensor:
        return ~(x < INF)

    batch, time, device = *emission.shape[:2], emission.device
    inside = torch.arange(time, device=device) < lengths.unsqueeze(-1)
    fits = torch.arange(durations.shape[-1], device=device) < lengths.unsqueeze(-1)
    found = (bad(emission) & inside.unsqueeze(-1)).flatten(1).any(-1)
    found = found | (bad(durations).any(-2).expand(batch, -1) & fits).any(-1)
    found = found | (bad(transition).flatten(-2).any(-1).expand(batch) & (lengths > 1))
    ends = bad(initial).any(-1) if final is None else bad(initial).any(-1) | bad(final).any(-1)
    return found | (ends.expand(batch) & (lengths > 0))


def _recursion(initial, transition, emission, durations, lengths, final, bonus, reduce):
    """start_t(j) = reduce_i[end_{t-1}(i) + phi(i, j)], end_t(j) = reduce_d[start_{t-d+1}(j) + durations(j, d) + ...].

    `windows` (B, D, N) holds start_{t-d+1}(j) plus the emissions since, for d = 1..D: it moves on by one place and
    grows by one frame at each step, so that no sums of emissions are subtracted. Ends are centred to maximum 0. Returns
    starts and ends, lists over time of (B, N), offsets (B,) that make up for what centring took out of a frame's ends
    and of the next frame's starts, and the reduction over the states at each sequence's end, (B,).
    """
    batch, time, num_states = emission.shape
    by_duration = durations.transpose(-1, -2)
    windows = emission.new_full((batch, durations.shape[-1], num_states), -INF)
    offset = emission.new_zeros(batch)
    total = emission.new_zeros(batch)
    starts, ends, offsets = [], [], []
    end = emission.new_zeros(batch, num_states)
    for t in range(time):
        start = initial.expand(batch, -1) if t == 0 else reduce(end.unsqueeze(-1) + transition, 1)
        if bonus is not None:
            start = start + bonus[:, t]
        windows = torch.cat([start.unsqueeze(1), windows[:, :-1]], 1) + emission[:, t].unsqueeze(1)
        end = reduce(windows + by_duration, 1)
        closing = end if final is None else end + final
        total = torch.where(lengths == t + 1, offset + reduce(closing, -1), total)
        centre = end.detach().amax(-1)
        centre = centre.masked_fill(~centre.isfinite(), 0)
        end, windows = end - centre.unsqueeze(-1), windows - centre[:, None, None]
        offset = offset + centre
        starts.append(start), ends.append(end), offsets.append(offset)
    return starts, ends, offsets, total


def _prepared(initial, transition, emission, durations, lengths, final):
    """Scores in float64, emissions less the largest of their frame (which all paths have alike) and 0 past the end; and
    what that took out, (B,)."""
    inside = torch.arange(emission.shape[1], device=emission.device) < lengths.unsqueeze(-1)
    emission = torch.where(inside.unsqueeze(-1), emission, 0).double()
    most = emission.detach().amax(-1, keepdim=True)
    most = most.masked_fill(~most.isfinite(), 0)
    final = None if final is None else final.double()
    scores = initial.double(), transition.double(), emission - most, durations.double(), lengths, final
    return scores, most.sum((1, 2))


def log_partition(initial, transition, emission, durations, lengths, final, bonus=None) -> Tensor:
    """log sum over segmentations of exp(score), (B,). bonus (B, T, N), or None, is added to every segment's start."""
    scores, constant = _prepared(initial, transition, emission, durations, lengths, final)
    total = _recursion(*scores, bonus, logsumexp)[-1]
    bad = bad_scores(initial, transition, emission, durations, lengths, final)
    known = torch.where(torch.zeros_like(bad), initial.double().sum(-1), 0)  # T = 0: zeros that autograd knows
    return torch.where(bad, torch.nan, constant + total + known).to(emission.dtype)


def viterbi(initial, transition, emission, durations, lengths, final) -> tuple[Tensor, Tensor, Tensor]:
    """The best segmentation's score (B,), states (B, T) and starts (B, T). Ties: the smallest state, then the shortest
    duration. Where none is feasible -inf, -1 and False, as are states and starts past the end."""
    scores, constant = _prepared(initial, transition, emission, durations, lengths, final)
    *messages, total = _recursion(*scores, None, lambda x, dim: x.amax(dim))
    score = torch.where(
        bad_scores(initial, transition, emission, durations, lengths, final), torch.nan, constant + total
    )
    states, starts = _walk(scores, messages, score.isfinite(), 1, lambda t, which, x: x.argmax(-1))
    return score.to(emission.dtype), states[0], starts[0]


def sample(initial, transition, emission, durations, lengths, final, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Segmentations drawn from the posterior, states and starts (S, B, T): forward filtering, backward sampling, by the
    inverse of cumulative distributions at `uniform` (S, B, T, 2)."""
    scores, _ = _prepared(initial, transition, emission, durations, lengths, final)
    *messages, total = _recursion(*scores, None, logsumexp)
    bad = bad_scores(initial, transition, emission, durations, lengths, final)

    def draw(t: int, which: int, x: Tensor) -> Tensor:
        top = x.amax(-1, keepdim=True)
        cumulative = (x - top.masked_fill(~top.isfinite(), 0)).exp().cumsum(-1)
        drawn = (cumulative <= uniform[:, :, t, which, None] * cumulative[..., -1:]).sum(-1)
        last = x.shape[-1] - 1 - (x > -INF).flip(-1).int().argmax(-1)
        return torch.minimum(drawn, last)

    return _walk(scores, messages, total.isfinite() & ~bad, uniform.shape[0], draw)


def _walk(scores, messages, feasible: Tensor, num_walks: int, choose: Callable[[int, int, Tensor], Tensor]):
    """Backward over the frames: where a segment ends, choose(t, which, x) picks one of x (S, B, K) for its state
    (which = 0) and its duration less 1 (which = 1)."""
    _, transition, emission, durations, lengths, final = scores
    batch, time, _ = emission.shape
    shape = num_walks, batch
    states = torch.full((*shape, time), -1, dtype=torch.int64, device=emission.device)
    starts = torch.zeros_like(states, dtype=torch.bool)
    if time == 0:
        return states, starts
    transition = transition.expand(batch, -1, -1).transpose(1, 2)
    durations = durations.expand(batch, -1, -1)
    row = torch.arange(batch, device=emission.device)
    no_offset = torch.zeros_like(messages[2][0]).unsqueeze(0)
    start_scores = torch.stack(messages[0]) + torch.cat([no_offset, torch.stack(messages[2])[:-1]]).unsqueeze(-1)
    state = torch.zeros(shape, dtype=torch.int64, device=emission.device)
    left = torch.zeros_like(state)  # frames of the current segment at and before t
    for t in reversed(range(time)):
        inside = (t < lengths) & feasible
        ending = inside & (left == 0)
        closing = (0 if final is None else final.expand(batch, -1)) + torch.zeros_like(emission[:, 0])
        onward = torch.where((t + 1 == lengths).unsqueeze(-1), closing, transition[row, state])
        state = torch.where(ending, choose(t, 0, messages[1][t] + onward), state)
        longest = min(durations.shape[-1], t + 1)
        window = emission[:, t + 1 - longest : t + 1].flip(1).cumsum(1)  # (B, d, N)
        before = start_scores[t + 1 - longest : t + 1].flip(0).transpose(0, 1)
        every = (before + window).transpose(1, 2) + durations[..., :longest]
        left = torch.where(ending, choose(t, 1, every[row, state]) + 1, left)
        states[..., t] = torch.where(inside, state, -1)
        starts[..., t] = inside & (left == 1)
        left = (left - 1).clamp(min=0)
    return states, starts
