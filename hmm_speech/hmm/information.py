"""Entropies and divergences between chains over the same frames, from posteriors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .api import HMM


def _doubled(hmm: HMM) -> HMM:
    """The same chain with its scores in float64; gradients reach the original ones."""
    initial, transition, emission, lengths, final = hmm._scores
    doubles = [None if x is None else x.double() for x in (initial, transition, emission, final)]
    return type(hmm)(*doubles[:3], lengths, doubles[3])


def _expectation(weight: Tensor, score: Tensor) -> Tensor:
    """Sum over all axes but the first of weight * score; nothing times -inf (or NaN, in the padding) is nothing."""
    used = torch.where((weight > 0) | score.isfinite(), score, 0)
    return (weight * used).flatten(1).sum(1)


def expected_score(p: HMM, q: HMM) -> Tensor:
    """E_p[s_q(z)], (B,): posteriors of p times scores of q. -inf where q forbids what p allows."""
    initial, transition, emission, lengths, final = q._scores
    batch, time, _ = p._size
    if time == 0:
        return torch.zeros(batch, dtype=transition.dtype, device=transition.device)
    state, edge = p._posterior(4 if transition.dim() == 4 else max(p.transition.dim(), 3), edges=True)
    if transition.dim() < 4 and edge.dim() == 4:
        edge = edge.sum(1)
    total = _expectation(state[:, 0], initial.expand(batch, -1))
    total = total + _expectation(
        edge, transition.expand(batch, *transition.shape[-2:]) if edge.dim() == 3 else transition
    )
    if emission is not None:
        total = total + _expectation(state, emission)
    if final is not None:
        last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, state.shape[2])
        total = total + _expectation(state.gather(1, last).squeeze(1), final.expand(batch, -1))
    return total


def _same_frames(p: HMM, q: HMM) -> None:
    if type(q) is not type(p):
        raise TypeError(f"other: got {type(q).__name__}, expected an HMM")
    if p._size != q._size:
        raise ValueError(f"other: has B, T, N = {q._size}, expected {p._size}, those of this chain")
    if q.transition.device != p.transition.device:
        raise ValueError(f"other: on {q.transition.device}, expected {p.transition.device}, where this chain is")
    if p.lengths.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.equal(p.lengths, q.lengths):
        raise ValueError(f"other: has lengths {q.lengths.tolist()}, expected {p.lengths.tolist()}, those of this chain")


def cross_entropy(p: HMM, q: HMM) -> Tensor:
    """log Z_q - E_p[s_q], (B,); see :meth:`HMM.cross_entropy`."""
    _same_frames(p, q)
    wide_p = _doubled(p)
    wide_q = wide_p if q is p else _doubled(q)
    expected = expected_score(wide_p, wide_q)
    feasible = wide_p.log_partition().detach() > -torch.inf
    z = wide_q.log_partition()
    infinite = feasible & ((expected == -torch.inf) | (z == -torch.inf))
    value = torch.where(feasible & ~infinite, z - torch.where(infinite, 0, expected), 0)
    return torch.where(infinite, torch.inf, value).to(p._scores[1].dtype)


def kl_divergence(p: HMM, q: HMM) -> Tensor:
    """E_p[s_p] - log Z_p - E_p[s_q] + log Z_q, (B,), rounded once; see :meth:`HMM.kl_divergence`."""
    _same_frames(p, q)
    wide_p, wide_q = _doubled(p), _doubled(q)
    return (cross_entropy(wide_p, wide_q) - cross_entropy(wide_p, wide_p)).to(p._scores[1].dtype)
