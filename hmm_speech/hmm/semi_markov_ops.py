"""The semi-Markov kernels as torch operators, and the autograd functions around them, in the manner of ops.py."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor
from torch.autograd import Function

from . import library, ops
from . import semi_markov_reference as reference

_ARGUMENTS = "Tensor initial, Tensor transition, Tensor emission, Tensor durations, Tensor lengths, Tensor? final"
_MESSAGES = "Tensor log_partition, Tensor messages, Tensor centre"
_WANTED = "bool starts, bool arcs, bool lasting"
_lib = torch.library.Library("hmm_speech", "FRAGMENT")
_lib.define(f"semi_markov_forward({_ARGUMENTS}, bool messages) -> (Tensor, Tensor, Tensor)")
_lib.define(
    f"semi_markov_backward(Tensor grad, {_ARGUMENTS}, {_MESSAGES}, {_WANTED}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(f"semi_markov_viterbi({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
_lib.define(f"semi_markov_sample({_ARGUMENTS}, Tensor uniform) -> (Tensor, Tensor)")


class _Problem(ctypes.Structure):
    """``struct hmm_semi_markov`` of csrc/include/hmm_speech.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "time", "states", "max_duration")),
        ("initial", ctypes.c_void_p), ("initial_batch_stride", ctypes.c_int64),
        ("transition", ctypes.c_void_p), ("transition_batch_stride", ctypes.c_int64),
        ("emission", ctypes.c_void_p),
        ("durations", ctypes.c_void_p), ("durations_batch_stride", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("final", ctypes.c_void_p), ("final_batch_stride", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    ]  # fmt: skip


@functools.cache
def _function(name: str):
    function = getattr(library.load().handle, f"hmm_semi_markov_{name}")
    pointers = {"forward": 3, "backward": 8, "viterbi": 5, "sample": 6}[name.split("_")[0]]
    counts = [ctypes.c_int64] if name.startswith("sample") else []
    function.argtypes = [ctypes.POINTER(_Problem), *counts, *[ctypes.c_void_p] * pointers]
    return function


class _Call:
    """One problem, kept alive with its tensors while the library reads them."""

    def __init__(self, initial, transition, emission, durations, lengths, final):
        self.shape = *emission.shape, durations.shape[-1]
        self.dtype = emission.dtype
        tensors = {"initial": initial, "transition": transition, "emission": emission, "durations": durations}
        tensors |= {"lengths": lengths, "final": final}
        self.tensors = {name: x if x is None else x.contiguous() for name, x in tensors.items()}
        strides = {
            f"{name}_batch_stride": x.numel() // x.shape[0] if x is not None and x.dim() == axes and x.shape[0] else 0
            for name, axes in (("initial", 2), ("transition", 3), ("durations", 3), ("final", 2))
            for x in (self.tensors[name],)
        }
        self.problem = _Problem(
            **dict(zip(("batch", "time", "states", "max_duration"), self.shape, strict=True)),
            **{name: None if x is None else x.data_ptr() for name, x in self.tensors.items()},
            **strides,
            threads=torch.get_num_threads(),
        )

    def messages(self) -> tuple[Tensor, Tensor]:
        batch, time, num_states, _ = self.shape
        messages = torch.empty(2, batch, time, num_states, dtype=torch.float64)
        return messages, torch.empty(batch, time, dtype=torch.float64)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype)

    def __call__(self, name: str, *arguments) -> None:
        suffix = "f64" if self.dtype == torch.float64 else "f32"
        pointers = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        status = _function(f"{name}_{suffix}")(ctypes.byref(self.problem), *pointers)
        if status:
            message = library.load().handle.hmm_status_message(status).decode()
            raise RuntimeError(f"hmm_speech semi_markov_{name}: {message}; B, T, N, D = {self.shape}")


def _forward(initial, transition, emission, durations, lengths, final, messages):
    call = _Call(initial, transition, emission, durations, lengths, final)
    log_partition = call.empty(call.shape[0])
    if not messages:
        call("forward", log_partition, None, None)
        return log_partition, *(torch.empty(0, dtype=torch.float64) for _ in range(2))
    kept = call.messages()
    call("forward", log_partition, *kept)
    return log_partition, *kept


def _backward(
    grad,
    initial,
    transition,
    emission,
    durations,
    lengths,
    final,
    log_partition,
    messages,
    centre,
    starts,
    arcs,
    lasting,
):
    call = _Call(initial, transition, emission, durations, lengths, final)
    state = call.empty(*emission.shape)
    wanted = ((starts, emission), (arcs, transition), (lasting, durations))
    outputs = [call.empty(*x.shape) if asked else call.empty(0) for asked, x in wanted]
    pointers = [x if asked else None for (asked, _), x in zip(wanted, outputs, strict=True)]
    call("backward", grad.contiguous(), log_partition, messages, centre, state, *pointers)
    return state, *outputs


def _viterbi(initial, transition, emission, durations, lengths, final):
    call = _Call(initial, transition, emission, durations, lengths, final)
    score, states = call.empty(call.shape[0]), call.empty(*call.shape[:2], dtype=torch.int64)
    starts = call.empty(*call.shape[:2], dtype=torch.bool)
    call("viterbi", score, *call.messages(), states, starts)
    return score, states, starts


