"""The native kernels as torch operators, on a CPU (on a GPU: cuda.py), and the autograd functions around them.

``torch.ops.hmm_speech.forward / backward / viterbi / topk / sample`` wrap csrc/include/hmm_speech.h one to one: they
expect arguments that :mod:`hmm_speech.hmm.checks` has seen, allocate what they return with torch and write to nothing
else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import Function

from . import library, reference

_ARGUMENTS = "Tensor initial, Tensor transition, Tensor? emission, Tensor lengths, Tensor? final"
_MESSAGES = "Tensor log_partition, Tensor alpha, Tensor norm, Tensor centre, Tensor method"
_lib = torch.library.Library("hmm_speech", "DEF")
_lib.define(f"forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_lib.define(f"backward(Tensor grad, {_ARGUMENTS}, {_MESSAGES}, bool edges) -> (Tensor, Tensor)")
_lib.define(f"viterbi({_ARGUMENTS}) -> (Tensor, Tensor)")
_lib.define(f"topk({_ARGUMENTS}, int k) -> (Tensor, Tensor)")
_lib.define(f"sample({_ARGUMENTS}, Tensor uniform) -> Tensor")
_lib.define(
    f"tangent(Tensor grad, {_ARGUMENTS}, Tensor direction_state, Tensor? direction_edge, bool edges)"
    " -> (Tensor, Tensor, Tensor)"
)


def _dense(x: Tensor | None, axes: int) -> Tensor | None:
    """`x` with its last `axes` axes contiguous; the leading ones keep any stride."""
    if x is None or x.numel() == 0 or x.is_contiguous() or x[(0,) * (x.dim() - axes)].is_contiguous():
        return x
    return x.contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


_HUGE_PAGE = 1 << 21  # bytes


class _Call:
    """One problem, kept alive with its tensors while the library reads them."""

    def __init__(self, initial, transition, emission, lengths, final):
        batch, num_states, time = lengths.shape[0], transition.shape[-1], reference.frames(transition, emission)
        initial, final, transition = _dense(initial, 1), _dense(final, 1), _dense(transition, 2)
        if transition.dim() == 3 and transition.stride(0) == 0:
            transition = transition.contiguous()  # in C, stride 0 means one block of gradients for all sequences
        emission = None if emission is None else emission.contiguous()
        self.tensors = (initial, transition, emission, lengths.contiguous(), final)
        self.shape = batch, time, num_states
        self.dtype, self.time_varying = transition.dtype, transition.dim() == 4
        self.problem = library.Problem(
            batch=batch, time=time, states=num_states,
            initial=_address(initial), initial_batch_stride=initial.stride(0) if initial.dim() == 2 else 0,
            transition=_address(transition),
            transition_batch_stride=transition.stride(0) if transition.dim() > 2 else 0,
            transition_time_stride=transition.stride(1) if self.time_varying else 0,
            emission=_address(emission), lengths=_address(self.tensors[3]), final=_address(final),
            final_batch_stride=final.stride(0) if final is not None and final.dim() == 2 else 0,
            time_varying=self.time_varying, threads=torch.get_num_threads(),
        )  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype)

    def messages(self) -> Tensor:
        """(B, T, N), for what stays inside: from 1 MiB on it begins where a huge page does and has room behind it for
        the page's rest, so that the kernels' first touch takes one fault (csrc/cpu/dispatch.cpp) instead of hundreds of
        1.2 us each: for B=8, T=1000, N=50 a fifth of both passes. What is not touched is no memory."""
        batch, time, num_states = self.shape
        size = batch * time * num_states
        if size * self.dtype.itemsize < _HUGE_PAGE // 2:
            return self.empty(*self.shape)
        room = self.empty(size + 2 * _HUGE_PAGE // self.dtype.itemsize)
        begin = -room.data_ptr() % _HUGE_PAGE // self.dtype.itemsize
        return room.as_strided(self.shape, (time * num_states, num_states, 1), begin)

    def __call__(self, name: str, *arguments) -> None:
        handle = library.load().handle
        suffix = "f64" if self.dtype == torch.float64 else "f32"
        pointers = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        status = getattr(handle, f"hmm_{name}_{suffix}")(ctypes.byref(self.problem), *pointers)
        if status:
            raise RuntimeError(
                f"hmm_speech {name}: {handle.hmm_status_message(status).decode()}; B, T, N = {self.shape}"
            )


# Asking a second thread takes a few us. A frame of one sequence takes some 32 + N ns, more for large N: sequences
# are walked from both ends where that makes 60 us or more in all.
_BOTH_ENDS_FROM = 60_000
# States from which threads take every step of the same sequences together (csrc/cpu/lockstep.h) instead: two packed
# matrices, one a direction, then no longer fit the caches that one does.
_STEPS_FROM = 1024


def _sharing(batch: int, time: int, num_states: int, both_ends: bool) -> int:
    """How threads are to share a few sequences."""
    if num_states >= _STEPS_FROM:
        return library.BY_STEPS
    both_ends = both_ends and batch * time * (num_states + 32) >= _BOTH_ENDS_FROM
    return library.BY_ENDS if both_ends else library.BY_SEQUENCES


def _forward(initial, transition, emission, lengths, final, both_ends=True):
    call = _Call(initial, transition, emission, lengths, final)
    batch, time, _ = call.shape
    call.problem.sharing = _sharing(*call.shape, both_ends)
    log_partition, alpha = call.empty(batch), call.messages()
    norm = call.messages() if call.time_varying else call.empty(0)
    centre = call.empty(batch, time)
    method = call.empty(batch, dtype=torch.int32)
    call("forward", log_partition, alpha, norm, centre, method)
    if not call.time_varying:
        library.count_redone(method.tolist().count(library.REDONE))
    return log_partition, alpha, norm, centre, method


def _backward(grad, initial, transition, emission, lengths, final, log_partition, alpha, norm, centre, method, edges):
    call = _Call(initial, transition, emission, lengths, final)
    call.problem.sharing = _sharing(*call.shape, both_ends=False)
    state = call.empty(*call.shape)
    edge = call.empty(*(transition.shape if edges else (0,)))
    call("backward", grad.contiguous(), log_partition, alpha, norm, centre, method, state, edge if edges else None)
    return state, edge


def _viterbi(initial, transition, emission, lengths, final):
    call = _Call(initial, transition, emission, lengths, final)
    score, states = call.empty(call.shape[0]), call.empty(*call.shape[:2], dtype=torch.int64)
    call("viterbi", score, call.messages(), states)
    return score, states


def _topk(initial, transition, emission, lengths, final, k):
    call = _Call(initial, transition, emission, lengths, final)
    batch, time, _ = call.shape
    score, states = call.empty(k, batch), call.empty(k, batch, time, dtype=torch.int64)
    call("topk", k, score, states)
    return score, states


def _sample(initial, transition, emission, lengths, final, uniform):
    log_partition, alpha, _, _, method = _forward(initial, transition, emission, lengths, final, both_ends=False)
    call = _Call(initial, transition, emission, lengths, final)
    states = call.empty(*uniform.shape, dtype=torch.int64)
    call("sample", uniform.shape[0], log_partition, alpha, method, uniform.contiguous(), states)
    return states


def _tangent(grad, initial, transition, emission, lengths, final, direction_state, direction_edge, edges):
    call = _Call(initial, transition, emission, lengths, final)
    direction_edge = None if direction_edge is None else direction_edge.contiguous()
    expected, state = call.empty(call.shape[0]), call.empty(*call.shape)
    edge = call.empty(*(transition.shape if edges else (0,)))
    call("tangent", grad.contiguous(), direction_state.contiguous(), direction_edge, expected, state,
         edge if edges else None)  # fmt: skip
    return expected, state, edge


def has_norm(transition: Tensor) -> bool:
    """Whether a forward pass returns `norm`: in log space, where on a GPU any sequence may end up."""
    return transition.dim() == 4 or transition.device.type == "cuda"


def _fake_messages(initial, transition, emission, lengths, final):
    batch, time, num_states = lengths.shape[0], reference.frames(transition, emission), transition.shape[-1]
    return (
        transition.new_empty(batch),
        transition.new_empty(batch, time, num_states),
        transition.new_empty((batch, time, num_states) if has_norm(transition) else (0,)),
        transition.new_empty(batch, time),
        transition.new_empty(batch, dtype=torch.int32),
    )


def _fake_backward(
    grad, initial, transition, emission, lengths, final, log_partition, alpha, norm, centre, method, edges
):
    return torch.empty_like(alpha), transition.new_empty(transition.shape if edges else (0,))


def _fake_tangent(grad, initial, transition, emission, lengths, final, direction_state, direction_edge, edges):
    return (
        torch.empty_like(grad),
        torch.empty_like(direction_state),
        transition.new_empty(transition.shape if edges else (0,)),
    )


def _fake_viterbi(initial, transition, emission, lengths, final):
    batch, time = lengths.shape[0], reference.frames(transition, emission)
    return transition.new_empty(batch), transition.new_empty((batch, time), dtype=torch.int64)


def _fake_topk(initial, transition, emission, lengths, final, k):
    batch, time = lengths.shape[0], reference.frames(transition, emission)
    return transition.new_empty(k, batch), transition.new_empty((k, batch, time), dtype=torch.int64)


def _fake_sample(initial, transition, emission, lengths, final, uniform):
    return uniform.new_empty(uniform.shape, dtype=torch.int64)


for _name, _kernel, _fake in (
    ("forward", _forward, _fake_messages),
    ("backward", _backward, _fake_backward),
    ("viterbi", _viterbi, _fake_viterbi),
    ("topk", _topk, _fake_topk),
    ("sample", _sample, _fake_sample),
    ("tangent", _tangent, _fake_tangent),
):
    _lib.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"hmm_speech::{_name}", _fake, lib=_lib)


class LogPartition(Function):
    """log Z with an explicit backward pass: its gradients are the posteriors times the upstream gradient."""

    @staticmethod
    def forward(ctx, initial, transition, emission, lengths, final):
        messages = torch.ops.hmm_speech.forward(initial, transition, emission, lengths, final)
        # What is returned may be changed in place; what is saved may not.
        ctx.save_for_backward(initial, transition, emission, lengths, final, messages[0].clone(), *messages[1:])
        return messages[0]

    @staticmethod
    def backward(ctx, grad):
        initial, transition, emission, lengths, final, *messages = ctx.saved_tensors
        needs = ctx.needs_input_grad
        arguments = (grad, initial, transition, emission, lengths, final)
        if torch.is_grad_enabled():  # create_graph=True
            state, edge = Posterior.apply(*arguments, needs[1], *messages)
        else:
            state, edge = torch.ops.hmm_speech.backward(*arguments, *messages, needs[1])
        return (
            first_frame(state, initial) if needs[0] else None,
            edge if needs[1] else None,
            state if needs[2] else None,
            None,
            last_frame(state, lengths, final) if needs[4] else None,
        )


class Posterior(Function):
    """grad times p(z_t | x), (B, T, N), and grad times p(z_t, z_t+1 | x), of the transition's shape (or empty).

    Its own backward pass is the Hessian of log Z times a vector (csrc/cpu/tangent.h); where that is to be
    differentiated again, and on a GPU, through the reference.
    """

    @staticmethod
    def forward(ctx, grad, initial, transition, emission, lengths, final, edges, *messages):
        ctx.save_for_backward(grad, initial, transition, emission, lengths, final)
        ctx.edges = edges
        return torch.ops.hmm_speech.backward(grad, initial, transition, emission, lengths, final, *messages, edges)

    @staticmethod
    def backward(ctx, grad_state, grad_edge):
        needs = ctx.needs_input_grad
        # torch.compile traces this with gradients enabled, though it asks for no third derivative.
        third = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if third or not library.use_native(grad_state.device.type, "tangent"):
            return through_reference(ctx, lambda *saved: posterior(*saved, ctx.edges), (grad_state, grad_edge))
        initial, lengths, final = ctx.saved_tensors[1], ctx.saved_tensors[4], ctx.saved_tensors[5]
        direction = grad_edge if ctx.edges else None
        expected, state, edge = torch.ops.hmm_speech.tangent(*ctx.saved_tensors, grad_state, direction, needs[2])
        gradients = (
            expected if needs[0] else None,
            first_frame(state, initial) if needs[1] else None,
            edge if needs[2] else None,
            state if needs[3] else None,
            None,
            last_frame(state, lengths, final) if needs[5] else None,
        )
        return (*gradients, *(None,) * (len(needs) - 6))


def through_reference(ctx, twin, upstream: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The backward pass of an autograd function whose first inputs are what it saved; with a graph, where one is asked.

    ``twin(*saved)`` computes the same in plain torch."""
    higher, needs = torch.is_grad_enabled(), ctx.needs_input_grad
    with torch.enable_grad():
        tracked = [own(x) for x in ctx.saved_tensors]
        value = sum((x * g).sum() for x, g in zip(twin(*tracked), upstream, strict=True))
        if not value.requires_grad:  # no frames: posteriors depend on nothing
            return (None,) * len(needs)
        wanted = [k for k, x in enumerate(tracked) if x is not None and needs[k]]
        found = torch.autograd.grad(value, [tracked[k] for k in wanted], create_graph=higher, allow_unused=True)
    gradients: list[Tensor | None] = [None] * len(needs)
    for k, gradient in zip(wanted, found, strict=True):
        gradients[k] = gradient
    return tuple(gradients)


