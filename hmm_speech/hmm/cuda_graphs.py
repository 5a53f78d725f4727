"""Walks through time that go a step at a time: matrix products by torch, each followed by a kernel of csrc/cuda.

A step is launched from Python, which takes some 7 us a launch; the GPU is often done in half of that. So steps are
captured, :data:`STEPS` of them, in a CUDA graph, which is launched as one and again until a pass is through, over any
T: what changes from pass to pass is read in device memory, in buffers of the graph's own (csrc/cuda/walked.h), and
steps past the end do nothing. A graph is for one number of sequences and states in one direction.

What is worth a graph. Capturing takes about a millisecond, which some 200 steps make good: so a shape is captured when
it comes for the second time, as those of a training do; the first time, step by step, also lets cuBLAS choose and load
its kernels, which a capture must not. Passes of up to STEPS / 2 steps are not, nor those whose matrices have more than
64 MB, since these take as long to read as a launch does. The :data:`MOST_GRAPHS` used last are kept, with copies of
their matrices.

What is safe. A graph's buffers must not be used by two passes at once, so graphs are for the default stream, where
passes follow each other, and under a lock, since several threads may fill that stream. On other streams steps are
launched one by one; these are also where a caller's own graph is captured, and where torch.compile's are warmed up,
whose memory pools are none of ours. Autograd's threads capture too, hence the capture mode. cuBLAS keeps a workspace
for each stream, which a graph goes on using: captures are made on a stream that nothing else runs on and in one memory
pool a device, so that it is the graphs' own, also when one is dropped (pytorch issue 193402).

While a graph is captured, another thread that draws random numbers on the same GPU gets torch's error: its generator
belongs to the capture then. Where that can be, or a graph is suspected of anything, HMM_SPEECH_CUDA_GRAPHS=0 in the
environment launches all steps one by one.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import library
from .products import full_precision

STEPS = 16
MOST_GRAPHS, MOST_SEEN = 16, 1024
_MOST_BYTES = 64 << 20


class Walk:
    """What a pass works in: `held` for the kernels (csrc/cuda/walked.h), and messages (groups, rows, width), one of
    each width, of which each is the one before times a matrix (groups, width before, width)."""

    def __init__(self, call, name: str, groups: int, rows: int, widths: tuple[int, ...]):
        self.name = name
        self.held = call.empty(library.CUDA_WALK_BYTES, dtype=torch.uint8)
        self.messages = [call.empty(groups, rows, width) for width in widths]

    def step(self, run: Callable[..., None], step: int, matrices: list[Tensor], multiply: bool = True) -> None:
        if multiply:
            for x, matrix, y in zip(self.messages, matrices, self.messages[1:], strict=False):
                torch.bmm(x, matrix, out=y)
        run(self.name, step, self.held)

    def take(self, call, run: Callable[..., None], matrices: list[Tensor], steps: int, multiply_first: bool) -> None:
        """All steps; `run` calls hmm_cuda_<name> on the current stream."""
        with full_precision(call.device.type):
            for step in range(steps):
                self.step(run, step, matrices, step > 0 or multiply_first)


class Captured(Walk):
    """The same in buffers that stay, by a graph that is captured when it is first needed."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.lock = threading.Lock()
        self.matrices: list[Tensor] = []
        self.graph = None

    def take(self, call, run, matrices, steps, multiply_first):
        if not self.matrices:  # laid out alike, so that products are the same to the bit
            self.matrices = [torch.empty_like(x) for x in matrices]
        for kept, matrix in zip(self.matrices, matrices, strict=True):
            kept.copy_(matrix)
        self.graph = self.graph or self.capture(call, run)
        if self.graph is None:
            return super().take(call, run, self.matrices, steps, multiply_first)
        for _ in range(0, steps, STEPS):
            self.graph.replay()

    def capture(self, call, run_now):
        """The graph; None where that failed, with a warning, and no other is tried."""
        run_now("steps_advance", 0, self.held)  # does nothing, but no kernel should be loaded within a capture
        torch.cuda.current_blas_handle()  # nor should cuBLAS be asked for this thread's handle there

        def steps(run: Callable[..., None]) -> None:
            for step in range(STEPS):
                self.step(run, step, self.matrices)
            run("steps_advance", STEPS, self.held)

        try:
            with _captures:
                if call.device not in _places:
                    _places[call.device] = Place(call)
                return _places[call.device].capture(call, steps)
        except RuntimeError as error:
            _turn_off()
            warnings.warn(f"hmm_speech: no CUDA graphs from here on, since a capture failed: {error}", stacklevel=2)
            return None


