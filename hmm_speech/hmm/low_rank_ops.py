"""Forward-backward through two factors, by scaled probabilities on any device: operators composed of torch's own.

    L(i, r) = exp(left(i, r) - c_r),         c_r = max_i left(i, r)
    R(r, j) = exp(right(r, j) + c_r - c_j),  c_j = max_r [right(r, j) + c_r]
    w_t(j)  = exp(e_t(j) + c_j - max of the same over j)
    u_t     = a_{t-1} L, a_t = 2^30 (u_t R) * w_t / s_t, s_t its sum before;  log Z = sum_t log s_t + what is taken out
    v_t     = R (w_t * b_t),  b_{t-1} = L v_t / G_{t-1},  G such that sum_i a_t(i) b_t(i) = 1;  gamma_t = a_t * b_t
    counts of left  = L * sum_t a_{t-1}^T v_t / G_{t-1}
    counts of right = R * sum_t u_t^T (w_t * b_t) / G_{t-1}

(Rabiner 1989, section V.A, with a hidden class between two states: Chiu et al. 2021.) Sequences run together, in
the order of falling length, so that a half step is one matrix product; the counts are one product over all frames each.
Cost a frame and sequence: 4 N R flops forward, 8 N R backward with counts, N exps; memory: two messages and the
weights, B T (2 N + R) numbers, and as much again backward. No (N, N) is formed. No limits on N, R and T.

When is it exact? A number below 2^-m, m = 126 (float32) or 1022, is lost; p = 24 or 53 bits are wanted; L, R <= 1.
 (mixing) All of left is finite, each of its columns within B bits. A = L R then has A(i, j) <= 2^B A(i', j), so that
    backward scores of two states differ by B bits at most. Lost at t are N terms below 2^-m of each u(r), which reach N
    states through R <= 1, R terms of each of N sums, and N weights before sums of R numbers of at most 2^31: together
    less than 2 N R 2^(31 - m), whose posterior is below N R 2^(B + 32 - m) / s_t. Over T frames this is less than 2^-p
    if s_t >= T N R 2^(B + 32 - m + p).
 (entrywise) Every class and state that can be reached has a sum of at least 2^(32 - m), to which N lost terms are
    N 2^-32: nothing was lost. What is smaller, and reached by an allowed arc from what is not 0, fails.
Backward, lost terms of v are below N 2^-m, of b below R N 2^-m; a <= 2^30, and G_{t-1} is s_t / 2^30 before scaling:
their posterior is below R N 2^(61 - m) / s_t, and s_t >= T N R 2^(61 - m + p) is asked for, too. Either way, no allowed
entry of L and R may be below 2^(26 - m). Sequences that fail are done again in log space in float64 (low_rank_redo.py)
and counted by :func:`library.count_redone`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import library, low_rank_redo

_ARGUMENTS = "Tensor initial, Tensor factors, Tensor emission, Tensor lengths, Tensor? final"
_MESSAGES = "Tensor log_partition, Tensor alpha, Tensor half, Tensor weights, Tensor order, Tensor redone"
_lib = torch.library.Library("hmm_speech", "FRAGMENT")
_lib.define(f"low_rank_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
_lib.define(f"low_rank_backward(Tensor grad, {_ARGUMENTS}, {_MESSAGES}, bool edges) -> (Tensor, Tensor)")

INF = float("inf")
TOP = 30  # messages are scaled to a sum of 2^30
SMALLEST = {torch.float32: 126, torch.float64: 1022}
PRECISION = {torch.float32: 24, torch.float64: 53}


def split(factors: Tensor) -> tuple[Tensor, Tensor]:
    """left (..., N, R) and right (..., R, N) from both as rows of one, (..., 2 R, N)."""
    left, right = factors.chunk(2, -2)
    return left.transpose(-1, -2), right


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(x == -INF, 0)


class Factors:
    """L and R, the shift c_j of the emissions and its maximum, and what the certificates ask for."""

    def __init__(self, factors: Tensor, time: int):
        left, right = split(factors.double())
        rank, self.num_states = right.shape[-2:]
        middle = _finite(left.amax(-2, keepdim=True))  # (..., 1, R)
        right = right + middle.transpose(-1, -2)
        shift = (_finite(right.amax(-2, keepdim=True)) * 64).round() / 64  # on a grid: its differences are exact
        left, right = left - middle, right - shift
        self.top = shift.amax(-1, keepdim=True)
        self.shift = (shift - self.top).squeeze(-2)  # (..., N)
        self.top = self.top.flatten(-2).squeeze(-1)  # () or (B,)
        self.left, self.right = left.exp().to(factors.dtype), right.exp().to(factors.dtype)
        self.wide = bool((self.shift < -16).any())  # e + c may cancel
        size, m, p = math.log2(max(time, 1) * self.num_states * rank), SMALLEST[factors.dtype], PRECISION[factors.dtype]
        lowest = min(float(x.masked_fill(x == -INF, 0).min()) for x in (left, right))
        self.usable = lowest >= (26 - m) * math.log(2)  # False for NaN
        needed = size - float(left.min()) / math.log(2) + 32 - m + p
        self.mixing = needed <= TOP - 16  # beyond that, benign frames would fail it
        self.least = 2.0 ** max(needed if self.mixing else -INF, size + 61 - m + p)

    def select(self, order: Tensor) -> None:
        """Sequences in this order, where each has factors of its own."""
        if self.left.dim() == 3:
            self.left, self.right, self.shift, self.top = (
                x[order] for x in (self.left, self.right, self.shift, self.top)
            )


def multiply(x: Tensor, matrix: Tensor, out: Tensor) -> None:
    """out = x @ matrix for rows x (n, K), a matrix (K, M) or one for each of them, the first n of (B, K, M)."""
    if matrix.dim() == 2:
        torch.mm(x, matrix, out=out)
    else:
        torch.bmm(x.unsqueeze(1), matrix[: x.shape[0]], out=out.unsqueeze(1))


def _weights(score, lengths, final, shift: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """w (T, B, N), 0 past the end, else 0 only where a state is forbidden; and what was taken out, (B,) in float64.

    ``score`` (T, B, N), e, is overwritten."""
    time, device, dtype = score.shape[0], score.device, score.dtype
    inside = torch.arange(time, device=device).unsqueeze(-1) < lengths  # (T, B)
    score.masked_fill_(~inside.unsqueeze(-1), 0)
    if wide:
        score = score.double()
    top = _finite(score.amax(-1, keepdim=True))
    score, taken = score.sub_(top), torch.where(inside, top.squeeze(-1), 0).double().sum(0)
    if final is not None:
        rows, last = torch.arange(lengths.shape[0], device=device)[lengths > 0], (lengths - 1)[lengths > 0]
        top = _finite(final.amax(-1, keepdim=True))
        score[last, rows] += (final - top).expand(lengths.shape[0], -1)[rows]
        taken += torch.where(lengths > 0, top.squeeze(-1), 0).double()
    score[1:] += shift.to(score.dtype)
    top = _finite(score.amax(-1, keepdim=True))
    taken += torch.where(inside, top.squeeze(-1), 0).double().sum(0)
    score = (score - top if wide else score.sub_(top)).to(dtype)
    forbidden = ~inside.unsqueeze(-1) | (score == -INF)
    return score.exp_().clamp_(min=torch.finfo(score.dtype).tiny).masked_fill_(forbidden, 0), taken


def _running(lengths: Tensor, time: int) -> list[int]:
    """How many sequences have a frame t, for t = 0..T (none at T)."""
    ended = torch.bincount(lengths, minlength=time + 1).cumsum(0)
    return (lengths.shape[0] - ended).tolist()


def _sweep(alpha: Tensor, half: Tensor, weights: Tensor, total: Tensor, made: Factors, running: list[int]) -> None:
    """Messages a_t (T, B, N) from a_0 on, not yet scaled, and u_t (T, B, R); s_t (T, B)."""
    for t, n in enumerate(running[:-1]):
        message = alpha[t, :n]
        if t:
            multiply(alpha[t - 1, :n], made.left, half[t, :n])
            multiply(half[t, :n], made.right, message)
            message.mul_(weights[t, :n])
        mass = torch.sum(message, -1, out=total[t, :n])
        message.mul_((2.0**TOP / mass).unsqueeze(-1))


def _reached_and_lost(alpha, half, weights, total, initial, made: Factors) -> Tensor:
    """(B,): whether the entrywise certificate fails. Scaling by 2^30 / s_t is undone in the comparison."""
    smallest = 2.0 ** (TOP + 2 - SMALLEST[alpha.dtype])
    suspect = (alpha < (smallest * 2.0**TOP / total).unsqueeze(-1)) & (weights > 0)
    suspect_class = half < smallest
    lost = (suspect[0] & (initial > -INF)).any(-1)
    left, right = (made.left > 0).to(alpha.dtype), (made.right > 0).to(alpha.dtype)
    for b in suspect[1:].any(-1).any(0).logical_or(suspect_class[1:].any(-1).any(0)).nonzero().flatten().tolist():
        into, out = (left[b], right[b]) if left.dim() == 3 else (left, right)
        reached = ((alpha[:-1, b] > 0).to(alpha.dtype) @ into) > 0
        lost[b] |= (suspect_class[1:, b] & reached).any()
        lost[b] |= (suspect[1:, b] & ((reached.to(alpha.dtype) @ out) > 0)).any()
    return lost


def _forward(initial, factors, emission, lengths, final):
    batch, time, _ = emission.shape
    if not batch:
        return _fake_forward(initial, factors, emission, lengths, final)  # all empty
    order = lengths.argsort(descending=True, stable=True)
    made = Factors(factors, time)
    made.select(order)
    first = initial.expand(batch, -1)[order]
    top = _finite(first.amax(-1, keepdim=True))
    size, last = lengths[order], final[order] if final is not None and final.dim() == 2 else final
    scores = emission.transpose(0, 1).index_select(1, order)  # a copy
    weights, taken = _weights(scores, size, last, made.shift, made.wide)
    alpha, half = torch.zeros_like(weights), weights.new_zeros(time, batch, made.left.shape[-1])
    total = torch.ones_like(weights[..., 0])
    lost = torch.zeros_like(size, dtype=torch.bool)
    if time:
        taken += torch.where(size > 0, top.squeeze(-1), 0).double() + (size - 1).clamp(min=0) * made.top
        torch.mul((first - top).exp(), weights[0], out=alpha[0]).mul_(2.0**TOP)
        _sweep(alpha, half, weights, total, made, _running(size, time))
        inside = torch.arange(time, device=size.device).unsqueeze(-1) < size
        taken += torch.where(inside, total.double().log() - TOP * math.log(2), 0).sum(0)
        lost = (~(total >= made.least) & inside).any(0)
        if not made.usable:
            lost |= size > 0
        elif not made.mixing:
            lost |= _reached_and_lost(alpha, half, weights, total, first, made)
    log_partition = torch.empty_like(taken).scatter(0, order, taken)
    redone = torch.empty_like(lost).scatter(0, order, lost)
    for b in redone.nonzero().flatten().tolist():
        log_partition[b] = low_rank_redo.Sequence(initial, factors, emission, lengths, final, b).log_partition
    if lost.any():
        library.count_redone(int(lost.sum()))
        alpha[:, lost], half[:, lost] = 0, 0  # of no use, but the same bits every time
    return log_partition.to(alpha.dtype), alpha, half, weights, order, redone


def _backward(
    grad, initial, factors, emission, lengths, final, log_partition, alpha, half, weights, order, redone, edges
):
    state, edge = torch.zeros_like(emission), factors.new_zeros(factors.shape if edges else (0,))
    if not emission.shape[0]:
        return state, edge
    made = Factors(factors, emission.shape[1])
    kept = ~redone[order] & (lengths[order] > 0)
    if not bool(kept.all()):
        order, alpha, half, weights = order[kept], alpha[:, kept], half[:, kept], weights[:, kept]
    if order.numel():
        made.select(order)
        gamma, classes, leaving = _sweep_back(alpha, weights, made, _running(lengths[order], emission.shape[1]), edges)
        gamma *= grad[order].unsqueeze(-1)
        state[order] = gamma.transpose(0, 1)
        if edges:
            _count(edge, grad, order, alpha, half, classes, leaving, made)
    for b in redone.nonzero().flatten().tolist():
        sequence = low_rank_redo.Sequence(initial, factors, emission, lengths, final, b)
        sequence.backward(float(grad[b]), state[b], (edge[b] if edge.dim() == 3 else edge) if edges else None)
    return state, edge


def _sweep_back(alpha: Tensor, weights: Tensor, made: Factors, running: list[int], edges: bool):
    """gamma_t (T, B, N), and, for edges, v_t / G_{t-1} (T, B, R) and w_t b_t / G_{t-1} (T, B, N)."""
    time, batch, num_states = alpha.shape
    gamma, classes = torch.zeros_like(alpha), alpha.new_zeros(time, batch, made.left.shape[-1])
    leaving = torch.zeros_like(alpha) if edges else alpha.new_empty(1, batch, num_states).expand(time, -1, -1)
    back_left, back_right = made.left.transpose(-1, -2), made.right.transpose(-1, -2)
    beta = torch.ones_like(alpha[0])
    for t in reversed(range(time)):
        n, before = running[t], running[t + 1]
        if before:
            multiply(leaving[t + 1, :before], back_right, classes[t + 1, :before])
            multiply(classes[t + 1, :before], back_left, beta[:before])
        message, b = alpha[t, :n], beta[:n]
        b.masked_fill_(message == 0, 0)  # what cannot be reached may have overflowed
        posterior = torch.mul(message, b, out=gamma[t, :n])
        inverse = posterior.sum(-1, keepdim=True).reciprocal_()
        posterior.mul_(inverse)
        if edges and before:
            classes[t + 1, :before].mul_(inverse[:before])
            leaving[t + 1, :before].mul_(inverse[:before])
        torch.mul(weights[t, :n], b.mul_(inverse), out=leaving[t, :n])
    return gamma, classes, leaving


def _over_frames(x: Tensor, y: Tensor, axes: int) -> Tensor:
    """Sums over frames of products of (T, B, R) and (T, B, N): (R, N), or (B, R, N) for 3 axes. Blocks of frames are
    added up in float64, so that rounding does not grow with T."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for a, b in zip(x.split(256), y.split(256), strict=True):
        if axes == 2:
            total = total + a.flatten(0, 1).T @ b.flatten(0, 1)
        else:
            total = total + a.permute(1, 2, 0) @ b.transpose(0, 1)
    return total.expand(*(x.shape[1:2] if axes == 3 else ()), x.shape[2], y.shape[2])


