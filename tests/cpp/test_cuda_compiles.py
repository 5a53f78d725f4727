"""Every file of csrc/cuda compiles alone, for registers.ARCHITECTURES, without a warning, a stack frame or a spill."""

import pytest

from tests.cpp.cuda import registers

REGENERATE = "if it is meant, `python -m tests.cpp.cuda.registers` writes the table again"


@pytest.fixture(scope="module")
def kernels():
    if registers.release() is None:
        pytest.skip("no nvcc here")
    return registers.measure()


def test_nothing_is_kept_in_local_memory(kernels):
    assert kernels and all(kernels.values())
    spilled = {(file, k.name, k.architecture): k.memory for file, of in kernels.items() for k in of if k.memory}
    assert not spilled


def test_every_kernel_is_there_for_every_architecture(kernels):
    for file, found in kernels.items():
        for name in {k.name for k in found}:
            assert sorted(k.architecture for k in found if k.name == name) == [*registers.ARCHITECTURES], (file, name)


def test_registers_are_those_of_the_table(kernels, cuda_on_cpu, tmp_path):
    """A change that costs a kernel registers or shared memory, and with them warps, is seen."""
    expected = registers.TABLE.read_text()
    if f"nvcc {registers.release()}:" not in expected.splitlines()[0]:
        pytest.skip(f"{registers.TABLE.name} was written by another nvcc than {registers.release()}")
    assert registers.table(kernels, registers.shared_memory(cuda_on_cpu, tmp_path)) == expected, REGENERATE
