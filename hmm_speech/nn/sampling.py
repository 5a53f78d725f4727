"""Ancestral sampling: states and observations of a composition, a frame at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hmm_speech.hmm import Banded, Chunked, LowRank
from hmm_speech.nn.composition import reads_frames, uses_context


class Drawn(NamedTuple):
    """What was drawn."""

    states_BT: Tensor
    units_BT: Tensor | None
    """None where the emission is over frames."""
    frames_BTD: Tensor | None
    """None where the emission is over units."""


def draw_sequences(model: Any, num: int, frames: int, generator: torch.Generator) -> Drawn:
    """``num`` sequences of ``frames`` frames: z_1, x_1, z_2, x_2, ... from their conditional distributions.

    A context reads all frames so far anew for each frame, so its cost grows with the square of the length.
    """
    over_frames = reads_frames(model.emission)
    states: list[Tensor] = []
    seen: list[Tensor] = []
    fixed = None if uses_context(model.transition) else model.transition()
    for _ in range(frames):
        past = torch.stack(seen, 1) if seen else torch.zeros(num, 0, dtype=torch.int64)
        context_BTH = None
        if model.context is not None:  # of the frame that comes now: causal, so what stands at its place is not read
            context_BTH = model.context(F.pad(past, (0, 0, 0, 1) if past.dim() == 3 else (0, 1)))
        transition = model.transition(context_BTH) if fixed is None else fixed
        states.append(_draw(_next_state(model, transition, states, num), generator))
        context = (context_BTH[:, -1],) if uses_context(model.emission) else ()
        if over_frames:
            seen.append(model.emission.draw(states[-1], generator))
        else:
            seen.append(_draw(model.emission.predict(states[-1], past, *context), generator))
    states_BT, observed = torch.stack(states, 1), torch.stack(seen, 1)
    return Drawn(states_BT, None if over_frames else observed, observed if over_frames else None)


def _next_state(model: Any, transition: Any, states: list[Tensor], num: int) -> Tensor:
    """(B, N) log p(z_t | z_{t-1}, h_t), or of z_1."""
    if hasattr(transition, "following"):
        so_far = torch.stack(states, 1) if states else torch.zeros(num, 0, dtype=torch.int64)
        return transition.following(model.initial(), so_far).expand(num, -1)
    if not states:
        return model.initial().expand(num, -1)
    if isinstance(transition, Chunked):
        t = len(states)
        transition = transition.function(t - 1, t)[:, 0]
    if isinstance(transition, LowRank | Banded):
        every = torch.arange(transition.num_states).expand(num, 1, -1)
        return transition.gather(states[-1][:, None, None], every)[:, 0, 0]
    return transition[states[-1]] if transition.dim() == 2 else transition[torch.arange(num), states[-1]]


def _draw(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(log_probs.exp(), 1, generator=generator).squeeze(-1)
