"""Every bad argument gets an error that names it, before anything reaches C."""

import subprocess
import sys

import pytest
import torch

from hmm_speech.hmm import HMM, HMMForward, backend, library, use_backend
from tests.hmm.problems import problem


def arguments(**changes):
    made = problem(2, 5, 3, "shared", 1, torch.float32, lengths="full")
    made["lengths"] = torch.tensor([5, 3])
    return {**made, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"initial": None}, TypeError, "initial: got NoneType"),
        ({"initial": [0.0, 1.0]}, TypeError, "initial: got list"),
        ({"initial": torch.zeros(4)}, ValueError, r"initial: shape is \(4\), expected \(3,\) or \(2, 3\)"),
        ({"initial": torch.zeros(3, 3)}, ValueError, r"initial: shape is \(3, 3\)"),
        ({"initial": torch.zeros(3, dtype=torch.int64)}, TypeError, "initial: dtype is torch.int64"),
        ({"transition": torch.zeros(3, 4)}, ValueError, r"transition: shape is \(3, 4\)"),
        ({"transition": torch.zeros(3)}, ValueError, r"transition: shape is \(3\)"),
        ({"transition": torch.zeros(4, 3, 3)}, ValueError, r"transition: .* expected B = 2 first"),
        ({"transition": torch.zeros(2, 5, 3, 3)}, ValueError, r"transition: .*\(2, 4, 3, 3\)"),
        ({"transition": torch.zeros(3, 3).to_sparse()}, TypeError, "transition: layout"),
        ({"transition": torch.zeros(0, 0)}, ValueError, "transition: .* N of at least 1"),
        ({"emission": torch.zeros(2, 5, 4)}, ValueError, r"emission: shape is \(2, 5, 4\)"),
        ({"emission": torch.zeros(5, 3)}, ValueError, r"emission: shape is \(5, 3\)"),
        ({"emission": None}, ValueError, "emission: None needs a transition"),
        (
            {"emission": torch.zeros(2, 5, 3).double()},
            TypeError,
            "emission is torch.float64 but initial is torch.float32",
        ),
        ({"final": torch.zeros(2)}, ValueError, r"final: shape is \(2\)"),
        ({"lengths": [5, 3]}, TypeError, "lengths: got list"),
        ({"lengths": torch.tensor([5, 3]).int()}, TypeError, "lengths: dtype is torch.int32"),
        ({"lengths": torch.tensor([5, 3, 1])}, ValueError, r"lengths: shape is \(3\)"),
        ({"lengths": torch.tensor([5, 6])}, ValueError, "lengths: holds 6, expected 0 to 5"),
        ({"lengths": torch.tensor([-1, 5])}, ValueError, "lengths: holds -1"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        HMM(**arguments(**changes))


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), ValueError, r"states: shape is \(2, 4\)"),
        (torch.zeros(2, 5), TypeError, "states: got torch.float32"),
        (torch.full((2, 5), 3), ValueError, r"states: holds 3 at \(0, 0\), expected 0 to 2"),
        (torch.full((2, 5), -1), ValueError, r"states: holds -1"),
    ],
)
def test_bad_states(states, error, message):
    with pytest.raises(error, match=message):
        HMM(**arguments()).score(states)


def test_other_bad_calls():
    with pytest.raises(ValueError, match="num_samples"):
        HMM(**arguments()).sample(0)
    with pytest.raises(ValueError, match="potential: shape"):
        HMMForward.apply(torch.zeros(2, 5, 3), torch.tensor([5, 5]))
    with pytest.raises(ValueError, match='expected "auto"'), use_backend("cuda"):
        pass


def test_arguments_stay_as_attributes():
    made = arguments()
    hmm = HMM(**made)
    assert all(getattr(hmm, k) is v for k, v in made.items() if k != "lengths")
    assert torch.equal(hmm.lengths, made["lengths"])


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 1, 3), (1, 1, 1)])
def test_empty_and_tiny_batches(shape):
    batch, time, states = shape
    made = problem(batch, time, states, "shared", 1, torch.float32, lengths="full")
    for name in ("native", "reference"):
        with use_backend(name):
            hmm = HMM(**{k: x.requires_grad_() if x is not None else x for k, x in made.items()})
            assert hmm.log_partition().shape == (batch,)
            hmm.log_partition().sum().backward()
            assert hmm.viterbi().states.shape == (batch, time)
            assert hmm.marginals().shape == shape
            assert hmm.sample(2).shape == (2, batch, time)


def run(code, **environment):
    import os

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_layer_imports_torch_only():
    heavy = run(
        "import torch, sys; before = set(sys.modules); import hmm_speech.hmm;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    assert heavy == "['hmm_speech']"


def test_without_the_library_the_reference_runs_and_says_why():
    said = run(
        "import torch; from hmm_speech.hmm import HMM, backend, use_backend\n"
        "z = HMM(torch.zeros(2), torch.zeros(2, 2), torch.zeros(1, 3, 2)).log_partition()\n"
        "print(backend().name, '|', backend().detail, '|', round(float(z), 4))\n"
        "try:\n    use_backend('native').__enter__()\nexcept RuntimeError as error: print(error)",
        HMM_SPEECH_NO_NATIVE="1",
    )
    assert said.startswith("reference | HMM_SPEECH_NO_NATIVE is set | 2.0794") and "not available" in said


def test_a_wrong_library_is_refused(tmp_path, monkeypatch):
    (tmp_path / "libhmm_speech.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "_candidates", lambda: iter([tmp_path / "libhmm_speech.so"]))
    library.load.cache_clear()
    try:
        assert (
            backend().name == "reference" and "did not load" in backend().detail and "pip install" in backend().detail
        )
    finally:
        library.load.cache_clear()


@pytest.mark.parametrize("instructions", ["portable", "avx2"])
def test_other_instruction_sets_agree(instructions):
    """The narrower kernels in a process of their own, float32 and float64, against the reference."""
    if library.load().handle.hmm_instruction_set() == b"portable":
        pytest.skip("this machine has the portable kernels only, which every other test runs")
    said = run(
        "import torch; from hmm_speech.hmm import backend, use_backend\n"
        "from tests.hmm.problems import *\n"
        "print(backend().detail.split()[0])\n"
        "for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-10)):\n"
        "  for kind in KINDS:\n"
        "    for n in (1, 5, 8, 17, 40):\n"
        "      for forbidden in (0.0, 0.4):\n"
        "        p = problem(5, 9, n, kind, n, dtype, forbidden=forbidden)\n"
        "        z, g = solve(p, torch.ones(5))\n"
        "        with use_backend('reference'): y, h = solve(doubled(p), torch.ones(5))\n"
        "        torch.testing.assert_close(z.double(), y, rtol=2e-6, atol=tolerance)\n"
        "        for k in g: torch.testing.assert_close(g[k].double(), h[k], rtol=1e-5, atol=tolerance)\n",
        HMM_SPEECH_ISA=instructions,
    )
    assert said == instructions