def _sample(initial, transition, emission, durations, lengths, final, uniform):
    scores = (initial, transition, emission, durations, lengths, final)
    kept, call = _forward(*scores, True), _Call(*scores)
    states = call.empty(*uniform.shape[:3], dtype=torch.int64)
    starts = call.empty(*uniform.shape[:3], dtype=torch.bool)
    call("sample", uniform.shape[0], *kept, uniform.double().contiguous(), states, starts)
    return states, starts


def _fake_forward(initial, transition, emission, durations, lengths, final, messages):
    batch, time, num_states = emission.shape
    shapes = ((2, batch, time, num_states), (batch, time)) if messages else ((0,), (0,))
    return emission.new_empty(batch), *(emission.new_empty(shape, dtype=torch.float64) for shape in shapes)


def _fake_backward(
    grad,
    initial,
    transition,
    emission,
    durations,
    lengths,
    final,
    log_partition,
    messages,
    centre,
    starts,
    arcs,
    lasting,
):
    wanted = ((True, emission), (starts, emission), (arcs, transition), (lasting, durations))
    return tuple(emission.new_empty(x.shape if asked else (0,)) for asked, x in wanted)


def _fake_viterbi(initial, transition, emission, durations, lengths, final):
    shape = emission.shape[:2]
    states, starts = (emission.new_empty(shape, dtype=dtype) for dtype in (torch.int64, torch.bool))
    return emission.new_empty(shape[:1]), states, starts


def _fake_sample(initial, transition, emission, durations, lengths, final, uniform):
    return tuple(uniform.new_empty(uniform.shape[:3], dtype=dtype) for dtype in (torch.int64, torch.bool))


for _name, _kernel, _fake in (
    ("forward", _forward, _fake_forward),
    ("backward", _backward, _fake_backward),
    ("viterbi", _viterbi, _fake_viterbi),
    ("sample", _sample, _fake_sample),
):
    _lib.impl(f"semi_markov_{_name}", _kernel, "CPU")
    torch.library.register_fake(f"hmm_speech::semi_markov_{_name}", _fake, lib=_lib)


class LogPartition(Function):
    """log Z with an explicit backward pass: its gradients are the posteriors times the upstream gradient."""

    @staticmethod
    def forward(ctx, *scores):
        messages = torch.ops.hmm_speech.semi_markov_forward(*scores, True)
        # What is returned may be changed in place; what is saved may not.
        ctx.save_for_backward(*scores, messages[0].clone(), *messages[1:])
        return messages[0]

    @staticmethod
    def backward(ctx, grad):
        *scores, log_partition, messages, centre = ctx.saved_tensors
        initial, _, _, _, lengths, final = scores
        needs = ctx.needs_input_grad
        wanted = (False, needs[1], needs[3])
        if torch.is_grad_enabled():  # create_graph=True
            state, _, arcs, lasting = Posterior.apply(grad, *scores, *wanted, log_partition, messages, centre)
        else:
            state, _, arcs, lasting = torch.ops.hmm_speech.semi_markov_backward(
                grad, *scores, log_partition, messages, centre, *wanted
            )
        return (
            ops.first_frame(state, initial) if needs[0] else None,
            arcs if needs[1] else None,
            state if needs[2] else None,
            lasting if needs[3] else None,
            None,
            ops.last_frame(state, lengths, final) if needs[5] else None,
        )


class Posterior(Function):
    """grad times p(z_t = j), (B, T, N), and, where wanted (else empty), times the posterior of a start, (B, T, N), and
    the expected counts of arcs and durations, of the scores' shapes. Differentiable by the reference."""

    @staticmethod
    def forward(ctx, grad, *rest):
        scores, wanted, messages = rest[:6], rest[6:9], rest[9:]
        ctx.save_for_backward(grad, *scores)
        ctx.wanted = wanted
        return torch.ops.hmm_speech.semi_markov_backward(grad, *scores, *messages, *wanted)

    @staticmethod
    def backward(ctx, *upstream):
        return ops.through_reference(ctx, lambda *saved: posterior(*saved, *ctx.wanted), upstream)


def posterior(grad, initial, transition, emission, durations, lengths, final, starts, arcs, lasting) -> list[Tensor]:
    """What :class:`Posterior` computes, by differentiating the reference."""
    with torch.enable_grad():
        bonus = torch.zeros_like(emission, dtype=torch.float64).requires_grad_()
        initial, transition, emission, durations, final = (
            ops.own(x) for x in (initial, transition, emission, durations, final)
        )
        z = reference.log_partition(initial, transition, emission, durations, lengths, final, bonus)
        wanted = ((True, emission), (starts, bonus), (arcs, transition), (lasting, durations))
        inputs = [x for asked, x in wanted if asked]
        if not emission.shape[1]:  # no frames: log Z depends on nothing
            found = iter([None] * len(inputs))
        else:
            found = iter(torch.autograd.grad((z * grad).sum(), inputs, create_graph=True, allow_unused=True))
    outputs = []
    for asked, x in wanted:
        g = next(found) if asked else emission.new_empty(0)
        outputs.append(torch.zeros_like(x) if g is None else g)
    outputs[1] = outputs[1].to(emission.dtype)
    return outputs
