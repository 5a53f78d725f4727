r"""Chains whose time-varying transitions are made a chunk of frames at a time.

A message :math:`\alpha_t` is all that a chunk needs of the frames before it. Forward, each chunk takes the message of
its first frame to that of its last ("advance"); its arcs are made for that and dropped, and made again in the backward
pass, by ``torch.utils.checkpoint``. Backward, the gradient :math:`g` of a message with respect to what a loss makes of
it is moved to the chunk's first frame by the posterior Markov chain ("retreat"): with :math:`\log` messages,

.. math:: g_{t-1}(i) = \sum_j g_t(j)\, \exp(\alpha_{t-1}(i) + \phi_t(i, j) - \mathrm{norm}_t(j)),

which is what the backward kernel computes (csrc/cpu/log_space.h) when :math:`g` has one sign and stands where the
posterior of the last frame does; with both signs, it runs twice. The summands are the gradients of the arcs. Messages
are centred, and what centring takes out is summed in float64 beside them, a constant for autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from . import ops, reference
from .chain import Chain
from .library import use_native
from .reference import INF

LOG_SPACE = 2  # enum hmm_method
_lib = torch.library.Library("hmm_speech", "FRAGMENT")
_lib.define(
    "advance(Tensor message, Tensor arcs, Tensor emission, Tensor lengths) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "retreat(Tensor grad, Tensor arcs, Tensor lengths, Tensor end, Tensor alpha, Tensor norm, Tensor centre,"
    " bool edges) -> (Tensor, Tensor)"
)
_lib.define("advance_maximum(Tensor message, Tensor arcs, Tensor emission, Tensor lengths) -> (Tensor, Tensor)")
_lib.define("walk(Tensor arcs, Tensor lengths, Tensor messages, Tensor end, Tensor uniform) -> Tensor")


def _last(messages: Tensor, lengths: Tensor) -> Tensor:
    """messages (B, C+1, N) at each sequence's last frame, (B, 1, N) as an index."""
    return (lengths - 1)[:, None, None].expand(-1, 1, messages.shape[2])


def _end(z: Tensor, messages: Tensor, lengths: Tensor) -> Tensor:
    """The last message (B, N); -inf or NaN throughout where that is what the chunk came to."""
    last = messages.gather(1, _last(messages, lengths)).squeeze(1)
    return torch.where(z.isfinite().unsqueeze(-1), last, z.unsqueeze(-1))


def _with_first(message: Tensor, emission: Tensor) -> Tensor:
    """emission (B, C, N) with a frame of zeros before it, that of the message."""
    return torch.cat([torch.zeros_like(message).unsqueeze(1), emission], 1)


def _advance(message, arcs, emission, lengths):
    """See :func:`hmm_speech.hmm.reference.advance`: the last message, the offset, and what retreat reads."""
    scores = _with_first(message, emission)
    z, alpha, norm, centre, _ = ops._forward(message, arcs, scores, lengths, None)
    # What the kernel added up within z, anew: z is rounded to the scores' type, and chunks would add up its errors.
    top = scores.amax(-1)
    middle = (norm + (scores - top.unsqueeze(-1))).amax(-1)
    inside = (torch.arange(scores.shape[1], device=z.device) < lengths.unsqueeze(-1)) & z.isfinite().unsqueeze(-1)
    offset = torch.where(inside, centre.double() + top.double() + middle.double(), 0).sum(-1)
    return _end(z, alpha, lengths), offset, alpha, norm, centre


def _retreat(grad, arcs, lengths, end, alpha, norm, centre, edges):
    """grad (B, N) of the last message, moved back over the chunk: state (B, C+1, N) and edge (B, C, N, N), or empty.

    state[:, 0] is the gradient of the first message and state[:, 1:] that of the emissions."""
    grad = torch.where(end > -INF, grad, 0)
    positive, negative = grad.clamp(min=0), grad.clamp(max=0)
    rises = positive.any(-1)
    both = rises & negative.any(-1)
    z = torch.where(end.amax(-1) > -INF, 0, end.amax(-1))
    method = torch.full_like(lengths, LOG_SPACE, dtype=torch.int32)

    def run(part: Tensor) -> tuple[Tensor, Tensor]:
        size = part.abs()
        share = (size / size.amax(-1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)).log()
        messages = alpha.scatter(1, _last(alpha, lengths), share.unsqueeze(1))
        mass = part.double().sum(-1).to(part.dtype)
        return ops._backward(mass, part, arcs, None, lengths, None, z, messages, norm, centre, method, edges)

    state, edge = run(torch.where(rises.unsqueeze(-1), positive, negative))
    if both.any():
        for total, part in zip((state, edge), run(torch.where(both.unsqueeze(-1), negative, 0)), strict=True):
            total.add_(part)
    return state, edge


