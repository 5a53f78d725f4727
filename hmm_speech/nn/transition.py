"""p(z_t | z_{t-1}): (N, N) log-probabilities, ``[i, j]`` scores i -> j, -inf where the topology has no arc."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmm_speech.errors import UserError
from hmm_speech.nn.blocks import LogTable, StateNetwork
from hmm_speech.nn.topology import AnyTopology, ClonedTopology


class TransitionTable(LogTable):
    """One free number an arc.

    Between cloned states, ``prior`` holds the bigram of units once training has begun (``ClusterInitialisation`` sets
    it): what EM draws the table to.
    """

    def __init__(self, topology: AnyTopology) -> None:
        super().__init__(topology.num_states, topology.num_states, allowed=topology.arcs())
        if isinstance(topology, ClonedTopology):
            self.prior = torch.zeros(topology.num_states, topology.num_states)


class TransitionNetwork(nn.Module):
    """log softmax over j of h_i . k_j + b_j, with h_i from a network over state embeddings.

    The scores have rank ``dim`` + 1 at most; forbidden arcs are masked before they are normalised.

    Args:
        keys: ``free``: each k_j is a parameter of its own. ``network``: they come from a second network over
            embeddings, so that states which share a unit or a label are entered alike, too; then h_i . k_j is divided
            by the square root of ``dim``.
        dim, blocks, dropout, std: of the networks, see :class:`~hmm_speech.nn.blocks.StateNetwork`.
    """

    def __init__(
        self,
        topology: AnyTopology,
        keys: str = "free",
        dim: int = 128,
        blocks: int = 5,
        dropout: float = 0.05,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        if keys not in ("free", "network"):
            raise UserError(f"transition.keys is {keys!r}; expected free or network")
        self.network = StateNetwork(topology, dim, blocks, dropout, std)
        if keys == "free":
            self.key = nn.Linear(dim, topology.num_states)
        else:
            self.key_network = StateNetwork(topology, dim, blocks, dropout, std)
            self.bias = nn.Parameter(torch.zeros(topology.num_states))
        self.keys, self.scale = keys, dim**-0.5
        self.register_buffer("forbidden", ~topology.arcs(), persistent=False)

    def forward(self) -> Tensor:
        rows_ND = self.network()
        if self.keys == "free":
            logits_NN = self.key(rows_ND)
        else:
            logits_NN = self.scale * rows_ND @ self.key_network().T + self.bias
        return logits_NN.masked_fill(self.forbidden, -torch.inf).log_softmax(-1)
