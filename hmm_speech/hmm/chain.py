"""What :class:`hmm_speech.hmm.HMM` hands its calls to: one class for each structure of scores, all with these methods.

Whatever a structure has no better way for, it does as the dense chain that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import checks, ops, structures
from .structures import Active, Banded, Chunked, LowRank, Transition

if TYPE_CHECKING:
    from .dense import DenseChain


class Chain:
    """Scores that have been checked and brought to one type; ``lengths`` on their device."""

    def __init__(
        self,
        initial: Tensor,
        transition: Transition,
        emission: Tensor | Active | None,
        lengths: Tensor,
        final: Tensor | None,
        time: int,
    ):
        if isinstance(transition, Chunked):  # looked at again in the backward pass, where a change would go unnoticed
            lengths = lengths.clone()
        self.initial, self.transition, self.emission, self.lengths, self.final = (
            initial, transition, emission, lengths, final,
        )  # fmt: skip
        self.size = self.batch, self.time, self.num_states = lengths.shape[0], time, initial.shape[-1]

    def map(self, function: Callable[[Tensor], Tensor]) -> Chain:
        """This chain with every score tensor x replaced by function(x)."""
        scores = [mapped(x, function) for x in (self.initial, self.transition, self.emission, self.final)]
        return type(self)(*scores[:3], self.lengths, scores[3], self.time)

    def dense(self) -> DenseChain:
        """The chain without structure that this one stands for."""
        from .dense import DenseChain

        transition, emission = self.transition, self.emission
        if isinstance(transition, Chunked):
            spans = transition.spans(self.time)
            parts = [transition.function(start, stop) for start, stop in spans]
            empty = self.initial.new_empty(self.batch, 0, self.num_states, self.num_states)
            transition = torch.cat(parts, 1) if parts else empty
        elif isinstance(transition, LowRank):
            transition = transition.within(self.lengths).dense()
        elif isinstance(transition, Banded):
            transition = transition.dense()
        if isinstance(emission, Active):
            emission = emission.dense(self.num_states)
        return DenseChain(self.initial, transition, emission, self.lengths, self.final, self.time)

    def log_partition(self) -> Tensor:
        return self.dense().log_partition()

    def marginals(self) -> Tensor:
        return self.dense().marginals()

    def edge_marginals(self) -> Tensor:
        return self.dense().edge_marginals()

    def transition_counts(self) -> Tensor:
        return self.dense().transition_counts()

    def viterbi(self) -> tuple[Tensor, Tensor]:
        """Scores (B,) and states (B, T), without gradients."""
        return self.dense().viterbi()

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Scores (k, B) and states (k, B, T), without gradients."""
        return self.dense().topk(k)

    def sample(self, uniform: Tensor) -> Tensor:
        """States (S, B, T) from uniform numbers (S, B, T)."""
        return self.dense().sample(uniform)

    def scaled(self, factor: float) -> Chain:
        """The chain whose every score is `factor` times this one's."""
        return self.map(lambda x: x * factor)

    def tracked(self) -> bool:
        """Whether autograd follows what is computed of the scores. Of a function's: maybe."""
        scores = checks.score_tensors(self.initial, self.transition, self.emission, self.final)
        unknown = torch.is_grad_enabled() and isinstance(self.transition, Chunked)
        return unknown or ops.tracked(scores.values())

    def path_score(self, states: Tensor) -> Tensor:
        """Scores of paths (B, T), summed in float64; states are clamped: what is past the end may hold anything."""
        total = torch.zeros(self.batch, dtype=torch.float64, device=states.device)
        if self.time == 0:
            return total.to(self.initial.dtype)
        path = states.clamp(0, self.num_states - 1)
        some, inside = self.lengths > 0, torch.arange(self.time, device=states.device) < self.lengths.unsqueeze(-1)

        def add(scores: Tensor, inside: Tensor) -> Tensor:
            return torch.where(inside, scores, 0).double()

        def one(scores: Tensor, state: Tensor) -> Tensor:
            return scores.expand(self.batch, -1).gather(1, state.unsqueeze(-1)).squeeze(-1)

        total = total + add(one(self.initial, path[:, 0]), some)
        if self.emission is not None:
            picked = (
                self.emission.look_up(path)
                if isinstance(self.emission, Active)
                else self.emission.gather(2, path.unsqueeze(-1)).squeeze(-1)
            )
            total = total + add(picked, inside).sum(-1)
        if self.time > 1:
            total = total + add(self._arcs_along(path), inside[:, 1:]).sum(-1)
        if self.final is not None:
            last = path.gather(1, (self.lengths - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
            total = total + add(one(self.final, last), some)
        return total.to(self.initial.dtype)

    def _arcs_along(self, path: Tensor) -> Tensor:
        """(B, T-1): the score of each arc that paths take."""
        rows, columns = path[:, :-1].unsqueeze(-1), path[:, 1:].unsqueeze(-1)
        if isinstance(self.transition, LowRank):
            return self.transition.within(self.lengths).gather(rows, columns)[..., 0, 0]
        if not isinstance(self.transition, Chunked):
            return structures.gather(self.transition, rows, columns)[..., 0, 0]

        def along(start: int, stop: int) -> Tensor:
            arcs = self.transition.function(start, stop)
            return structures.gather(arcs, rows[:, start:stop], columns[:, start:stop])

        spans = self.transition.spans(self.time)
        parts = [checkpoint(along, start, stop, use_reentrant=False) for start, stop in spans]
        return torch.cat(parts, 1)[..., 0, 0]


def mapped(scores, function: Callable[[Tensor], Tensor]):
    """function(x) for a tensor x, or for each tensor of a structure; None stays None."""
    if scores is None:
        return None
    return function(scores) if isinstance(scores, Tensor) else scores.map(function)
