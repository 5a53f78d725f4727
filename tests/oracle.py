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


def arc_scores(transition: Tensor, b: int, t: int) -> Tensor:
    """(N, N) scores of the arcs from frame t-1 to frame t of sequence b."""
    return {2: lambda: transition, 3: lambda: transition[b], 4: lambda: transition[b, t - 1]}[transition.dim()]()


def path_score(path, b, initial, transition, emission, final) -> float:
    """The score of one path of sequence b, as DESIGN writes it."""
    if not path:
        return 0.0
    start = initial if initial.dim() == 1 else initial[b]
    score = float(start[path[0]])
    for t, state in enumerate(path):
        if emission is not None:
            score += float(emission[b, t, state])
        if t:
            score += float(arc_scores(transition, b, t)[path[t - 1], state])
    if final is not None:
        end = final if final.dim() == 1 else final[b]
        score += float(end[path[-1]])
    return score


def enumerate_paths(initial, transition, emission=None, lengths=None, final=None) -> Answer:
    """Every quantity of the layer for small problems, (N ** T) paths a sequence."""
    states = transition.shape[-1]
    batch = emission.shape[0] if emission is not None else transition.shape[0]
    time = emission.shape[1] if emission is not None else transition.shape[1] + 1
    lengths = [time] * batch if lengths is None else lengths.tolist()
    log_partition, best = torch.zeros(batch, dtype=torch.float64), torch.zeros(batch, dtype=torch.float64)
    marginals = torch.zeros(batch, time, states, dtype=torch.float64)
    edges = torch.zeros(batch, max(time - 1, 0), states, states, dtype=torch.float64)
    listed = []
    for b, length in enumerate(lengths):
        scores = {
            path: path_score(path, b, initial, transition, emission, final)
            for path in itertools.product(range(states), repeat=length)
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
            probability = math.exp(score - top) / total
            listed[b][path] = probability
            for t, state in enumerate(path):
                marginals[b, t, state] += probability
                if t:
                    edges[b, t - 1, path[t - 1], state] += probability
    return Answer(log_partition, marginals, edges, best, listed)


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
