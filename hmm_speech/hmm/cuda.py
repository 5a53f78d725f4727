"""The operators of dense chains on a GPU, by hmm_cuda_* of csrc/include/hmm_speech.h.

Everything is allocated by torch and put on the current stream; nothing waits for the GPU. Hence sequences that were
done again are not counted (:func:`hmm_speech.hmm.backend`), and lengths are moved, not looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from . import library, ops

_FORWARD, _BACKWARD = 0, 1  # enum hmm_cuda_pass
_CUDA_ERROR = 1000  # HMM_CUDA_ERROR
_NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice
_lib = torch.library.Library("hmm_speech", "IMPL", "CUDA")


@contextlib.contextmanager
def stream_of(device: torch.device) -> Iterator[int | None]:
    """Makes `device` the current one, and gives its current stream's handle."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


class Call(ops._Call):
    """As its base, for hmm_cuda_*: with a workspace, and on a stream."""

    def __init__(self, initial, transition, emission, lengths, final):
        self.device = transition.device
        super().__init__(initial, transition, emission, lengths.to(self.device, non_blocking=True), final)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def __call__(self, name: str, *arguments, workspace: int | None = None) -> None:
        """Calls hmm_cuda_`name`; `workspace` is the pass that it is for, None where the function takes none."""
        handle = library.cuda()
        if handle is None:
            raise RuntimeError(
                f"hmm_speech::{name}: the library has no kernels for GPUs; `hmm-speech info` says what brings them"
            )
        suffix = "f64" if self.dtype == torch.float64 else "f32"
        problem, given = ctypes.byref(self.problem), list(arguments)
        with stream_of(self.device) as stream:
            if workspace is not None:
                size = handle.hmm_cuda_workspace(problem, self.dtype.itemsize, workspace)
                given.append(self.empty(max(size, 0), dtype=torch.uint8))
            pointers = [x.data_ptr() if isinstance(x, Tensor) else x for x in given]
            status = getattr(handle, f"hmm_cuda_{name}_{suffix}")(problem, *pointers, stream)
        if status:
            raise RuntimeError(f"hmm_speech {name}: {_message(status)}; B, T, N = {self.shape} on {self.device}")


def _message(status: int) -> str:
    if status < _CUDA_ERROR:
        return library.load().handle.hmm_status_message(status).decode()
    code = status - _CUDA_ERROR
    text = str(torch.cuda.CudaError(code)) if torch.version.cuda else str(code)
    if code == _NO_KERNEL_IMAGE:
        text += (
            "; the library was built for other GPUs: build it again with this one's compute capability in the "
            'environment, as `CUDAARCHS=native pip install -e .`, or take use_backend("reference")'
        )
    return f"CUDA error: {text}"


def forward(initial, transition, emission, lengths, final):
    call = Call(initial, transition, emission, lengths, final)
    batch, time, _ = call.shape
    log_partition, alpha, norm = call.empty(batch), call.empty(*call.shape), call.empty(*call.shape)
    centre, method = call.empty(batch, time), call.empty(batch, dtype=torch.int32)
    call("forward", log_partition, alpha, norm, centre, method, workspace=_FORWARD)
    return log_partition, alpha, norm, centre, method


def backward(grad, initial, transition, emission, lengths, final, log_partition, alpha, norm, centre, method, edges):
    call = Call(initial, transition, emission, lengths, final)
    state, edge = call.empty(*call.shape), call.empty(*(transition.shape if edges else (0,)))
    call("backward", grad.contiguous(), log_partition, alpha, norm, centre, method, state, edge if edges else None,
         workspace=_BACKWARD)  # fmt: skip
    return state, edge


def viterbi(initial, transition, emission, lengths, final):
    call = Call(initial, transition, emission, lengths, final)
    score, states = call.empty(call.shape[0]), call.empty(*call.shape[:2], dtype=torch.int64)
    call("viterbi", score, call.empty(*call.shape, dtype=torch.int16), states)
    return score, states


def sample(initial, transition, emission, lengths, final, uniform):
    log_partition, alpha, _, _, method = forward(initial, transition, emission, lengths, final)
    call = Call(initial, transition, emission, lengths, final)
    states = call.empty(*uniform.shape, dtype=torch.int64)
    call("sample", uniform.shape[0], log_partition, alpha, method, uniform.contiguous(), states)
    return states


for _kernel in (forward, backward, viterbi, sample):
    _lib.impl(_kernel.__name__, _kernel)
