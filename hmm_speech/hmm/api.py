"""The layer: :class:`HMM` and its function forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, information
from .active import ActiveChain
from .banded import BandedChain
from .chain import Chain, mapped
from .chunked import ChunkedChain
from .dense import DenseChain
from .low_rank import LowRankChain
from .structures import Active, Banded, Chunked, LowRank, Transition


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
        transition: :math:`\phi`, (N, N), (B, N, N) or (B, T-1, N, N): ``[..., i, j]`` scores i -> j. Or a
            :class:`LowRank`, :class:`Banded` or :class:`Chunked`.
        emission: :math:`e`, (B, T, N): the score of frame t under each state. Or an :class:`Active`: only K of the
            states can emit each frame. None only with a 4-D transition.
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
    >>> hmm.transition_counts()[0].round(decimals=3)
    tensor([[1.0760, 0.7310],
            [0.0470, 0.1460]])
    >>> hmm.log_partition().round(decimals=4), hmm.smooth_viterbi(0.1).round(decimals=3)
    (tensor([5.4888]), tensor([5.]))
    >>> hmm.topk(2).states[:, 0]
    tensor([[0, 0, 1],
            [0, 0, 0]])
    >>> hmm.sample(1000, torch.Generator().manual_seed(0)).shape
    torch.Size([1000, 1, 3])
    >>> path = torch.tensor([[0, 0, 1]])
    >>> hmm.score(path), hmm.log_prob(path).exp().round(decimals=3)
    (tensor([5.]), tensor([0.6130]))
    >>> other = HMM(initial, torch.zeros(2, 2), emission)
    >>> hmm.entropy().round(decimals=3), hmm.kl_divergence(other).round(decimals=3)
    (tensor([1.1380]), tensor([0.1140]))

    States that a frame may not have, for constrained or semi-supervised training and forced alignment, are emissions of
    -inf; log Z of what is allowed less log Z of all is the log-probability that a path is allowed:

    >>> allowed = torch.tensor([[[True, True], [True, False], [True, True]]])
    >>> held = HMM(initial, transition, emission.masked_fill(~allowed, -torch.inf))
    >>> (held.log_partition() - hmm.log_partition()).exp().round(decimals=3)
    tensor([0.8810])
    """

    def __init__(
        self,
        initial: Tensor,
        transition: Transition,
        emission: Tensor | Active | None = None,
        lengths: Tensor | None = None,
        final: Tensor | None = None,
        check: bool = False,
    ):
        self.initial, self.transition, self.emission, self.final = initial, transition, emission, final
        scores = checks.score_tensors(initial, transition, emission, final)
        dtype, device = checks.common_dtype(scores), checks.common_device(scores)
        batch, time, self.num_states = checks.check_shapes(initial, transition, emission, final)
        self.lengths = checks.check_lengths(lengths, batch, time, device, check)
        if isinstance(emission, Active):
            checks.check_active(emission.states, self.lengths, self.num_states, check)
        if check:
            checks.check_scores(initial, transition, emission, self.lengths, final)
        if isinstance(transition, Chunked):
            transition = transition.checked(batch, self.num_states, dtype, device, self.lengths if check else None)
        if any(x.dtype != dtype for x in scores.values()):
            cast = [mapped(x, lambda x: x.to(dtype)) for x in (initial, transition, emission, final)]
            initial, transition, emission, final = cast
        self._chain = _kind(transition, emission)(initial, transition, emission, self.lengths, final, time)

    def log_partition(self) -> Tensor:
        r""":math:`\log Z = \log \sum_z \exp s(z)`, (B,): the log-likelihood where scores are normalised.

        The forward algorithm (Rabiner 1989, eqs. 19-21), :math:`\alpha_t(j) = e_t(j) + \log \sum_i
        \exp(\alpha_{t-1}(i) + \phi_t(i, j))`. Its gradients are the posteriors below, with an explicit backward pass.
        """
        return self._chain.log_partition()

    def marginals(self) -> Tensor:
        r"""Posteriors :math:`p(z_t = i)`, (B, T, N), 0 past the end (Rabiner 1989, eq. 27). Differentiable."""
        return self._chain.marginals()

    def edge_marginals(self) -> Tensor:
        r"""Posteriors :math:`p(z_t = i, z_{t+1} = j)`, (B, T-1, N, N), 0 past the end (Rabiner 1989, eq. 37).

        Takes the memory of its result; where the sum over time is enough, :meth:`transition_counts` does not.
        Differentiable.
        """
        return self._chain.edge_marginals()

    def transition_counts(self) -> Tensor:
        r"""Expected transitions :math:`\sum_{0<t<L} p(z_{t-1} = i, z_t = j)`, (B, N, N): Rabiner 1989, eq. 39b.

        Never forms (B, T, N, N), unless the transition came that way. Differentiable.
        """
        return self._chain.transition_counts()

    def viterbi(self) -> Viterbi:
        r"""The path of the highest score, :math:`\max_z s(z)` (Rabiner 1989, eqs. 32-35); ties: the smallest state.

        ``score`` is differentiable: its gradients are the indicator of the path.
        """
        with torch.no_grad():
            score, states = self._chain.viterbi()
        return Viterbi(self._differentiable(score, states), states)

    def topk(self, k: int) -> TopK:
        r"""The k best paths: list Viterbi, :math:`\delta_t(j)` being the k highest scores of paths into j.

        Seshadri and Sundberg 1994, the parallel algorithm: at most B T N^2 k candidates, of which most are skipped, and
        T N k back-pointers a sequence. Among paths of equal score any may come first, the same every time. ``score``
        is differentiable.
        """
        if isinstance(k, bool) or not hasattr(k, "__index__") or k < 1:
            raise ValueError(f"k: got {k!r}, expected an integer of at least 1")
        with torch.no_grad():
            score, states = self._chain.topk(int(k))
        rows = [self._differentiable(s, z) for s, z in zip(score, states, strict=True)]
        return TopK(torch.stack(rows), states)

    def smooth_viterbi(self, temperature: float) -> Tensor:
        r"""The relaxed maximum :math:`\tau \log \sum_z \exp(s(z) / \tau)`, (B,), for a temperature :math:`\tau > 0`.

        It lies above the Viterbi score and tends to it as the temperature falls; its gradients are the relaxed path
        (Mensch and Blondel 2018, with the entropy as regulariser).
        """
        if not temperature > 0 or temperature == float("inf"):
            raise ValueError(f"temperature: got {temperature!r}, expected a positive, finite number")
        return temperature * self._chain.scaled(1 / temperature).log_partition()

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
        return information.cross_entropy(self._chain, _chain_of(other))

    def kl_divergence(self, other: HMM) -> Tensor:
        r""":math:`\sum_z p(z) \log (p(z) / q(z))`, (B,), in nats: ``cross_entropy(other) - entropy()``.

        +inf where q forbids a path that p allows. Exact and differentiable in both.
        """
        return information.kl_divergence(self._chain, _chain_of(other))

    def sample(self, num_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples of paths from the posterior, (S, B, T) int64, -1 past the end and where no path is feasible.

        One forward pass, then S backward walks (forward filtering, backward sampling; Scott 2002, section 2.1).
        """
        if isinstance(num_samples, bool) or not hasattr(num_samples, "__index__") or num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples!r}, expected an integer of at least 1")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: got {type(generator).__name__}, expected a torch.Generator or None")
        batch, time, _ = self._chain.size
        shape, initial = (int(num_samples), batch, time), self._chain.initial
        uniform = torch.rand(shape, generator=generator, dtype=initial.dtype, device=initial.device)
        with torch.no_grad():
            return self._chain.sample(uniform)

    def score(self, states: Tensor) -> Tensor:
        """The score of paths, (B,) for states (B, T) int64; what they hold past the end is ignored. Differentiable.

        Raises:
            ValueError: for a state that is not one of 0..N-1 within the lengths.
        """
        batch, time, num_states = self._chain.size
        if not isinstance(states, Tensor) or states.dtype != torch.int64:
            raise TypeError(f"states: got {getattr(states, 'dtype', type(states).__name__)}, expected an int64 tensor")
        if tuple(states.shape) != (batch, time):
            raise ValueError(
                f"states: shape is {checks.shape_of(states)}, expected ({batch}, {time}), one state a frame"
            )
        if states.device != self.initial.device:
            raise ValueError(f"states: on {states.device}, expected {self.initial.device}, where the scores are")
        inside = torch.arange(time, device=states.device) < self.lengths.unsqueeze(-1)
        wrong = inside & ((states < 0) | (states >= num_states))
        if torch.compiler.is_compiling():  # nobody can be told while tracing
            return self._chain.path_score(states).masked_fill(wrong.any(-1), torch.nan)
        if wrong.any():
            b, t = (int(k) for k in wrong.nonzero()[0])
            raise ValueError(f"states: holds {int(states[b, t])} at ({b}, {t}), expected 0 to {num_states - 1}")
        return self._chain.path_score(states)

    def log_prob(self, states: Tensor) -> Tensor:
        """``score(states) - log_partition()``, (B,): the log-probability of given paths."""
        return self.score(states) - self.log_partition()

    def _differentiable(self, score: Tensor, states: Tensor) -> Tensor:
        """`score` (B,) of the best paths, as autograd sees it."""
        if not self._chain.tracked():
            return score
        along = self._chain.path_score(states)
        return torch.where(score.isfinite(), along, score) if along.requires_grad else score


_KINDS: dict[type, type[Chain]] = {LowRank: LowRankChain, Banded: BandedChain, Chunked: ChunkedChain}


def _kind(transition: Transition, emission: Tensor | Active | None) -> type[Chain]:
    return ActiveChain if isinstance(emission, Active) else _KINDS.get(type(transition), DenseChain)


def _chain_of(other: object) -> Chain:
    if not isinstance(other, HMM):
        raise TypeError(f"other: got {type(other).__name__}, expected an HMM")
    return other._chain


def log_partition(
    initial: Tensor,
    transition: Transition,
    emission: Tensor | Active | None = None,
    lengths: Tensor | None = None,
    final: Tensor | None = None,
) -> Tensor:
    """``HMM(initial, transition, emission, lengths, final).log_partition()``, (B,).

    >>> import torch
    >>> from hmm_speech.hmm import log_partition
    >>> log_partition(torch.zeros(2), torch.zeros(2, 2), torch.zeros(1, 3, 2)).exp().round()
    tensor([8.])
    """
    return HMM(initial, transition, emission, lengths, final).log_partition()


class HMMForward:
    """The interface of hmm-backprop, the code of Yeh and Tang 2022 (arXiv:2210.16659), on this layer."""

    @staticmethod
    def apply(potential: Tensor, lengths: Tensor, mask: Tensor | None = None) -> Tensor:
        """log Z, (B, 1), of edge potentials (B, T, N, N) with the start scores in ``potential[:, 0, 0]``.

        ``lengths`` (B,) says where each sequence ends. ``mask``, (B, T, 1, 1) or None, marked the same frames for the
        seed's backward pass; `lengths` decides here, and nothing is read from it. No argument is written to.

        >>> import torch
        >>> from hmm_speech.hmm import HMMForward
        >>> HMMForward.apply(torch.zeros(1, 3, 2, 2), torch.tensor([3])).exp().round()
        tensor([[8.]])
        """
        checks.require_tensor("potential", potential)
        if potential.dim() != 4 or potential.shape[-1] != potential.shape[-2] or potential.shape[1] < 1:
            raise ValueError(
                f"potential: shape is {checks.shape_of(potential)}, expected (B, T, N, N) with T of at least 1"
            )
        return log_partition(potential[:, 0, 0], potential[:, 1:], None, lengths).unsqueeze(-1)
