"""The library with kernels for GPUs, as it was built with the package, where there is no driver or no GPU."""

import os
import shutil
import subprocess
import sys

import pytest

from hmm_speech.hmm import library
from tests.cpp.cuda.build import ROOT

LAUNCH = """
import contextlib, torch
from hmm_speech.hmm import backend, cuda, library
assert "CUDA kernels" in backend().detail, backend()
cuda.stream_of = lambda device: contextlib.nullcontext()  # torch has no CUDA to ask
scores = (torch.zeros(3), torch.zeros(3, 3), torch.zeros(2, 4, 3), torch.tensor([4, 2]), None)
for call in (cuda.forward, cuda.viterbi):
    try:
        call(*scores)
    except RuntimeError as error:
        print(error)
"""


def test_a_launch_without_a_gpu_is_an_error():
    if library.cuda() is None:
        if shutil.which("nvcc") and os.environ.get("HMM_SPEECH_CUDA") != "0":
            pytest.fail("there is an nvcc, but the library has no kernels for GPUs: `pip install -e .` builds it again")
        pytest.skip("the library was built without nvcc")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", LAUNCH], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("CUDA error" in line and "B, T, N = (2, 4, 3)" in line for line in lines), (
        done.stdout
    )
