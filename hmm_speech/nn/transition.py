"""p(z_t | z_{t-1}): (N, N) log-probabilities, ``[i, j]`` scores i -> j, -inf where the topology has no arc."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hmm_speech.errors import UserError
from hmm_speech.nn.blocks import LogTable, StateNetwork
from hmm_speech.nn.topology import AnyTopology, ClonedTopology


class TransitionTable(LogTable):
    """One free number an arc.

    With ``skip``, every substate that has one between itself and a later one leaves that out with a probability of
    ``skip``, which is not learned: p(i -> i + 2) = skip, and the arcs of the table share 1 - skip. Chains of three then
    last two frames at a price (the skips of a Bakis model: Bakis 1976). Learned, skips become as frequent as any arc.

    Between cloned states, ``prior`` holds the bigram of units once training has begun (``SpeechHMM.setup``): what EM
    draws the table to.

    Raises:
        UserError: skip is no probability below 1, or there are no chains of three substates.
    """

    def __init__(self, topology: AnyTopology, skip: float = 0.0) -> None:
        super().__init__(topology.num_states, topology.num_states, allowed=topology.arcs())
        if not 0 <= skip < 1:
            raise UserError(f"transition.skip is {skip!r}; expected a probability of at least 0 and less than 1")
        if skip and getattr(topology, "substates", 1) < 3:
            raise UserError(
                f"transition.skip is {skip}, but {topology} have no substate to leave out; expected 3 or more"
            )
        self.skip = skip
        if skip:
            label, substate = topology.factors()
            skips = (label == label[:, None]) & (substate == substate[:, None] + 2)
            self.register_buffer("skips", skips, persistent=False)
            self.register_buffer("rest", skips.any(-1, keepdim=True) * math.log1p(-skip), persistent=False)
        if isinstance(topology, ClonedTopology):
            self.prior = torch.zeros(topology.num_states, topology.num_states)

    def forward(self) -> Tensor:
        table = super().forward()
        return torch.where(self.skips, math.log(self.skip), table + self.rest) if self.skip else table


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
        self.register_buffer("forbidden", None if topology.is_full else ~topology.arcs(), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """h (N, dim), scaled, k (N, dim) and b (N,)."""
        if self.keys == "free":
            return self.network(), self.key.weight, self.key.bias
        return self.scale * self.network(), self.key_network(), self.bias

    def forward(self) -> Tensor:
        rows_ND, keys_ND, bias_N = self.factors()
        logits_NN = torch.addmm(bias_N, rows_ND, keys_ND.T)
        if self.forbidden is not None:
            logits_NN = logits_NN.masked_fill(self.forbidden, -torch.inf)
        return logits_NN.log_softmax(-1)
