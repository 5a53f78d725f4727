"""Registers of every kernel for GPUs on every architecture, and the warps that a multiprocessor can hold with them.

`python -m tests.cpp.cuda.registers` in the clone writes registers.tsv, which tests/cpp/test_cuda_compiles.py compares.
Shared memory that a launch asks for may let it hold fewer warps: its size depends on N."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.cpp.cuda.build import HERE, ROOT, SOURCES

TABLE = HERE / "registers.tsv"
# Warps and blocks that a multiprocessor holds at most; all have 65536 registers (CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability").
LIMITS = {75: (32, 16), 80: (64, 32), 86: (48, 16), 89: (48, 24), 90: (64, 32), 100: (64, 32), 120: (48, 24)}
ARCHITECTURES = tuple(LIMITS)
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_BOUNDS = re.compile(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)")


class Kernel(NamedTuple):
    """One kernel on one architecture; `memory` is what it has in local memory, which should be nothing."""

    name: str
    architecture: int
    threads: int
    registers: int
    shared: int
    memory: list[str]

    @property
    def warps(self) -> int:
        """Warps that a multiprocessor holds: a warp takes registers by 256, 8 a thread, a block comes as a whole."""
        warps, blocks = LIMITS[self.architecture]
        by_block = self.threads // 32
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32) // by_block
        return by_block * min(by_registers, warps // by_block, blocks)


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
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        said = _nvcc(*code, "-Xptxas", "-v", "-c", source, "-o", f"{folder}/object.o", "--keep", "--keep-dir", folder)
        bounds = dict(pair for ptx in Path(folder).glob("*.ptx") for pair in _BOUNDS.findall(ptx.read_text()))
    threads = {_plain(name): int(count) for name, count in bounds.items()}
    found = []
    for part in re.split(r"(?=ptxas info +: Compiling entry)", said)[1:]:
        entry, frames = _ENTRY.search(part), _FRAME.findall(part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert entry and frames and registers, part
        name, memory = (
            _plain(entry[1]),
            [f"stack {a}, spills {b} and {c}" for a, b, c in frames if any((int(a), int(b), int(c)))],
        )
        assert name in threads, f"{source.name}: {name} has no __launch_bounds__"
        found.append(
            Kernel(name, int(entry[2]), threads[name], int(registers[1]), int(shared[1]) if shared else 0, memory)
        )
    return found


def measure() -> dict[str, list[Kernel]]:
    """The kernels of each file, two files at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((x.name for x in SOURCES), pool.map(of, SOURCES), strict=True))


def table(kernels: dict[str, list[Kernel]]) -> str:
    """One line a kernel: its threads, and for each architecture its registers and the warps of a multiprocessor."""
    columns = "\t".join(f"sm_{a}" for a in ARCHITECTURES)
    lines = [f"# nvcc {release()}: registers/warps a multiprocessor holds", f"file\tkernel\tthreads\t{columns}"]
    for file, found in kernels.items():
        for name in sorted({k.name for k in found}):
            by_architecture = {k.architecture: k for k in found if k.name == name}
            cells = "\t".join(f"{k.registers}/{k.warps}" for k in (by_architecture[a] for a in ARCHITECTURES))
            lines.append(f"{file}\t{name}\t{by_architecture[ARCHITECTURES[0]].threads}\t{cells}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table(measure()))
    sys.stdout.write(TABLE.read_text())
