"""Builds the kernels for GPUs for the CPU: the sources that nvcc compiles, by g++ and on_cpu.h, with on_cpu.cpp."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HERE = ROOT / "tests/cpp/cuda"
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ENGINE = HERE / "on_cpu.cpp"
LINKED = [ENGINE, *SOURCES]  # what every library and program of them is made of
# Products and sums are not fused, as they need not be on a GPU.
FLAGS = ["-std=c++20", "-ffp-contract=off", "-DHMM_ON_CPU", "-Wall", "-Wno-unknown-pragmas", "-fPIC", f"-I{HERE}",
         *(f"-I{ROOT}/{folder}" for folder in ("csrc/include", "csrc", "csrc/cuda"))]  # fmt: skip

# With more optimisation UBSan's checks take thrice the time to compile; with none, programs take half as long again.
# Two of its checks are left out: AddressSanitizer sees the same where a pointer is followed. A compiler's own macro is
# said for the engine, which is not looked at itself, but tells a sanitizer what its fibers do.
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=all"]
SANITIZERS = {
    "address": ["-Og", "-fsanitize=address", *UNDEFINED, "-D__SANITIZE_ADDRESS__"],
    "thread": ["-Og", "-fsanitize=thread", "-D__SANITIZE_THREAD__"],
}
OF_ENGINE = ["-O2", "-fno-sanitize=all"]


def run(command: list[str | Path], **environment: str) -> str:
    """What a command prints; fails where the command does."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, f"{environment or ''} {' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def two_at_a_time(function: Callable, *arguments: Iterable) -> list:
    """`map`, in two threads that wait for programs."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, *arguments))


def compiler() -> str:
    """g++; skips the test where there is none."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no g++ here")
    return found


def compiled(folder: Path, sources: list[Path], flags: list[str]) -> list[Path]:
    """Object files, two compilers at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [folder / f"{x.stem}.o" for x in sources]
    command = [compiler(), *FLAGS, *flags]
    header = HERE / "on_cpu.h"  # precompiled, with what it includes: half of what a small file takes
    run([*command, "-x", "c++-header", header, "-o", folder / f"{header.name}.gch"])

    def compile_one(source: Path, made: Path) -> None:
        own = OF_ENGINE if source == ENGINE else ["-include", folder / header.name]
        run([*command, *own, "-x", "c++", "-c", source, "-o", made])

    two_at_a_time(compile_one, sources, found)
    return found


def library(folder: Path) -> Path:
    """A shared library whose hmm_cuda_* run on the CPU, for any stream; the one that is there, if there is one."""
    made = folder / "libhmm_cuda_on_cpu.so"
    if made.exists():
        return made
    run([compiler(), "-shared", *compiled(folder, LINKED, ["-O2"]), "-o", made])
    return made


def imitate(handle: ctypes.CDLL, kilobytes: int = 64, multiprocessors: int = 68) -> None:
    """Gives the device that `library` stands for so much shared memory a block, and so many multiprocessors."""
    ctypes.c_int.in_dll(handle, "_ZN6on_cpu19shared_memory_limitE").value = kilobytes * 1024
    ctypes.c_int.in_dll(handle, "_ZN6on_cpu15multiprocessorsE").value = multiprocessors