def tracked(scores: Iterable[Tensor | None]) -> bool:
    """Whether autograd follows what is computed of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in scores)


def own(x: Tensor | None) -> Tensor | None:
    """Scores `x` as autograd knows them here alone: where one of several arguments was computed from another, a
    gradient with respect to the other is not to come through the first one's past."""
    if x is None or not x.is_floating_point():
        return x
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _zeros(x: Tensor) -> Tensor:
    """Zeros for `x` that autograd knows, as it does every other result."""
    return torch.where(torch.zeros((), dtype=torch.bool, device=x.device), x, 0)


def posterior(
    grad, initial, transition, emission, lengths, final, edges: bool, step=reference.EVERY_ARC
) -> tuple[Tensor, Tensor]:
    """What :class:`Posterior` computes, by differentiating the reference."""
    with torch.enable_grad():
        if emission is None:
            emission = transition.new_zeros(lengths.shape[0], reference.frames(transition, None), transition.shape[-1])
        initial, transition, emission, final = (own(x) for x in (initial, transition, emission, final))
        tracked = [emission, transition]
        if not emission.shape[1]:  # no frames: log Z depends on nothing
            return _zeros(emission), _zeros(transition) if edges else transition.new_empty(0)
        z = reference.log_partition(initial, transition, emission, lengths, final, step)
        found = torch.autograd.grad(
            (z * grad).sum(), tracked if edges else tracked[:1], create_graph=True, allow_unused=True
        )
    state, *edge = [_zeros(x) if g is None else g for g, x in zip(found, tracked, strict=False)]
    return state, edge[0] if edge else transition.new_empty(0)


def first_frame(state: Tensor, initial: Tensor) -> Tensor:
    """The gradient of `initial` from that of the emission: initial scores are added at the first frame."""
    first = state.select(1, 0) if state.shape[1] else state.new_zeros(state.shape[0], state.shape[2])
    return first if initial.dim() == 2 else first.sum(0)


def last_frame(state: Tensor, lengths: Tensor, final: Tensor) -> Tensor:
    """The gradient of `final` from that of the emission: final scores are added at each sequence's last frame."""
    if not state.shape[1]:
        return torch.zeros_like(final)
    index = (lengths - 1).clamp(min=0).to(state.device)[:, None, None].expand(-1, 1, state.shape[2])
    last = state.gather(1, index).squeeze(1)
    return last if final.dim() == 2 else last.sum(0)
