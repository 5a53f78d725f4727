"""Chains whose time-varying transitions are made a chunk of frames at a time."""

from __future__ import annotations

from .chain import Chain


class ChunkedChain(Chain):
    """transition: a Chunked; emission (B, T, N)."""
