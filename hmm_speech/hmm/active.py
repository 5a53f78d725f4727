"""Chains of which only K of the N states can emit a frame."""

from __future__ import annotations

import torch

from . import structures
from .chain import Chain
from .dense import DenseChain
from .structures import Active, Chunked


class ActiveChain(Chain):
    """emission: an Active; transition: any."""

    def slots(self) -> DenseChain:
        """The same chain over the K slots of each frame, with time-varying transitions (B, T-1, K, K)."""
        active: Active = self.emission
        place = active.states.clamp(min=0)  # what pads is forbidden by its emission
        rows, columns = place[:, :-1], place[:, 1:]
        if isinstance(self.transition, Chunked):
            parts = [
                structures.gather(self.transition.function(a, b), rows[:, a:b], columns[:, a:b])
                for a, b in self.transition.spans(self.time)
            ]
            arcs = torch.cat(parts, 1) if parts else self.initial.new_empty(self.batch, 0, *2 * active.shape[2:])
        else:
            arcs = structures.gather(self.transition, rows, columns)
        used = active.states >= 0
        arcs = torch.where(used[:, :-1, :, None] & used[:, 1:, None, :], arcs, 0)
        none = place.new_zeros(self.batch, place.shape[2])
        end = (self.lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, place.shape[2])
        first, last = (place[:, 0], place.gather(1, end).squeeze(1)) if self.time else (none, none)
        initial, final = (
            None if x is None else x.expand(self.batch, -1).gather(1, at)
            for x, at in ((self.initial, first), (self.final, last))
        )
        return DenseChain(initial, arcs, active.slots(), self.lengths, final, self.time)

    def same_states(self, other: Chain) -> bool:
        return isinstance(other, ActiveChain) and torch.equal(self.emission.states, other.emission.states)

    def scaled(self, factor: float) -> Chain:
        return self.slots().scaled(factor)
