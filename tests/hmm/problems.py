"""Random problems for the layer's tests, and hypothesis strategies over them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from hmm_speech.hmm import HMM

INF = float("inf")
KINDS = ("shared", "per-sequence", "time-varying")


def random_scores(g, shape, dtype, scale, shift, forbidden):
    x = torch.randn(shape, generator=g, dtype=torch.float64) * scale + shift
    x[torch.rand(shape, generator=g) < forbidden] = -INF
    return x.to(dtype)


def problem(
    batch,
    time,
    states,
    kind="shared",
    seed=0,
    dtype=torch.float64,
    scale=1.0,
    shift=0.0,
    forbidden=0.0,
    lengths="ragged",
    final=True,
):
    """Arguments of HMM as a dict. `forbidden`: share of scores that are -inf; `shift`: added to every score."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"shared": (states, states), "per-sequence": (batch, states, states)}
    shapes["time-varying"] = (batch, max(time - 1, 0), states, states)

    def scores(*shape):
        return random_scores(g, shape, dtype, scale, shift, forbidden)

    made = {"initial": scores(states) if seed % 2 else scores(batch, states), "transition": scores(*shapes[kind])}
    made["emission"] = scores(batch, time, states)
    made["lengths"] = torch.randint(0, time + 1, (batch,), generator=g) if lengths == "ragged" else None
    made["final"] = (scores(batch, states) if seed % 3 else scores(states)) if final else None
    return made


def doubled(arguments):
    """The same problem in float64."""
    return {k: x.double() if x is not None and x.is_floating_point() else x for k, x in arguments.items()}


def solve(arguments, grad):
    """log Z and the gradients of sum(grad * log Z), without infeasible sequences, as a training loop would."""
    leaves = {
        k: x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for k, x in arguments.items()
    }
    z = HMM(**leaves).log_partition()
    (torch.where(z.isfinite(), z, 0) * grad.to(z.dtype)).sum().backward()
    gradients = {k: x.grad for k, x in leaves.items() if x is not None and x.is_floating_point()}
    # None: an argument that had no say, as a transition over one frame; plain torch leaves such gradients out.
    return z.detach(), {k: torch.zeros_like(leaves[k]) if g is None else g for k, g in gradients.items()}


@st.composite
def small_problems(draw, most_paths=4096):
    """Problems small enough to enumerate, over shapes, lengths, -inf, scales, signs and kinds of transition."""
    states = draw(st.integers(1, 5))
    time = draw(st.integers(1, 6).filter(lambda t: states**t <= most_paths))
    return problem(
        draw(st.integers(1, 4)), time, states,
        kind=draw(st.sampled_from(KINDS)),
        seed=draw(st.integers(0, 10_000)),
        scale=draw(st.sampled_from([0.1, 1.0, 10.0, 300.0])),
        shift=draw(st.sampled_from([0.0, 1000.0, -1000.0])),
        forbidden=draw(st.sampled_from([0.0, 0.0, 0.3, 0.6])),
        lengths=draw(st.sampled_from(["ragged", "full"])),
        final=draw(st.booleans()),
    )  # fmt: skip
