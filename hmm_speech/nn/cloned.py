"""Transitions of cloned states at any size: scores are made for the clones of one frame's unit and the next's alone.

Shapes: B utterances, T frames, N states, K clones of a unit at most, M states that are active, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hmm_speech.errors import UserError
from hmm_speech.hmm import HMM, Active, Chunked, Viterbi
from hmm_speech.nn.topology import AnyTopology, ClonedTopology
from hmm_speech.nn.transition import TransitionNetwork

NUMBERS = 2**23  # of scores and vectors that are in memory at a time, 32 MB


class Normaliser(Function):
    """log sum_j exp(q_i . k_j + b_j) for all i, (N,), some rows at a time, whose scores the backward pass makes again.

    All scores pass through one buffer of NUMBERS: blocks that are allocated anew leave holes between what is kept, and
    the process then grows to the (N, N) that is to be avoided.
    """

    @staticmethod
    def forward(ctx, query_NF: Tensor, key_NF: Tensor, bias_N: Tensor) -> Tensor:
        found_N = torch.empty_like(bias_N)
        for rows, scores_IN in _portions(query_NF, key_NF, bias_N):
            top_I1 = scores_IN.amax(-1, keepdim=True)
            found_N[rows] = scores_IN.sub_(top_I1).exp_().sum(-1).log_() + top_I1.squeeze(-1)
        ctx.save_for_backward(query_NF, key_NF, bias_N, found_N)
        return found_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query_NF, key_NF, bias_N, found_N = ctx.saved_tensors
        query_grad, key_grad, bias_grad = (torch.zeros_like(x) for x in (query_NF, key_NF, bias_N))
        for rows, scores_IN in _portions(query_NF, key_NF, bias_N):
            share_IN = scores_IN.sub_(found_N[rows, None]).exp_().mul_(grad_N[rows, None])
            torch.mm(share_IN, key_NF, out=query_grad[rows])
            key_grad.addmm_(share_IN.T, query_NF[rows])
            bias_grad += share_IN.sum(0)
        return query_grad, key_grad, bias_grad


def _portions(query_NF: Tensor, key_NF: Tensor, bias_N: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their scores (I, N), in one buffer that the next ones overwrite."""
    num_states = len(bias_N)
    most = min(num_states, max(1, NUMBERS // num_states))
    buffer_IN = query_NF.new_empty(most, num_states)
    for start in range(0, num_states, most):
        rows = slice(start, min(start + most, num_states))
        scores_IN = buffer_IN[: rows.stop - start]
        yield rows, torch.addmm(bias_N, query_NF[rows], key_NF.T, out=scores_IN)


class Products(NamedTuple):
    """p(z_t = j | z_{t-1} = i) = softmax_j(q_i . k_j + b_j), over the active states j, of which z_1 is one too."""

    query_NF: Tensor
    key_NF: Tensor
    bias_N: Tensor
    active_M: Tensor | None = None
    """Ascending; None: all."""

    def chain(self, initial_N: Tensor, emission: Tensor | Active, lengths_B: Tensor) -> SlotChain:
        """The chain of a batch over the active states of each frame."""
        if not isinstance(emission, Active):
            raise UserError("transition=cloned needs emission=cloned, and topology=cloned")
        if self.active_M is None:
            return SlotChain(self, initial_N, emission, lengths_B)
        place_N = torch.full_like(initial_N, -1, dtype=torch.int64)
        place_N[self.active_M] = torch.arange(len(self.active_M), device=place_N.device)
        inner = Products(*(x[self.active_M] for x in self[:3]))
        initial_M = initial_N[self.active_M].log_softmax(-1)
        return SlotChain(inner, initial_M, renamed(emission, place_N), lengths_B, self.active_M)

    def normaliser(self) -> Tensor:
        """(N,): log sum_j exp(q_i . k_j + b_j)."""
        return Normaliser.apply(self.query_NF, self.key_NF, self.bias_N)

    def following(self, initial_N: Tensor, states_BT: Tensor) -> Tensor:
        """(B, N) log p(next state | last state), or of the first one."""
        if not states_BT.shape[1]:
            return initial_N.expand(len(states_BT), -1)
        return torch.addmm(self.bias_N, self.query_NF[states_BT[:, -1]], self.key_NF.T).log_softmax(-1)

    def dense(self) -> Tensor:
        """(N, N) log-probabilities, for small N."""
        return torch.addmm(self.bias_N, self.query_NF, self.key_NF.T).log_softmax(-1)


def renamed(emission: Active, place_N: Tensor) -> Active:
    """An emission over the states that have a place, by their places; slots of the others are closed up."""
    states_BTK = torch.where(emission.states < 0, -1, place_N[emission.states.clamp(min=0)])
    kept_BTK = states_BTK >= 0
    slot_BTK = kept_BTK.cumsum(-1) - 1
    width = int(slot_BTK.max()) + 1 if slot_BTK.numel() else 1
    slot_BTK = torch.where(kept_BTK, slot_BTK, width)
    shape = (*states_BTK.shape[:2], width + 1)
    states = states_BTK.new_full(shape, -1).scatter(2, slot_BTK, states_BTK)[..., :width]
    return Active(states, emission.scores.new_zeros(shape).scatter(2, slot_BTK, emission.scores)[..., :width])


class SlotChain:
    """A batch as a chain over the K slots of each frame, whose (K, K) scores are made some frames at a time.

    Time is B T K^2 F for the scores and N^2 F for their normalisers; no (B, T, K, K) and no (N, N) arises.
    """

    def __init__(
        self,
        parts: Products,
        initial_N: Tensor,
        emission: Active,
        lengths_B: Tensor,
        names_N: Tensor | None = None,
    ) -> None:
        self.lengths, self.names_N = lengths_B, names_N
        used_BTK = emission.states >= 0
        self.states_BTK = states_BTK = emission.states.clamp(min=0)
        one_N1 = torch.ones_like(parts.bias_N)[:, None]
        query_NF = torch.cat([parts.query_NF, -parts.normaliser()[:, None], one_N1], -1)
        key_NF = torch.cat([parts.key_NF, one_N1, parts.bias_N[:, None]], -1)  # so that a product is a log-probability

        def arcs(start: int, stop: int) -> Tensor:
            leave_BTKF = F.embedding(states_BTK[:, start:stop], query_NF)
            enter_BTKF = F.embedding(states_BTK[:, start + 1 : stop + 1], key_NF)
            return leave_BTKF @ enter_BTKF.transpose(-1, -2)

        batch, time, width = states_BTK.shape
        chunk = max(1, NUMBERS // max(1, batch * width * (width + 2 * query_NF.shape[1])))
        first_BK = initial_N[states_BTK[:, 0]] if time else initial_N.new_zeros(batch, width)
        scores_BTK = torch.where(used_BTK, emission.scores, -torch.inf)
        self.slots = HMM(first_BK, Chunked(arcs, chunk), scores_BTK, lengths_B)

    def log_partition(self) -> Tensor:
        """(B,) log p(observations)."""
        return self.slots.log_partition()

    def viterbi(self) -> Viterbi:
        """The best path's score (B,) and states (B, T), -1 past the end."""
        score, slots_BT = self.slots.viterbi()
        states_BT = self.states_BTK.gather(-1, slots_BT.clamp(min=0)[..., None]).squeeze(-1)
        if self.names_N is not None:
            states_BT = self.names_N[states_BT]
        return Viterbi(score, torch.where(slots_BT < 0, -1, states_BT))


class ClonedTransition(TransitionNetwork):
    """The same distribution as :class:`TransitionNetwork`, for cloned states too many for (N, N) scores.

    State dropout (Chiu and Rush 2020, arXiv:2011.04640): in each training batch a random part of each
    unit's clones is active, and the chain is normalised over these. A step then costs less, by the square of that part,
    and clones do not co-adapt. All are active outside training.

    Args:
        state_dropout: share of each unit's clones that a training batch does without; one is always left.
        options: see :class:`TransitionNetwork`.

    Raises:
        UserError: the states are not cloned, or ``state_dropout`` is no share below 1.
    """

    def __init__(self, topology: AnyTopology, state_dropout: float = 0.5, **options: Any) -> None:
        if not isinstance(topology, ClonedTopology):
            raise UserError(f"transition=cloned needs topology=cloned, but the topology has {topology}")
        if not 0 <= state_dropout < 1:
            raise UserError(f"transition.state_dropout is {state_dropout!r}; expected a share from 0 to below 1")
        super().__init__(topology, **options)
        self.state_dropout = state_dropout
        clones_V = torch.tensor(topology.clones)
        kept_V = (clones_V * (1 - state_dropout)).round().long().clamp(min=1)
        self.register_buffer("unit_N", topology.factors()[0], persistent=False)
        self.register_buffer("start_V", clones_V.cumsum(0) - clones_V, persistent=False)
        self.register_buffer("kept_V", kept_V, persistent=False)

    def forward(self) -> Products:
        return Products(*self.factors(), self.draw() if self.training and self.state_dropout else None)

    def draw(self) -> Tensor:
        """(M,): as many clones of each unit as are kept, at random; ascending."""
        noise_N = torch.rand(len(self.unit_N), dtype=torch.float64, device=self.unit_N.device)
        order = torch.argsort(self.unit_N + noise_N)
        rank_N = torch.arange(len(order), device=order.device) - self.start_V[self.unit_N]  # states lie sorted by unit
        return order[rank_N < self.kept_V[self.unit_N]].sort().values

    def logits(self) -> Tensor:
        """(N, N) log-probabilities, for small N."""
        return super().forward()
