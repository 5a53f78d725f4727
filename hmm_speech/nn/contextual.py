"""Transitions and emissions that depend on a context h_t, and the transition that depends on nothing else.

Shapes: B utterances, T frames, N states, V units, H the width of the context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmm_speech.errors import check_size
from hmm_speech.hmm import Chunked, LowRank
from hmm_speech.hmm.products import log_matmul_exp
from hmm_speech.nn.blocks import ArcScores, StateScores
from hmm_speech.nn.drift import Drift
from hmm_speech.nn.low_rank import require_full
from hmm_speech.nn.topology import AnyTopology


class ContextualTransition(nn.Module):
    """log p(z_t = j | z_{t-1} = i, h_t) = log softmax_j(A[i, j] + (W h_t)[j]), as a :class:`Drift`.

    The context says which states are likely now, whatever the one before; A says which follow one another. A comes from
    :class:`ArcScores`, which takes ``network``; arcs that the topology has not are forbidden.
    """

    uses_context = True

    def __init__(
        self,
        topology: AnyTopology,
        context_dim: int,
        **network: Any,
    ) -> None:
        super().__init__()
        self.scores = ArcScores(topology, ~topology.arcs(), **network)
        self.drift = nn.Linear(context_dim, topology.num_states, bias=False)  # a bias would double the scores'

    def logits(self) -> Tensor:
        """(N, N): A."""
        return self.scores()

    def forward(self, context_BTH: Tensor) -> Drift:
        return Drift(self.logits(), self.drift(context_BTH))


class IndependentTransition(nn.Module):
    """log p(z_t = j | z_{t-1}, h_t) = log softmax_j((W h_t)[j] + b[j]): no dependence on the state before.

    The baseline of Markov models: frames are then a mixture each, given the context. Without a context, b alone says
    which states there are. The chain has rank 1 and costs N a frame.

    Raises:
        UserError: the topology forbids arcs, which is a dependence on the state before.
    """

    uses_context = True
    context_is_optional = True

    def __init__(self, topology: AnyTopology, context_dim: int | None = None) -> None:
        super().__init__()
        require_full("independent", topology, "states then depend on one another")
        self.bias = nn.Parameter(torch.randn(topology.num_states) * 0.1)
        self.drift = None if context_dim is None else nn.Linear(context_dim, topology.num_states, bias=False)

    def logits(self) -> Tensor:
        """(N, N): b in every row."""
        return self.bias.expand(len(self.bias), -1)

    def forward(self, context_BTH: Tensor | None = None) -> Drift | LowRank:
        nothing_N1 = torch.zeros_like(self.bias)[:, None]
        if self.drift is None:
            return LowRank(nothing_N1, self.bias.log_softmax(-1)[None])
        return Drift(LowRank(nothing_N1, nothing_N1.T), self.drift(context_BTH) + self.bias)


class FullContextualTransition(nn.Module):
    """log p(z_t = j | z_{t-1} = i, h_t) = log softmax_j(A[i, j] + sum_r (W h_t)[r] M_r[i, j]).

    Every arc has a rate of its own at which each of ``rank`` features of the context changes it. A chunk of frames at a
    time (:class:`hmm_speech.hmm.Chunked`), so that memory is B x chunk x N x N, but time is B T N^2 rank. A comes from
    :class:`ArcScores`, which takes ``network``.
    """

    uses_context = True

    def __init__(
        self,
        topology: AnyTopology,
        context_dim: int,
        rank: int = 8,
        chunk: int = 32,
        **network: Any,
    ) -> None:
        super().__init__()
        for name, value in (("rank", rank), ("chunk", chunk)):
            check_size(f"transition.{name}", value)
        self.chunk = chunk
        self.scores = ArcScores(topology, ~topology.arcs(), **network)
        self.features = nn.Linear(context_dim, rank, bias=False)
        self.change_RNN = nn.Parameter(torch.randn(rank, topology.num_states, topology.num_states) * 0.1)

    def logits(self) -> Tensor:
        """(N, N): A."""
        return self.scores()

    def forward(self, context_BTH: Tensor) -> Chunked:
        shared_NN = self.logits()
        features_BTR = self.features(context_BTH)[:, 1:]  # the arc t leads to frame t + 1

        def arcs(start: int, stop: int) -> Tensor:
            changes = torch.einsum("btr,rij->btij", features_BTR[:, start:stop], self.change_RNN)
            return (changes + shared_NN).log_softmax(-1)

        return Chunked(arcs, self.chunk)


class ContextualEmission(nn.Module):
    """log p(x_t | z_t, h_t) = log softmax_x((O h_t)[x] + S[z_t, x]), S from :class:`StateScores` (and its ``network``).

    The normalisers of all frames and states are one product, exp(O h) exp(S)^T, so no (B, T, N, V) arises. With one
    state this is the language model that the context is.
    """

    observes = "units"
    uses_context = True

    def __init__(
        self,
        topology: AnyTopology,
        vocabulary: int,
        context_dim: int,
        **network: Any,
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.scores = StateScores(topology, vocabulary, **network)
        self.output = nn.Linear(context_dim, vocabulary, bias=False)

    def logits(self) -> Tensor:
        """(N, V): S."""
        return self.scores()

    def forward(self, units_BT: Tensor, context_BTH: Tensor) -> Tensor:
        """(B, T, N) log-probability of each frame's unit in each state."""
        scores_NV, context_BTV = self.logits(), self.output(context_BTH)
        chosen_BT1 = context_BTV.gather(-1, units_BT[..., None])
        return F.embedding(units_BT, scores_NV.T) + chosen_BT1 - log_matmul_exp(context_BTV, scores_NV)

    def predict(self, states_B: Tensor, past_BT: Tensor, context_BH: Tensor) -> Tensor:
        """(B, V): log p(x_t | z_t, h_t); the past is in the context."""
        return (self.output(context_BH) + self.logits()[states_B]).log_softmax(-1)
