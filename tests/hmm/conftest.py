"""The kernels for GPUs in place of the layer's operators, executed on the CPU (tests/cpp/cuda/on_cpu.h)."""

import contextlib
import ctypes

import pytest
import torch

from hmm_speech.hmm import cuda, library

OPERATORS = ("forward", "backward", "viterbi", "sample")


@pytest.fixture(scope="session")
def handle(cuda_on_cpu):
    return library.declare_cuda(ctypes.CDLL(str(cuda_on_cpu)))


@pytest.fixture(params=["0", "1", "2"])
def schedule(request, monkeypatch):
    """The order in which threads run (on_cpu.h)."""
    monkeypatch.setenv("HMM_SCHEDULE", request.param)


@pytest.fixture
def on_cpu(handle, monkeypatch):
    """The layer's operators are those of cuda.py, on CPU tensors."""

    @contextlib.contextmanager
    def no_stream(device):
        yield None

    monkeypatch.setattr(library, "cuda", lambda: handle)
    monkeypatch.setattr(cuda, "stream_of", no_stream)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 1000)
    monkeypatch.setattr(cuda, "chunks_beside", lambda *_: 1)
    monkeypatch.setattr(cuda, "memory_of", lambda device: 1e6)
    for name in OPERATORS:
        monkeypatch.setattr(torch.ops.hmm_speech, name, getattr(cuda, name))
