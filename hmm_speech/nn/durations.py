"""Transitions of explicit duration: each segment of a state has a length drawn from the state's own distribution.

Shapes: B utterances, T frames, N states, D frames of a segment at most.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hmm_speech.errors import UserError, check_size
from hmm_speech.hmm import Active, SemiMarkovHMM, Viterbi
from hmm_speech.nn.blocks import ArcScores, LogTable
from hmm_speech.nn.low_rank import require_full
from hmm_speech.nn.topology import AnyTopology


class Durations(NamedTuple):
    """Segments: p(next segment's state | this one's) and p(d | state), log-probabilities; no state follows itself."""

    matrix_NN: Tensor
    """-inf on the diagonal."""
    durations_ND: Tensor
    """``[i, d - 1]``: log p(a segment of i lasts d frames)."""

    def survival(self) -> Tensor:
        """(N, D): log p(a segment of state i lasts at least d frames)."""
        return self.durations_ND.flip(-1).logcumsumexp(-1).flip(-1)

    def chain(self, initial_N: Tensor, emission: Tensor | Active, lengths_B: Tensor) -> SemiMarkovChain:
        """The chain of a batch, whose first segment begins at the first frame and whose last one is cut by the end."""
        if isinstance(emission, Active):
            raise UserError(
                "transition=semi_markov needs an emission over all states; emission=cloned has few a frame, so take "
                "emission=network or emission=table"
            )
        return SemiMarkovChain(self, initial_N, emission, lengths_B)

    def following(self, initial_N: Tensor, states_BT: Tensor) -> Tensor:
        """(B, N) log p(next state | states so far): a segment goes on with the survival of one more frame."""
        batch, time = states_BT.shape
        if not time:
            return initial_N.expand(batch, -1)
        last_B = states_BT[:, -1]
        lasted_B = (states_BT.flip(1) == last_B[:, None]).cumprod(1).sum(1)
        survival_BD = torch.nn.functional.pad(self.survival()[last_B], (0, 1), value=-torch.inf)
        at_least, longer = (survival_BD.gather(1, d[:, None]) for d in (lasted_B - 1, lasted_B))
        ends_B1 = self.durations_ND[last_B].gather(1, (lasted_B - 1)[:, None]) - at_least
        return (ends_B1 + self.matrix_NN[last_B]).scatter(1, last_B[:, None], longer - at_least)

    def dense(self) -> Tensor:
        """(N, N) log-probabilities of the Markov chain with the same successions and mean durations."""
        frames_D = torch.arange(1, self.durations_ND.shape[1] + 1, device=self.durations_ND.device)
        leave_N1 = -(self.durations_ND.exp() * frames_D).sum(-1, keepdim=True).log()
        stay_N = torch.log1p(-leave_N1.exp().clamp(max=1 - 1e-6)).squeeze(1)
        own = torch.eye(len(stay_N), dtype=torch.bool, device=stay_N.device)
        return torch.where(own, stay_N[:, None], leave_N1 + self.matrix_NN)


class SemiMarkovChain:
    """A batch of utterances that are segmented; the last segment may go on past the end.

    An utterance of L frames has the probability of all segmentations that cover it, the last segment lasting at least
    as long as is seen. :class:`hmm_speech.hmm.SemiMarkovHMM` knows no such segment, so each state gets a twin in which
    paths end, that nothing follows, and whose durations have the scores of the survival function.
    """

    def __init__(self, parts: Durations, initial_N: Tensor, emission_BTN: Tensor, lengths_B: Tensor) -> None:
        self.num_states, self.lengths = len(initial_N), lengths_B
        ends_here_N = torch.full_like(initial_N, -torch.inf)
        self.segments = SemiMarkovHMM(
            torch.cat([initial_N, initial_N]),
            torch.cat([parts.matrix_NN, torch.full_like(parts.matrix_NN, -torch.inf)]).repeat(1, 2),
            torch.cat([emission_BTN, emission_BTN], -1),
            torch.cat([parts.durations_ND, parts.survival()]),
            lengths_B,
            torch.cat([ends_here_N, torch.zeros_like(initial_N)]),
        )

    def log_partition(self) -> Tensor:
        """(B,) log p(observations)."""
        return self.segments.log_partition()

    def viterbi(self) -> Viterbi:
        """The best segmentation's score (B,) and states (B, T), -1 past the end."""
        score, states_BT, _ = self.segments.viterbi()
        return Viterbi(score, torch.where(states_BT < 0, -1, states_BT % self.num_states))


class SemiMarkovTransition(nn.Module):
    """An explicit-duration model (Ferguson 1980; Yu 2010, "Hidden semi-Markov models"): :class:`Durations`.

    Which state follows comes from :class:`ArcScores`, or from a table that exact EM can train; durations from a table
    (N, D), log softmax over ``shortest`` .. ``longest`` frames.

    Args:
        shortest, longest: frames of a segment; the last one of an utterance may be cut shorter.
        dim: width of the network; None for a table.
        network: ``blocks``, ``dropout`` and ``std``, see :class:`StateNetwork`.

    Raises:
        UserError: durations are out of range, or the topology forbids arcs or has but one state.
    """

    def __init__(
        self,
        topology: AnyTopology,
        shortest: int = 1,
        longest: int = 25,
        dim: int | None = 128,
        **network: Any,
    ) -> None:
        super().__init__()
        require_full("semi_markov", topology, "durations do what chains of substates do")
        for name, value in (("shortest", shortest), ("longest", longest)):
            check_size(f"transition.{name}", value)
        if longest < shortest:
            raise UserError(f"transition.longest is {longest}, below transition.shortest, {shortest}")
        size = topology.num_states
        if size < 2:
            raise UserError("transition=semi_markov: no state follows itself, so topology.labels must be 2 at least")
        own_NN = torch.eye(size, dtype=torch.bool)
        if dim is None:
            self.arcs = LogTable(size, size, allowed=~own_NN)
        else:
            self.scores = ArcScores(topology, own_NN, dim=dim, **network)
        permitted_D = torch.arange(1, longest + 1) >= shortest
        self.durations = LogTable(size, longest, allowed=permitted_D)

    def forward(self) -> Durations:
        if hasattr(self, "arcs"):
            return Durations(self.arcs(), self.durations())
        return Durations(self.scores().log_softmax(-1), self.durations())

    def logits(self) -> Tensor:
        """(N, N): the Markov chain of the same mean durations, by which the initialisation fits both."""
        return self().dense()
