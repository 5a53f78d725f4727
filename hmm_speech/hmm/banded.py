"""Chains that move along a few diagonals."""

from __future__ import annotations

from .chain import Chain


class BandedChain(Chain):
    """transition: a Banded; emission (B, T, N)."""
