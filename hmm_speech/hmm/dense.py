"""Chains over dense scores: the native kernels, or the reference where they are not."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda as cuda  # registers the operators' kernels for GPUs
from . import ops, reference
from .chain import Chain
from .library import CUDA_MOST_STATES, CUDA_MOST_STATES_VARYING, use_native


class DenseChain(Chain):
    """transition (N, N), (B, N, N) or (B, T-1, N, N); emission (B, T, N), or None with a 4-D transition."""

    def dense(self) -> DenseChain:
        return self

    @property
    def scores(self) -> tuple:
        """The arguments of the operators and of the reference."""
        return self.initial, self.transition, self.emission, self.lengths, self.final

    def native(self, operation: str, transition_axes: int | None = None) -> bool:
        """Whether the operator of this name serves the chain, its transitions expanded to so many axes."""
        device, axes = self.transition.device.type, transition_axes or self.transition.dim()
        most = CUDA_MOST_STATES_VARYING if axes == 4 else CUDA_MOST_STATES
        return use_native(device, operation) and (device == "cpu" or self.num_states <= most)

    def log_partition(self) -> Tensor:
        return ops.LogPartition.apply(*self.scores) if self.native("forward") else reference.log_partition(*self.scores)

    def marginals(self) -> Tensor:
        return self.posterior(self.transition.dim(), edges=False)[0]

    def edge_marginals(self) -> Tensor:
        return self.posterior(4, edges=True)[1]

    def transition_counts(self) -> Tensor:
        edges = self.posterior(max(self.transition.dim(), 3), edges=True)[1]
        return edges.sum(1) if edges.dim() == 4 else edges

    def viterbi(self) -> tuple[Tensor, Tensor]:
        return torch.ops.hmm_speech.viterbi(*self.scores) if self.native("viterbi") else reference.viterbi(*self.scores)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        return torch.ops.hmm_speech.topk(*self.scores, k) if self.native("topk") else reference.topk(*self.scores, k)

    def sample(self, uniform: Tensor) -> Tensor:
        scores = [x if x is None else x.detach() for x in self.scores]
        if self.native("sample"):
            return torch.ops.hmm_speech.sample(*scores, uniform)
        return reference.sample(*scores, uniform)

    def posterior(self, transition_axes: int, edges: bool) -> tuple[Tensor, Tensor]:
        """State and edge posteriors for transitions expanded to `transition_axes` axes, one block of edges for each."""
        initial, transition, emission, lengths, final = self.scores
        batch, time, num_states = self.size
        if transition.dim() < transition_axes == 3:
            transition = transition.expand(batch, num_states, num_states).contiguous()
        elif transition.dim() < transition_axes:
            per_sequence = transition.expand(batch, num_states, num_states).unsqueeze(1)
            transition = per_sequence.expand(batch, max(time - 1, 0), num_states, num_states)
        ones = torch.ones(batch, dtype=transition.dtype, device=transition.device)
        scores = (initial, transition, emission, lengths, final)
        if self.native("backward", transition.dim()):
            with torch.no_grad():
                messages = torch.ops.hmm_speech.forward(*scores)
            return ops.Posterior.apply(ones, *scores, edges, *messages)
        state, edge = ops.posterior(ones, *scores, edges)
        if ops.tracked(scores):
            return state, edge
        return state.detach(), edge.detach()
