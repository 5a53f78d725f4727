"""The native second backward pass (csrc/cpu/tangent.h) against the reference's, differentiated by autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.hmm import HMM, use_backend
from tests.hmm.problems import INF, KINDS, problem, small_problems


def hessian_product(arguments, edges, backend, seed=0, shift=0.0):
    """The gradient of randomly weighted posteriors with respect to every score, 0 where they depend on none."""
    g = torch.Generator().manual_seed(seed)
    leaves = {
        k: x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for k, x in arguments.items()
    }
    with use_backend(backend):
        hmm = HMM(**leaves)
        found = (
            (hmm.edge_marginals() if edges == "time-varying" else hmm.transition_counts()) if edges else hmm.marginals()
        )
        weight = torch.randn(found.shape, generator=g, dtype=torch.float64).add(shift).to(found.dtype)
        names = [k for k, x in leaves.items() if x is not None and x.requires_grad]
        if not found.requires_grad:  # one frame has no arcs
            return {k: torch.zeros_like(leaves[k]) for k in names}
        gradients = torch.autograd.grad((found * weight).sum(), [leaves[k] for k in names], allow_unused=True)
    return {k: torch.zeros_like(leaves[k]) if x is None else x for k, x in zip(names, gradients, strict=True)}


def agree(arguments, edges, tolerance=1e-9, seed=0):
    native, reference = (hessian_product(arguments, edges, backend, seed) for backend in ("native", "reference"))
    for name, mine in native.items():
        torch.testing.assert_close(
            mine, reference[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("edges", [None, "counts", "time-varying"])
@settings(max_examples=60, deadline=None)
@given(arguments=small_problems(most_paths=256))
def test_equals_the_reference(edges, arguments):
    agree(arguments, edges)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 5), time=st.integers(1, 20), states=st.integers(1, 40), kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000), forbidden=st.sampled_from([0.0, 0.2, 0.5]), edges=st.sampled_from([None, "counts"]),
)  # fmt: skip
def test_every_width(batch, time, states, kind, seed, forbidden, edges):
    agree(problem(batch, time, states, kind, seed, forbidden=forbidden), edges)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_does_not_drift(kind):
    """2,000 frames: prefix sums of the direction are in the ten thousands, and cancel."""
    arguments = problem(2, 2000, 4, kind, 3, lengths="full")
    narrow = {k: x.float() if x is not None and x.is_floating_point() else x for k, x in arguments.items()}
    wide = {k: x.double() if x is not None and x.is_floating_point() else x for k, x in narrow.items()}
    found, expected = (hessian_product(x, None, "native", shift=20.0) for x in (narrow, wide))
    torch.testing.assert_close(found["emission"].double(), expected["emission"], rtol=0, atol=2e-5)
    # Sums over 4,000 frames of differences of either sign.
    torch.testing.assert_close(found["transition"].double(), expected["transition"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_infeasible_and_short_sequences(kind):
    arguments = problem(4, 5, 3, kind, 2)
    arguments["lengths"] = torch.tensor([5, 0, 1, 4])
    arguments["emission"][3, 2] = -INF
    arguments["emission"][2, 1:] = float("nan")
    for edges in (None, "counts"):
        found = hessian_product(arguments, edges, "native")
        assert all(x.isfinite().all() for x in found.values())
        assert not found["emission"][3].any() and not found["emission"][1].any() and not found["emission"][2, 1:].any()
        clean = dict(arguments, emission=arguments["emission"].nan_to_num(nan=0.0, neginf=-INF))
        agree(clean, edges)


def test_upstream_weights_get_their_expectation():
    """d/dg of sum g p V is E[V]: the gradient of a weighted log Z's gradient with respect to the weights."""
    arguments = problem(3, 6, 4, "shared", 5)
    arguments["emission"].requires_grad_()
    weight = torch.tensor([1.5, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    hmm = HMM(**arguments)
    (gradient,) = torch.autograd.grad((hmm.log_partition() * weight).sum(), arguments["emission"], create_graph=True)
    direction = torch.randn_like(gradient)
    (found,) = torch.autograd.grad((gradient * direction).sum(), weight)
    torch.testing.assert_close(found, (hmm.marginals() * direction).sum((1, 2)).detach())


def test_threads_do_not_change_the_numbers_of_one_sequence():
    arguments, threads = problem(5, 30, 7, "per-sequence", 1, torch.float32), torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(hessian_product(arguments, "counts", "native"))
    finally:
        torch.set_num_threads(threads)
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]) or name in ("initial", "final")
