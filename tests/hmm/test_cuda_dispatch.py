"""What goes to the kernels for GPUs and what does not, without a GPU: shapes of results, choices and messages."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hmm_speech.hmm import HMM, backend, cuda, library, use_backend
from tests.hmm.problems import KINDS, problem


@pytest.fixture
def with_kernels(monkeypatch):
    monkeypatch.setattr(library, "cuda", lambda: library.load().handle)


def test_what_has_kernels_on_a_gpu(with_kernels):
    for operation in ("forward", "backward", "viterbi", "sample", "low_rank"):
        assert library.use_native("cuda", operation)
    for operation in ("", "topk", "tangent", "advance"):
        assert library.use_native("cpu", operation)
        with use_backend("native"):
            assert not library.use_native("cuda", operation)
    with use_backend("reference"):
        assert not library.use_native("cuda", "forward")
    assert "CUDA kernels for dense chains of up to 8192 states" in backend().detail


def test_without_kernels_for_gpus(monkeypatch):
    monkeypatch.setattr(library, "cuda", lambda: None)
    assert not library.use_native("cuda", "forward") and "CUDA" not in backend().detail
    with use_backend("native"), pytest.raises(RuntimeError, match="no kernels for cuda tensors"):
        library.use_native("cuda", "forward")
    arguments = problem(2, 3, 4, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="no kernels for GPUs"):
        cuda.viterbi(*arguments.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_of_a_gpu_meet_operators_of_the_right_shapes(with_kernels, kind, dtype):
    """On tensors without numbers: what torch.compile sees."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = {
            k: x if x is None else mode.from_tensor(x).to("cuda") for k, x in problem(3, 5, 4, kind, 1, dtype).items()
        }
        messages = torch.ops.hmm_speech.forward(*arguments.values())
        assert [tuple(x.shape) for x in messages] == [(3,), (3, 5, 4), (3, 5, 4), (3, 5), (3,)]
        assert messages[4].dtype == torch.int32 and all(x.device.type == "cuda" for x in messages)
        for edges in (True, False):
            state, edge = torch.ops.hmm_speech.backward(messages[0], *arguments.values(), *messages, edges)
            assert state.shape == (3, 5, 4) and edge.shape == (arguments["transition"].shape if edges else (0,))
        hmm = HMM(**arguments)
        assert hmm.log_partition().dtype == dtype
        assert hmm.marginals().shape == (3, 5, 4) and hmm.viterbi().states.shape == (3, 5)
        assert hmm.sample(2).shape == (2, 3, 5) and hmm.edge_marginals().shape == (3, 4, 4, 4)


def test_many_states_take_the_reference_on_a_gpu(with_kernels):
    """Fewer, where transitions vary over time: as posteriors of all arcs do."""
    with FakeTensorMode():
        initial, arcs, emission = (torch.zeros(shape, device="cuda") for shape in (9000, (9000, 9000), (1, 2, 9000)))
        assert not HMM(initial, arcs, emission)._chain.native("forward")
        assert HMM(initial, arcs, emission).log_partition().shape == (1,)
        for states, varying in ((8192, False), (5000, False), (4096, True)):
            fewer = HMM(initial[:states], arcs[:states, :states], emission[..., :states])._chain
            assert fewer.native("forward") and fewer.native("forward", 4) == varying
        assert not HMM(initial[:5000], arcs[None, None, :5000, :5000], emission[..., :5000])._chain.native("forward")


def test_both_ends_are_walked_where_that_saves_more_than_joining_them():
    assert not cuda.walk_both_ends(1, 3, in_steps=False) and cuda.walk_both_ends(2, 50, in_steps=False)
    assert not cuda.walk_both_ends(6, 128, in_steps=False) and cuda.walk_both_ends(8, 128, in_steps=False)
    assert not cuda.walk_both_ends(9, 256, in_steps=False) and cuda.walk_both_ends(12, 256, in_steps=False)
    assert not cuda.walk_both_ends(20, 1024, in_steps=True) and cuda.walk_both_ends(40, 1024, in_steps=True)
    assert not cuda.walk_both_ends(3000, 2049, in_steps=True)


def test_transitions_that_vary_are_walked_from_both_ends_where_multiprocessors_would_be_idle():
    def chosen(batch, time, num_states, multiprocessors=68):
        return cuda.walk_varying_from_both_ends(batch, time, num_states, multiprocessors)

    assert chosen(8, 3000, 50) and chosen(8, 6, 50) and not chosen(8, 4, 50) and chosen(8, 100, 4096)
    assert chosen(34, 3000, 50) and not chosen(35, 3000, 50) and chosen(35, 3000, 50, 132)
    assert not any(chosen(1, time, states) for time in (0, 1, 2) for states in (1, 50, 4096))
    assert not chosen(1, 3, 4096)


def test_which_passes_are_walked_from_both_ends(with_kernels, monkeypatch):
    """Samples need messages from the front."""
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 28)
    monkeypatch.setattr(cuda, "chunks_beside", lambda *_: 1)
    monkeypatch.setattr(cuda, "memory_of", lambda device: 1e6)
    scores = tuple(problem(8, 100, 5, "time-varying", 1, torch.float32).values())

    def sharing(both_ends):
        call = cuda.Call(*scores)
        call.share(both_ends)
        return call.problem.sharing

    assert sharing(True) == library.BY_ENDS and sharing(False) == library.BY_SEQUENCES
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 15)
    assert sharing(True) == library.BY_SEQUENCES


def test_messages_of_errors():
    assert "invalid argument" in cuda._message(1)
    if torch.version.cuda:
        assert "no kernel image" in cuda._message(1209)
    assert "CUDAARCHS=native" in cuda._message(1209) and 'use_backend("reference")' in cuda._message(1209)
    assert "CUDAARCHS" not in cuda._message(1002) and "(2)" in cuda._message(1002)
    assert library.load().handle.hmm_status_message(1002).startswith(b"CUDA error")
