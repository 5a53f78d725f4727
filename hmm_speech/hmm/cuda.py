"""The operators of dense chains on a GPU, by hmm_cuda_* of csrc/include/hmm_speech.h.

Everything is allocated by torch and put on the current stream; nothing waits for the GPU. Hence sequences that were
done again are not counted (:func:`hmm_speech.hmm.backend`), and lengths are moved, not looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import cuda_graphs, library, ops

_CUDA_ERROR = 1000  # HMM_CUDA_ERROR
_NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice
_lib = torch.library.Library("hmm_speech", "IMPL", "CUDA")


@contextlib.contextmanager
def stream_of(device: torch.device) -> Iterator[int | None]:
    """Makes `device` the current one, and gives its current stream's handle."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


# What walking from both ends saves and costs, in us; estimated, not measured (csrc/cuda/README.md). A step of scaled.cu
# is a chain of some 540 cycles, one of wide.cu, beyond 128 states, some 1,500, one of steps.cu two launches; where the
# halves meet, one block a sequence reads all arcs, at some 50 GB/s.
_STEP, _WIDE_STEP, _LAUNCHED_STEP, _JOINED_ARC = 0.35, 1.0, 6.0, 8e-5
_WIDE_FROM = 129
# Beyond, a step of steps.cu is bound by the bytes of its arcs, not by launches: 64 MB at 4,096 states, 30 us at 2 TB/s.
# From both ends these are read twice, once a half, and nothing is won; up to here, N^2 more numbers are the price.
_BOTH_ENDS_TO = 2048
# Where transitions vary over time (log_space.cu), a step is a chain of 1.1 us or more, or reads its arcs as fast; the
# halves meet in one launch more, which reads all arcs of a step twice.
_VARYING_STEP, _LAUNCH = 1.1, 3.0
# In chunks (transfer.cu), a frame of a matrix comes to the steps of the walks: 2,800 cycles or more for 50 states, N^3
# products, at least what barriers and exponentials take. From chunk to chunk messages are handed on in up to 1,450;
# four launches are more. Two chunks on one multiprocessor, whose shared memory holds both, are put at 1.6 of one.
_MATRIX_FRAME, _LEAST_MATRIX_FRAME, _BRIDGE = 1.6, 0.6, 0.9
_CHUNK_STATES, _BESIDE = 64, 1.6
_TWO_CHUNKS = {52: 94 * 1024, 64: 108 * 1024}  # bytes of shared memory, by the states that they have at most


def walk_both_ends(time: int, num_states: int, in_steps: bool) -> bool:
    """Whether a sequence is to be walked from both of its ends at once, half as many steps one after the other.

    The batch's size does not matter: where B blocks fill the GPU, 2 B blocks of half the length take as long."""
    step = _LAUNCHED_STEP if in_steps else _WIDE_STEP if num_states >= _WIDE_FROM else _STEP
    saved = time // 2 * step
    return saved > num_states**2 * _JOINED_ARC and (not in_steps or num_states <= _BOTH_ENDS_TO)


