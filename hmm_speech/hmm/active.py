"""Chains of which only K of the N states can emit a frame, over the K slots of each frame.

With a transition (N, N) or (B, N, N) the kernels of csrc/cpu/active.h do the work. All else, and what they are compared
with, is :meth:`ActiveChain.slots`: the same chain as a dense one over K states with transitions that vary over time.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd import Function

from . import library, ops, reference, structures
from .chain import Chain
from .dense import DenseChain
from .ops import _address, _dense, _lib
from .structures import Active, Chunked, LowRank, Transition


class ActiveChain(Chain):
    """emission: an Active; transition: any."""

    @property
    def scores(self) -> tuple:
        """The arguments of the operators."""
        return self.initial, self.transition, self.emission.states, self.emission.scores, self.lengths, self.final

    @property
    def native(self) -> bool:
        plain = isinstance(self.transition, Tensor) and self.transition.dim() < 4
        return plain and library.use_native(self.initial.device.type)

    def states(self) -> Tensor:
        """(B, T, K): the states of each frame, -1 where a slot pads and past the end."""
        return used_states(self.emission.states, self.lengths)

    def dense(self) -> DenseChain:
        emission = Active(self.states(), self.emission.scores)
        return Chain(self.initial, self.transition, emission, self.lengths, self.final, self.time).dense()

    def slots(self) -> DenseChain:
        """The same chain over the K slots of each frame, with time-varying transitions (B, T-1, K, K)."""
        return _slots(*self.scores)[0]

    def same_states(self, other: Chain) -> bool:
        return isinstance(other, ActiveChain) and torch.equal(self.emission.states, other.emission.states)

    def scaled(self, factor: float) -> Chain:
        return super().scaled(factor) if isinstance(self.transition, Tensor) else self.slots().scaled(factor)

    def log_partition(self) -> Tensor:
        return ActiveLogPartition.apply(*self.scores) if self.native else self.slots().log_partition()

    def marginals(self) -> Tensor:
        if self.native:
            states, state = self.states(), self._posterior("none")[0]
        else:
            chain, states = _slots(*self.scores)
            state = chain.marginals()
        place = torch.where(states < 0, self.num_states, states)
        return state.new_zeros(*self.size[:2], self.num_states + 1).scatter(2, place, state)[..., : self.num_states]

    def edge_marginals(self) -> Tensor:
        chain, states = _slots(*self.scores)
        pairs, place = chain.edge_marginals().flatten(2), self._arcs(states)
        edges = pairs.new_zeros(*place.shape[:2], self.num_states**2 + 1).scatter(2, place, pairs)
        return edges[..., :-1].unflatten(-1, (self.num_states, self.num_states))

    def transition_counts(self) -> Tensor:
        if self.native:
            return self._posterior("each")[1]
        chain, states = _slots(*self.scores)
        pairs, place = chain.edge_marginals().flatten(1), self._arcs(states).flatten(1)
        counts = pairs.new_zeros(self.batch, self.num_states**2 + 1).scatter_add(1, place, pairs)
        return counts[..., :-1].unflatten(-1, (self.num_states, self.num_states))

    def viterbi(self) -> tuple[Tensor, Tensor]:
        if self.native:
            return torch.ops.hmm_speech.active_viterbi(*self.scores)
        chain, states = _slots(*self.scores)
        score, slots = chain.viterbi()
        return score, _look_up(states, slots)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        chain, states = _slots(*self.scores)
        score, slots = chain.topk(k)
        return score, _look_up(states.expand(k, -1, -1, -1), slots)

    def sample(self, uniform: Tensor) -> Tensor:
        if self.native:
            return torch.ops.hmm_speech.active_sample(*(x if x is None else x.detach() for x in self.scores), uniform)
        chain, states = _slots(*self.scores)
        return _look_up(states.expand(uniform.shape[0], -1, -1, -1), chain.sample(uniform))

    def _posterior(self, edges: str) -> tuple[Tensor, Tensor]:
        ones = torch.ones(self.batch, dtype=self.initial.dtype, device=self.initial.device)
        with torch.no_grad():
            _, *messages = torch.ops.hmm_speech.active_forward(*self.scores)
        if ops.tracked(self.scores):
            return ActivePosterior.apply(ones, *self.scores, edges, *messages)
        return torch.ops.hmm_speech.active_backward(ones, *self.scores, *messages, edges)

    def _arcs(self, states: Tensor) -> Tensor:
        """(B, T-1, K K): the place of each pair of slots in a flat (N, N), N^2 where one of them pads."""
        rows, columns = states[:, :-1, :, None], states[:, 1:, None, :]
        place = torch.where((rows < 0) | (columns < 0), self.num_states**2, rows * self.num_states + columns)
        return place.flatten(2)


def used_states(states: Tensor, lengths: Tensor) -> Tensor:
    """`states` (B, T, K) with -1 where a slot pads and past the end, where they may hold anything."""
    inside = torch.arange(states.shape[1], device=states.device) < lengths.unsqueeze(-1)
    return torch.where(inside.unsqueeze(-1) & (states >= 0), states, -1)


def _slots(
    initial: Tensor, transition: Transition, states: Tensor, scores: Tensor, lengths: Tensor, final: Tensor | None
) -> tuple[DenseChain, Tensor]:
    """The chain over slots, and their states (B, T, K), ascending and then -1, so that ties go to the smallest."""
    batch, time, width = states.shape
    states = used_states(states, lengths)
    if isinstance(transition, LowRank):
        transition = transition.within(lengths)
    states, order = torch.where(states < 0, torch.iinfo(torch.int64).max, states).sort(-1)
    used = states < torch.iinfo(torch.int64).max
    states, emission = torch.where(used, states, -1), torch.where(used, scores.gather(-1, order), -torch.inf)
    place = states.clamp(min=0)  # what pads is forbidden by its emission
    arcs = _gather(transition, place, initial) if time else initial.new_empty(batch, 0, width, width)
    arcs = torch.where(used[:, :-1, :, None] & used[:, 1:, None, :], arcs, 0)
    none = place.new_zeros(batch, width)
    end = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, width)
    first, last = (place[:, 0], place.gather(1, end).squeeze(1)) if time else (none, none)
    initial, final = (
        None if x is None else x.expand(batch, -1).gather(1, at) for x, at in ((initial, first), (final, last))
    )
    return DenseChain(initial, arcs, emission, lengths, final, time), states


def _gather(transition: Transition, place: Tensor, like: Tensor) -> Tensor:
    """(B, T-1, K, K): scores of the arcs between the slots of each frame and the next."""
    rows, columns, width = place[:, :-1], place[:, 1:], place.shape[2]
    if not isinstance(transition, Chunked):
        return structures.gather(transition, rows, columns)
    parts = [
        structures.gather(transition.function(a, b), rows[:, a:b], columns[:, a:b])
        for a, b in transition.spans(place.shape[1])
    ]
    return torch.cat(parts, 1) if parts else like.new_empty(place.shape[0], 0, width, width)


def _look_up(states: Tensor, slots: Tensor) -> Tensor:
    """The states (..., T) of slots (..., T), -1 where those are."""
    found = states.gather(-1, slots.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(slots < 0, -1, found)


class _Problem(ctypes.Structure):
    """``struct hmm_active_problem`` of csrc/include/hmm_speech.h."""

    _fields_ = [
        ("batch", ctypes.c_int64), ("time", ctypes.c_int64), ("states", ctypes.c_int64), ("slots", ctypes.c_int64),
        ("initial", ctypes.c_void_p), ("initial_batch_stride", ctypes.c_int64),
        ("transition", ctypes.c_void_p), ("transition_batch_stride", ctypes.c_int64),
        ("active", ctypes.c_void_p), ("emission", ctypes.c_void_p), ("lengths", ctypes.c_void_p),
        ("final", ctypes.c_void_p), ("final_batch_stride", ctypes.c_int64), ("threads", ctypes.c_int32),
    ]  # fmt: skip


def _call(name: str, scores: tuple, *arguments) -> None:
    """Run a function of the library on a problem and on tensors, which stay alive while it does."""
    initial, transition, states, emission, lengths, final = scores
    initial, final, transition = _dense(initial, 1), _dense(final, 1), _dense(transition, 2)
    if transition.dim() == 3 and transition.stride(0) == 0:
        transition = transition.contiguous()  # in C, stride 0 means one block of gradients for all sequences
    states, emission, lengths = states.contiguous(), emission.contiguous(), lengths.contiguous()
    batch, time, slots = states.shape
    problem = _Problem(
        batch=batch, time=time, states=transition.shape[-1], slots=slots, threads=torch.get_num_threads(),
        initial=_address(initial), initial_batch_stride=initial.stride(0) if initial.dim() == 2 else 0,
        transition=_address(transition),
        transition_batch_stride=transition.stride(0) if transition.dim() == 3 else 0,
        active=_address(states), emission=_address(emission), lengths=_address(lengths), final=_address(final),
        final_batch_stride=final.stride(0) if final is not None and final.dim() == 2 else 0,
    )  # fmt: skip
    handle = library.load().handle
    suffix = "f64" if emission.dtype == torch.float64 else "f32"
    pointers = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    status = getattr(handle, f"hmm_active_{name}_{suffix}")(ctypes.byref(problem), *pointers)
    if status:
        raise RuntimeError(
            f"hmm_speech active_{name}: {handle.hmm_status_message(status).decode()}; "
            f"B, T, N, K = {(batch, time, transition.shape[-1], slots)}"
        )


def _forward(*problem):
    log_partition, alpha, method = _fake_forward(*problem)
    _call("forward", problem, log_partition, alpha, method)
    library.count_redone(method.tolist().count(library.REDONE))
    return log_partition, alpha, method


def _backward(grad, *problem_and_messages):
    *problem, alpha, method, edges = problem_and_messages
    state, edge = _fake_backward(grad, *problem, alpha, method, edges)
    stride = edge.stride(0) if edge.dim() == 3 else 0
    _call("backward", tuple(problem), grad.contiguous(), alpha, method, state, edge if edge.dim() > 1 else None, stride)
    return state, edge


def _viterbi(*problem):
    score, states = _fake_viterbi(*problem)
    _call("viterbi", problem, score, torch.empty_like(problem[3], memory_format=torch.contiguous_format), states)
    return score, states


def _sample(*problem_and_uniform):
    *problem, uniform = problem_and_uniform
    log_partition, alpha, method = _forward(*problem)
    paths = _fake_sample(*problem, uniform)
    _call("sample", tuple(problem), uniform.shape[0], log_partition, alpha, method, uniform.contiguous(), paths)
    return paths


def _fake_forward(initial, transition, states, scores, lengths, final):
    batch = states.shape[0]
    return scores.new_empty(batch), scores.new_empty(states.shape), scores.new_empty(batch, dtype=torch.int32)


def _fake_backward(grad, initial, transition, states, scores, lengths, final, alpha, method, edges):
    num_states, leading = transition.shape[-1], (states.shape[0],) if edges == "each" else transition.shape[:-2]
    shape = (0,) if edges == "none" else (*leading, num_states, num_states)
    return scores.new_empty(states.shape), scores.new_empty(shape)


def _fake_viterbi(initial, transition, states, scores, lengths, final):
    return scores.new_empty(states.shape[0]), states.new_empty(states.shape[:2])


def _fake_sample(initial, transition, states, scores, lengths, final, uniform):
    return states.new_empty(uniform.shape)


_PROBLEM = "Tensor initial, Tensor transition, Tensor states, Tensor scores, Tensor lengths, Tensor? final"
_MESSAGES = "Tensor alpha, Tensor method"
for _name, _arguments, _results, _kernel, _fake in (
    ("forward", _PROBLEM, "(Tensor, Tensor, Tensor)", _forward, _fake_forward),
    ("backward", f"Tensor grad, {_PROBLEM}, {_MESSAGES}, str edges", "(Tensor, Tensor)", _backward, _fake_backward),
    ("viterbi", _PROBLEM, "(Tensor, Tensor)", _viterbi, _fake_viterbi),
    ("sample", f"{_PROBLEM}, Tensor uniform", "Tensor", _sample, _fake_sample),
):
    _lib.define(f"active_{_name}({_arguments}) -> {_results}")
    _lib.impl(f"active_{_name}", _kernel, "CPU")
    torch.library.register_fake(f"hmm_speech::active_{_name}", _fake, lib=_lib)


class ActiveLogPartition(Function):
    """log Z with an explicit backward pass: its gradients are the posteriors times the upstream gradient."""

    @staticmethod
    def forward(ctx, initial, transition, states, scores, lengths, final):
        messages = torch.ops.hmm_speech.active_forward(initial, transition, states, scores, lengths, final)
        ctx.save_for_backward(initial, transition, states, scores, lengths, final, *messages[1:])
        return messages[0]

    @staticmethod
    def backward(ctx, grad):
        initial, transition, states, scores, lengths, final, *messages = ctx.saved_tensors
        needs = ctx.needs_input_grad
        arguments = (grad, initial, transition, states, scores, lengths, final)
        edges = "like" if needs[1] else "none"
        if torch.is_grad_enabled():  # create_graph=True
            state, edge = ActivePosterior.apply(*arguments, edges, *messages)
        else:
            state, edge = torch.ops.hmm_speech.active_backward(*arguments, *messages, edges)
        first, last = torch.zeros_like(lengths), (lengths - 1).clamp(min=0)
        return (
            _at_frame(state, states, lengths, first, initial) if needs[0] else None,
            edge if needs[1] else None,
            None,
            state if needs[3] else None,
            None,
            _at_frame(state, states, lengths, last, final) if needs[5] else None,
        )


def _at_frame(state: Tensor, states: Tensor, lengths: Tensor, frame: Tensor, scores: Tensor) -> Tensor:
    """The gradient of initial or final scores, (N,) or (B, N), from that of the emission (B, T, K) at `frame` (B,)."""
    batch, time, width = states.shape
    num_states = scores.shape[-1]
    found = state.new_zeros(batch, num_states + 1)
    if time:
        at = frame[:, None, None].expand(-1, 1, width)
        place = states.gather(1, at).squeeze(1)
        place = torch.where((place >= 0) & (lengths > 0).unsqueeze(-1), place, num_states)
        found = found.scatter(1, place, state.gather(1, at).squeeze(1))
    return found[:, :num_states] if scores.dim() == 2 else found[:, :num_states].sum(0)


class ActivePosterior(Function):
    """grad times p(z_t | x), (B, T, K), and the edges asked for: "none", "like" the transition, or (B, N, N), "each".

    Differentiable by the reference, a Hessian-vector product of log Z over slots through plain torch.
    """

    @staticmethod
    def forward(ctx, grad, initial, transition, states, scores, lengths, final, edges, *messages):
        ctx.save_for_backward(grad, initial, transition, states, scores, lengths, final)
        ctx.edges = edges
        return torch.ops.hmm_speech.active_backward(
            grad, initial, transition, states, scores, lengths, final, *messages, edges
        )

    @staticmethod
    def backward(ctx, grad_state, grad_edge):
        return ops.through_reference(ctx, lambda *saved: posterior(*saved, ctx.edges), (grad_state, grad_edge))


def posterior(grad, initial, transition, states, scores, lengths, final, edges: str) -> tuple[Tensor, Tensor]:
    """What :class:`ActivePosterior` computes, by differentiating the reference over slots."""
    with torch.enable_grad():
        initial, final = ops.own(initial), ops.own(final)
        tracked = [ops.own(scores), ops.own(transition)]
        if edges == "each":
            tracked[1] = tracked[1].expand(states.shape[0], *transition.shape[-2:])
        chain, _ = _slots(initial, tracked[1], states, tracked[0], lengths, final)
        z = reference.log_partition(*chain.scores)
        wanted = tracked if edges != "none" else tracked[:1]
        found = torch.autograd.grad((z * grad).sum(), wanted, create_graph=True, allow_unused=True)
    state, *edge = [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]
    return state, edge[0] if edge else transition.new_empty(0)
