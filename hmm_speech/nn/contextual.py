"""Transitions and emissions that depend on a context h_t, and the transition that depends on nothing else.

Shapes: B utterances, T frames, N states, V units, H the width of the context.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmm_speech.errors import UserError
from hmm_speech.hmm import Chunked, LowRank
from hmm_speech.nn.blocks import StateNetwork
from hmm_speech.nn.drift import Drift
from hmm_speech.nn.products import log_matmul_exp
from hmm_speech.nn.topology import AnyTopology


class StateScores(nn.Module):
    """(N, M) scores, one row a state: a free table, or U n_z + b with n_z from a network over state embeddings.

    Args:
        outputs: M.
        dim: width of the network; None for a table, drawn from N(0, 0.1^2).
        blocks, dropout, std: of the network, see :class:`StateNetwork`.
    """

    def __init__(
        self, topology: AnyTopology, outputs: int, dim: int | None, blocks: int, dropout: float, std: float
    ) -> None:
        super().__init__()
        if dim is None:
            self.table = nn.Parameter(torch.randn(topology.num_states, outputs) * 0.1)
        else:
            self.network = StateNetwork(topology, dim, blocks, dropout, std)
            self.output = nn.Linear(dim, outputs)

    def forward(self) -> Tensor:
        return self.table if hasattr(self, "table") else self.output(self.network())


class ContextualTransition(nn.Module):
    """log p(z_t = j | z_{t-1} = i, h_t) = log softmax_j(A[i, j] + (W h_t)[j]), as a :class:`Drift`.

    The context says which states are likely now, whatever the one before; A says which follow one another. A comes from
    :class:`StateScores`; arcs that the topology has not are forbidden.
    """

    uses_context = True

    def __init__(
        self,
        topology: AnyTopology,
        context_dim: int,
        dim: int | None = 128,
        blocks: int = 2,
        dropout: float = 0.05,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        self.scores = StateScores(topology, topology.num_states, dim, blocks, dropout, std)
        self.drift = nn.Linear(context_dim, topology.num_states, bias=False)  # a bias would double the scores'
        self.register_buffer("forbidden", ~topology.arcs(), persistent=False)

    def logits(self) -> Tensor:
        """(N, N): A."""
        return self.scores().masked_fill(self.forbidden, -torch.inf)

    def forward(self, context_BTH: Tensor) -> Drift:
        return Drift(self.logits(), self.drift(context_BTH))


class IndependentTransition(nn.Module):
    """log p(z_t = j | z_{t-1}, h_t) = log softmax_j((W h_t)[j] + b[j]): no dependence on the state before.

    The baseline of Markov models: frames are then a mixture each, given the context. Without a context, b alone says
    which states there are. The chain costs N a frame, as one of rank 1, where there is no context.

    Raises:
        UserError: the topology forbids arcs, which is a dependence on the state before.
    """

    uses_context = True
    context_is_optional = True

    def __init__(self, topology: AnyTopology, context_dim: int | None = None) -> None:
        super().__init__()
        if not topology.is_full:
            raise UserError(
                f"transition=independent: the topology, {topology}, forbids arcs, so that states depend on one "
                "another; take topology=full"
            )
        self.bias = nn.Parameter(torch.randn(topology.num_states) * 0.1)
        self.drift = None if context_dim is None else nn.Linear(context_dim, topology.num_states, bias=False)

    def logits(self) -> Tensor:
        """(N, N): b in every row."""
        return self.bias.expand(len(self.bias), -1)

    def forward(self, context_BTH: Tensor | None = None) -> Drift | LowRank:
        if self.drift is None:
            scores = self.bias.log_softmax(-1)
            return LowRank(torch.zeros_like(scores)[:, None], scores[None])
        scores_BTN = (self.drift(context_BTH) + self.bias).log_softmax(-1)
        return Drift(scores_BTN.new_zeros(scores_BTN.shape[-1], scores_BTN.shape[-1]), scores_BTN)


class FullContextualTransition(nn.Module):
    """log p(z_t = j | z_{t-1} = i, h_t) = log softmax_j(A[i, j] + sum_r (W h_t)[r] M_r[i, j]).

    Every arc has a rate of its own at which each of ``rank`` features of the context changes it. A chunk of frames at a
    time (:class:`hmm_speech.hmm.Chunked`), so that memory is B x chunk x N x N, but time is B T N^2 rank. A comes from
    :class:`StateScores`.
    """

    uses_context = True

    def __init__(
        self,
        topology: AnyTopology,
        context_dim: int,
        rank: int = 8,
        chunk: int = 32,
        dim: int | None = 128,
        blocks: int = 2,
        dropout: float = 0.05,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("rank", rank), ("chunk", chunk)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"transition.{name} is {value!r}; expected a positive integer")
        self.chunk = chunk
        self.scores = StateScores(topology, topology.num_states, dim, blocks, dropout, std)
        self.features = nn.Linear(context_dim, rank, bias=False)
        self.change_RNN = nn.Parameter(torch.randn(rank, topology.num_states, topology.num_states) * 0.1)
        self.register_buffer("forbidden", ~topology.arcs(), persistent=False)

    def logits(self) -> Tensor:
        """(N, N): A."""
        return self.scores().masked_fill(self.forbidden, -torch.inf)

    def forward(self, context_BTH: Tensor) -> Chunked:
        shared_NN = self.logits()
        features_BTR = self.features(context_BTH)[:, 1:]  # the arc t leads to frame t + 1

        def arcs(start: int, stop: int) -> Tensor:
            changes = torch.einsum("btr,rij->btij", features_BTR[:, start:stop], self.change_RNN)
            return (changes + shared_NN).log_softmax(-1)

        return Chunked(arcs, self.chunk)


class ContextualEmission(nn.Module):
    """log p(x_t | z_t, h_t) = log softmax_x((O h_t)[x] + S[z_t, x]), S from :class:`StateScores`.

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
        dim: int | None = 128,
        blocks: int = 2,
        dropout: float = 0.05,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.scores = StateScores(topology, vocabulary, dim, blocks, dropout, std)
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
