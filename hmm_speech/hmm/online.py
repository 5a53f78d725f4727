r"""Online Viterbi: the best path of a stream, as far as it is decided.

After frame t each state j has its best path, a survivor of score :math:`\delta_t(j)`, and each survivor its ancestors,
the states that it took at the frames s that are not decided yet:

.. math:: A_t(s, j) = A_{t-1}(s, \psi_t(j)), \quad A_t(t, j) = j, \quad
    \psi_t(j) = \arg\max_i\, [\delta_{t-1}(i) + \phi(i, j)].

Where all survivors have one ancestor, no later frame can change it (Bloit and Rodet 2008; Šrámek et al. 2007). A frame
that reaches the lag is decided by the survivor that is best then, and those that disagree are dropped (delta = -inf):
what is decided is the beginning of one feasible path, whatever comes. Which states come out depends on the stream and
the lag alone, not on how the stream is cut into chunks; only where the path comes to a dead end, states that nobody
had asked for until then are lost.

Cost a frame and stream: N^2 additions and comparisons, and N (lag + 1) numbers moved. Without a lag, back-pointers are
kept, N a frame, and each time that decided states are asked for, ancestors are followed over the frames that are not
decided yet. Plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import INF


def _centred(x: Tensor) -> Tensor:
    top = x.amax(-1, keepdim=True)
    return x - top.masked_fill(top == -INF, 0)


def packed(states: Tensor) -> Tensor:
    """Rows (B, K) with their -1 moved to the end, and cut to the longest."""
    found = states >= 0
    order = (~found).to(torch.uint8).argsort(dim=1, stable=True)
    longest = int(found.sum(1).max()) if found.numel() else 0
    return states.gather(1, order)[:, :longest]


class OnlineViterbi:
    """Streams that have had no frame yet: initial (N,) or (B, N), transition (N, N) or (B, N, N), lag or None."""

    def __init__(self, batch: int, initial: Tensor, transition: Tensor, lag: int | None):
        size, device = (batch, transition.shape[-1]), transition.device
        self.initial, self.transition, self.lag = _centred(initial), transition, lag
        self.delta = torch.zeros(size, dtype=transition.dtype, device=device)
        self.own = torch.arange(size[1], device=device).expand(size)
        self.started = torch.zeros(batch, dtype=torch.bool, device=device)
        # With a lag: ancestors (B, lag+1, N), the newest frame last, -1 before the first; and whether a frame waits for
        # its decision, (B, lag+1). Without: the back-pointers and that, a tensor for each frame.
        frames = 0 if lag is None else lag + 1
        self.ancestors = torch.full((batch, frames, size[1]), -1, device=device)
        self.waiting = torch.zeros(batch, frames, dtype=torch.bool, device=device)
        self.pointers: list[tuple[Tensor, Tensor]] = []
        self.decided = [torch.zeros(batch, 0, dtype=torch.int64, device=device)]  # not yet asked for; -1 pads

    def update(self, emission: Tensor, lengths: Tensor) -> None:
        """The next frames of each stream, (B, C, N) of which lengths (B,) count."""
        forced = []
        for t, scores in enumerate(emission.unbind(1)):
            arrived = (t < lengths).unsqueeze(-1)
            pointer = self._step(torch.where(arrived, scores, 0), arrived)
            if self.lag is None:
                self.pointers.append((pointer, arrived.squeeze(-1)))
            else:
                forced.append(self._force(pointer, arrived))
        if forced:
            self.decided.append(packed(torch.stack(forced, 1)))

    def take(self, finish: bool = False) -> Tensor:
        """The states decided since the last call, (B, K), -1 past each stream's; with `finish`, all that are left."""
        ancestors, waiting = (self.ancestors, self.waiting) if self.lag is not None else self._followed()
        alive, path = self._best(ancestors)
        agreed = ((ancestors == path.unsqueeze(-1)) | (self.delta == -INF).unsqueeze(1)).all(-1)
        settled = waiting & (agreed | ~alive.unsqueeze(-1) | finish)
        waiting = waiting & ~settled
        if self.lag is None:
            rest = waiting.any(0).nonzero()
            first = int(rest[0]) if len(rest) else len(self.pointers)
            self.pointers = [
                (p, w) for (p, _), w in zip(self.pointers[first:], waiting[:, first:].unbind(1), strict=True)
            ]
        else:
            self.waiting = waiting
        found = torch.where(settled & alive.unsqueeze(-1), path, -1)
        result = packed(torch.cat([*self.decided, found], 1))
        self.decided = []
        return result

    def _step(self, scores: Tensor, arrived: Tensor) -> Tensor:
        """One more frame; returns its back-pointers, (B, N): the states themselves where there is no step."""
        into, pointer = (self.delta.unsqueeze(-1) + self.transition).max(1)
        started = self.started.unsqueeze(-1)
        delta = _centred(torch.where(started, into, self.initial) + _centred(scores))
        self.delta = torch.where(arrived, delta, self.delta)
        self.started = self.started | arrived.squeeze(-1)
        return torch.where(arrived & started, pointer, self.own)

    def _force(self, pointer: Tensor, arrived: Tensor) -> Tensor:
        """Moves the window, decides its oldest frame where it is to be, (B,), -1 elsewhere, and drops who disagrees."""
        older = self.ancestors[:, 1:].gather(2, pointer.unsqueeze(1).expand(-1, self.ancestors.shape[1] - 1, -1))
        moved = arrived.unsqueeze(-1)
        self.ancestors = torch.where(moved, torch.cat([older, self.own.unsqueeze(1)], 1), self.ancestors)
        self.waiting = torch.where(arrived, torch.cat([self.waiting[:, 1:], torch.ones_like(arrived)], 1), self.waiting)
        oldest = self.ancestors[:, :1]
        alive, state = self._best(oldest)
        self.delta = torch.where(oldest.squeeze(1) == state, self.delta, -INF)
        found = torch.where(self.waiting[:, 0] & alive, state.squeeze(1), -1)
        self.waiting = torch.cat([torch.zeros_like(arrived), self.waiting[:, 1:]], 1)
        return found

    def _best(self, ancestors: Tensor) -> tuple[Tensor, Tensor]:
        """Which streams have a feasible path, (B,), and the best survivor's states at the ancestors' frames, (B, F)."""
        best = self.delta.argmax(-1)
        alive = self.delta.amax(-1) > -INF
        return alive, ancestors.gather(2, best[:, None, None].expand(-1, ancestors.shape[1], 1)).squeeze(-1)

    def _followed(self) -> tuple[Tensor, Tensor]:
        """Ancestors (B, F, N) at the frames of the back-pointers, and which of them wait, (B, F)."""
        rows, states = [], self.own
        for pointer, _ in reversed(self.pointers):
            rows.append(states)
            states = pointer.gather(1, states)
        if not rows:
            return self.ancestors, self.waiting
        return torch.stack(rows[::-1], 1), torch.stack([waiting for _, waiting in self.pointers], 1)
