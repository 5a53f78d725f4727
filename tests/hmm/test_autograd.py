"""gradcheck, gradgradcheck and opcheck of the operators and of the layer."""

import pytest
import torch

from hmm_speech.hmm import HMM, use_backend
from tests.hmm.problems import KINDS, problem


def leaves(kind, seed=1, **more):
    arguments = problem(2, 4, 3, kind, seed, **more)
    arguments["lengths"] = torch.tensor([4, 2])
    names = [k for k, x in arguments.items() if x is not None and x.is_floating_point()]
    return arguments, names, tuple(arguments[k].requires_grad_() for k in names)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["log_partition", "marginals", "transition_counts"])
def test_first_and_second_derivatives(backend, kind, method):
    arguments, names, inputs = leaves(kind)

    def function(*values):
        return getattr(HMM(**{**arguments, **dict(zip(names, values, strict=True))}), method)()

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_agree_between_backends(kind):
    results = []
    for backend in ("native", "reference"):
        arguments, names, inputs = leaves(kind)
        with use_backend(backend):
            z = HMM(**arguments).log_partition()
            first = torch.autograd.grad((z * torch.tensor([1.5, -0.5])).sum(), inputs, create_graph=True)
            results.append(torch.autograd.grad(sum((g * g).sum() for g in first), inputs))
    for name, native, reference in zip(names, *results, strict=True):
        torch.testing.assert_close(native, reference, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_are_registered_as_torch_expects(kind, dtype):
    arguments = problem(3, 5, 4, kind, 1, dtype)
    scores = tuple(arguments[k] for k in ("initial", "transition", "emission", "lengths", "final"))
    ops = torch.ops.hmm_speech
    torch.library.opcheck(ops.forward.default, scores)
    messages = ops.forward(*scores)
    torch.library.opcheck(ops.backward.default, (torch.ones(3, dtype=dtype), *scores, *messages, True))
    torch.library.opcheck(ops.backward.default, (torch.ones(3, dtype=dtype), *scores, *messages, False))
    ones = torch.ones(3, dtype=dtype)
    torch.library.opcheck(ops.tangent.default, (ones, *scores, messages[1], torch.ones_like(scores[1]), True))
    torch.library.opcheck(ops.tangent.default, (ones, *scores, messages[1], None, False))
    torch.library.opcheck(ops.viterbi.default, scores)
    torch.library.opcheck(ops.topk.default, (*scores, 3))
    torch.library.opcheck(ops.sample.default, (*scores, torch.rand(2, 3, 5, dtype=dtype)))


@pytest.mark.parametrize("missing", ["initial", "transition", "emission", "final"])
def test_gradients_only_where_asked(missing):
    arguments, names, _ = leaves("shared")
    arguments[missing] = arguments[missing].detach()
    HMM(**arguments).log_partition().sum().backward()
    assert arguments[missing].grad is None
    assert all(arguments[k].grad is not None for k in names if k != missing)


def test_non_contiguous_scores():
    arguments = problem(3, 6, 4, "time-varying", 1)
    expected = HMM(**arguments).log_partition()
    twisted = {k: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x is not None and x.dim() > 1 else x
               for k, x in arguments.items()}  # fmt: skip
    torch.testing.assert_close(HMM(**twisted).log_partition(), expected)
    spread = {k: torch.stack([x, x], 1)[:, 0] if x is not None and k != "lengths" else x for k, x in arguments.items()}
    torch.testing.assert_close(HMM(**spread).log_partition(), expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("method", ["marginals", "transition_counts", "entropy"])
def test_scores_computed_from_each_other(backend, method):
    """All three made from one parameter: posteriors are those of the numbers, gradients go through all of them."""

    def chain(table):
        emission = table[torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])]
        return HMM(emission[0, 0] * 2, table * emission.mean(), emission)

    def function(table):
        return getattr(chain(table), method)()

    table = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with use_backend("reference"):
        expected = function(table)
    with use_backend(backend):
        torch.testing.assert_close(function(table.requires_grad_()), expected)
        assert torch.autograd.gradcheck(function, (table,))
        assert torch.autograd.gradgradcheck(function, (table,), fast_mode=True)
