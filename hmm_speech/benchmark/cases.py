"""What `hmm-speech bench` times: random problems of each kind, and the same inference as a loop in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hmm_speech.hmm import HMM, Active, Banded, LowRank, SemiMarkovHMM

LONGEST = 30  # duration of a semi-Markov segment
SLOTS = 10  # states that can emit a frame, of "active"
OFFSETS = (0, 1)  # of "banded"
RANK = 64  # of "low-rank"


@dataclass
class Case:
    """``layer(*scores)`` is a chain with `log_partition` and `viterbi`; ``loop(*scores)`` its log partition."""

    kind: str
    scores: list[Tensor]
    layer: Callable[..., HMM | SemiMarkovHMM]
    loop: Callable[..., Tensor]
    batch: int
    states: int
    frames: int
    part: Part | None = field(default=None)


@dataclass
class Part:
    """A smaller problem that the loop runs instead, its times multiplied by `scale`."""

    scores: list[Tensor]
    layer: Callable[..., HMM]
    scale: float


def dense_loop(initial: Tensor, transition: Tensor) -> Tensor:
    """Forward algorithm in log space, one torch.logsumexp a frame. `unbind`: indexing makes backward quadratic."""
    alpha = initial
    for arcs in transition.unbind(1):
        alpha = torch.logsumexp(alpha.unsqueeze(-1) + arcs, 1)
    return torch.logsumexp(alpha, -1)


def _scaled_loop(initial: Tensor, emission: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
    """Forward algorithm with scaled probabilities (Rabiner 1989, section V.A); `step` is the product with the arcs."""
    top = emission.detach().amax(-1, keepdim=True)
    weights = (emission - top).exp().unbind(1)
    alpha = initial.exp() * weights[0]
    scale = alpha.sum(-1, keepdim=True)
    alpha, scales = alpha / scale, [scale]
    for weight in weights[1:]:
        alpha = step(alpha) * weight
        scale = alpha.sum(-1, keepdim=True)
        alpha = alpha / scale
        scales.append(scale)
    return torch.cat(scales, 1).log().sum(1) + top.sum((1, 2))


def shared_loop(initial: Tensor, transition: Tensor, emission: Tensor) -> Tensor:
    """One matrix product a frame."""
    arcs = transition.exp()
    return _scaled_loop(initial, emission, lambda alpha: torch.mm(alpha, arcs))


def low_rank_loop(initial: Tensor, left: Tensor, right: Tensor, emission: Tensor) -> Tensor:
    """Two products with the factors a frame."""
    into, out = left.exp(), right.exp()
    return _scaled_loop(initial, emission, lambda alpha: torch.mm(torch.mm(alpha, into), out))


def banded_loop(initial: Tensor, diagonals: Tensor, emission: Tensor) -> Tensor:
    """Forward algorithm in log space along the diagonals 0 and 1: a shift and a torch.logaddexp a frame, re-centred."""
    stay, move = diagonals[0], diagonals[1, :-1]
    scores = emission.unbind(1)
    alpha, centres = initial + scores[0], []
    for score in scores[1:]:
        moved = torch.nn.functional.pad(alpha[:, :-1] + move, (1, 0), value=-1e30)
        alpha = torch.logaddexp(alpha + stay, moved) + score
        centres.append(alpha.detach().amax(-1, keepdim=True))
        alpha = alpha - centres[-1]
    return torch.logsumexp(alpha, -1) + torch.cat(centres, 1).double().sum(1).to(alpha.dtype)


def semi_markov_loop(initial: Tensor, transition: Tensor, emission: Tensor, durations: Tensor) -> Tensor:
    """Forward algorithm over segments: one matrix product and one torch.logsumexp over durations a frame."""
    by_duration, arcs, start = durations.T, transition.exp(), initial.expand(emission.shape[0], -1)
    windows, total, end = start.new_full((len(start), *by_duration.shape), -torch.inf), 0, start
    for t, scores in enumerate(emission.unbind(1)):
        if t > 0:
            top = end.detach().amax(-1, keepdim=True)
            start, total, windows = torch.mm((end - top).exp(), arcs).log(), total + top, windows - top.unsqueeze(1)
        windows = torch.cat([start.unsqueeze(1), windows[:, :-1]], 1) + scores.unsqueeze(1)
        end = torch.logsumexp(windows + by_duration, 1)
    return (total + torch.logsumexp(end, -1, keepdim=True)).squeeze(-1)


def _banded(initial: Tensor, diagonals: Tensor, emission: Tensor) -> HMM:
    return HMM(initial, Banded(diagonals, OFFSETS), emission)


def _low_rank(initial: Tensor, left: Tensor, right: Tensor, emission: Tensor) -> HMM:
    return HMM(initial, LowRank(left, right), emission)


def make(kind: str, states: int, frames: int, batch: int) -> Case:
    """A case of `batch` sequences of `frames` frames; of "active", `frames` is their mean."""
    g = torch.Generator().manual_seed(7)

    def log_probabilities(*shape: int, dim: int = -1) -> Tensor:
        return torch.randn(shape, generator=g).log_softmax(dim)

    initial = log_probabilities(states)
    if kind == "active":
        return _active(g, initial, log_probabilities(states, states), frames, batch)
    if kind == "dense":
        arcs = -torch.randn(batch, frames - 1, states, states, generator=g).pow_(2)
        arcs.add_(log_probabilities(states, states))
        return Case(kind, [initial.expand(batch, -1).contiguous(), arcs], HMM, dense_loop, batch, states, frames)
    emission = -torch.randn(batch, frames, states, generator=g).pow_(2)
    if kind == "banded":
        scores, layer, loop = [log_probabilities(len(OFFSETS), states, dim=0), emission], _banded, banded_loop
    elif kind == "low-rank":
        factors = [log_probabilities(states, RANK), log_probabilities(RANK, states)]
        scores, layer, loop = [*factors, emission], _low_rank, low_rank_loop
    elif kind == "semi-Markov":
        scores = [log_probabilities(states, states), emission, log_probabilities(states, LONGEST)]
        layer, loop = SemiMarkovHMM, semi_markov_loop
    else:
        scores, layer, loop = [log_probabilities(states, states), emission], HMM, shared_loop
    return Case(kind, [initial, *scores], layer, loop, batch, states, frames)


def _active(g: torch.Generator, initial: Tensor, transition: Tensor, frames: int, batch: int) -> Case:
    """Blocked emissions over ragged lengths. Its loop is the layer itself with -inf for all other states in a dense
    emission, which takes the first 100 frames of 8 sequences: all of them would be gigabytes."""
    states, share = len(initial), torch.rand(batch, generator=g) + 0.35
    lengths = (share * (batch * frames / share.sum())).long()
    time = int(lengths.max())
    slots = torch.randint(0, states // SLOTS, (batch, time, 1), generator=g) * SLOTS + torch.arange(SLOTS)
    scores = torch.randn(batch, time, SLOTS, generator=g)
    few, short = Active(slots[:8, :100].contiguous(), scores[:8, :100].contiguous()), lengths[:8].clamp(max=100)
    part = Part(
        [initial, transition, few.dense(states)],
        lambda pi, phi, _: HMM(pi, phi, few.map(lambda x: x.to(pi.dtype)), short),
        float(lengths.sum() / short.sum()),
    )
    return Case(
        "active", [initial, transition, scores], lambda pi, phi, e: HMM(pi, phi, Active(slots, e), lengths),
        lambda pi, phi, e: HMM(pi, phi, e, short).log_partition(), batch, states, frames, part,
    )  # fmt: skip
