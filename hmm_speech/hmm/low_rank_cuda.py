"""The sweeps of :mod:`low_rank_ops` on a GPU, by hmm_cuda_low_rank_* of csrc/include/hmm_speech.h.

Two products a step by torch and a kernel (csrc/cuda/low_rank.cu), in CUDA graphs where :mod:`cuda_graphs` makes them.
What is lost is done again on the device (low_rank_redo.cu): nothing waits for the GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from . import cuda, cuda_graphs, library
from .products import full_precision


class _Call(cuda.Call):
    def __init__(self, made, initial, factors, emission, lengths, final):
        super().__init__(initial, made.pairs, emission, lengths, final)
        self.pairs = self.tensors[1]
        self.kept = factors.contiguous(), made.shift.to(self.dtype).contiguous(), made.top.contiguous(), made.demands
        scores, shift, top, demands = self.kept
        self.rank = made.rank
        self.problem = library.CudaLowRankProblem(
            chain=self.problem, rank=made.rank, scores=scores.data_ptr(),
            shift=shift.data_ptr(), shift_batch_stride=shift.stride(0) if shift.dim() == 2 else 0,
            top=top.data_ptr(), top_batch_stride=top.dim(), demands=demands.data_ptr(),
        )  # fmt: skip

    def workspace(self, of_pass: int) -> Tensor:
        size = library.cuda().hmm_cuda_low_rank_workspace(ctypes.byref(self.problem), self.dtype.itemsize, of_pass)
        return self.empty(max(size, 0), dtype=torch.uint8)

    def walk(self, name: str):
        """Messages (1, B, N), (1, B, R) and (1, B, N); where each sequence has its own factors, (B, 1, ...)."""
        batch, time, num_states = self.shape
        sizes = (1, batch) if self.pairs.dim() == 2 else (batch, 1)
        return cuda_graphs.walk(self, f"low_rank_{name}", *sizes, (num_states, self.rank, num_states), time)

    @property
    def matrices(self) -> list[Tensor]:
        """L and R, each (1, ...) or (B, ...)."""
        pairs = self.pairs if self.pairs.dim() == 3 else self.pairs.unsqueeze(0)
        left, right = pairs.chunk(2, -2)
        return [left.mT, right]


def forward(made, initial, factors, emission, lengths, final):
    call = _Call(made, initial, factors, emission, lengths, final)
    batch, time, num_states = call.shape
    log_partition, method = call.empty(batch).zero_(), call.empty(batch, dtype=torch.int32).zero_()
    alpha, half = call.empty(batch, time, num_states), call.empty(batch, time, made.rank)
    if not time:
        return log_partition, alpha, half, method
    with call.on_stream() as run:
        workspace = call.workspace(library.CUDA_FORWARD)
        with call.walk("forward") as walk:
            message, between, product = walk.messages
            run("low_rank_begin", alpha, half, between, product, message, walk.held, workspace)
            walk.take(call, run, call.matrices, time, multiply_first=False)
        run("low_rank_end", log_partition, alpha, half, method, workspace)
    return log_partition, alpha, half, method


def backward(
    made, grad, initial, factors, emission, lengths, final, log_partition, alpha, method, edge: Tensor | None,
    count: Callable[[Tensor, Tensor], None],
) -> Tensor:  # fmt: skip
    """The posteriors' gradient (B, T, N). `count`, from classes and leaving, writes edge; lost sequences' is added."""
    call = _Call(made, initial, factors, emission, lengths, final)
    batch, time, _ = call.shape
    state, leaving = call.empty(*call.shape), call.empty(*call.shape)
    classes, grad = call.empty(batch, time, made.rank), grad.contiguous()
    if not time:
        return state
    with call.on_stream() as run:
        workspace = call.workspace(library.CUDA_BACKWARD)
        with call.walk("backward") as walk:
            message, between, product = walk.messages
            buffers = (between, product, message, walk.held, workspace)
            run("low_rank_back_begin", grad, alpha, method, state, classes, leaving, *buffers)
            left, right = call.matrices
            walk.take(call, run, [right.mT, left.mT], time, multiply_first=False)
        if edge is not None:
            with full_precision(call.device.type):
                count(classes=classes, leaving=leaving)
        run("low_rank_back_end", grad, log_partition, method, state, edge, classes, leaving, workspace)
    return state
