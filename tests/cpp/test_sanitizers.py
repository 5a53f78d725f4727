"""The C interface under AddressSanitizer with UBSan, and under ThreadSanitizer.

Of the library's three sets of kernels one is built: what tells them apart is the width of vectors (simd.h). Under
AddressSanitizer it has this machine's widest; under ThreadSanitizer, since threads meet alike in all, the portable
one's."""

import shutil

import pytest

from tests.cpp.cuda.build import ROOT, SANITIZERS, run, two_at_a_time

PROGRAMS = ("exercise", "exercise_best_paths", "exercise_halves", "exercise_semi_markov", "exercise_active",
            "exercise_banded", "exercise_low_rank")  # fmt: skip
VECTORS = {"address": ["-march=native"], "thread": []}


def built(folder, sanitizer):
    flags = [*SANITIZERS[sanitizer], *VECTORS[sanitizer], "-g1", "-fno-omit-frame-pointer"]
    options = [f"-DCMAKE_CXX_FLAGS={' '.join(flags)}", "-DCMAKE_BUILD_TYPE=None", "-DHMM_SPEECH_CUDA=OFF"]
    options += ["-DHMM_SPEECH_BESIDE_PORTABLE="]
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
    two_at_a_time(lambda program: run([program]), built(tmp_path, sanitizer))
