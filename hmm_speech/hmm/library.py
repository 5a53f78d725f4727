"""Finding and loading the shared library, and choosing between it and the reference.

A library that is missing or does not fit never breaks the import: the reference in plain torch takes over, and
:func:`backend` says why and how to rebuild.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ABI_VERSION = 7
REDONE = 1  # HMM_REDONE
BY_SEQUENCES, BY_ENDS, BY_STEPS = 0, 1, 2  # enum hmm_sharing
CUDA_MOST_STATES, CUDA_MOST_STATES_VARYING = 8192, 4096  # HMM_CUDA_MOST_STATES, and with a time axis
CUDA_FORWARD, CUDA_BACKWARD = 0, 1  # enum hmm_cuda_pass
CUDA_WALK_BYTES = 512  # HMM_CUDA_WALK_BYTES
CUDA_KERNELS = frozenset({"forward", "backward", "viterbi", "sample", "low_rank"})  # on a GPU; of dense chains, but one
REBUILD = "rebuild it with `pip install -e .` (or `pip install .`) in the clone; it needs a C++20 compiler"
_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
_FILE = f"libhmm_speech.{_SUFFIX}"


class Problem(ctypes.Structure):
    """``struct hmm_problem`` of csrc/include/hmm_speech.h."""

    _fields_ = [
        ("batch", ctypes.c_int64),
        ("time", ctypes.c_int64),
        ("states", ctypes.c_int64),
        ("initial", ctypes.c_void_p),
        ("initial_batch_stride", ctypes.c_int64),
        ("transition", ctypes.c_void_p),
        ("transition_batch_stride", ctypes.c_int64),
        ("transition_time_stride", ctypes.c_int64),
        ("emission", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("final", ctypes.c_void_p),
        ("final_batch_stride", ctypes.c_int64),
        ("time_varying", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("sharing", ctypes.c_int32),
        ("chunk_frames", ctypes.c_int32),
        ("warm_up", ctypes.c_int32),
    ]


class BandedProblem(ctypes.Structure):
    """``struct hmm_banded``."""

    _fields_ = [("chain", Problem), ("diagonals", ctypes.c_int64), ("offsets", ctypes.POINTER(ctypes.c_int64))]


class LowRankProblem(ctypes.Structure):
    """``struct hmm_low_rank``."""

    _fields_ = [
        ("chain", Problem),
        ("rank", ctypes.c_int64),
        ("shift", ctypes.c_void_p),
        ("shift_batch_stride", ctypes.c_int64),
        ("least", ctypes.c_double),
        ("mixing", ctypes.c_int32),
        ("wide", ctypes.c_int32),
    ]


class CudaLowRankProblem(ctypes.Structure):
    """``struct hmm_cuda_low_rank``."""

    _fields_ = [
        ("chain", Problem),
        ("rank", ctypes.c_int64),
        ("scores", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("shift_batch_stride", ctypes.c_int64),
        ("top", ctypes.c_void_p),
        ("top_batch_stride", ctypes.c_int64),
        ("demands", ctypes.c_void_p),
    ]


class Library(NamedTuple):
    """The loaded library and where it came from; or None and why it did not load."""

    handle: ctypes.CDLL | None
    detail: str


def _candidates() -> Iterator[Path]:
    """The package's own folders (an editable install adds one in site-packages), then the installed distribution."""
    package = importlib.util.find_spec("hmm_speech")
    for folder in package.submodule_search_locations or () if package else ():
        yield Path(folder) / _FILE
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        yield Path(str(importlib.metadata.distribution("hmm-speech").locate_file(f"hmm_speech/{_FILE}")))


def _declare(handle: ctypes.CDLL) -> None:
    pointer, problem = ctypes.c_void_p, ctypes.POINTER(Problem)
    arguments = {
        "forward": [pointer] * 5,
        "backward": [pointer] * 8,
        "viterbi": [pointer] * 3,
        "tangent": [pointer] * 6,
    }
    arguments["sample"] = [ctypes.c_int64] + [pointer] * 5
    arguments["topk"] = [ctypes.c_int64] + [pointer] * 2
    active = {"forward": [pointer] * 3, "backward": [pointer] * 5 + [ctypes.c_int64], "viterbi": [pointer] * 3}
    active["sample"] = arguments["sample"]
    banded = {"forward": [pointer] * 3, "backward": [pointer] * 6, "viterbi": [pointer] * 3}
    banded["sample"] = [ctypes.c_int64] + [pointer] * 4
    declared = {name: [problem, *types] for name, types in arguments.items()}
    declared |= {f"active_{name}": [pointer, *types] for name, types in active.items()}
    declared |= {f"banded_{name}": [ctypes.POINTER(BandedProblem), *types] for name, types in banded.items()}
    low_rank = {"forward": [pointer] * 4, "backward": [pointer] * 6}
    declared |= {f"low_rank_{name}": [ctypes.POINTER(LowRankProblem), *types] for name, types in low_rank.items()}
    for name, types in declared.items():
        for suffix in ("f32", "f64"):
            getattr(handle, f"hmm_{name}_{suffix}").argtypes = types
    handle.hmm_instruction_set.restype = ctypes.c_char_p
    handle.hmm_status_message.restype = ctypes.c_char_p


@functools.cache
def load() -> Library:
    """Load the library once; what happened is remembered."""
    if os.environ.get("HMM_SPEECH_NO_NATIVE"):
        return Library(None, "HMM_SPEECH_NO_NATIVE is set")
    found = next((path for path in _candidates() if path.is_file()), None)
    if found is None:
        return Library(None, f"{_FILE} was not found beside the package; {REBUILD}")
    try:
        handle = ctypes.CDLL(str(found))
        version = handle.hmm_abi_version()
        if version != ABI_VERSION:
            return Library(
                None, f"{found} has interface version {version}, this package needs {ABI_VERSION}; {REBUILD}"
            )
        _declare(handle)
    except (OSError, AttributeError) as error:
        return Library(None, f"{found} did not load ({error}); {REBUILD}")
    return Library(handle, str(found))


