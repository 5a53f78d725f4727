"""The layer in plain torch: the specification that the kernels are compared with, and the fallback without them.

Every function takes scores as :class:`hmm_speech.hmm.HMM` documents them, already validated: ``initial`` (N,) or
(B, N), ``transition`` (N, N), (B, N, N) or (B, T-1, N, N), ``emission`` (B, T, N) or None, ``lengths`` (B,), ``final``
(N,), (B, N) or None. Everything here is differentiable any number of times. Cost: B T N^2 operations and, under
autograd, memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """log sum exp along `dim`: -inf with zero gradients where every entry is -inf (torch.logsumexp gives NaN there)."""
    maximum = x.detach().amax(dim, keepdim=True)
    maximum = maximum.masked_fill(maximum == -INF, 0)
    total = (x - maximum).exp().sum(dim)
    empty = total == 0
    return torch.where(empty, -INF, torch.where(empty, 1, total).log()) + maximum.squeeze(dim)


def frames(transition: Tensor, emission: Tensor | None) -> int:
    """T, the number of frames that the scores have."""
    return emission.shape[1] if emission is not None else transition.shape[1] + 1


def _arcs(transition: Tensor, lengths: Tensor, time: int) -> list[Tensor]:
    """Scores from frame t-1 to t for t = 1..T-1, (N, N) or (B, N, N) each; 0 past the end, whatever they hold."""
    if transition.dim() < 4 or time < 2:
        return [transition] * max(time - 1, 0)
    steps = torch.arange(1, time, device=transition.device)
    inside = (steps < lengths.unsqueeze(-1))[:, :, None, None]
    return list(torch.where(inside, transition, 0).unbind(1))


def _frame_scores(emission: Tensor | None, lengths: Tensor) -> list[Tensor] | None:
    if emission is None:
        return None
    inside = torch.arange(emission.shape[1], device=emission.device) < lengths.unsqueeze(-1)
    return list(torch.where(inside.unsqueeze(-1), emission, 0).unbind(1))


class EveryArc:
    """One frame's step where arcs are (..., N, N). :class:`banded.Diagonals` is another."""

    def extend(self, alpha: Tensor, arcs: Tensor) -> Tensor:
        """Scores alpha(i) + phi(i, j) of the ways to leave states, (B, I, N), what leads to j along axis 1."""
        return alpha.unsqueeze(-1) + arcs

    def into(self, alpha: Tensor, arcs: Tensor, state: Tensor) -> Tensor:
        """Scores alpha(i) + phi(i, j) of the ways into states j (..., B): (..., B, I), the smallest i first."""
        columns = arcs.expand(alpha.shape[-2], -1, -1).transpose(1, 2)
        return alpha + columns[torch.arange(alpha.shape[-2], device=state.device), state]

    def source(self, state: Tensor, way: Tensor) -> Tensor:
        """The states i that ways of `into` come from."""
        return way


EVERY_ARC = EveryArc()


def recursion(initial, transition, emission, lengths, final, reduce, step=EVERY_ARC):
    """alpha_t(j) = reduce_i[alpha_{t-1}(i) + phi_t(i, j)] + e_t(j), with final scores added at each sequence's end.

    Returns the messages, each centred so that its maximum is 0, as a list over time of (B, N) (past a sequence's end it
    repeats), and what centring took out, (B,) in float64.
    """
    batch, num_states, time = lengths.shape[0], transition.shape[-1], frames(transition, emission)
    arcs, scores = _arcs(transition, lengths, time), _frame_scores(emission, lengths)
    alpha = torch.zeros_like(initial.expand(batch, num_states))
    offset = torch.zeros(batch, dtype=torch.float64, device=initial.device)
    messages = []
    for t in range(time):
        new = initial.expand(batch, num_states) if t == 0 else reduce(step.extend(alpha, arcs[t - 1]))
        if scores is not None:
            new = new + scores[t]
        if final is not None:
            new = torch.where((lengths == t + 1).unsqueeze(-1), new + final, new)
        centre = new.detach().amax(-1, keepdim=True)
        centre = centre.masked_fill(centre == -INF, 0)
        running = t < lengths
        alpha = torch.where(running.unsqueeze(-1), new - centre, alpha)
        offset = offset + torch.where(running, centre.squeeze(-1), 0).double()
        messages.append(alpha)
    return messages, offset


