"""The C interface under AddressSanitizer with UBSan, and under ThreadSanitizer, for each instruction set."""

import shutil
from pathlib import Path

import pytest

from tests.cpp.cuda.build import run, two_at_a_time

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"address": "-fsanitize=address,undefined -fno-sanitize-recover=all", "thread": "-fsanitize=thread"}


PROGRAMS = ("exercise", "exercise_best_paths", "exercise_halves", "exercise_semi_markov", "exercise_active",
            "exercise_banded", "exercise_low_rank")  # fmt: skip


def built(folder, sanitizer):
    flags = f"{FLAGS[sanitizer]} -O1 -g1 -fno-omit-frame-pointer"
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or shutil.which("cmake") is None:
        pytest.skip("no C++ compiler or no cmake here")
    configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_CXX_FLAGS={flags}"]
    run([*configure, "-DCMAKE_BUILD_TYPE=None", "-DHMM_SPEECH_CUDA=OFF", f"-DCMAKE_CXX_COMPILER={compiler}"])
    run(["cmake", "--build", str(folder)])
    command = [compiler, "-std=c++20", *flags.split(), f"-I{ROOT / 'csrc/include'}"]
    link = [f"-L{folder}", "-lhmm_speech", f"-Wl,-rpath,{folder}"]
    two_at_a_time(
        lambda name: run([*command, str(ROOT / f"tests/cpp/{name}.cpp"), *link, "-o", str(folder / name)]), PROGRAMS
    )
    return [folder / name for name in PROGRAMS]


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_the_c_interface(tmp_path, sanitizer):
    programs = built(tmp_path, sanitizer)
    for instructions in ("", "avx2", "portable"):
        said = two_at_a_time(lambda program, isa=instructions: run([program], HMM_SPEECH_ISA=isa).strip(), programs)
        assert instructions != "portable" or set(said) == {"portable"}
