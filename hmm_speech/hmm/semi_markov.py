"""Hidden semi-Markov models: chains whose states last for a number of frames with scores of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, semi_markov_ops
from . import semi_markov_reference as reference
from .library import use_native
from .ops import tracked


class Segmentation(NamedTuple):
    """The best segmentation: ``score`` (B,), ``states`` (B, T) int64, -1 past the end and where none is feasible, and
    ``starts`` (B, T) bool, where segments start: two neighbouring ones may have the same state."""

    score: Tensor
    states: Tensor
    starts: Tensor


class Segments(NamedTuple):
    """Sampled segmentations: ``states`` (S, B, T) int64 and ``starts`` (S, B, T) bool, as in :class:`Segmentation`."""

    states: Tensor
    starts: Tensor


class SemiMarkovHMM:
    r"""A batch of hidden semi-Markov models (explicit-duration HMMs, semi-Markov CRFs): exact, differentiable.

    A path is a segmentation: segments of a state :math:`z_k` and a duration :math:`d_k \in 1..D` that cover the L
    frames exactly. Segment k begins at frame :math:`t_k`; the score, in nats, is

    .. math:: s = \pi(z_1) + \sum_k \Big[ \delta(z_k, d_k) + \sum_{t_k \le t < t_k + d_k} e_t(z_k) \Big]
        + \sum_{k>1} \phi(z_{k-1}, z_k) + f(z_K)

    (Yu 2010, "Hidden semi-Markov models"; Sarawagi and Cohen 2004). Scores are potentials of any sign
    and scale, -inf forbids. The first segment begins at the first frame and the last ends at the last. A state may
    follow itself, as a second segment, unless ``transition`` has -inf on its diagonal.

    Args:
        initial: :math:`\pi`, (N,) or (B, N): the score of the first segment's state.
        transition: :math:`\phi`, (N, N) or (B, N, N): ``[..., i, j]`` scores a segment of j after one of i.
        emission: :math:`e`, (B, T, N): the score of frame t under each state.
        durations: :math:`\delta`, (N, D) or (B, N, D): ``[..., i, d - 1]`` scores d frames in state i.
        lengths: L, (B,) int64, 0..T in any order; None: all T. Frames past a length are ignored whatever they hold (NaN
            too) and get zero gradient. Length 0 has log partition 0.
        final: :math:`f`, (N,) or (B, N), or None: the score of the last segment's state.
        check: look for +inf and NaN within the lengths, which otherwise give NaN, and at lengths on a GPU.

    Types are those of :class:`HMM`: float32 or float64, halves computed in float32. Inside, all is float64. A sequence
    without a feasible segmentation (its length may be more than durations permit) has log partition -inf, zero
    posteriors and zero gradients. Costs T (N^2 + N D) operations.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    >>> import torch
    >>> from hmm_speech.hmm import SemiMarkovHMM
    >>> durations = torch.tensor([[-9.0, 0.0], [-9.0, 0.0]])  # two frames are likely
    >>> emission = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 2.0]]])
    >>> SemiMarkovHMM(torch.zeros(2), torch.zeros(2, 2), emission, durations).viterbi().states
    tensor([[0, 0, 1, 1]])
    """

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        emission: Tensor,
        durations: Tensor,
        lengths: Tensor | None = None,
        final: Tensor | None = None,
        check: bool = False,
    ):
        self.initial, self.transition, self.emission, self.durations = initial, transition, emission, durations
        self.final = final
        named = {"initial": initial, "transition": transition, "emission": emission, "durations": durations}
        named |= {} if final is None else {"final": final}
        for name, x in named.items():
            checks.require_tensor(name, x)
        dtype, device = checks.common_dtype(named), checks.common_device(named)
        if transition.dim() not in (2, 3):
            raise ValueError(f"transition: shape is {checks.shape_of(transition)}, expected (N, N) or (B, N, N)")
        self.batch, self.time, self.num_states = checks.check_shapes(initial, transition, emission, final)
        self._check_durations()
        self.lengths = checks.check_lengths(lengths, self.batch, self.time, device, check)
        if check:
            checks.check_scores(initial, transition, emission, self.lengths, final)
            checks.check_values("durations", durations, None)
        cast = [None if x is None else x.to(dtype) for x in (initial, transition, emission, durations, final)]
        self._scores = (*cast[:4], self.lengths, cast[4])

    def _check_durations(self) -> None:
        shape, batch, num_states = tuple(self.durations.shape), self.batch, self.num_states
        if shape[:-1] not in ((num_states,), (batch, num_states)) or shape[-1] < 1:
            raise ValueError(
                f"durations: shape is {checks.shape_of(self.durations)}, expected ({num_states}, D) or "
                f"({batch}, {num_states}, D) with D of at least 1"
            )

    @property
    def _native(self) -> bool:
        return use_native(self._scores[0].device.type)

    @property
    def _tracked(self) -> bool:
        return tracked(self._scores)

    def log_partition(self) -> Tensor:
        r""":math:`\log Z`, the log of the sum over segmentations of exp(score), (B,).

        The forward algorithm over starts and ends of segments (Yu 2010),

        .. math:: \alpha_t(j) = \log \sum_{d \le \min(D, t + 1)} \exp\Big( \beta_{t-d+1}(j) + \delta(j, d)
            + \sum_{t-d < s \le t} e_s(j) \Big), \quad \beta_t(j) = \log \sum_i \exp(\alpha_{t-1}(i) + \phi(i, j)),

        :math:`\beta_0 = \pi`. Its gradients are the posteriors below, with an explicit backward pass.
        """
        if not self._native:
            return reference.log_partition(*self._scores)
        if self._tracked:
            return semi_markov_ops.LogPartition.apply(*self._scores)
        return torch.ops.hmm_speech.semi_markov_forward(*self._scores, False)[0]

    def marginals(self) -> Tensor:
        r"""Posteriors :math:`p(z_t = i)` of the state at each frame, (B, T, N), 0 past the end. Differentiable."""
        return self._posterior()[0]

    def starts(self) -> Tensor:
        """Posteriors that a segment of state i starts at frame t, (B, T, N), 0 past the end. Differentiable.

        Their sum over t and i is the expected number of segments."""
        return self._posterior(starts=True)[1]

    def transition_counts(self) -> Tensor:
        """Expected number of segments of j after one of i, (B, N, N). Differentiable."""
        return self._posterior(arcs=True)[2]

    def duration_counts(self) -> Tensor:
        """Expected number of segments of state i that last d frames, (B, N, D), d - 1 last. Differentiable."""
        return self._posterior(lasting=True)[3]

    def viterbi(self) -> Segmentation:
        """The segmentation of the highest score (Yu 2010). Ties: the smallest state, then the shortest
        duration, from the last segment on. ``score`` is differentiable: its gradients are the path's indicators."""
        with torch.no_grad():
            find = torch.ops.hmm_speech.semi_markov_viterbi if self._native else reference.viterbi
            score, states, starts = find(*self._scores)
        if self._tracked:
            score = torch.where(score.isfinite(), self._path_score(states, starts), score)
        return Segmentation(score, states, starts)

    def sample(self, num_samples: int = 1, generator: torch.Generator | None = None) -> Segments:
        """Exact samples of segmentations from the posterior: one forward pass, then S backward walks."""
        if isinstance(num_samples, bool) or not hasattr(num_samples, "__index__") or num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples!r}, expected an integer of at least 1")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: got {type(generator).__name__}, expected a torch.Generator or None")
        shape = int(num_samples), self.batch, self.time, 2
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=self.lengths.device)
        with torch.no_grad():
            draw = torch.ops.hmm_speech.semi_markov_sample if self._native else reference.sample
            return Segments(*draw(*self._scores, uniform))

    def score(self, states: Tensor, starts: Tensor | None = None) -> Tensor:
        """The score of segmentations, (B,), from states (B, T) int64 and starts (B, T) bool. Differentiable.

        ``starts`` None: a segment is a maximal run of one state. What both hold past the end is ignored. A segment of
        more than D frames is no path: -inf.

        Raises:
            ValueError: for a state that is not one of 0..N-1, a first frame that starts no segment, or a state that
                changes within a segment.
        """
        shape, device = (self.batch, self.time), self.lengths.device
        for name, x, dtype in (("states", states, torch.int64), ("starts", starts, torch.bool)):
            if x is None and name == "starts":
                continue
            if not isinstance(x, Tensor) or x.dtype != dtype:
                raise TypeError(f"{name}: got {getattr(x, 'dtype', type(x).__name__)}, expected a tensor of {dtype}")
            if tuple(x.shape) != shape:
                raise ValueError(f"{name}: shape is {checks.shape_of(x)}, expected {shape}")
            if x.device != device:
                raise ValueError(f"{name}: on {x.device}, expected {device}, where the scores are")
        inside = torch.arange(self.time, device=device) < self.lengths.unsqueeze(-1)
        wrong = inside & ((states < 0) | (states >= self.num_states))
        changes = torch.ones(shape, dtype=torch.bool, device=device)
        changes[:, 1:] = states[:, 1:] != states[:, :-1]
        missing = torch.zeros_like(changes) if starts is None else inside & changes & ~starts
        starts = changes if starts is None else starts
        if torch.compiler.is_compiling():  # nobody can be told while tracing
            return self._path_score(states, starts).masked_fill((wrong | missing).any(-1), torch.nan)
        if wrong.any():
            b, t = (int(k) for k in wrong.nonzero()[0])
            raise ValueError(f"states: holds {int(states[b, t])} at ({b}, {t}), expected 0 to {self.num_states - 1}")
        if missing.any():
            b, t = (int(k) for k in missing.nonzero()[0])
            reason = "a new state starts a segment" if t else "the first frame starts a segment"
            raise ValueError(f"starts: False at ({b}, {t}), expected True: {reason}")
        return self._path_score(states, starts)

    def log_prob(self, states: Tensor, starts: Tensor | None = None) -> Tensor:
        """``score(states, starts) - log_partition()``, (B,): the log-probability of given segmentations."""
        return self.score(states, starts) - self.log_partition()

    def _posterior(self, starts: bool = False, arcs: bool = False, lasting: bool = False) -> list[Tensor]:
        """State posteriors and, where asked, those of starts and the counts of arcs and durations, one a sequence."""
        initial, transition, emission, durations, lengths, final = self._scores
        if arcs:
            transition = transition.expand(self.batch, -1, -1)
        if lasting:
            durations = durations.expand(self.batch, -1, -1)
        scores, wanted = (initial, transition, emission, durations, lengths, final), (starts, arcs, lasting)
        ones, tracked = emission.new_ones(self.batch), self._tracked
        if not self._native:
            found = semi_markov_ops.posterior(ones, *scores, *wanted)
            return found if tracked else [x.detach() for x in found]
        with torch.no_grad():
            messages = torch.ops.hmm_speech.semi_markov_forward(*scores, True)
            if not tracked:
                return torch.ops.hmm_speech.semi_markov_backward(ones, *scores, *messages, *wanted)
        return semi_markov_ops.Posterior.apply(ones, *scores, *wanted, *messages)

    def _path_score(self, states: Tensor, starts: Tensor) -> Tensor:
        """Scores of segmentations (B, T), summed in float64; what is past the end may hold anything."""
        initial, transition, emission, durations, lengths, final = self._scores
        total = torch.zeros(self.batch, dtype=torch.float64, device=states.device)
        if self.time == 0:
            return total.to(emission.dtype)
        path, place = states.clamp(0, self.num_states - 1), torch.arange(self.time, device=states.device)
        inside, row = place < lengths.unsqueeze(-1), torch.arange(self.batch, device=states.device)
        starts = starts & inside
        ends = inside & (starts.roll(-1, 1) | (place + 1 == lengths.unsqueeze(-1)))
        duration = place - torch.where(starts, place, 0).cummax(1).values + 1
        longest = durations.shape[-1]

        def add(scores: Tensor, where: Tensor) -> Tensor:
            return torch.where(where, scores, 0).double()

        of_batch = row.unsqueeze(-1)
        lasting = durations.expand(self.batch, -1, -1)[of_batch, path, (duration - 1).clamp(max=longest - 1)]
        total = total + add(torch.where(duration > longest, -torch.inf, lasting), ends).sum(-1)
        total = total + add(emission.gather(2, path.unsqueeze(-1)).squeeze(-1), inside).sum(-1)
        arcs = transition.expand(self.batch, -1, -1)[of_batch, path[:, :-1], path[:, 1:]]
        total = total + add(arcs, starts[:, 1:]).sum(-1)
        total = total + add(initial.expand(self.batch, -1)[row, path[:, 0]], lengths > 0)
        if final is not None:
            last = path[row, (lengths - 1).clamp(min=0)]
            total = total + add(final.expand(self.batch, -1)[row, last], lengths > 0)
        return total.to(emission.dtype)