def log_partition(initial, transition, emission, lengths, final, step=EVERY_ARC) -> Tensor:
    """log sum over paths of exp(score), (B,): the forward algorithm (Rabiner 1989, eqs. 19-21) in log space.

    Each message is re-centred so that errors do not grow with T; what is taken out is summed in float64.
    """
    messages, offset = recursion(initial, transition, emission, lengths, final, lambda x: logsumexp(x, 1), step)
    if not messages:  # zeros that autograd knows, as every other result is
        nothing = torch.zeros((), dtype=torch.bool, device=initial.device)
        return torch.where(nothing, initial.expand(lengths.shape[0], -1), 0).sum(-1)
    return torch.where(lengths > 0, offset + logsumexp(messages[-1], -1).double(), 0).to(initial.dtype)


def advance(message, arcs, emission, lengths, maximum: bool = False) -> tuple[list[Tensor], Tensor]:
    """Messages of the frames that follow one whose message (B, N) is known, by sums or by maxima.

    arcs (B, C, N, N) and emission (B, C, N) lead to the C frames after it; lengths (B,), 1..C+1, counts the known frame
    too. Returns C+1 messages, each with maximum 0, (past a sequence's end its last), and what centring took out, (B,)
    in float64, which autograd takes for a constant: a message and that constant are together what they should be.
    """
    scores = torch.cat([torch.zeros_like(message).unsqueeze(1), emission], 1)
    return recursion(
        message, arcs, scores, lengths, None, (lambda x: x.amax(1)) if maximum else lambda x: logsumexp(x, 1)
    )


def viterbi(initial, transition, emission, lengths, final, step=EVERY_ARC) -> tuple[Tensor, Tensor]:
    """The best path's score (B,) and states (B, T): Rabiner 1989, eqs. 32-35. Ties go to the smallest state.

    Where no path is feasible the score is -inf and the states are -1, as they are past the end.
    """
    messages, offset = recursion(initial, transition, emission, lengths, final, lambda x: x.amax(1), step)
    time = len(messages)
    states = torch.full((lengths.shape[0], time), -1, dtype=torch.int64, device=initial.device)
    if time == 0:
        return torch.zeros_like(offset, dtype=initial.dtype), states
    arcs = _arcs(transition, lengths, time)
    best, state = messages[-1].max(-1)
    score = torch.where(lengths > 0, offset + best, 0).to(initial.dtype)
    for t in reversed(range(time)):
        if t + 1 < time:
            way = step.into(messages[t], arcs[t], state).argmax(-1)
            state = torch.where(t + 1 < lengths, step.source(state, way), state)
        states[:, t] = torch.where(t < lengths, state, -1)
    return score, torch.where((score > -INF).unsqueeze(-1), states, -1)


