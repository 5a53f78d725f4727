"""Which states there are, which arcs between them are allowed, and which label each belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hmm_speech.errors import UserError


@dataclass(frozen=True)
class Topology:
    """Labels, each a left-to-right chain of ``substates`` states; N = labels * substates.

    State ``label * substates + s`` is substate s of its label. Every state may repeat; a substate that is not the
    last goes on to the next; the last one leaves into the first substate of any label, its own included. With
    ``substates=1`` that is the fully connected HMM, so the two need no separate code. An utterance begins in a first
    substate: its start is a boundary, and a label entered in its middle would have no beginning. It may end anywhere,
    since recordings are cut.

    A chain of S substates holds a label for at least S frames, which is what keeps labels as long as phones
    (minimum-duration HMM: Rabiner 1989, section IV-D).
    """

    labels: int
    substates: int = 1

    def __post_init__(self) -> None:
        for name in ("labels", "substates"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"topology.{name} is {value!r}; expected a positive integer")

    @property
    def num_states(self) -> int:
        """N."""
        return self.labels * self.substates

    def arcs(self) -> Tensor:
        """(N, N) bool: ``[i, j]`` tells whether state i may be followed by state j."""
        states = torch.arange(self.num_states)
        substate = states % self.substates
        is_last, is_first = substate == self.substates - 1, substate == 0
        follows = ~is_last[:, None] & (states[None, :] == states[:, None] + 1)
        return torch.eye(self.num_states, dtype=torch.bool) | follows | (is_last[:, None] & is_first[None, :])

    def starts(self) -> Tensor:
        """(N,) bool: the states in which an utterance may begin."""
        return torch.arange(self.num_states) % self.substates == 0

    def label_of(self, states: Tensor) -> Tensor:
        """The label of each state, same shape; padding (-1) stays -1."""
        return torch.div(states, self.substates, rounding_mode="floor")
