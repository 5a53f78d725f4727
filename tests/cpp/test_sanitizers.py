"""The C interface under AddressSanitizer with UBSan, and under ThreadSanitizer."""

import shutil
from pathlib import Path

import pytest

from tests.cpp.cuda.build import ROOT, SANITIZERS, run, two_at_a_time

PROGRAMS = ("exercise", "exercise_best_paths", "exercise_halves", "exercise_semi_markov", "exercise_active",
            "exercise_banded", "exercise_low_rank")  # fmt: skip


def beside_portable():
    """The instruction sets with kernels of their own that this machine executes."""
    cpus = Path("/proc/cpuinfo")
    flags = cpus.read_text().split() if cpus.exists() else []
    return [x for x, flag in (("avx2", "avx2"), ("avx512", "avx512f")) if flag in flags]


def built(folder, sanitizer):
    flags = [*SANITIZERS[sanitizer], "-g1", "-fno-omit-frame-pointer"]
    options = [f"-DCMAKE_CXX_FLAGS={' '.join(flags)}", "-DCMAKE_BUILD_TYPE=None", "-DHMM_SPEECH_CUDA=OFF"]
    options += [f"-DHMM_SPEECH_BESIDE_PORTABLE={'' if sanitizer == 'thread' else ';'.join(beside_portable())}"]
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or shutil.which("cmake") is None:
        pytest.skip("no C++ compiler or no cmake here")
    configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja"]
    run([*configure, *options, f"-DCMAKE_CXX_COMPILER={compiler}"])
    run(["cmake", "--build", str(folder)])
    command = [compiler, "-std=c++20", *flags, f"-I{ROOT / 'csrc/include'}"]
    link = [f"-L{folder}", "-lhmm_speech", f"-Wl,-rpath,{folder}"]
    two_at_a_time(
        lambda name: run([*command, str(ROOT / f"tests/cpp/{name}.cpp"), *link, "-o", str(folder / name)]), PROGRAMS
    )
    return [folder / name for name in PROGRAMS]


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_c_interface(tmp_path, sanitizer):
    """In each instruction set; under ThreadSanitizer, since threads meet alike in all, in the portable one."""
    programs, done = built(tmp_path, sanitizer), set()
    for instructions in ("", "avx2", "portable") if sanitizer == "address" else ("",):
        if instructions in done:
            continue
        said = two_at_a_time(lambda program, isa=instructions: run([program], HMM_SPEECH_ISA=isa).strip(), programs)
        assert len(set(said)) == 1
        assert not (instructions == "portable" or sanitizer == "thread") or said[0] == "portable"
        done.add(said[0])
