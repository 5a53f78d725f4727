"""The C interface under AddressSanitizer with UBSan, and under ThreadSanitizer."""

import shutil

import pytest

from hmm_speech.hmm import library
from tests.cpp.cuda.build import ROOT, SANITIZERS, run, two_at_a_time

PROGRAMS = ("exercise", "exercise_best_paths", "exercise_halves", "exercise_semi_markov", "exercise_active",
            "exercise_banded", "exercise_low_rank")  # fmt: skip
ORDER = ["portable", "avx2", "avx512"]


def instruction_sets(sanitizer):
    """Those that this machine executes, by what the installed library has chosen; under ThreadSanitizer, since threads
    meet alike in all, the portable one."""
    if sanitizer == "thread":
        return ["portable"]
    found = library.load().handle.hmm_instruction_set().decode()
    return ORDER[: ORDER.index(found) + 1]


def built(folder, sanitizer, beside_portable):
    flags = [*SANITIZERS[sanitizer], "-g1", "-fno-omit-frame-pointer"]
    options = [f"-DCMAKE_CXX_FLAGS={' '.join(flags)}", "-DCMAKE_BUILD_TYPE=None", "-DHMM_SPEECH_CUDA=OFF"]
    options += [f"-DHMM_SPEECH_BESIDE_PORTABLE={';'.join(beside_portable)}"]
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
    ours = instruction_sets(sanitizer)
    programs = built(tmp_path, sanitizer, ours[1:])
    for instructions in ours:
        said = two_at_a_time(lambda program, isa=instructions: run([program], HMM_SPEECH_ISA=isa).strip(), programs)
        assert set(said) == {instructions}