def _count(edge, grad, order, alpha, half, classes, leaving, made: Factors) -> None:
    """edge (..., 2 R, N) = grad times the counts of both factors."""
    largest = grad[order].abs().max()
    scale = torch.where(largest > 0, largest, 1)
    weight = (grad[order] / scale).unsqueeze(-1)
    classes, leaving = classes.mul_(weight), leaving.mul_(weight)
    left, right = _over_frames(classes[1:], alpha[:-1], edge.dim()), _over_frames(half[1:], leaving[1:], edge.dim())
    pairs = torch.cat([made.left.transpose(-1, -2), made.right], -2)
    # What is forbidden gets nothing, whatever its sum overflowed to.
    found = torch.where(pairs > 0, torch.cat([left, right], -2) * pairs, 0) * scale
    if edge.dim() == 2:
        edge.copy_(found)
    else:
        edge[order] = found


def _fake_forward(initial, factors, emission, lengths, final):
    batch, time, num_states = emission.shape
    return (
        emission.new_empty(batch),
        emission.new_empty(time, batch, num_states),
        emission.new_empty(time, batch, factors.shape[-2] // 2),
        emission.new_empty(time, batch, num_states),
        lengths.new_empty(batch),
        lengths.new_empty(batch, dtype=torch.bool),
    )


def _fake_backward(
    grad, initial, factors, emission, lengths, final, log_partition, alpha, half, weights, order, redone, edges
):
    return emission.new_empty(emission.shape), factors.new_empty(factors.shape if edges else (0,))


for _name, _kernel, _fake in (
    ("low_rank_forward", _forward, _fake_forward),
    ("low_rank_backward", _backward, _fake_backward),
):
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hmm_speech::{_name}", _fake, lib=_lib)


class Kernels:
    """What :mod:`structured` calls."""

    def __init__(self, step):
        self.step = step

    def forward(self, *scores):
        return torch.ops.hmm_speech.low_rank_forward(*scores)

    def backward(self, *arguments):
        return torch.ops.hmm_speech.low_rank_backward(*arguments)
