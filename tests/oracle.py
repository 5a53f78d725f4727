"""Exact answers by listing every path: the oracle that all implementations of the layer are compared with.

Plain Python and float64, no recursion over time: nothing here could share a mistake with a forward algorithm.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

INF = float("inf")


class Answer(NamedTuple):
    log_partition: Tensor  # (B,)
    marginals: Tensor  # (B, T, N)
    edges: Tensor  # (B, T-1, N, N)
    best: Tensor  # (B,) the highest score
    paths: list[dict[tuple[int, ...], float]]  # per sequence, every feasible path and its probability


def scores_of(b, initial, transition, emission=None, final=None):
    """Sequence b's scores of the first state, of the arcs into frames 1 to T-1, of frames and of the last state; nested
    lists, which Python reads in a tenth of the time that it takes for tensors."""
    arcs = transition[b] if transition.dim() > 2 else transition
    time = emission.shape[1] if emission is not None else transition.shape[1] + 1
    return (
        (initial if initial.dim() == 1 else initial[b]).tolist(),
        arcs.tolist() if transition.dim() == 4 else [arcs.tolist()] * (time - 1),
        None if emission is None else emission[b].tolist(),
        None if final is None else (final if final.dim() == 1 else final[b]).tolist(),
    )


def path_score(path, start, arcs, local, end) -> float:
    """The score of one path of the sequence whose scores these are, as DESIGN writes it."""
    if not path:
        return 0.0
    score = start[path[0]]
    for t, state in enumerate(path):
        if local is not None:
            score += local[t][state]
        if t:
            score += arcs[t - 1][path[t - 1]][state]
    return score if end is None else score + end[path[-1]]


def enumerate_paths(initial, transition, emission=None, lengths=None, final=None) -> Answer:
    """Every quantity of the layer for small problems, (N ** T) paths a sequence."""
    states = transition.shape[-1]
    batch = emission.shape[0] if emission is not None else transition.shape[0]
    time = emission.shape[1] if emission is not None else transition.shape[1] + 1
    lengths = [time] * batch if lengths is None else lengths.tolist()
    log_partition, best = [-INF] * batch, [-INF] * batch
    marginals = torch.zeros(batch, time, states).tolist()
    edges = torch.zeros(batch, max(time - 1, 0), states, states).tolist()
    listed: list[dict] = [{} for _ in range(batch)]
    for b, length in enumerate(lengths):
        scores = scores_of(b, initial, transition, emission, final)
        sums = {path: path_score(path, *scores) for path in itertools.product(range(states), repeat=length)}
        feasible = {path: score for path, score in sums.items() if score > -INF}
        if not feasible:
            continue
        best[b] = top = max(feasible.values())
        total = math.fsum(math.exp(score - top) for score in feasible.values())
        log_partition[b] = top + math.log(total)
        for path, score in feasible.items():
            listed[b][path] = probability = math.exp(score - top) / total
            for t, state in enumerate(path):
                marginals[b][t][state] += probability
                if t:
                    edges[b][t - 1][path[t - 1]][state] += probability
    log_partition, best, marginals, edges = (
        torch.tensor(x, dtype=torch.float64) for x in (log_partition, best, marginals, edges)
    )
    edges = edges.reshape(batch, max(time - 1, 0), states, states)  # an empty list does not say how it is shaped
    return Answer(log_partition, marginals.reshape(batch, time, states), edges, best, listed)


class Segmented(NamedTuple):
    log_partition: Tensor  # (B,)
    marginals: Tensor  # (B, T, N)
    starts: Tensor  # (B, T, N)
    transitions: Tensor  # (B, N, N)
    durations: Tensor  # (B, N, D)
    best: Tensor  # (B,) the highest score
    paths: list[dict[tuple[tuple[int, int], ...], float]]  # per sequence, every feasible segmentation: its probability


def segmentations(length: int, states: int, longest: int):
    """Every way to cover `length` frames by segments, as ((state, duration), ...)."""
    for cuts in itertools.product((False, True), repeat=max(length - 1, 0)):
        edges = [0, *(t + 1 for t, cut in enumerate(cuts) if cut), length]
        sizes = [b - a for a, b in itertools.pairwise(edges) if b > a]
        if max(sizes, default=0) <= longest:
            for path in itertools.product(range(states), repeat=len(sizes)):
                yield tuple(zip(path, sizes, strict=True))


def segmentation_score(path, b, initial, transition, emission, durations, final=None) -> float:
    """The score of one segmentation of sequence b."""
    if not path:
        return 0.0
    initial, final = (x if x is None or x.dim() == 1 else x[b] for x in (initial, final))
    transition, durations = (x if x.dim() == 2 else x[b] for x in (transition, durations))
    score, t = float(initial[path[0][0]]), 0
    for k, (state, size) in enumerate(path):
        score += float(durations[state, size - 1])
        for frame in range(t, t + size):
            score += float(emission[b, frame, state])
        t += size
        if k:
            score += float(transition[path[k - 1][0], state])
    return score if final is None else score + float(final[path[-1][0]])


def enumerate_segmentations(initial, transition, emission, durations, lengths=None, final=None) -> Segmented:
    """Every quantity of a semi-Markov chain for small problems, up to N (N + 1)^(T - 1) segmentations a sequence."""
    (batch, time, states), longest = emission.shape, durations.shape[-1]
    lengths = [time] * batch if lengths is None else lengths.tolist()
    log_partition, best = torch.zeros(batch, dtype=torch.float64), torch.zeros(batch, dtype=torch.float64)
    marginals, starts = (torch.zeros(batch, time, states, dtype=torch.float64) for _ in range(2))
    transitions = torch.zeros(batch, states, states, dtype=torch.float64)
    counts = torch.zeros(batch, states, longest, dtype=torch.float64)
    listed = []
    for b, length in enumerate(lengths):
        scores = {
            path: segmentation_score(path, b, initial, transition, emission, durations, final)
            for path in segmentations(length, states, longest)
        }
        feasible = {path: score for path, score in scores.items() if score > -INF}
        listed.append({})
        if not feasible:
            log_partition[b] = best[b] = -INF
            continue
        best[b] = top = max(feasible.values())
        total = math.fsum(math.exp(score - top) for score in feasible.values())
        log_partition[b] = top + math.log(total)
        for path, score in feasible.items():
            probability, t = math.exp(score - top) / total, 0
            listed[b][path] = probability
            for k, (state, size) in enumerate(path):
                starts[b, t, state] += probability
                counts[b, state, size - 1] += probability
                marginals[b, t : t + size, state] += probability
                t += size
                if k:
                    transitions[b, path[k - 1][0], state] += probability
    return Segmented(log_partition, marginals, starts, transitions, counts, best, listed)
