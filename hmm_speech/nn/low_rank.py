"""Transitions through R classes: p(z_t = j | z_{t-1} = i) = sum_r p(r | i) p(j | r), at 2 N R a frame.

Shapes: B utterances, T frames, N states, R classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hmm_speech.errors import UserError, check_size
from hmm_speech.hmm import HMM, LowRank, Viterbi
from hmm_speech.hmm.products import log_matmul_exp
from hmm_speech.nn.blocks import LogTable, StateNetwork
from hmm_speech.nn.topology import AnyTopology

MOST_STATES = 2048  # of an exact best path, which takes N^2 a frame


class LowRankTransition(nn.Module):
    """log sum_r softmax_r(l_i)[r] softmax_j(k_r)[j] (Chiu et al. 2021, arXiv:2201.02715).

    Both factors are tables, which exact EM can train, or two maps of one network over state embeddings: l = U n_z,
    k = (W n_z)^T. Memory and time are N R; no (N, N) arises in training.

    Args:
        rank: R.
        dim: width of the network; None for tables.
        blocks, dropout: of the network, see :class:`StateNetwork`.
        std: of the embeddings at the start, or of the tables' logits.

    Raises:
        UserError: ``rank`` is no positive integer, or the topology forbids arcs.
    """

    def __init__(
        self,
        topology: AnyTopology,
        rank: int = 64,
        dim: int | None = 128,
        blocks: int = 2,
        dropout: float = 0.05,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        require_full("low_rank", topology, "a sum of products of probabilities forbids no single arc")
        check_size("transition.rank", rank)
        self.rank = rank
        if dim is None:
            self.left, self.right = (
                LogTable(topology.num_states, rank, std=std),
                LogTable(rank, topology.num_states, std=std),
            )
        else:
            self.network = StateNetwork(topology, dim, blocks, dropout, std)
            self.output = nn.Linear(dim, 2 * rank)

    def forward(self) -> LowRank:
        if hasattr(self, "left"):
            return LowRank(self.left(), self.right())
        left_NR, right_NR = self.output(self.network()).chunk(2, -1)
        return LowRank(left_NR.log_softmax(-1), right_NR.T.log_softmax(-1))

    def halves(self) -> tuple[Any, Any]:
        """What gives log-probabilities (N, R) and what gives (R, N): the tables, or functions."""
        if hasattr(self, "left"):
            return self.left, self.right
        return lambda: self().left, lambda: self().right

    def logits(self) -> Tensor:
        """(N, N): log-probabilities of arcs, for small N."""
        factors = self()
        return log_matmul_exp(factors.left, factors.right.T)


class LowRankHMM(HMM):
    """A chain through classes whose ``viterbi`` works at any size.

    A best path takes N^2 R a frame, since no maximum can be taken before the sum over classes. With more than
    ``MOST_STATES`` states, each frame gets its most probable state instead (posterior decoding, Rabiner 1989, equations
    27 to 29), in N R.
    """

    def viterbi(self) -> Viterbi:
        if self.num_states <= MOST_STATES:
            return super().viterbi()
        with torch.no_grad():
            states_BT = self.marginals().argmax(-1)
            inside_BT = torch.arange(states_BT.shape[1], device=states_BT.device) < self.lengths[:, None]
            states_BT = torch.where(inside_BT, states_BT, -1)
        return Viterbi(self.score(states_BT), states_BT)


def require_full(name: str, topology: AnyTopology, reason: str) -> None:
    """Raise a UserError where a topology forbids arcs."""
    if not topology.is_full:
        raise UserError(
            f"transition={name}: the topology, {topology}, forbids arcs, and {reason}; take topology=full with "
            "topology.substates=1, or transition=network"
        )
