"""Chains that move along a few diagonals, i -> i + k_d: the native kernels, or the plain torch beside them.

The recursions are the dense ones (:mod:`reference`) with D ways into a state in place of N: cost B T D N.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import banded_ops, reference, structured
from .chain import Chain
from .library import use_native
from .reference import INF
from .structures import Banded


class Diagonals:
    """One frame's step where arcs are diagonals (..., D, N), from the largest of the offsets k_d to the smallest: see
    :class:`reference.EveryArc`, whose methods these are. What leads nowhere is not read."""

    def __init__(self, offsets: tuple[int, ...]):
        self.offsets = offsets

    def extend(self, alpha: Tensor, arcs: Tensor) -> Tensor:
        size, moved = alpha.shape[-1], []
        for d, offset in enumerate(self.offsets):
            first, last = max(0, -offset), max(0, size - max(0, offset))
            if first < last:
                score = alpha[:, first:last] + arcs[..., d, first:last]
                moved.append(pad(score, (first + offset, size - last - offset), value=-INF))
            else:
                moved.append(torch.full_like(alpha, -INF))
        return torch.stack(moved, 1)

    def into(self, alpha: Tensor, arcs: Tensor, state: Tensor) -> Tensor:
        batch, size = alpha.shape
        source = self._sources(state)
        inside, source = (source >= 0) & (source < size), source.clamp(0, size - 1)
        rows, ways = torch.arange(batch, device=state.device).unsqueeze(-1), torch.arange(len(self.offsets))
        scores = arcs.expand(batch, -1, -1)[rows, ways.to(state.device), source]
        return torch.where(inside, alpha[rows, source] + torch.where(inside, scores, 0), -INF)

    def source(self, state: Tensor, way: Tensor) -> Tensor:
        return self._sources(state).gather(-1, way.unsqueeze(-1)).squeeze(-1)

    def _sources(self, state: Tensor) -> Tensor:
        return state.unsqueeze(-1) - torch.tensor(self.offsets, device=state.device)


class BandedChain(Chain):
    """transition: a Banded; emission (B, T, N)."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        offsets = self.transition.offsets
        self.order = sorted(range(len(offsets)), key=lambda d: -offsets[d])  # predecessors from the smallest on
        self.offsets = tuple(offsets[d] for d in self.order)
        self.step = Diagonals(self.offsets)
        self.kernels = banded_ops.Kernels(self.offsets, self.step)

    @property
    def scores(self) -> tuple:
        """The arguments of the operators and of the reference, but for the offsets."""
        diagonals = self.transition.diagonals
        if self.order != list(range(len(self.order))):
            diagonals = diagonals[..., self.order, :]
        return self.initial, diagonals, self.emission, self.lengths, self.final

    @property
    def native(self) -> bool:
        return use_native(self.initial.device.type)

    def same_diagonals(self, other: Chain) -> bool:
        return isinstance(other, BandedChain) and self.offsets == other.offsets

    def log_partition(self) -> Tensor:
        if self.native:
            return structured.LogPartition.apply(*self.scores, self.kernels)
        return reference.log_partition(*self.scores, self.step)

    def marginals(self) -> Tensor:
        return self.posterior(self.transition.diagonals.dim(), edges=False)[0]

    def edge_marginals(self) -> Tensor:
        return self._spread(self.posterior(4, edges=True)[1])

    def transition_counts(self) -> Tensor:
        edges = self.posterior(max(self.transition.diagonals.dim(), 3), edges=True)[1]
        return self._spread(edges.sum(1) if edges.dim() == 4 else edges)

    def _spread(self, edges: Tensor) -> Tensor:
        """(..., N, N) from what is along the diagonals, (..., D, N)."""
        return Banded(edges, self.offsets).dense(elsewhere=0)

    def posterior(self, transition_axes: int, edges: bool) -> tuple[Tensor, Tensor]:
        """State posteriors and those of arcs along the diagonals, which are expanded to `transition_axes` axes."""
        initial, diagonals, *others = self.scores
        for axes in range(diagonals.dim(), transition_axes):
            times = self.batch if axes == 2 else max(self.time - 1, 0)
            diagonals = diagonals.unsqueeze(axes - 2).expand(*diagonals.shape[: axes - 2], times, -1, -1)
        scores = (initial, diagonals, *others)
        if self.native:
            return structured.posterior(scores, self.kernels, edges)
        return structured.reference_posterior(scores, self.step, edges)

    def viterbi(self) -> tuple[Tensor, Tensor]:
        if self.native:
            return torch.ops.hmm_speech.banded_viterbi(*self._arguments())
        return reference.viterbi(*self.scores, self.step)

    def sample(self, uniform: Tensor) -> Tensor:
        if self.native:
            return torch.ops.hmm_speech.banded_sample(*self._arguments(), uniform)
        return reference.sample(*self.scores, uniform, self.step)

    def _arguments(self) -> tuple:
        """The operators' arguments, without autograd."""
        initial, diagonals, emission, lengths, final = (x if x is None else x.detach() for x in self.scores)
        return initial, diagonals, self.offsets, emission, lengths, final
