"""Forward-backward through two factors, by scaled probabilities: operators for any device.

    L(i, r) = exp(left(i, r) - c_r),         c_r = max_i left(i, r)
    R(r, j) = exp(right(r, j) + c_r - c_j),  c_j = max_r [right(r, j) + c_r]
    w_t(j)  = exp(e_t(j) + c_j - max of the same over j)
    u_t     = a_{t-1} L,  a_t = 2^k (u_t R) * w_t, its sum near 2^30;  log Z = log of the last sum + what is taken out
    v_t     = R (w_t * b_t),  b_{t-1} = L v_t / G_{t-1},  G such that sum_i a_t(i) b_t(i) = 1;  gamma_t = a_t * b_t
    counts of left  = L * sum_t a_{t-1}^T v_t / G_{t-1}
    counts of right = R * sum_t u_t^T (w_t * b_t) / G_{t-1}

(Rabiner 1989, section V.A, with a hidden class between two states: Chiu et al. 2021.) The sweeps over time are
native (csrc/cpu/low_rank.h; on a GPU csrc/cuda/low_rank.cu, by low_rank_cuda.py) or, on other devices and without the
library, composed of torch's own operators (low_rank_sweeps.py); the counts are one product over all frames each. Cost a
frame and sequence: 4 N R flops forward, 8 N R backward with counts, N exps each; memory: messages of N + R numbers, and
2 N + R more backward. No (N, N) is formed. No limits on N, R and T.

When is it exact? A number below 2^-m, m = 126 (float32) or 1022, is lost; p = 24 or 53 bits are wanted; L, R <= 1; a
message's sum is below 2^31, s_t is the sum before it is scaled.
 (mixing) All of left is finite, each of its columns within B bits. A = L R then has A(i, j) <= 2^B A(i', j), so that
    backward scores of two states differ by B bits at most. Lost at t are N terms below 2^-m of each u(r), which reach N
    states through R <= 1, R terms of each of N sums, and N weights before sums of R numbers of at most 2^31: together
    less than 2 N R 2^(31 - m), whose posterior is below N R 2^(B + 32 - m) / s_t. Over T frames this is less than 2^-p
    if s_t >= T N R 2^(B + 32 - m + p).
 (entrywise) Every class and state that can be reached has a sum of at least 2^(32 - m), to which N lost terms are
    N 2^-32, and a weight above 2^-m, to which smaller ones are lifted: nothing was lost or made up. What is smaller,
    and reached by an allowed arc from what is not 0, fails.
Backward, lost terms of v are below N 2^-m, of b below R N 2^-m; a < 2^31, and 1 / G_{t-1} is what a_t was scaled by, at
most 2^31 / s_t: their posterior is below R N 2^(62 - m) / s_t, and s_t >= T N R 2^(62 - m + p) is asked for, too.
Either way, no allowed entry of L and R may be below 2^(26 - m). Sequences that fail are done again in log space in
float64 (low_rank_redo.py) and counted by :func:`library.count_redone`; on a GPU, on the device (low_rank_redo.cu).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import library, low_rank_cuda, low_rank_redo, low_rank_sweeps, ops
from .low_rank_sweeps import INF, TOP, finite

_ARGUMENTS = "Tensor initial, Tensor factors, Tensor emission, Tensor lengths, Tensor? final"
_MESSAGES = "Tensor log_partition, Tensor alpha, Tensor half, Tensor method"
_lib = torch.library.Library("hmm_speech", "FRAGMENT")
_lib.define(f"low_rank_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
_lib.define(f"low_rank_backward(Tensor grad, {_ARGUMENTS}, {_MESSAGES}, bool edges) -> (Tensor, Tensor)")

SMALLEST = {torch.float32: 126, torch.float64: 1022}
PRECISION = {torch.float32: 24, torch.float64: 53}


class Factors:
    """L and R, the shift c_j of the emissions and its maximum, and what the certificates ask for.

    pairs (..., 2 R, N): R rows of L transposed, then those of R. shift (..., N), top () or (B,). demands (2,), in
    float64 on the factors' device: the least sum, and whether that is all that is asked, `mixing`. Nothing waits for a
    GPU until `least`, `mixing` or `wide` is looked at."""

    def __init__(self, factors: Tensor, time: int):
        left, right = factors.double().chunk(2, -2)  # (..., R, N), left transposed
        self.rank, num_states = right.shape[-2:]
        middle = finite(left.amax(-1, keepdim=True))  # (..., R, 1)
        right = right + middle
        shift = (finite(right.amax(-2, keepdim=True)) * 64).round() / 64  # on a grid: its differences are exact
        pairs = torch.cat([left - middle, right - shift], -2)
        top = shift.amax(-1, keepdim=True)
        self.shift, self.top = (shift - top).squeeze(-2), top.flatten(-2).squeeze(-1)
        self.pairs = pairs.exp().to(factors.dtype)
        size, m, p = math.log2(max(time, 1) * num_states * self.rank), SMALLEST[factors.dtype], PRECISION[factors.dtype]
        range_of_left = pairs[..., : self.rank, :].min() / math.log(2)
        usable = finite(pairs).min() >= (26 - m) * math.log(2)  # False for NaN
        needed = size - range_of_left + 32 - m + p
        mixing = needed <= TOP - 16  # beyond that, benign frames would fail it
        least = torch.where(mixing, needed, -INF).clamp(min=size + 62 - m + p).exp2()
        self.demands = torch.stack([torch.where(usable, least, INF), mixing.double()])

    @functools.cached_property
    def least(self) -> float:
        return self.demands[0].item()

    @functools.cached_property
    def mixing(self) -> bool:
        return bool(self.demands[1])

    @functools.cached_property
    def wide(self) -> bool:
        return bool((self.shift < -16).any())  # e + c may cancel

    @property
    def left(self) -> Tensor:
        return self.pairs[..., : self.rank, :].transpose(-1, -2)

    @property
    def right(self) -> Tensor:
        return self.pairs[..., self.rank :, :]


class _Call(ops._Call):
    def __init__(self, made: Factors, initial, emission, lengths, final):
        super().__init__(initial, made.pairs, emission, lengths, final)
        self.shift, self.rank = made.shift.to(self.dtype).contiguous(), made.rank
        self.problem = library.LowRankProblem(
            chain=self.problem, rank=made.rank, shift=self.shift.data_ptr(),
            shift_batch_stride=self.shift.stride(0) if self.shift.dim() == 2 else 0,
            least=made.least, mixing=made.mixing, wide=made.wide,
        )  # fmt: skip


def _native_forward(made: Factors, initial, emission, lengths, final):
    call = _Call(made, initial, emission, lengths, final)
    batch, time, num_states = call.shape
    log_partition, method = call.empty(batch, dtype=torch.float64), call.empty(batch, dtype=torch.int32)
    alpha, half = call.empty(batch, time, num_states), call.empty(batch, time, made.rank)
    call("low_rank_forward", log_partition, alpha, half, method)
    return log_partition, alpha, half, method


def _native_backward(made: Factors, grad, initial, emission, lengths, final, alpha, method, edges):
    call = _Call(made, initial, emission, lengths, final)
    batch, time, num_states = call.shape
    state = call.empty(batch, time, num_states)
    classes, leaving = (call.empty(batch, time, made.rank), torch.empty_like(state)) if edges else (None, None)
    call("low_rank_backward", grad.contiguous(), alpha, method, state, classes, leaving)
    return state, classes, leaving


def _on_gpu(emission: Tensor) -> bool:
    return emission.device.type == "cuda" and library.use_native("cuda", "low_rank")


def _forward(initial, factors, emission, lengths, final):
    if not emission.shape[0]:
        return _fake_forward(initial, factors, emission, lengths, final)  # all empty
    made = Factors(factors, emission.shape[1])
    if _on_gpu(emission):
        return low_rank_cuda.forward(made, initial, factors, emission, lengths, final)
    sweep = _native_forward if library.use_native(emission.device.type) else low_rank_sweeps.forward
    log_partition, alpha, half, method = sweep(made, initial, emission, lengths, final)
    log_partition += (lengths - 1).clamp(min=0) * made.top
    lost = (method == library.REDONE).nonzero().flatten().tolist()
    for b in lost:
        log_partition[b] = low_rank_redo.Sequence(initial, factors, emission, lengths, final, b).log_partition
    library.count_redone(len(lost))
    return log_partition.to(alpha.dtype), alpha, half, method


def _backward(grad, initial, factors, emission, lengths, final, log_partition, alpha, half, method, edges):
    edge = factors.new_zeros(factors.shape if edges else (0,))
    if not emission.shape[0]:
        return torch.empty_like(emission), edge
    made = Factors(factors, emission.shape[1])
    if _on_gpu(emission):
        scores = (initial, factors, emission, lengths, final)
        counted = functools.partial(_count, edge, grad, alpha, half, made=made)
        state = low_rank_cuda.backward(
            made, grad, *scores, log_partition, alpha, method, edge if edges else None, counted
        )
        return state, edge
    sweep = _native_backward if library.use_native(emission.device.type) else low_rank_sweeps.backward
    state, classes, leaving = sweep(made, grad, initial, emission, lengths, final, alpha, method, edges)
    if edges and emission.numel():
        _count(edge, grad, alpha, half, classes, leaving, made)
    for b in (method == library.REDONE).nonzero().flatten().tolist():
        sequence = low_rank_redo.Sequence(initial, factors, emission, lengths, final, b)
        sequence.backward(float(grad[b]), state[b], (edge[b] if edge.dim() == 3 else edge) if edges else None)
    return state, edge


def _over_frames(x: Tensor, y: Tensor, axes: int) -> Tensor:
    """Sums over frames of products of (B, T, R) and (B, T, N): (R, N), or (B, R, N) for 3 axes. Blocks of frames are
    added up in float64, so that rounding does not grow with T."""
    frames = 1024
    if axes == 2:
        x, y = x.flatten(0, 1), y.flatten(0, 1)
    total = 0
    for a, b in zip(x.split(frames, -2), y.split(frames, -2), strict=True):
        total = total + (a.transpose(-1, -2) @ b).double()
    return total


def _count(edge, grad, alpha, half, classes, leaving, made: Factors) -> None:
    """edge (..., 2 R, N) = grad times the counts of both factors."""
    largest = grad.abs().max()
    scale = torch.where(largest > 0, largest, 1)
    weight = (grad / scale)[:, None, None]
    left, right = _over_frames(classes * weight, alpha, edge.dim()), _over_frames(half * weight, leaving, edge.dim())
    # What is forbidden gets nothing, whatever its sum overflowed to.
    edge.copy_(torch.where(made.pairs > 0, torch.cat([left, right], -2) * made.pairs, 0) * scale)


def _fake_forward(initial, factors, emission, lengths, final):
    batch, time, num_states = emission.shape
    return (
        emission.new_empty(batch),
        emission.new_empty(batch, time, num_states),
        emission.new_empty(batch, time, factors.shape[-2] // 2),
        lengths.new_empty(batch, dtype=torch.int32),
    )


def _fake_backward(grad, initial, factors, emission, lengths, final, log_partition, alpha, half, method, edges):
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