def topk(initial, transition, emission, lengths, final, k: int) -> tuple[Tensor, Tensor]:
    """The k best paths' scores (k, B), best first, and states (k, B, T): list Viterbi.

    delta_t(j) holds the k highest scores of paths that end in j, taken from the N k extensions of those before; a
    back-pointer is the previous state and its rank. Where there are fewer than k paths, -inf and -1.
    """
    batch, num_states, time = lengths.shape[0], transition.shape[-1], frames(transition, emission)
    device = initial.device
    states = torch.full((k, batch, time), -1, dtype=torch.int64, device=device)
    if time == 0:
        none = torch.full((k, batch), -INF, dtype=initial.dtype, device=device)
        none[0] = 0
        return none, states
    arcs, scores = _arcs(transition, lengths, time), _frame_scores(emission, lengths)
    delta = torch.full((batch, num_states, k), -INF, dtype=initial.dtype, device=device)
    offset = torch.zeros(batch, dtype=torch.float64, device=device)
    pointers = []
    for t in range(time):
        if t == 0:
            new = delta.clone()
            new[..., 0] = initial.expand(batch, num_states)
        else:
            into = arcs[t - 1].expand(batch, num_states, num_states).transpose(1, 2)  # (B, j, i)
            extensions = (into.unsqueeze(-1) + delta.unsqueeze(1)).flatten(2)  # (B, j, i k)
            new, pointer = extensions.topk(k, dim=-1)
            pointers.append(pointer)
        if scores is not None:
            new = new + scores[t].unsqueeze(-1)
        if final is not None:
            new = torch.where((lengths == t + 1)[:, None, None], new + final.expand(batch, -1).unsqueeze(-1), new)
        centre = new.amax((1, 2))
        centre = centre.masked_fill(centre == -INF, 0)
        running = t < lengths
        delta = torch.where(running[:, None, None], new - centre[:, None, None], delta)
        offset = offset + torch.where(running, centre, 0).double()
    score, place = delta.flatten(1).topk(k, dim=-1)  # place = state * k + rank, as in the pointers
    invalid = ~(offset < INF).unsqueeze(-1)  # a score is NaN or +inf
    found = (score > -INF) & ~invalid
    for t in reversed(range(time)):
        if t + 1 < time:
            back = pointers[t].flatten(1).gather(1, place)
            place = torch.where((t + 1 < lengths).unsqueeze(-1), back, place)
        states[:, :, t] = torch.where((t < lengths).unsqueeze(-1) & found, place // k, -1).T
    empty = lengths == 0  # one path, the empty one
    total = torch.where(found, offset.unsqueeze(-1) + score, -INF).masked_fill(invalid, torch.nan)
    total = torch.where(empty.unsqueeze(-1), torch.full_like(total, -INF), total)
    total[:, 0] = torch.where(empty, 0, total[:, 0])
    return total.T.to(initial.dtype), states


def sample(initial, transition, emission, lengths, final, uniform: Tensor, step=EVERY_ARC) -> Tensor:
    """Paths drawn from the posterior, (S, B, T), by forward filtering, backward sampling (Scott 2002, section 2.1).

    z_{L-1} ~ alpha_{L-1}, then z_{t-1} with probability proportional to exp(alpha_{t-1}(i) + phi_t(i, z_t)), by the
    inverse of its cumulative distribution at `uniform` (S, B, T). -1 past the end and where no path is feasible.
    """
    messages, _ = recursion(initial, transition, emission, lengths, final, lambda x: logsumexp(x, 1), step)
    return walk_back(messages, transition, lengths, uniform, step)


def walk_back(messages: list[Tensor], transition: Tensor, lengths: Tensor, uniform: Tensor, step=EVERY_ARC) -> Tensor:
    """The samples of :func:`sample` from its messages, (B, N) or, different for each sample, (S, B, N)."""
    time, states = len(messages), torch.full(uniform.shape, -1, dtype=torch.int64, device=uniform.device)
    if time == 0:
        return states
    arcs = _arcs(transition, lengths, time)
    feasible = logsumexp(messages[-1], -1) > -INF
    state = torch.zeros_like(states[..., 0])
    for t in reversed(range(time)):
        before, state = state, _draw(messages[t].expand(*uniform.shape[:2], -1), uniform[:, :, t])
        if t + 1 < time:
            way = _draw(step.into(messages[t], arcs[t], before), uniform[:, :, t])
            state = torch.where(t + 1 < lengths, step.source(before, way), state)
        states[:, :, t] = torch.where((t < lengths) & feasible, state, -1)
    return states


def _draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Indices (S, B) drawn in proportion to the exponentials of scores (S, B, I)."""
    cumulative = torch.softmax(scores, -1).cumsum(-1)
    drawn = (cumulative <= uniform.unsqueeze(-1) * cumulative[..., -1:]).sum(-1)
    last = scores.shape[-1] - 1 - (scores > -INF).flip(-1).int().argmax(-1)
    return torch.minimum(drawn, last)