@functools.cache
def cuda() -> ctypes.CDLL | None:
    """The library where it was built with nvcc: its functions hmm_cuda_*. None otherwise."""
    handle = load().handle
    if handle is None or not hasattr(handle, "hmm_cuda_forward_f32"):
        return None
    return declare_cuda(handle)


def declare_cuda(handle: ctypes.CDLL) -> ctypes.CDLL:
    """`handle`, with the types of hmm_cuda_* of csrc/include/hmm_speech.h; each ends with a stream."""
    pointer, problem = ctypes.c_void_p, ctypes.POINTER(Problem)
    counts = {"forward": 7, "backward": 10, "viterbi": 5}
    counts |= {"steps_begin": 8, "steps_end": 7, "steps_back_begin": 11, "steps_back_end": 10}
    declared = {name: [problem] + [pointer] * count for name, count in counts.items()}
    for name, count in {"sample": 7, "steps_forward": 2, "steps_backward": 2}.items():
        declared[name] = [problem, ctypes.c_int64] + [pointer] * count
    low_rank = ctypes.POINTER(CudaLowRankProblem)
    for name, count in {"begin": 8, "end": 6, "back_begin": 12, "back_end": 9}.items():
        declared[f"low_rank_{name}"] = [low_rank] + [pointer] * count
    for name in ("forward", "backward"):
        declared[f"low_rank_{name}"] = [low_rank, ctypes.c_int64] + [pointer] * 2
    for name, types in declared.items():
        for suffix in ("f32", "f64"):
            getattr(handle, f"hmm_cuda_{name}_{suffix}").argtypes = types
    handle.hmm_cuda_workspace.argtypes = [problem, ctypes.c_int32, ctypes.c_int32]
    handle.hmm_cuda_workspace.restype = ctypes.c_int64
    handle.hmm_cuda_low_rank_workspace.argtypes = [low_rank, ctypes.c_int32, ctypes.c_int32]
    handle.hmm_cuda_low_rank_workspace.restype = ctypes.c_int64
    handle.hmm_cuda_in_steps.argtypes = [problem, ctypes.c_int32]
    handle.hmm_cuda_steps_advance.argtypes = [ctypes.c_int64, pointer, pointer]
    handle.hmm_cuda_create_stream.argtypes = [ctypes.POINTER(pointer)]
    return handle


class Backend(NamedTuple):
    """What runs the layer. ``redone`` counts the sequences of this process that the scaled kernels could not certify
    and that were therefore computed again in float64 (csrc/cpu/scaled_arcs.h, redo.h). Those on a GPU are not counted:
    that would have to wait for it."""

    name: str
    detail: str
    redone: int


_choice: contextvars.ContextVar[str] = contextvars.ContextVar("hmm_speech_backend", default="auto")
redone = 0


def count_redone(sequences: int) -> None:
    """Add to the counter that :func:`backend` shows."""
    global redone
    redone += sequences


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context the layer runs on ``"native"`` kernels, the ``"reference"``, or what fits (``"auto"``).

    The choice holds for this thread (or asyncio task) and is not inherited by threads started within.

    Raises:
        ValueError: for another name.
        RuntimeError: for ``"native"`` where the library did not load; the message says why and how to rebuild.
    """
    if name not in ("auto", "native", "reference"):
        raise ValueError(f'use_backend: name is {name!r}, expected "auto", "native" or "reference"')
    if name == "native" and load().handle is None:
        raise RuntimeError(f"the native kernels are not available: {load().detail}")
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def use_native(device_type: str, operation: str = "") -> bool:
    """Whether `operation` on this kind of device goes to the native kernels. Under torch.compile, at compile time.

    On a CPU everything does. On a GPU only what :data:`CUDA_KERNELS` names, up to :data:`CUDA_MOST_STATES` states (the
    caller sees to that); the rest is composed of torch operations there, under ``use_backend("native")`` too."""
    if _choice.get() == "reference" or load().handle is None:
        return False
    if device_type == "cpu":
        return True
    if device_type == "cuda" and cuda() is not None:
        return operation in CUDA_KERNELS
    if _choice.get() == "native":
        raise RuntimeError(
            f'use_backend("native"): the library has no kernels for {device_type} tensors; use the "auto" backend, '
            "which takes the reference there, or move the scores to the CPU"
        )
    return False


def chose_reference() -> bool:
    """Whether ``use_backend("reference")`` holds. Under torch.compile, decided at compile time."""
    return _choice.get() == "reference"


# What torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo here.
use_native._dynamo_marked_constant = chose_reference._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backend() -> Backend:
    """What runs, and why.

    >>> from hmm_speech.hmm import backend, use_backend
    >>> with use_backend("reference"):
    ...     backend().name
    'reference'
    """
    library = load()
    if library.handle is None:
        return Backend("reference", library.detail, redone)
    if _choice.get() == "reference":
        return Backend("reference", 'chosen by use_backend("reference")', redone)
    instructions = library.handle.hmm_instruction_set().decode()
    found = f"{instructions} kernels for CPU tensors, "
    if cuda() is not None:
        found += f"CUDA kernels for dense chains of up to {CUDA_MOST_STATES} states and low-rank ones on a GPU, "
    return Backend("native", f"{found}the reference elsewhere; {library.detail}", redone)
