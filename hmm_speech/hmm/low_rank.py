"""Chains whose transition is a product of two factors: through R hidden classes, 2 N R a frame, never an (N, N).

Factors that are shared over time run by scaled probabilities, natively where the library serves (:mod:`low_rank_ops`).
Those that vary over time, second derivatives and the reference backend go through the reference, half a step at a
time: B N R of memory a frame, and B T N R under autograd. What needs scores of single arcs takes the dense (N, N)
scores: Viterbi (an arc's score is a sum over classes, of which no maximum can be taken first), samples,
:meth:`HMM.topk`, edge marginals, transition counts and entropies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library, low_rank_ops, reference, structured
from .chain import Chain
from .reference import logsumexp


class ThroughClasses:
    """One frame's step of the forward algorithm where arcs are both factors as rows, (..., 2 R, N), as in
    :class:`reference.EveryArc`."""

    def extend(self, alpha: Tensor, arcs: Tensor) -> Tensor:
        left, right = arcs.chunk(2, -2)
        return logsumexp(alpha.unsqueeze(-2) + left, -1).unsqueeze(-1) + right


class LowRankChain(Chain):
    """transition: a LowRank; emission (B, T, N)."""

    kernels = low_rank_ops.Kernels(ThroughClasses())

    @property
    def scores(self) -> tuple:
        factors = torch.cat([self.transition.left.transpose(-1, -2), self.transition.right], -2)
        return self.initial, factors, self.emission, self.lengths, self.final

    @property
    def by_products(self) -> bool:
        return len(self.transition.leading) < 2 and not library.chose_reference()

    def log_partition(self) -> Tensor:
        if self.by_products:
            return structured.LogPartition.apply(*self.scores, self.kernels)
        return reference.log_partition(*self.scores, self.kernels.step)

    def marginals(self) -> Tensor:
        if self.by_products:
            return structured.posterior(self.scores, self.kernels, edges=False)[0]
        return structured.reference_posterior(self.scores, self.kernels.step, edges=False)[0]

    def scaled(self, factor: float) -> Chain:
        return self.dense().scaled(factor)  # a power of a product of matrices is not the product of their powers
