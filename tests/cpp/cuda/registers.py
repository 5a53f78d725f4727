"""Registers and shared memory of every kernel for GPUs, and the warps that a multiprocessor can hold with them.

`python -m tests.cpp.cuda.registers` in the clone writes registers.tsv, which tests/cpp/test_cuda_compiles.py compares.
Shared memory depends on N: it is the most that launches ask for with the numbers of states of `STATES`, as executed on
the CPU (on_cpu.h), which imitates sm_75; wide.cu takes more where a device has more, and has one block either way."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hmm_speech.hmm import cuda, library, low_rank_cuda, low_rank_ops
from tests.cpp.cuda.build import HERE, ROOT, SOURCES, imitate
from tests.cpp.cuda.build import library as build_library
from tests.hmm.problems import problem

TABLE = HERE / "registers.tsv"
# Warps, blocks and KB of shared memory that a multiprocessor holds at most; all have 65536 registers, and from sm_80 on
# a block takes a KB of shared memory more (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"). sm_89 is left out: all kernels had sm_86's registers there. CI installs for it, so it is compiled too.
LIMITS = {75: (32, 16, 64), 80: (64, 32, 164), 86: (48, 16, 100), 90: (64, 32, 228)}
LIMITS |= {100: (64, 32, 228), 120: (48, 24, 100)}
# Every width of scaled.cu, and the other regimes with and without tiles.
STATES = {"shared": (32, 64, 96, 128, 256, 600, 1025), "per-sequence": (200,), "time-varying": (50, 128, 384, 512, 520)}
ARCHITECTURES = tuple(LIMITS)
# Architectures by what PTX they are compiled from, as in csrc/CMakeLists.txt.
PTX = {75: (75,), 80: (80, 86, 90), 100: (100, 120)}
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_BOUNDS = re.compile(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)")


class Kernel(NamedTuple):
    """One kernel on one architecture; `memory` is what it has in local memory, which should be nothing."""

    name: str
    architecture: int
    threads: int
    registers: int
    memory: list[str]

    def warps(self, shared: int) -> int:
        """Warps that a multiprocessor holds: a warp takes registers by 256, 8 a thread, a block comes as a whole, with
        so many bytes of shared memory."""
        warps, blocks, kilobytes = LIMITS[self.architecture]
        by_block = self.threads // 32
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32) // by_block
        by_memory = kilobytes * 1024 // max(1, shared + (1024 if self.architecture >= 80 else 0))
        return by_block * min(by_registers, warps // by_block, blocks, by_memory)


def release() -> str | None:
    """nvcc's version, None without an nvcc."""
    if shutil.which("nvcc") is None:
        return None
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", said)
    return found.group(1) if found else None


def _nvcc(*arguments: str | Path) -> str:
    command = ["nvcc", "-std=c++20", "-O3", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc", "-Werror", "all-warnings"]
    command += map(str, arguments)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(" ".join(command) + "\n" + done.stdout + done.stderr)
    return done.stdout + done.stderr


@functools.cache
def _plain(name: str) -> str:
    """A kernel's name as the sources have it, without arguments."""
    said = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True, check=True).stdout.strip()
    return said.replace("hmm::", "").replace("(anonymous namespace)::", "")


def of(source: Path) -> list[Kernel]:
    """All kernels of a file, which is compiled for every architecture; no warning is let through."""
    with tempfile.TemporaryDirectory() as folder:
        code = [f"-gencode=arch=compute_{a},code=[{','.join(f'sm_{x}' for x in real)}]" for a, real in PTX.items()]
        # Without the half that runs on the CPU, whose compilation is the installation's.
        said = _nvcc(*code, "-Xptxas", "-v", "-fatbin", source, "-o", f"{folder}/made", "--keep", "--keep-dir", folder)
        bounds = dict(pair for ptx in Path(folder).glob("*.ptx") for pair in _BOUNDS.findall(ptx.read_text()))
    threads = {_plain(name): int(count) for name, count in bounds.items()}
    found = []
    for part in re.split(r"(?=ptxas info +: Compiling entry)", said)[1:]:
        entry, frames = _ENTRY.search(part), _FRAME.findall(part)
        registers = re.search(r"Used (\d+) registers", part)
        assert entry and frames and registers, part
        name, memory = (
            _plain(entry[1]),
            [f"stack {a}, spills {b} and {c}" for a, b, c in frames if any((int(a), int(b), int(c)))],
        )
        assert name in threads, f"{source.name}: {name} has no __launch_bounds__"
        found.append(Kernel(name, int(entry[2]), threads[name], int(registers[1]), memory))
    return found


