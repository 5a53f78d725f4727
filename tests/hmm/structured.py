"""Random problems with structure, and the dense problems that they stand for."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from hmm_speech.hmm import Active, Banded, Chunked, LowRank
from tests.hmm.problems import INF, problem, random_scores

TRANSITIONS = ("dense", "low-rank", "banded", "chunked")
EMISSIONS = ("dense", "active")
KINDS = ("shared", "per-sequence", "time-varying")


def structured(
    transition,
    emission,
    batch,
    time,
    states,
    kind="shared",
    seed=0,
    dtype=torch.float64,
    scale=1.0,
    forbidden=0.0,
    **more,
):
    """Arguments of HMM, and those of the same HMM without structure. A chunked transition always varies over time."""
    arguments = problem(batch, time, states, kind, seed, dtype, scale, forbidden=forbidden, **more)
    plain = dict(arguments)
    g = torch.Generator().manual_seed(seed + 1)
    leading = {"shared": (), "per-sequence": (batch,), "time-varying": (batch, max(time - 1, 0))}[kind]

    def scores(*shape):
        return random_scores(g, shape, dtype, scale, 0.0, forbidden)

    if transition == "low-rank":
        rank = 1 + seed % 3
        left, right = scores(*leading, states, rank), scores(*leading, rank, states)
        arguments["transition"] = LowRank(left, right)
        plain["transition"] = torch.logsumexp(left.unsqueeze(-1) + right.unsqueeze(-3), -2)  # no NaN without autograd
    elif transition == "banded":
        offsets = ((0, 1), (1, 0, 2), (-1, 0, 1), (0, states + 1), (-2, 3))[seed % 5]
        diagonals = scores(*leading, len(offsets), states)
        dense = torch.full((*leading, states, states), -INF, dtype=dtype)
        for d, offset in enumerate(offsets):
            for i in range(states):
                if 0 <= i + offset < states:
                    dense[..., i, i + offset] = diagonals[..., d, i]
        arguments["transition"], plain["transition"] = Banded(diagonals, offsets), dense
    elif transition == "chunked":
        arcs = scores(batch, max(time - 1, 0), states, states)
        arguments["transition"] = Chunked(lambda start, stop: arcs[:, start:stop], 1 + seed % 4)
        plain["transition"] = arcs
    if emission == "active":
        kept = 1 + seed % states
        order = torch.rand(batch, time, states, generator=g).argsort(-1)[..., :kept]
        order[torch.rand(batch, time, kept, generator=g) < 0.1] = -1
        values = scores(batch, time, kept)
        dense = torch.full((batch, time, states + 1), -INF, dtype=dtype)
        dense.scatter_(2, torch.where(order < 0, states, order), values)
        values[order < 0] = float("nan")  # what pads is never read
        arguments["emission"], plain["emission"] = Active(order, values), dense[..., :states]
    return arguments, plain


@st.composite
def structured_problems(draw, transitions=TRANSITIONS, emissions=EMISSIONS, most_paths=4096):
    """Pairs of a structured problem and its dense twin, small enough to enumerate."""
    states = draw(st.integers(1, 5))
    return structured(
        draw(st.sampled_from(transitions)), draw(st.sampled_from(emissions)),
        draw(st.integers(1, 4)), draw(st.integers(1, 6).filter(lambda t: states**t <= most_paths)), states,
        kind=draw(st.sampled_from(KINDS)),
        seed=draw(st.integers(0, 10_000)),
        scale=draw(st.sampled_from([0.1, 1.0, 10.0, 300.0])),
        forbidden=draw(st.sampled_from([0.0, 0.0, 0.3, 0.6])),
        lengths=draw(st.sampled_from(["ragged", "full"])),
        final=draw(st.booleans()),
    )  # fmt: skip


def leaves(arguments):
    """The tensors of a problem that gradients reach, by name; each is made to require them."""
    found = {}
    for name, x in arguments.items():
        tensors = x.tensors() if hasattr(x, "tensors") else {name: x}
        for key, tensor in tensors.items():
            if tensor is not None and tensor.is_floating_point():
                found[key] = tensor.requires_grad_()
    return found
