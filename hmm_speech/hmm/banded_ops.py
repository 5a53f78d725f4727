"""The banded kernels (csrc/cpu/banded.h) as torch operators.

``diagonals`` is (D, N), (B, D, N) or (B, T-1, D, N), in the order of the offsets; all else is as in :mod:`ops`.
"""

from __future__ import annotations

import ctypes

import torch

from . import library, ops

_ARGUMENTS = "Tensor initial, Tensor diagonals, int[] offsets, Tensor emission, Tensor lengths, Tensor? final"
_MESSAGES = "Tensor log_partition, Tensor alpha, Tensor centre"
_lib = torch.library.Library("hmm_speech", "FRAGMENT")
_lib.define(f"banded_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
_lib.define(f"banded_backward(Tensor grad, {_ARGUMENTS}, {_MESSAGES}, bool edges) -> (Tensor, Tensor)")
_lib.define(f"banded_viterbi({_ARGUMENTS}) -> (Tensor, Tensor)")
_lib.define(f"banded_sample({_ARGUMENTS}, Tensor uniform) -> Tensor")


class _Call(ops._Call):
    def __init__(self, initial, diagonals, offsets, emission, lengths, final):
        super().__init__(initial, diagonals, emission, lengths, final)
        self.offsets = (ctypes.c_int64 * len(offsets))(*offsets)
        self.problem = library.BandedProblem(chain=self.problem, diagonals=len(offsets), offsets=self.offsets)


def _forward(initial, diagonals, offsets, emission, lengths, final):
    call = _Call(initial, diagonals, offsets, emission, lengths, final)
    batch, time, num_states = call.shape
    alpha, centre = (
        call.empty(batch, time, num_states, dtype=torch.float64),
        call.empty(batch, time, dtype=torch.float64),
    )
    log_partition = call.empty(batch)
    call("banded_forward", log_partition, alpha, centre)
    return log_partition, alpha, centre


def _backward(grad, initial, diagonals, offsets, emission, lengths, final, log_partition, alpha, centre, edges):
    call = _Call(initial, diagonals, offsets, emission, lengths, final)
    state, edge = call.empty(*call.shape), call.empty(*(diagonals.shape if edges else (0,)))
    call("banded_backward", grad.contiguous(), log_partition, alpha, centre, state, edge if edges else None)
    return state, edge


def _viterbi(initial, diagonals, offsets, emission, lengths, final):
    call = _Call(initial, diagonals, offsets, emission, lengths, final)
    score, states = call.empty(call.shape[0]), call.empty(*call.shape[:2], dtype=torch.int64)
    call("banded_viterbi", score, call.empty(*call.shape, dtype=torch.float64), states)
    return score, states


def _sample(initial, diagonals, offsets, emission, lengths, final, uniform):
    log_partition, alpha, _ = _forward(initial, diagonals, offsets, emission, lengths, final)
    call = _Call(initial, diagonals, offsets, emission, lengths, final)
    states = call.empty(*uniform.shape, dtype=torch.int64)
    call("banded_sample", uniform.shape[0], log_partition, alpha, uniform.contiguous(), states)
    return states


def _fake_forward(initial, diagonals, offsets, emission, lengths, final):
    shape = emission.shape
    return (
        emission.new_empty(shape[0]),
        emission.new_empty(shape, dtype=torch.float64),
        emission.new_empty(shape[:2], dtype=torch.float64),
    )


def _fake_backward(grad, initial, diagonals, offsets, emission, lengths, final, log_partition, alpha, centre, edges):
    return emission.new_empty(emission.shape), diagonals.new_empty(diagonals.shape if edges else (0,))


def _fake_viterbi(initial, diagonals, offsets, emission, lengths, final):
    return emission.new_empty(emission.shape[0]), emission.new_empty(emission.shape[:2], dtype=torch.int64)


def _fake_sample(initial, diagonals, offsets, emission, lengths, final, uniform):
    return uniform.new_empty(uniform.shape, dtype=torch.int64)


for _name, _kernel, _fake in (
    ("banded_forward", _forward, _fake_forward),
    ("banded_backward", _backward, _fake_backward),
    ("banded_viterbi", _viterbi, _fake_viterbi),
    ("banded_sample", _sample, _fake_sample),
):
    _lib.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"hmm_speech::{_name}", _fake, lib=_lib)


class Kernels:
    """What :mod:`structured` calls."""

    def __init__(self, offsets: tuple[int, ...], step):
        self.offsets, self.step = offsets, step

    def forward(self, initial, diagonals, *others):
        return torch.ops.hmm_speech.banded_forward(initial, diagonals, self.offsets, *others)

    def backward(self, grad, initial, diagonals, *others):
        return torch.ops.hmm_speech.banded_backward(grad, initial, diagonals, self.offsets, *others)
