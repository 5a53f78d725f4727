"""The layer: :class:`HMM` and its function forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, information, ops, reference
from .library import use_native


class Viterbi(NamedTuple):
    """The best path: ``score`` (B,), and ``states`` (B, T) int64, -1 past the end and where no path is feasible."""

    score: Tensor
    states: Tensor


class TopK(NamedTuple):
    """The k best paths, best first: ``score`` (k, B), -inf where there are fewer paths; ``states`` (k, B, T) int64, -1
    past the end and for paths that do not exist."""

    score: Tensor
    states: Tensor


class HMM:
    r"""A batch of hidden Markov chains (or linear-chain CRFs), N states over T frames: exact, differentiable inference.

    A path :math:`z` of a sequence with L frames has the score

    .. math:: s(z) = \pi(z_0) + \sum_{t<L} e_t(z_t) + \sum_{0<t<L} \phi_t(z_{t-1}, z_t) + f(z_{L-1})

    in nats. Scores are potentials of any sign and scale; they need not be normalised, and -inf forbids. All that the
    methods return follows from the distribution :math:`p(z) = \exp(s(z) - \log Z)`.

    Args:
        initial: :math:`\pi`, (N,) or (B, N): the score of starting in each state.
        transition: :math:`\phi`, (N, N), (B, N, N) or (B, T-1, N, N): ``[..., i, j]`` scores i -> j.
        emission: :math:`e`, (B, T, N): the score of frame t under each state. None only with a 4-D transition.
        lengths: L, (B,) int64, 0..T in any order; None: all T. Frames past a length are ignored whatever they hold (NaN
            too) and get zero gradient. Length 0 has log partition 0.
        final: :math:`f`, (N,) or (B, N), or None: the score of ending in each state.
        check: look for +inf and NaN within the lengths, which otherwise give NaN, and at lengths on a GPU.

    float16 and bfloat16 scores are computed in float32; results are then float32, and gradients come back in the
    inputs' type. A sequence whose every path is forbidden has log partition -inf, zero marginals and zero gradients.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    >>> import torch
    >>> from hmm_speech.hmm import HMM
    >>> initial, transition = torch.zeros(2), torch.tensor([[0.0, -1.0], [-1.0, 0.0]])
    >>> emission = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]])
    >>> hmm = HMM(initial, transition, emission)
    >>> hmm.viterbi().states
    tensor([[0, 0, 1]])
    >>> hmm.marginals()[0, :, 0].round(decimals=3)
    tensor([0.9260, 0.8810, 0.2430])
    """

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        emission: Tensor | None = None,
        lengths: Tensor | None = None,
        final: Tensor | None = None,
        check: bool = False,
    ):
        self.initial, self.transition, self.emission, self.final = initial, transition, emission, final
        scores = {"initial": initial, "transition": transition, "emission": emission, "final": final}
        scores = {name: x for name, x in scores.items() if x is not None or name in ("initial", "transition")}
        for name, x in scores.items():
            checks.require_tensor(name, x)
        device = transition.device
        for name, x in scores.items():
            if x.device != device:
                raise ValueError(f"{name}: on {x.device}, expected {device}, where transition is")
        dtype = checks.common_dtype(scores)
        self._size = checks.check_shapes(initial, transition, emission, final)
        batch, time, self.num_states = self._size
        self.lengths = checks.check_lengths(lengths, batch, time, device, check)
        if check:
            checks.check_values("initial", initial, None)
            checks.check_values("transition", transition, self.lengths if transition.dim() == 4 else None, shift=1)
            checks.check_values("emission", emission, self.lengths)
            checks.check_values("final", final, None)
        cast = [None if x is None else x.to(dtype) for x in (initial, transition, emission, final)]
        self._scores = (cast[0], cast[1], cast[2], self.lengths, cast[3])

    def log_partition(self) -> Tensor:
        r""":math:`\log Z = \log \sum_z \exp s(z)`, (B,): the log-likelihood where scores are normalised.

        The forward algorithm (Rabiner 1989, eqs. 19-21), :math:`\alpha_t(j) = e_t(j) + \log \sum_i
        \exp(\alpha_{t-1}(i) + \phi_t(i, j))`. Its gradients are the posteriors below, with an explicit backward pass.
        """
        if use_native(self.transition.device.type):
            return ops.LogPartition.apply(*self._scores)
        return reference.log_partition(*self._scores)

    def marginals(self) -> Tensor:
        r"""Posteriors :math:`p(z_t = i)`, (B, T, N), 0 past the end (Rabiner 1989, eq. 27). Differentiable."""
        return self._posterior(self.transition.dim(), edges=False)[0]

    def edge_marginals(self) -> Tensor:
        r"""Posteriors :math:`p(z_t = i, z_{t+1} = j)`, (B, T-1, N, N), 0 past the end (Rabiner 1989, eq. 37).

        Takes the memory of its result; where the sum over time is enough, :meth:`transition_counts` does not.
        Differentiable.
        """
        return self._posterior(4, edges=True)[1]

    def transition_counts(self) -> Tensor:
        r"""Expected transitions :math:`\sum_{0<t<L} p(z_{t-1} = i, z_t = j)`, (B, N, N): Rabiner 1989, eq. 39b.

        Never forms (B, T, N, N), unless the transition came that way. Differentiable.
        """
        edges = self._posterior(max(self.transition.dim(), 3), edges=True)[1]
        return edges.sum(1) if edges.dim() == 4 else edges

    def viterbi(self) -> Viterbi:
        r"""The path of the highest score, :math:`\max_z s(z)` (Rabiner 1989, eqs. 32-35); ties: the smallest state.

        ``score`` is differentiable: its gradients are the indicator of the path.
        """
        with torch.no_grad():
            if use_native(self.transition.device.type):
                score, states = torch.ops.hmm_speech.viterbi(*self._scores)
            else:
                score, states = reference.viterbi(*self._scores)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self._scores):
            score = torch.where(score.isfinite(), self._path_score(states), score)
        return Viterbi(score, states)

    def topk(self, k: int) -> TopK:
        r"""The k best paths: list Viterbi, :math:`\delta_t(j)` being the k highest scores of paths into j.

        Seshadri and Sundberg 1994, the parallel algorithm. Plain torch on every backend: B T N^2 k operations, B T N k
        back-pointers. ``score`` is differentiable.
        """
        if isinstance(k, bool) or not hasattr(k, "__index__") or k < 1:
            raise ValueError(f"k: got {k!r}, expected an integer of at least 1")
        with torch.no_grad():
            score, states = reference.topk(*self._scores, int(k))
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self._scores):
            score = torch.stack(
                [torch.where(s.isfinite(), self._path_score(z), s) for s, z in zip(score, states, strict=True)]
            )
        return TopK(score, states)

    def smooth_viterbi(self, temperature: float) -> Tensor:
        r"""The relaxed maximum :math:`\tau \log \sum_z \exp(s(z) / \tau)`, (B,), for a temperature :math:`\tau > 0`.

        It lies above the Viterbi score and tends to it as the temperature falls; its gradients are the relaxed path
        (Mensch and Blondel 2018, with the entropy as regulariser).
        """
        if not temperature > 0 or temperature == float("inf"):
            raise ValueError(f"temperature: got {temperature!r}, expected a positive, finite number")
        cooled = [None if x is None else x / temperature for x in (*self._scores[:3], self._scores[4])]
        return temperature * HMM(*cooled[:3], self.lengths, cooled[3]).log_partition()

    def entropy(self) -> Tensor:
        r""":math:`-\sum_z p(z) \log p(z)`, (B,), in nats; 0 where no path is feasible. Exact and differentiable.

        :math:`\log Z - E_p[s(z)]`, whose expectation needs the posteriors alone (Hernando et al. 2005 get the same by a
        recursion). Computed in float64: the two terms grow with T and cancel.
        """
        return self.cross_entropy(self)

    def cross_entropy(self, other: HMM) -> Tensor:
        r""":math:`-\sum_z p(z) \log q(z)`, (B,), in nats, of this p and another q with the same B, T, N and lengths.

        +inf where q forbids a path that p allows, 0 where p allows none. Exact and differentiable in both.
        """
        return information.cross_entropy(self, other)

    def kl_divergence(self, other: HMM) -> Tensor:
        r""":math:`\sum_z p(z) \log (p(z) / q(z))`, (B,), in nats: ``cross_entropy(other) - entropy()``.

        +inf where q forbids a path that p allows. Exact and differentiable in both.
        """
        return information.kl_divergence(self, other)

    def sample(self, num_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples of paths from the posterior, (S, B, T) int64, -1 past the end and where no path is feasible.

        One forward pass, then S backward walks (forward filtering, backward sampling; Scott 2002, section 2.1).
        """
        if isinstance(num_samples, bool) or not hasattr(num_samples, "__index__") or num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples!r}, expected an integer of at least 1")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: got {type(generator).__name__}, expected a torch.Generator or None")
        batch, time, _ = self._size
        scores = [x if x is None else x.detach() for x in self._scores]
        shape = (int(num_samples), batch, time)
        uniform = torch.rand(shape, generator=generator, dtype=scores[1].dtype, device=scores[1].device)
        if use_native(self.transition.device.type):
            return torch.ops.hmm_speech.sample(*scores, uniform)
        return reference.sample(*scores, uniform)

    def score(self, states: Tensor) -> Tensor:
        """The score of paths, (B,) for states (B, T) int64; what they hold past the end is ignored. Differentiable.

        Raises:
            ValueError: for a state that is not one of 0..N-1 within the lengths.
        """
        batch, time, num_states = self._size
        if not isinstance(states, Tensor) or states.dtype != torch.int64:
            raise TypeError(f"states: got {getattr(states, 'dtype', type(states).__name__)}, expected an int64 tensor")
        if tuple(states.shape) != (batch, time):
            raise ValueError(
                f"states: shape is {checks.shape_of(states)}, expected ({batch}, {time}), one state a frame"
            )
        if states.device != self.transition.device:
            raise ValueError(f"states: on {states.device}, expected {self.transition.device}, where transition is")
        inside = torch.arange(time, device=states.device) < self.lengths.unsqueeze(-1)
        wrong = inside & ((states < 0) | (states >= num_states))
        if wrong.any():
            b, t = (int(k) for k in wrong.nonzero()[0])
            raise ValueError(f"states: holds {int(states[b, t])} at ({b}, {t}), expected 0 to {num_states - 1}")
        return self._path_score(states)

    def log_prob(self, states: Tensor) -> Tensor:
        """``score(states) - log_partition()``, (B,): the log-probability of given paths."""
        return self.score(states) - self.log_partition()

    def _path_score(self, states: Tensor) -> Tensor:
        """Scores of paths, summed in float64; states are clamped, so that what is past the end may hold anything."""
        initial, transition, emission, lengths, final = self._scores
        batch, time, num_states = self._size
        total = torch.zeros(batch, dtype=torch.float64, device=states.device)
        if time == 0:
            return total.to(transition.dtype)
        path, rows = states.clamp(0, num_states - 1), torch.arange(batch, device=states.device)
        steps = torch.arange(time, device=states.device)
        some = lengths > 0

        def add(scores: Tensor, inside: Tensor) -> Tensor:
            return torch.where(inside, scores, 0).double()

        total = total + add(initial.expand(batch, -1)[rows, path[:, 0]], some)
        if emission is not None:
            picked = emission.gather(2, path.unsqueeze(-1)).squeeze(-1)
            total = total + add(picked, steps < lengths.unsqueeze(-1)).sum(-1)
        if time > 1:
            if transition.dim() == 4:
                arcs = transition[rows[:, None], steps[None, :-1], path[:, :-1], path[:, 1:]]
            else:
                arcs = transition.expand(batch, -1, -1)[rows[:, None], path[:, :-1], path[:, 1:]]
            total = total + add(arcs, steps[1:] < lengths.unsqueeze(-1)).sum(-1)
        if final is not None:
            last = path.gather(1, (lengths - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
            total = total + add(final.expand(batch, -1)[rows, last], some)
        return total.to(transition.dtype)

    def _posterior(self, transition_axes: int, edges: bool) -> tuple[Tensor, Tensor]:
        """State and edge posteriors for transitions expanded to `transition_axes` axes, one block of edges for each."""
        initial, transition, emission, lengths, final = self._scores
        batch, time, num_states = self._size
        if transition.dim() < transition_axes == 3:
            transition = transition.expand(batch, num_states, num_states).contiguous()
        elif transition.dim() < transition_axes:
            per_sequence = transition.expand(batch, num_states, num_states).unsqueeze(1)
            transition = per_sequence.expand(batch, max(time - 1, 0), num_states, num_states)
        ones = torch.ones(batch, dtype=transition.dtype, device=transition.device)
        scores = (initial, transition, emission, lengths, final)
        if use_native(transition.device.type):
            with torch.no_grad():
                messages = torch.ops.hmm_speech.forward(*scores)
            return ops.Posterior.apply(ones, *scores, edges, *messages)
        state, edge = ops.posterior(ones, *scores, edges)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in scores):
            return state, edge
        return state.detach(), edge.detach()


def log_partition(
    initial: Tensor,
    transition: Tensor,
    emission: Tensor | None = None,
    lengths: Tensor | None = None,
    final: Tensor | None = None,
) -> Tensor:
    """``HMM(initial, transition, emission, lengths, final).log_partition()``, (B,)."""
    return HMM(initial, transition, emission, lengths, final).log_partition()


class HMMForward:
    """The interface of hmm-backprop, the code of Yeh and Tang 2022 (arXiv:2210.16659), on this layer."""

    @staticmethod
    def apply(potential: Tensor, lengths: Tensor, mask: Tensor | None = None) -> Tensor:
        """log Z, (B, 1), of edge potentials (B, T, N, N) with the start scores in ``potential[:, 0, 0]``.

        ``lengths`` (B,) says where each sequence ends. ``mask``, (B, T, 1, 1) or None, marked the same frames for the
        seed's backward pass; `lengths` decides here, and nothing is read from it. No argument is written to.
        """
        checks.require_tensor("potential", potential)
        if potential.dim() != 4 or potential.shape[-1] != potential.shape[-2] or potential.shape[1] < 1:
            raise ValueError(
                f"potential: shape is {checks.shape_of(potential)}, expected (B, T, N, N) with T of at least 1"
            )
        return log_partition(potential[:, 0, 0], potential[:, 1:], None, lengths).unsqueeze(-1)
