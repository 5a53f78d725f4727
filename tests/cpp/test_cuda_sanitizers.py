"""The kernels for GPUs on the CPU (cuda/on_cpu.h), under AddressSanitizer with UBSan and under ThreadSanitizer.

In several orders of threads; and with defects (HMM_DEFECT in csrc/cuda), each of which must be noticed."""

import functools
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.cpp.cuda import build

# With the order of threads, of which on_cpu.h has three: memory is addressed alike in all, races are seen in any, and
# numbers in each are tests/hmm's.
ORDERS = {"address": 0, "thread": 1}
PROGRAMS = sorted(build.HERE.glob("exercise*.cpp"))
DEFECTS = sorted(
    {int(k) for x in (build.ROOT / "csrc/cuda").iterdir() for k in re.findall(r"HMM_DEFECT\((\d+)\)", x.read_text())}
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The programs under a sanitizer, by name; each is linked with all kernels and what executes them."""

    @functools.cache
    def built(sanitizer: str) -> dict[str, Path]:
        folder, flags = tmp_path_factory.mktemp(sanitizer), ["-g1", *build.SANITIZERS[sanitizer]]
        objects = build.compiled(folder, [*build.LINKED, *PROGRAMS], flags)
        kernels, own = objects[: len(build.LINKED)], objects[len(build.LINKED) :]
        made = {x.stem: folder / x.stem for x in own}
        build.two_at_a_time(lambda x: build.run([build.compiler(), *flags, x, *kernels, "-o", made[x.stem]]), own)
        return made

    return built


def execute(program: Path, schedule: int, defect: int = 0) -> subprocess.CompletedProcess:
    own = {"HMM_SCHEDULE": str(schedule), "HMM_DEFECT": str(defect), "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], capture_output=True, text=True, env=os.environ | own, timeout=500)


def test_no_sanitizer_finds_anything(programs):
    made = {sanitizer: programs(sanitizer) for sanitizer in ORDERS}

    def execute_all(sanitizer):
        for program in made[sanitizer].values():
            done = execute(program, ORDERS[sanitizer])
            assert done.returncode == 0, f"{sanitizer}, {program.name}:\n{done.stdout}{done.stderr}"[:8000]

    build.two_at_a_time(execute_all, ORDERS)  # of those under ThreadSanitizer, which take 6 GB, one


# What notices a defect, in which program: a race, a bound that is passed, or wrong numbers (under "address" too).
NOTICED_BY = {
    1: ("thread", "exercise_log_space"),  # a barrier removed
    2: ("address", "exercise_log_space"),  # an index off by one
    3: ("address", "exercise_log_space"),  # a wait for copies dropped: wrong numbers
    4: ("thread", "exercise_log_space"),  # a barrier removed, done again: forward
    5: ("thread", "exercise_log_space"),  # and backward
    6: ("address", "exercise_log_space"),  # an index off by one, in the counts
    7: ("thread", "exercise_log_space"),  # a barrier removed, from the middle to the ends
    8: ("address", "exercise_log_space"),  # the wrong middle: wrong numbers
    9: ("address", "exercise_log_space"),  # a lane's part of a row left out
    11: ("thread", "exercise"),  # a barrier removed, forward
    12: ("thread", "exercise"),  # a barrier removed, backward
    13: ("address", "exercise_steps"),  # an index off by one
    14: ("thread", "exercise_steps"),  # a shuffle instead of a barrier
    15: ("thread", "exercise"),  # a barrier removed, where the halves meet
    16: ("thread", "exercise"),  # and where they are joined
    17: ("address", "exercise"),  # an index off by one, where the halves' counts meet
    21: ("thread", "exercise_wide"),  # a barrier removed, forward
    22: ("thread", "exercise_wide"),  # and backward
    23: ("address", "exercise_wide"),  # an index off by one, in what shared memory gets
    24: ("address", "exercise_wide"),  # states that were lost not looked for: redone nowhere
    25: ("thread", "exercise_wide"),  # a barrier removed, where they are looked for
    31: ("thread", "exercise_chunks"),  # a barrier removed, before a product of transfer matrices
    32: ("thread", "exercise_chunks"),  # and behind it
    33: ("thread", "exercise_chunks"),  # a barrier removed, from chunk to chunk
    34: ("thread", "exercise_chunks"),  # and backward, of the messages before a chunk
    35: ("address", "exercise_chunks"),  # certificates not looked at: sequences in chunks that must not be
    36: ("address", "exercise_chunks"),  # a rescale that is not counted: wrong numbers
    41: ("thread", "exercise_low_rank"),  # a barrier removed, in log space
    42: ("address", "exercise_low_rank"),  # states and classes that were lost not looked for
    43: ("address", "exercise_steps"),  # a graph's steps miscounted: wrong numbers
    44: ("address", "exercise_low_rank"),  # an index off by one, in the counts in log space
    51: ("address", "exercise_early_chunks"),  # rescales of another chunk's frames counted: wrong numbers
    52: ("address", "exercise_early_chunks"),  # chunks' factors left out backward
    53: ("address", "exercise_early_chunks"),  # messages that are not the same taken for it
    54: ("address", "exercise_early_chunks"),  # and posteriors
    55: ("thread", "exercise_early_chunks"),  # a message put where another chunk does
    56: ("thread", "exercise_early_varying"),  # the same where transitions vary
    57: ("address", "exercise_early_varying"),  # what another chunk's frames took out counted: wrong numbers
    58: ("address", "exercise_early_varying"),  # messages that are not the same taken for it
    59: ("address", "exercise_early_varying"),  # and posteriors
    60: ("thread", "exercise_early_varying"),  # posteriors put where another chunk does
    62: ("address", "exercise_log_space"),  # scores that no warp copies: wrong numbers
}


def test_every_defect_is_listed():
    assert list(NOTICED_BY) == DEFECTS


@pytest.mark.parametrize("defect", NOTICED_BY)
def test_a_defect_is_noticed(programs, defect):
    sanitizer, program = NOTICED_BY[defect]
    assert execute(programs(sanitizer)[program], schedule=1, defect=defect).returncode
