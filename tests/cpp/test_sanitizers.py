"""The C interface under AddressSanitizer with UBSan, and under ThreadSanitizer, for each instruction set."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

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
    for command in (
        [*configure, "-DCMAKE_BUILD_TYPE=None", "-DHMM_SPEECH_CUDA=OFF", f"-DCMAKE_CXX_COMPILER={compiler}"],
        ["cmake", "--build", str(folder)],
        *([compiler, "-std=c++20", *flags.split(), f"-I{ROOT / 'csrc/include'}", str(ROOT / f"tests/cpp/{name}.cpp"),
           f"-L{folder}", "-lhmm_speech", f"-Wl,-rpath,{folder}", "-o", str(folder / name)] for name in PROGRAMS),
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return [folder / name for name in PROGRAMS]


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_the_c_interface(tmp_path, sanitizer):
    for program in built(tmp_path, sanitizer):
        seen = set()
        for instructions in ("", "avx2", "portable"):
            done = subprocess.run(
                [program], capture_output=True, text=True, env={**os.environ, "HMM_SPEECH_ISA": instructions}
            )
            assert done.returncode == 0, f"{program.name}, {instructions or 'default'}:\n{done.stdout}{done.stderr}"
            seen.add(done.stdout.strip())
        assert "portable" in seen