def _advance_maximum(message, arcs, emission, lengths):
    """The same by maxima: the last message and the offset."""
    call = ops._Call(message, arcs, _with_first(message, emission), lengths, None)
    score, delta = call.empty(call.shape[0]), call.empty(*call.shape)
    call("viterbi", score, delta, call.empty(*call.shape[:2], dtype=torch.int64))
    return _end(score, delta, lengths), torch.where(score.isfinite(), score, 0).double()


def _certain(state: Tensor, like: Tensor) -> Tensor:
    """Log probabilities (..., B, N) of states (..., B) that are known; 0 where there is none, -1."""
    return torch.full((*state.shape, like.shape[-1]), -INF, dtype=like.dtype, device=like.device).scatter(
        -1, state.clamp(min=0).unsqueeze(-1), 0
    )


def _walk(arcs, lengths, messages, end, uniform):
    """Samples (S, B, C+1) of a chunk's states from its messages (B, C+1, N), the last ones being `end` (S, B, N)."""
    call = ops._Call(messages[:, 0], arcs, None, lengths, None)
    states = call.empty(*uniform.shape, dtype=torch.int64)
    z, method = call.empty(call.shape[0]).zero_(), torch.full_like(lengths, LOG_SPACE, dtype=torch.int32)
    for path, last, numbers in zip(states, end, uniform.contiguous(), strict=True):
        call("sample", 1, z, messages.scatter(1, _last(messages, lengths), last.unsqueeze(1)), method, numbers, path)
    return states


def _walk_reference(arcs, lengths, messages, end, uniform):
    rows = [torch.where((lengths == t + 1).unsqueeze(-1), end, row) for t, row in enumerate(messages.unbind(1))]
    return reference.walk_back(rows, arcs, lengths, uniform)


def _fake_walk(arcs, lengths, messages, end, uniform):
    return uniform.new_empty(uniform.shape, dtype=torch.int64)


def _fake_advance(message, arcs, emission, lengths):
    batch, time, num_states = emission.shape
    alpha = message.new_empty(batch, time + 1, num_states)
    offset = message.new_empty(batch, dtype=torch.float64)
    return torch.empty_like(message), offset, alpha, torch.empty_like(alpha), message.new_empty(batch, time + 1)


def _fake_retreat(grad, arcs, lengths, end, alpha, norm, centre, edges):
    return torch.empty_like(alpha), arcs.new_empty(arcs.shape if edges else (0,))


def _fake_advance_maximum(message, arcs, emission, lengths):
    return torch.empty_like(message), message.new_empty(message.shape[0], dtype=torch.float64)


for _name, _kernel, _fake in (
    ("advance", _advance, _fake_advance),
    ("retreat", _retreat, _fake_retreat),
    ("advance_maximum", _advance_maximum, _fake_advance_maximum),
    ("walk", _walk, _fake_walk),
):
    _lib.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"hmm_speech::{_name}", _fake, lib=_lib)


class Advance(Function):
    """The last message (B, N) and the offset (B,) from the first message, by the kernels."""

    @staticmethod
    def forward(ctx, message, arcs, emission, lengths):
        end, offset, alpha, norm, centre = torch.ops.hmm_speech.advance(message, arcs, emission, lengths)
        ctx.save_for_backward(message, arcs, emission, lengths, end, alpha, norm, centre)
        ctx.mark_non_differentiable(offset)
        return end, offset

    @staticmethod
    def backward(ctx, grad, _):
        message, arcs, emission, lengths, *messages = ctx.saved_tensors
        edges = ctx.needs_input_grad[1]
        if torch.is_grad_enabled():  # create_graph=True
            state, edge = Retreat.apply(grad, message, arcs, emission, lengths, edges, *messages)
        else:
            state, edge = torch.ops.hmm_speech.retreat(grad, arcs, lengths, *messages, edges)
        return state[:, 0], edge if edges else None, state[:, 1:], None


class Retreat(Function):
    """The backward pass of :class:`Advance`; differentiable by the reference."""

    @staticmethod
    def forward(ctx, grad, message, arcs, emission, lengths, edges, *messages):
        ctx.save_for_backward(grad, message, arcs, emission, lengths)
        ctx.edges = edges
        return torch.ops.hmm_speech.retreat(grad, arcs, lengths, *messages, edges)

    @staticmethod
    def backward(ctx, grad_state, grad_edge):
        return ops.through_reference(ctx, lambda *saved: retreat(*saved, ctx.edges), (grad_state, grad_edge))


