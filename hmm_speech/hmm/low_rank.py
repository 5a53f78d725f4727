"""Chains whose transition is a product of two factors."""

from __future__ import annotations

from .chain import Chain


class LowRankChain(Chain):
    """transition: a LowRank; emission (B, T, N)."""

    def scaled(self, factor: float) -> Chain:
        return self.dense().scaled(factor)  # a power of a product of matrices is not the product of their powers
