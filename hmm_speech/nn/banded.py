"""Transitions along a few diagonals, i -> i + k: left-to-right and near-diagonal chains, at N len(offsets) a frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hmm_speech.errors import UserError
from hmm_speech.hmm import Banded
from hmm_speech.nn.blocks import LogTable
from hmm_speech.nn.low_rank import require_full
from hmm_speech.nn.topology import AnyTopology


class BandedTransition(nn.Module):
    """One free number for each state and offset: log p(z_t = i + k | z_{t-1} = i), normalised over the offsets k.

    Offsets that lead out of 0 .. N-1 get nothing, so the last state of a left-to-right chain stays. ``optimizer=em``
    can train the table.

    Raises:
        UserError: offsets are no different integers, some state has nowhere to go, or the topology forbids arcs.
    """

    def __init__(self, topology: AnyTopology, offsets: Sequence[int] = (0, 1, 2)) -> None:
        super().__init__()
        require_full("banded", topology, "the offsets alone say which there are")
        offsets = list(offsets)
        whole = all(isinstance(k, int) and not isinstance(k, bool) for k in offsets)
        if not offsets or not whole or len(set(offsets)) < len(offsets):
            raise UserError(f"transition.offsets is {offsets}; expected different integers, such as [0, 1, 2]")
        target_ND = torch.arange(topology.num_states)[:, None] + torch.tensor(offsets)
        inside_ND = (target_ND >= 0) & (target_ND < topology.num_states)
        if not inside_ND.any(-1).all():
            state = int((~inside_ND.any(-1)).nonzero()[0])
            raise UserError(
                f"transition.offsets is {offsets}: state {state} of {topology.num_states} has nowhere to go; add 0, so "
                "that states may stay"
            )
        self.offsets = tuple(offsets)
        self.table = LogTable(topology.num_states, len(offsets), allowed=inside_ND)
        self.register_buffer("place_ND", target_ND.clamp(0, topology.num_states - 1), persistent=False)

    def forward(self) -> Banded:
        return Banded(self.table().T, self.offsets)

    def assign(self, log_probs_NN: Tensor) -> None:
        """Take over the diagonals of a table of log-probabilities (N, N), each row normalised anew."""
        picked_ND = log_probs_NN.gather(1, self.place_ND)
        self.table.assign(picked_ND.masked_fill(self.table.logits == -torch.inf, -torch.inf).log_softmax(-1))