def retreat(grad, message, arcs, emission, lengths, edges: bool) -> tuple[Tensor, Tensor]:
    """What :class:`Retreat` computes, by differentiating the reference."""
    with torch.enable_grad():
        tracked = [ops.own(x) for x in (message, emission, arcs)]
        end = reference.advance(tracked[0], tracked[2], tracked[1], lengths)[0][-1]
        found = torch.autograd.grad(
            end, tracked if edges else tracked[:2], torch.where(end == -INF, 0, grad), create_graph=True
        )
    state = torch.cat([found[0].unsqueeze(1), found[1]], 1)
    return state, found[2] if edges else arcs.new_empty(0)


def _centre(x: Tensor) -> tuple[Tensor, Tensor]:
    top = x.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -INF, 0)
    return x - top, top.squeeze(-1).double()


def centred(*scores: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of scores (B, N), with maximum 0, and what that took out, (B,) in float64, a constant for autograd.

    Each is centred before they are added, as in the kernels: they may differ in scale."""
    parts = [_centre(x) for x in scores]
    total, offset = _centre(sum(x for x, _ in parts))
    return total, offset + sum(top for _, top in parts)


class ChunkedChain(Chain):
    """transition: a Chunked; emission (B, T, N)."""

    @property
    def native(self) -> bool:
        return use_native(self.initial.device.type)

    def log_partition(self) -> Tensor:
        messages, offset = self._forward()
        end, more = self._end(messages[-1])
        z = offset + more + reference.logsumexp(end, -1).double()
        return torch.where(self.lengths > 0, z, 0).to(self.initial.dtype)

    def marginals(self) -> Tensor:
        return self._posteriors("none")[0]

    def edge_marginals(self) -> Tensor:
        blocks = self._posteriors("all")[1]
        empty = self.initial.new_empty(self.batch, 0, self.num_states, self.num_states)
        return torch.cat(blocks, 1) if blocks else empty

    def transition_counts(self) -> Tensor:
        total = self.initial.new_zeros(self.batch, self.num_states, self.num_states, dtype=torch.float64)
        for counts in self._posteriors("sum")[1]:
            total = total + counts
        return total.to(self.initial.dtype)

    def viterbi(self) -> tuple[Tensor, Tensor]:
        if self.time < 2:
            return super().viterbi()
        messages, offset = self._forward(maximum=True)
        end, more = self._end(messages[-1])
        score = torch.where(self.lengths > 0, offset + more + end.amax(-1), 0).to(self.initial.dtype)
        states = torch.full((self.batch, self.time), -1, dtype=torch.int64, device=score.device)
        solve = torch.ops.hmm_speech.viterbi if self.native else reference.viterbi
        for start, stop, emission, message in self._reversed(messages):
            arcs, lengths = self.transition.function(start, stop), self._local(start, stop)
            known = _certain(states[:, stop], message)
            final = torch.where((self.lengths > stop + 1).unsqueeze(-1), known, self._final_within(start, stop))
            states[:, start : stop + 1] = solve(message, arcs, _with_first(message, emission), lengths, final)[1]
        return score, self._masked(states, score > -INF)

    def sample(self, uniform: Tensor) -> Tensor:
        if self.time < 2:
            return super().sample(uniform)
        messages, _ = self._forward()
        feasible = self._end(messages[-1])[0].amax(-1) > -INF
        states = torch.full(uniform.shape, -1, dtype=torch.int64, device=uniform.device)
        for start, stop, emission, message in self._reversed(messages):
            arcs, lengths = self.transition.function(start, stop), self._local(start, stop)
            problem = (message, arcs, _with_first(message, emission), lengths, self._final_within(start, stop))
            if self.native:
                _, rows, *_ = torch.ops.hmm_speech.forward(*problem)
            else:
                rows = torch.stack(reference.recursion(*problem, lambda x: reference.logsumexp(x, 1))[0], 1)
            at_end = rows.gather(1, _last(rows, lengths)).squeeze(1)
            goes_on = (self.lengths > stop + 1).unsqueeze(-1)
            end = torch.where(goes_on, _certain(states[:, :, stop], at_end), at_end)
            walk = torch.ops.hmm_speech.walk if self.native else _walk_reference
            states[:, :, start : stop + 1] = walk(arcs, lengths, rows, end, uniform[:, :, start : stop + 1])
        return self._masked(states, feasible)

    def _forward(self, maximum: bool = False) -> tuple[list[Tensor], Tensor]:
        """Messages (B, N) of each chunk's first frame and of each sequence's last, and the offset (B,) of the last."""
        scores = torch.where((self.lengths > 0)[:, None, None], self.emission[:, :1], 0).sum(1)  # zeros for no frames
        message, offset = centred(self.initial.expand(self.batch, -1), scores)
        messages = [message]

        def step(message: Tensor, emission: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
            arcs, lengths = self.transition.function(start, stop), self._local(start, stop)
            if not self.native:
                found, taken = reference.advance(message, arcs, emission, lengths, maximum)
                return found[-1], taken
            if maximum:
                return torch.ops.hmm_speech.advance_maximum(message, arcs, emission, lengths)
            return Advance.apply(message, arcs, emission, lengths)

        for (start, stop), emission in self._chunks():
            message, taken = checkpoint(step, message, emission, start, stop, use_reentrant=False)
            messages.append(message)
            offset = offset + taken
        return messages, offset

    def _posteriors(self, edges: str) -> tuple[Tensor, list[Tensor]]:
        """State posteriors (B, T, N), and for each chunk its edges' ("all"), or their sum over its frames ("sum").

        A chain of its own from the last chunk to the first, since a backward pass that is to be differentiated keeps
        what it computes; here too only messages stay."""
        messages, _ = self._forward()
        end, _ = self._end(messages[-1])
        some = ((self.lengths > 0) & (end.detach().amax(-1) != -INF)).unsqueeze(-1)
        gamma = torch.where(some, torch.where(some, end, 0).softmax(-1), 0)

        def step(
            message: Tensor, gamma: Tensor, emission: Tensor, start: int, stop: int
        ) -> tuple[Tensor, Tensor, Tensor]:
            arcs, lengths = self.transition.function(start, stop), self._local(start, stop)
            if self.native:
                with torch.no_grad():
                    end, _, *rows = torch.ops.hmm_speech.advance(message, arcs, emission, lengths)
                state, edge = Retreat.apply(gamma, message, arcs, emission, lengths, edges != "none", end, *rows)
            else:
                state, edge = retreat(gamma, message, arcs, emission, lengths, edges != "none")
                if not ops.tracked((message, gamma, arcs, emission)):
                    state, edge = state.detach(), edge.detach()
            return state[:, 0], state[:, 1:], edge.sum(1) if edges == "sum" else edge

        states, blocks = [], []
        for start, stop, emission, message in self._reversed(messages):
            gamma, state, edge = checkpoint(step, message, gamma, emission, start, stop, use_reentrant=False)
            states.append(state)
            blocks.append(edge)
        return torch.cat([gamma.unsqueeze(1), *reversed(states)], 1)[:, : self.time], blocks[::-1]

    def _chunks(self) -> list[tuple[tuple[int, int], Tensor]]:
        """(start, stop) of each chunk and the emissions of the frames that its arcs lead to.

        Split at once: the gradient of a slice is as large as what it is cut from."""
        return list(
            zip(self.transition.spans(self.time), self.emission[:, 1:].split(self.transition.chunk, 1), strict=False)
        )

    def _reversed(self, messages: list[Tensor]) -> list[tuple[int, int, Tensor, Tensor]]:
        """Chunks from the last to the first: start, stop, emissions, first message."""
        return [
            (*span, emission, message) for (span, emission), message in zip(self._chunks(), messages, strict=False)
        ][::-1]

    def _local(self, start: int, stop: int) -> Tensor:
        """Lengths within a chunk, counted from its first frame: 1 where a sequence has ended before or there."""
        return (self.lengths - start).clamp(1, stop - start + 1)

    def _end(self, message: Tensor) -> tuple[Tensor, Tensor]:
        """The last message with the final scores."""
        return centred(message) if self.final is None else centred(message, self.final.expand(self.batch, -1))

    def _final_within(self, start: int, stop: int) -> Tensor:
        """(B, N): final scores of the sequences that end in a chunk, else 0."""
        if self.final is None:
            return torch.zeros(self.batch, self.num_states, dtype=self.initial.dtype, device=self.initial.device)
        ends = (self.lengths <= stop + 1) & (self.lengths > (start + 1 if start else 0))
        return torch.where(ends.unsqueeze(-1), self.final, 0)

    def _masked(self, states: Tensor, feasible: Tensor) -> Tensor:
        inside = torch.arange(self.time, device=states.device) < self.lengths.unsqueeze(-1)
        return torch.where(inside & feasible.unsqueeze(-1), states, -1)