def walk_varying_from_both_ends(batch: int, time: int, num_states: int, multiprocessors: int) -> bool:
    """The same where transitions vary over time: as long as each half has a multiprocessor of its own.

    Of T - 1 steps a pass T / 2 are saved, but for one of the backward pass, where both halves take the arcs that they
    meet at. With more sequences, a multiprocessor takes two whole ones at once, but one half after the other."""
    arcs = num_states**2 * _JOINED_ARC
    saved = (2 * (time // 2) - 1) * max(_VARYING_STEP, arcs)
    return 2 * batch <= multiprocessors and saved > _LAUNCH + 2 * arcs


def chunk_frames(batch: int, time: int, num_states: int, multiprocessors: int, beside: int) -> int:
    """Frames of a chunk where a float32 problem whose transitions vary over time is best cut into chunks, else 0.

    A multiprocessor has one chunk, or up to `beside`. Of P chunks a sequence, T / P frames take a frame of a matrix and
    two steps of a walk each, forward and backward, and P steps of the bridge. From both ends, T / 2 steps a pass."""
    found, least = 0, time * _VARYING_STEP
    if batch == 0 or num_states > _CHUNK_STATES:
        return 0
    one = max(_LEAST_MATRIX_FRAME, _MATRIX_FRAME * (num_states / 50) ** 3) + 2 * _VARYING_STEP
    for among in range(1, beside + 1):
        frame = one * (_BESIDE if among > 1 else 1)
        chunks = min(among * multiprocessors // batch, round(math.sqrt(time * frame / _BRIDGE)))
        if chunks < 2:
            continue
        frames = -(-time // chunks)
        cost = frames * frame + chunks * _BRIDGE + 4 * _LAUNCH
        if frames < time and cost < least:
            found, least = frames, cost
    return found


# Chunks that begin early (scaled_chunks.h, early_chunks.h): frames until a message has forgotten where it began, 8 to
# 38 for random scores and those of the recipes, more for states that stay (recipes/layer/forgetting.py).
_LEAST_WARM_UP, _MOST_WARM_UP = 32, 128
# Where transitions do not vary: warps that a multiprocessor issues from while a step waits, some 25 cycles each of 540.
_WARPS, _CHUNKED_STATES = 20, {torch.float32: 256, torch.float64: 96}
# Where they do: us that a block takes for a byte of its arcs, and bytes that the memory brings in a us for each
# multiprocessor, of A100, H100 and B200, and elsewhere.
_BYTE, _BYTES, _LEAST_BYTES = 2e-5, {(8, 0): 14e3, (9, 0): 25e3, (10, 0): 54e3}, 8e3


def warm_up_frames(time: int, dtype: torch.dtype) -> int:
    return min(max(time // 16, _LEAST_WARM_UP), _MOST_WARM_UP) * (2 if dtype == torch.float64 else 1)


def early_chunks(
    batch: int, time: int, num_states: int, dtype: torch.dtype, multiprocessors: int, both_ends: bool
) -> tuple[int, int]:
    """Frames of a chunk where a problem whose transitions do not vary is best cut into chunks, and frames that each
    begins early; else 0 and 0.

    Of P chunks a sequence, T / P + warm-up steps follow each other, T / 2 from both ends. Chunks of less than half a
    warm-up would be more work for little."""
    if batch == 0 or num_states > _CHUNKED_STATES[dtype]:
        return 0, 0
    warm_up = warm_up_frames(time, dtype)
    beside = 1 if dtype == torch.float64 else max(1, _WARPS // -(-num_states // 8))
    chunks = max(1, beside * multiprocessors // batch)
    frames = max(-(-time // chunks), warm_up // 2)
    step = _WIDE_STEP if num_states >= _WIDE_FROM else _STEP
    saved = (time // (2 if both_ends else 1) - frames - warm_up) * step
    return (frames, warm_up) if frames < time and saved > 2 * _LAUNCH else (0, 0)


def early_varying_chunks(
    batch: int, time: int, num_states: int, dtype: torch.dtype, multiprocessors: int, memory: float, both_ends: bool
) -> tuple[int, int]:
    """The same where transitions vary over time, one chunk or half a multiprocessor.

    A frame is a step's chain, or the reading of its arcs, by a block or by all that walk, from a memory that brings so
    many bytes a us. So more chunks, whose warm-ups read more, do not always take less time. They must halve it: no
    certificate says beforehand that a chain forgets, and of one that does not, walks of chunks are for nothing."""
    warm_up, arcs = warm_up_frames(time, dtype), num_states**2 * dtype.itemsize

    def cost(steps: int, walks: int) -> float:
        return steps * max(_VARYING_STEP, arcs * _BYTE, walks * arcs / memory)

    found = 0, 0
    least = (cost(time // 2, 2 * batch) if both_ends else cost(time, min(batch, multiprocessors))) / 2
    for chunks in range(2, min(multiprocessors // max(batch, 1), 2 * time // warm_up) + 1):
        frames = -(-time // chunks)
        taken = cost(frames + warm_up, chunks * batch) + 2 * _LAUNCH
        if batch and taken < least:
            found, least = (frames, warm_up), taken
    return found


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def memory_of(device: torch.device) -> float:
    """Bytes that its memory brings in a us, by the kind of GPU."""
    return _BYTES.get(torch.cuda.get_device_capability(device), _LEAST_BYTES) * multiprocessors(device)


def chunks_beside(device: torch.device, num_states: int) -> int:
    """Chunks that a multiprocessor takes at once; one where torch (before 2.7) does not know of its shared memory."""
    needed = min((room for most, room in _TWO_CHUNKS.items() if num_states <= most), default=math.inf)
    return 1 + (getattr(torch.cuda.get_device_properties(device), "shared_memory_per_multiprocessor", 0) >= needed)


class Call(ops._Call):
    """As its base, for hmm_cuda_*: with a workspace, and on a stream."""

    def __init__(self, initial, transition, emission, lengths, final):
        self.device = transition.device
        super().__init__(initial, transition, emission, lengths.to(self.device, non_blocking=True), final)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def workspace(self, of_pass: int) -> Tensor:
        size = library.cuda().hmm_cuda_workspace(ctypes.byref(self.problem), self.dtype.itemsize, of_pass)
        return self.empty(max(size, 0), dtype=torch.uint8)

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[Callable[..., None]]:
        """A function that calls hmm_cuda_<name>(problem, ..., stream), on the stream that is current now."""
        handle = library.cuda()
        if handle is None:
            raise RuntimeError(
                "hmm_speech: the library has no kernels for GPUs; `hmm-speech info` says what brings them"
            )
        suffix, problem = "f64" if self.dtype == torch.float64 else "f32", ctypes.byref(self.problem)

        with stream_of(self.device) as stream:

            def run(name: str, *arguments) -> None:
                pointers = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
                if name == "steps_advance":  # whatever the walk is over
                    status = handle.hmm_cuda_steps_advance(*pointers, stream)
                else:
                    status = getattr(handle, f"hmm_cuda_{name}_{suffix}")(problem, *pointers, stream)
                if status:
                    where = f"B, T, N = {self.shape} on {self.device}"
                    raise RuntimeError(f"hmm_speech {name}: {_message(status)}; {where}")

            yield run

    @property
    def in_steps(self) -> bool:
        """Whether there are so many states that a step is best done by a matrix product (csrc/cuda/steps.cu)."""
        return bool(library.cuda().hmm_cuda_in_steps(ctypes.byref(self.problem), self.dtype.itemsize))

    def share(self, both_ends: bool) -> None:
        """Chooses how a pass goes through time; a function of the shape, since the passes in steps must agree."""
        shape, long = self.shape, self.shape[1] > _LEAST_WARM_UP  # early chunks of fewer frames save nothing
        frames = warm_up = 0
        if not self.time_varying:
            halves = both_ends and walk_both_ends(*shape[1:], self.in_steps)
            if long:
                processors = multiprocessors(self.device)
                frames, warm_up = early_chunks(*shape, self.dtype, processors, both_ends)
        else:
            processors = multiprocessors(self.device)
            halves = both_ends and walk_varying_from_both_ends(*shape, processors)
            if both_ends and self.dtype == torch.float32:
                frames = chunk_frames(*shape, processors, chunks_beside(self.device, shape[2]))
            if long and not frames:
                memory = memory_of(self.device)
                frames, warm_up = early_varying_chunks(*shape, self.dtype, processors, memory, halves)
        self.problem.chunk_frames, self.problem.warm_up = frames, warm_up
        if halves:
            self.problem.sharing = library.BY_ENDS

    @property
    def steps(self) -> int:
        """Products that follow each other."""
        time = self.shape[1]
        return (time + 1) // 2 if self.problem.sharing == library.BY_ENDS else time

    def arcs(self, workspace: Tensor) -> Tensor:
        """The arcs that the workspace begins with, (1, N, N); from both ends the transposed ones follow, (2, N, N)."""
        num_states = self.shape[2]
        arcs = workspace[: num_states**2 * self.dtype.itemsize].view(self.dtype).view(1, num_states, num_states)
        return torch.cat([arcs, arcs.mT]) if self.problem.sharing == library.BY_ENDS else arcs

    def walk(self, name: str) -> contextlib.AbstractContextManager[cuda_graphs.Walk]:
        """Messages and their products, each (1, B, N), from both ends (2, B, N), and how steps_<name> is called."""
        batch, _, num_states = self.shape
        halves = 2 if self.problem.sharing == library.BY_ENDS else 1
        return cuda_graphs.walk(self, f"steps_{name}", halves, batch, (num_states, num_states), self.steps)


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


def forward(initial, transition, emission, lengths, final, both_ends=True):
    call = Call(initial, transition, emission, lengths, final)
    call.share(both_ends)
    batch, time, _ = call.shape
    log_partition, alpha, norm = call.empty(batch), call.empty(*call.shape), call.empty(*call.shape)
    centre, method = call.empty(batch, time), call.empty(batch, dtype=torch.int32)
    with call.on_stream() as run:
        workspace = call.workspace(library.CUDA_FORWARD)
        if not call.in_steps:
            run("forward", log_partition, alpha, norm, centre, method, workspace)
        else:
            with call.walk("forward") as walk:
                message, product = walk.messages
                run("steps_begin", alpha, norm, centre, product, message, walk.held, workspace)
                walk.take(call, run, [call.arcs(workspace)], call.steps, multiply_first=False)
            run("steps_end", log_partition, alpha, norm, centre, method, workspace)
    return log_partition, alpha, norm, centre, method


def backward(grad, initial, transition, emission, lengths, final, log_partition, alpha, norm, centre, method, edges):
    call = Call(initial, transition, emission, lengths, final)
    grad, state, edge = grad.contiguous(), call.empty(*call.shape), call.empty(*(transition.shape if edges else (0,)))
    call.share(both_ends=True)
    messages = (log_partition, alpha, norm, centre, method)
    outputs = (state, edge if edges else None)
    with call.on_stream() as run:
        workspace = call.workspace(library.CUDA_BACKWARD)
        if not call.in_steps:
            run("backward", grad, *messages, *outputs, workspace)
        else:
            with call.walk("backward") as walk:
                message, product = walk.messages
                buffers = (product, message, walk.held, workspace)
                run("steps_back_begin", grad, alpha, norm, centre, method, state, *buffers)
                arcs = call.arcs(workspace).mT
                walk.take(call, run, [arcs], call.steps, multiply_first=len(arcs) > 1)
            run("steps_back_end", grad, *messages, *outputs, workspace)
    return state, edge


def viterbi(initial, transition, emission, lengths, final):
    call = Call(initial, transition, emission, lengths, final)
    batch, time, num_states = call.shape
    score, states = call.empty(batch), call.empty(batch, time, dtype=torch.int64)
    delta, pointers = call.empty(batch, 2, num_states), call.empty(*call.shape, dtype=torch.int16)
    with call.on_stream() as run:
        run("viterbi", score, delta, pointers, states)
    return score, states


def sample(initial, transition, emission, lengths, final, uniform):
    log_partition, alpha, norm, _, method = forward(initial, transition, emission, lengths, final, both_ends=False)
    call = Call(initial, transition, emission, lengths, final)
    states = call.empty(*uniform.shape, dtype=torch.int64)
    with call.on_stream() as run:
        run("sample", uniform.shape[0], log_partition, alpha, norm, method, uniform.contiguous(), states)
    return states


for _kernel in (forward, backward, viterbi, sample):
    _lib.impl(_kernel.__name__, _kernel)