def measure() -> dict[str, list[Kernel]]:
    """The kernels of each file, two files at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((x.name for x in SOURCES), pool.map(of, SOURCES), strict=True))


def _solve(kind: str, states: int, dtype: torch.dtype, time: int = 2) -> None:
    """Every pass over a small problem, from both ends and from one."""
    arguments = problem(2, time, states, kind, 1, dtype, lengths="full") | {"lengths": torch.tensor([time, time])}
    scores = tuple(arguments.values())
    messages = cuda.forward(*scores)
    cuda.backward(torch.ones(2, dtype=dtype), *scores, *messages, True)
    cuda.viterbi(*scores)
    cuda.sample(*scores, torch.rand(4, 2, time, dtype=dtype))


def _solve_low_rank(dtype: torch.dtype) -> None:
    """Both passes through two factors, and what a CUDA graph of their steps ends with."""
    scores = torch.zeros(3, dtype=dtype), torch.zeros(4, 3, dtype=dtype), torch.zeros(2, 2, 3, dtype=dtype)
    made, lengths = low_rank_ops.Factors(scores[1], 2), torch.tensor([2, 2])
    log_partition, alpha, _, method = low_rank_cuda.forward(made, *scores, lengths, None)
    arguments = made, torch.ones(2, dtype=dtype), *scores, lengths, None, log_partition, alpha, method
    low_rank_cuda.backward(*arguments, torch.zeros_like(scores[1]), lambda classes, leaving: None)
    held = torch.zeros(1, dtype=torch.int64)
    library.cuda().hmm_cuda_steps_advance(1, held.data_ptr(), None)


def shared_memory(library_file: Path, folder: Path) -> dict[str, int]:
    """The most bytes of shared memory that a launch of each kernel asks for, by build.library; `folder` for files."""
    made = shutil.copy(library_file, folder / "own.so")  # with a device of its own to imitate
    launches = folder / "launches"
    handle = library.declare_cuda(ctypes.CDLL(str(made)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "cuda", lambda: handle)
        patch.setattr(cuda, "stream_of", lambda device: contextlib.nullcontext())
        patch.setattr(cuda, "multiprocessors", lambda device: 1000)
        patch.setattr(cuda, "chunks_beside", lambda *_: 1)
        patch.setenv("HMM_LAUNCHES", str(launches))
        for dtype in (torch.float32, torch.float64):
            _solve("shared", 2, dtype, time=200)  # counts in several blocks, which are summed
            imitate(handle, multiprocessors=1)
            _solve("shared", 256, dtype)  # two sequences a block of wide.cu
            imitate(handle)
            _solve_low_rank(dtype)
            for kind, sizes in STATES.items():
                for states in sizes:
                    _solve(kind, states, dtype, time=6 if kind == "time-varying" else 2)  # from both ends
        patch.setattr(cuda, "chunk_frames", lambda *shape: 2)
        for states in (50, 64):
            _solve("time-varying", states, torch.float32, time=4)
        patch.setattr(cuda, "chunk_frames", lambda *shape: 0)
        patch.setattr(cuda, "memory_of", lambda device: 1.0)
        patch.setattr(cuda, "_LEAST_WARM_UP", 0)
        patch.setattr(cuda, "early_varying_chunks", lambda *shape: (3, 1))
        for states in STATES["time-varying"]:
            for dtype in (torch.float32, torch.float64):
                _solve("time-varying", states, dtype, time=4)
        patch.setattr(cuda, "early_chunks", lambda *shape: (3, 1))
        for states in STATES["shared"]:
            for dtype in (torch.float32, torch.float64) if states <= 256 else ():  # most that chunks are for
                _solve("shared", states, dtype, time=4)
    said = subprocess.run(["nm", "-C", made], capture_output=True, text=True, check=True).stdout
    names = {}
    for line in said.splitlines():
        if "_kernel<" in line or "_kernel(" in line:
            place, _, name = line.split(" ", 2)
            plain = name.replace("hmm::", "").replace("(anonymous namespace)::", "").removeprefix("void ")
            names[int(place, 16)] = plain.split("(")[0]
    found: dict[str, int] = {}
    for line in launches.read_text().splitlines():
        place, shared = line.split()
        name = names[int(place, 16)]
        found[name] = max(found.get(name, 0), int(shared))
    return found


def table(kernels: dict[str, list[Kernel]], shared: dict[str, int]) -> str:
    """One line a kernel: its threads and shared memory, and for each architecture its registers and the warps of a
    multiprocessor."""
    columns = "\t".join(f"sm_{a}" for a in ARCHITECTURES)
    lines = [f"# nvcc {release()}: registers/warps a multiprocessor holds", f"file\tkernel\tthreads\tshared\t{columns}"]
    for file, found in kernels.items():
        for name in sorted({k.name for k in found}):
            by_architecture = {k.architecture: k for k in found if k.name == name}
            of_all, bytes_ = (by_architecture[a] for a in ARCHITECTURES), shared[name]
            cells = "\t".join(f"{k.registers}/{k.warps(bytes_)}" for k in of_all)
            lines.append(f"{file}\t{name}\t{by_architecture[ARCHITECTURES[0]].threads}\t{bytes_}\t{cells}")
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = build_library(Path(folder))
        TABLE.write_text(table(measure(), shared_memory(made, Path(folder))))
    sys.stdout.write(TABLE.read_text())


if __name__ == "__main__":
    main()
