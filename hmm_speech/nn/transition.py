"""p(z_t | z_{t-1}): (N, N) log-probabilities, ``[i, j]`` scores i -> j, -inf where the topology has no arc."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmm_speech.nn.blocks import LogTable, StateNetwork
from hmm_speech.nn.topology import AnyTopology


class TransitionTable(LogTable):
    """One free number an arc."""

    def __init__(self, topology: AnyTopology) -> None:
        super().__init__(topology.num_states, topology.num_states, allowed=topology.arcs())


class TransitionNetwork(nn.Module):
    """log softmax over j of h_i . k_j + b_j, with h_i from a network over state embeddings and k_j a free vector.

    The scores have rank ``dim`` + 1 at most; forbidden arcs are masked before they are normalised.
    """

    def __init__(
        self, topology: AnyTopology, dim: int = 128, blocks: int = 5, dropout: float = 0.05, std: float = 1.0
    ) -> None:
        super().__init__()
        self.network = StateNetwork(topology, dim, blocks, dropout, std)
        self.key = nn.Linear(dim, topology.num_states)
        self.register_buffer("forbidden", ~topology.arcs(), persistent=False)

    def forward(self) -> Tensor:
        logits = self.key(self.network())
        return logits.masked_fill(self.forbidden, -torch.inf).log_softmax(-1)
