"""The kernels for GPUs on the CPU (cuda/on_cpu.h), under AddressSanitizer with UBSan and under ThreadSanitizer.

In several orders of threads; and with defects built in (HMM_MUTATION in csrc/cuda), each of which must be noticed."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.cpp.cuda import build

SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
PROGRAMS = sorted(build.HERE.glob("exercise*.cpp"))
TEXTS = {path: path.read_text() for path in sorted((build.ROOT / "csrc/cuda").iterdir())}
MUTATIONS = sorted({int(k) for x in TEXTS.values() for k in re.findall(r"HMM_MUTATION [=!]= (\d+)", x)})


def included(path: Path) -> set[Path]:
    """A file of csrc/cuda or a program, and the files of csrc/cuda that it includes, at any depth."""
    found, text = {path}, path.read_text()
    for other in TEXTS:
        if f'"{other.name}"' in text and other != path:
            found |= included(other)
    return found


def mentions(path: Path, mutation: int) -> bool:
    return any(re.search(rf"HMM_MUTATION [=!]= {mutation}\b", TEXTS.get(x, "")) for x in included(path))


class Built:
    """Object files and programs for one sanitizer; a mutation compiles again what mentions it."""

    def __init__(self, folder: Path, sanitizer: str):
        self.folder, self.flags = folder, ["-O1", "-g1", *SANITIZERS[sanitizer]]
        sources = [*build.SOURCES, *PROGRAMS]
        self.objects = dict(zip(sources, self.compiled("whole", sources, []), strict=True))

    def compiled(self, name: str, sources: list[Path], flags: list[str]) -> list[Path]:
        return build.compiled(self.folder / name, sources, [*self.flags, *flags])

    def programs(self, name: str = "whole", objects: dict[Path, Path] | None = None) -> list[Path]:
        """The programs, linked with all kernels but for one that includes kernels itself."""
        objects, found = objects or self.objects, []
        for program in PROGRAMS:
            alone = re.search(r'#include "\w+\.cu"', program.read_text())
            parts = [] if alone else [objects[x] for x in build.SOURCES]
            found.append(self.folder / name / program.stem)
            build.run([build.compiler(), *self.flags, objects[program], *parts, "-o", found[-1]])
        return found

    def mutated(self, mutation: int) -> list[Path]:
        """Programs with a defect: those that can show it."""
        changed, name = [x for x in self.objects if mentions(x, mutation)], f"mutation{mutation}"
        objects = dict(zip(changed, self.compiled(name, changed, [f"-DHMM_MUTATION={mutation}"]), strict=True))
        return self.programs(name, self.objects | objects)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    made = {}

    def get(sanitizer: str) -> Built:
        if sanitizer not in made:
            made[sanitizer] = Built(tmp_path_factory.mktemp(sanitizer), sanitizer)
        return made[sanitizer]

    return get


def execute(program: Path, schedule: int) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HMM_SCHEDULE": str(schedule)}
    return subprocess.run([program], capture_output=True, text=True, env=environment, timeout=500)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_no_sanitizer_finds_anything(built, sanitizer):
    for program in built(sanitizer).programs():
        for schedule in range(3):
            done = execute(program, schedule)
            assert done.returncode == 0, f"{program.name}, order {schedule}:\n{done.stdout}{done.stderr}"[:8000]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_defect_is_noticed(built, mutation):
    """By wrong numbers, by a bound that is passed, or by a race."""
    assert any(
        execute(program, schedule).returncode
        for sanitizer in SANITIZERS
        for program in built(sanitizer).mutated(mutation)
        for schedule in range(2)
    )
