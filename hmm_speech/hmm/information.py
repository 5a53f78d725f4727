"""Entropies and divergences between chains over the same frames, from posteriors."""

from __future__ import annotations

import torch
from torch import Tensor

from .active import ActiveChain
from .banded import BandedChain
from .chain import Chain
from .dense import DenseChain

Wide = DenseChain | BandedChain


def _doubled(p: Chain, q: Chain) -> tuple[Wide, Wide]:
    """Both chains in float64, without structure unless both are along the same diagonals; gradients reach the original
    scores."""
    p, q = p.map(Tensor.double), (None if q is p else q.map(Tensor.double))
    if isinstance(p, BandedChain) and (q is None or p.same_diagonals(q)):
        wide, other = p, q
    elif isinstance(p, ActiveChain) and (q is None or p.same_states(q)):
        wide, other = p.slots(), None if q is None else q.slots()
    else:
        wide, other = p.dense(), None if q is None else q.dense()
    return wide, wide if other is None else other


def _expectation(weight: Tensor, score: Tensor) -> Tensor:
    """Sum over all axes but the first of weight * score; nothing times -inf (or NaN, in the padding) is nothing.

    Where it is -inf it has no gradient, and leaves those of the other sequences alone.
    """
    forbidden = (weight > 0) & (score == -torch.inf)
    used = torch.where(((weight > 0) & ~forbidden) | score.isfinite(), score, 0)
    return torch.where(forbidden.flatten(1).any(1), -torch.inf, (weight * used).flatten(1).sum(1))


def expected_score(p: Wide, q: Wide) -> Tensor:
    """E_p[s_q(z)], (B,): posteriors of p times scores of q. -inf where q forbids what p allows."""
    initial, transition, emission, lengths, final = q.scores
    batch, time, _ = p.size
    if time == 0:
        return torch.zeros(batch, dtype=transition.dtype, device=transition.device)
    state, edge = p.posterior(4 if transition.dim() == 4 else max(p.scores[1].dim(), 3), edges=True)
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


def _same_frames(p: Chain, q: Chain) -> None:
    if p.size != q.size:
        raise ValueError(f"other: has B, T, N = {q.size}, expected {p.size}, those of this chain")
    if q.initial.device != p.initial.device:
        raise ValueError(f"other: on {q.initial.device}, expected {p.initial.device}, where this chain is")
    if p.lengths.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.equal(p.lengths, q.lengths):
        raise ValueError(f"other: has lengths {q.lengths.tolist()}, expected {p.lengths.tolist()}, those of this chain")


def _cross_entropy(p: Wide, q: Wide) -> Tensor:
    """log Z_q - E_p[s_q], (B,), in float64."""
    expected = expected_score(p, q)
    feasible = p.log_partition().detach() != -torch.inf  # or NaN, which is passed on
    z = q.log_partition()
    infinite = feasible & ((expected == -torch.inf) | (z == -torch.inf))
    value = torch.where(feasible & ~infinite, z - torch.where(infinite, 0, expected), 0)
    return torch.where(infinite, torch.inf, value)


def cross_entropy(p: Chain, q: Chain) -> Tensor:
    """See :meth:`HMM.cross_entropy`."""
    _same_frames(p, q)
    return _cross_entropy(*_doubled(p, q)).to(p.initial.dtype)


def kl_divergence(p: Chain, q: Chain) -> Tensor:
    """E_p[s_p] - log Z_p - E_p[s_q] + log Z_q, (B,), rounded once; see :meth:`HMM.kl_divergence`."""
    _same_frames(p, q)
    wide_p, wide_q = _doubled(p, q)
    cross = _cross_entropy(wide_p, wide_q)
    value = torch.where(cross == torch.inf, torch.inf, cross - _cross_entropy(wide_p, wide_p))
    return value.to(p.initial.dtype)
