"""The sweeps over time of :mod:`low_rank_ops` (whose recursions and names these are) in torch's own operators, for
devices and installations without the library. A half step is one product over the batch; past a
sequence's end, all is 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import library

INF = float("inf")
TOP = 30  # messages are scaled to a sum of 2^30
SMALLEST_ENTRY = {torch.float32: -94, torch.float64: -990}  # bits of what is certainly complete: (entrywise)


def finite(x: Tensor) -> Tensor:
    """x with 0 in place of -inf."""
    return x.masked_fill(x == -INF, 0)


def _inside(emission: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(emission.shape[1], device=emission.device) < lengths.unsqueeze(-1)  # (B, T)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix for rows x (B, K), a matrix (K, M) or one for each of them, (B, K, M)."""
    return x @ matrix if matrix.dim() == 2 else (x.unsqueeze(1) @ matrix).squeeze(1)


def _weights(made, emission, lengths, final) -> tuple[Tensor, Tensor]:
    """w (B, T, N), 0 past the end, else 0 only where a state is forbidden; and what was taken out, (B,) in float64."""
    inside = _inside(emission, lengths)
    score = emission.masked_fill(~inside.unsqueeze(-1), 0).to(torch.float64 if made.wide else emission.dtype)
    top = finite(score.amax(-1, keepdim=True))
    score, taken = score - top, torch.where(inside, top.squeeze(-1), 0).double().sum(-1)
    if final is not None:
        rows = torch.arange(lengths.shape[0], device=lengths.device)[lengths > 0]
        top = finite(final.amax(-1, keepdim=True))
        score[rows, lengths[rows] - 1] += (final - top).expand(lengths.shape[0], -1)[rows]
        taken += torch.where(lengths > 0, top.squeeze(-1), 0).double()
    score[:, 1:] += made.shift.to(score.dtype).unsqueeze(-2)
    top = finite(score.amax(-1, keepdim=True))
    taken += torch.where(inside, top.squeeze(-1), 0).double().sum(-1)
    score = (score - top).to(emission.dtype)
    forbidden = ~inside.unsqueeze(-1) | (score == -INF)
    return score.exp_().clamp_(min=torch.finfo(score.dtype).tiny).masked_fill_(forbidden, 0), taken


def _reached_and_lost(made, alpha, half, weights, total, inside, initial) -> Tensor:
    """(B,): whether the entrywise certificate fails. Scaling by 2^30 / s_t is undone in the comparison."""
    smallest = 2.0 ** SMALLEST_ENTRY[alpha.dtype]
    lifted = weights <= torch.finfo(weights.dtype).tiny
    suspect = ((alpha < (smallest * 2.0**TOP / total).unsqueeze(-1)) | lifted) & (weights > 0)
    suspect_class = (half < smallest) & inside.unsqueeze(-1)
    lost = (suspect[:, 0] & (initial > -INF)).any(-1)
    left, right = (made.left > 0).to(alpha.dtype), (made.right > 0).to(alpha.dtype)
    for b in suspect[:, 1:].any(-1).logical_or(suspect_class[:, 1:].any(-1)).any(-1).nonzero().flatten().tolist():
        into, out = (left[b], right[b]) if left.dim() == 3 else (left, right)
        reached = ((alpha[b, :-1] > 0).to(alpha.dtype) @ into) > 0
        lost[b] |= (suspect_class[b, 1:] & reached).any()
        lost[b] |= (suspect[b, 1:] & ((reached.to(alpha.dtype) @ out) > 0)).any()
    return lost


def forward(made, initial, emission, lengths, final) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log Z (B,) in float64, but for c_j's maxima; a (B, T, N), u (B, T, R), 0 for sequences that were lost; which
    those are, (B,): library.REDONE, else 0."""
    batch, time, _ = emission.shape
    weights, log_partition = _weights(made, emission, lengths, final) if time else (emission, lengths.double() * 0)
    alpha, half = torch.zeros_like(weights), weights.new_zeros(batch, time, made.rank)
    lost = torch.zeros_like(lengths, dtype=torch.bool)
    if time and batch:
        inside, total = _inside(emission, lengths), torch.ones_like(weights[..., 0])
        first = initial.expand(batch, -1)
        top = finite(first.amax(-1, keepdim=True))
        message = (first - top).exp() * weights[:, 0] * 2.0**TOP
        for t in range(time):
            if t:
                half[:, t] = _times(alpha[:, t - 1], made.left)
                message = _times(half[:, t], made.right) * weights[:, t]
            total[:, t] = torch.where(inside[:, t], message.sum(-1), 1)
            alpha[:, t] = message * (2.0**TOP / total[:, t]).unsqueeze(-1)
        log_partition += torch.where(inside, total.double().log() - TOP * math.log(2), 0).sum(-1)
        log_partition += torch.where(lengths > 0, top.squeeze(-1), 0).double()
        lost = (~(total >= made.least) & inside).any(-1)
        if not made.mixing:
            lost |= _reached_and_lost(made, alpha, half, weights, total, inside, first)
        alpha[lost], half[lost] = 0, 0
    return log_partition, alpha, half, lost.to(torch.int32) * library.REDONE


def backward(made, grad, initial, emission, lengths, final, alpha, method, edges):
    """grad * gamma_t (B, T, N); and, for edges, v_{t+1} / G_t (B, T, R) and w_t b_t / G_{t-1} (B, T, N), else None."""
    batch, time, num_states = emission.shape
    gamma, classes = torch.zeros_like(alpha), alpha.new_zeros(batch, time, made.rank)
    if not gamma.numel():
        return gamma, classes, gamma
    weights, _ = _weights(made, emission, lengths, final)
    weights[method == library.REDONE] = 0  # may hold NaN
    back_left, back_right = made.left.transpose(-1, -2), made.right.transpose(-1, -2)
    leaving = torch.zeros_like(alpha) if edges else alpha.new_empty(batch, 1, num_states).expand(-1, time, -1)
    for t in reversed(range(time)):
        message, beta = alpha[:, t], torch.ones_like(alpha[:, t])
        if t + 1 < time:
            classes[:, t] = _times(leaving[:, t + 1], back_right)
            last = (lengths == t + 1).unsqueeze(-1)
            beta = torch.where(last, beta, _times(classes[:, t], back_left))
        beta = beta.masked_fill(message == 0, 0)  # what cannot be reached may have overflowed
        posterior = message * beta
        mass = posterior.sum(-1, keepdim=True)
        inverse = torch.where(mass > 0, mass.reciprocal(), 0)
        gamma[:, t] = posterior * inverse
        if t + 1 < time:
            classes[:, t] *= inverse
            if edges:
                leaving[:, t + 1] *= inverse
        leaving[:, t] = weights[:, t] * beta * inverse
    if edges:
        leaving[:, 0] = 0  # no arc leads there
    return gamma.mul_(grad[:, None, None]), classes, leaving