class Place:
    """Where a device's captures are made: on a stream that no one else has, in one memory pool.

    torch gives a pool up with the last graph in it, and takes it for no other then. So one graph is kept, which does
    nothing."""

    def __init__(self, call):
        self.stream, self.pool = _own_stream(call.device), torch.cuda.graph_pool_handle()
        held = call.empty(library.CUDA_WALK_BYTES, dtype=torch.uint8)
        self.kept = held, self.capture(call, lambda run: run("steps_advance", 0, held))

    def capture(self, call, launch: Callable[[Callable[..., None]], None]):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream), full_precision(call.device.type), call.on_stream() as run:
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                launch(run)
            finally:
                graph.capture_end()
        return graph


def _own_stream(device: torch.device):
    handle = ctypes.c_void_p()
    if status := library.cuda().hmm_cuda_create_stream(ctypes.byref(handle)):
        raise RuntimeError(f"no stream to capture on: status {status}")
    return torch.cuda.ExternalStream(handle.value, device=device.index)


_places: dict[torch.device, Place] = {}
_captures = threading.Lock()  # one at a time: a pool takes what one capture allocates
_kept: OrderedDict[tuple, Captured] = OrderedDict()  # by shape, the one used last at the end
_seen: OrderedDict[tuple, None] = OrderedDict()  # shapes that came
_lock = threading.Lock()
_failed = False


def _turn_off() -> None:
    global _failed
    _failed = True
    clear()


def clear() -> None:
    """Forgets all graphs and shapes."""
    with _lock:
        _kept.clear()
        _seen.clear()


def on_default_stream(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def _graphed(call, name: str, groups: int, rows: int, widths: tuple[int, ...], steps: int) -> Captured | None:
    """The graph for a shape, if it is to have one."""
    matrices = sum(x * y for x, y in itertools.pairwise(widths)) * groups * call.dtype.itemsize
    if steps <= STEPS // 2 or matrices > _MOST_BYTES or _failed or not on_default_stream(call.device):
        return None
    if os.environ.get("HMM_SPEECH_CUDA_GRAPHS") == "0":
        return None
    key = (call.device, call.dtype, name, groups, rows, widths)
    with _lock:
        found = _kept.get(key)
        if found is None and key not in _seen:
            _seen[key] = None
            while len(_seen) > MOST_SEEN:
                _seen.popitem(last=False)
            return None
        if found is None:
            found = Captured(call, name, groups, rows, widths)
            _kept[key] = found
        _kept.move_to_end(key)
        while len(_kept) > MOST_GRAPHS:
            dropped, _ = _kept.popitem(last=False)
            _seen.pop(dropped, None)
    return found


@contextlib.contextmanager
def walk(call, name: str, groups: int, rows: int, widths: tuple[int, ...], steps: int) -> Iterator[Walk]:
    """Buffers for a pass of so many steps, by a graph or not; within the context, no one else uses them.

    They are ordinary tensors, whatever mode the pass runs in: a graph's are used in others later."""
    with torch.inference_mode(False), torch.no_grad():
        found = _graphed(call, name, groups, rows, widths, steps)
        if found is None:
            yield Walk(call, name, groups, rows, widths)
            return
        with found.lock:
            yield found
