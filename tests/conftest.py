"""What tests of several folders build."""

import fcntl
import os

import pytest

from tests.cpp.cuda import build


@pytest.fixture(scope="session")
def cuda_on_cpu(tmp_path_factory):
    """The file of a library whose kernels for GPUs run on the CPU (tests/cpp/cuda/on_cpu.h). Built once, by the first
    of the processes (pytest-xdist), whose folders are side by side."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cuda"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build.library(folder)
