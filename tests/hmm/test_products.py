import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.hmm.products import log_matmul_exp


def summed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(left.double()[..., None, :] + right.double()[..., None, :, :], -1)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 2000), st.floats(0, 0.9), st.booleans(), st.integers(0, 2**16))
def test_sums_are_right_at_any_scale_and_with_forbidden_entries(
    spread: float, forbidden: float, batched: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 5, 6), (2, 4, 6) if batched else (4, 6))
    left, right = (torch.randn(*shape, generator=generator) * spread for shape in shapes)
    left, right = (
        x.masked_fill(torch.rand(x.shape, generator=generator) < share, -torch.inf)
        for x, share in ((left, forbidden / 2), (right, forbidden))
    )
    # Row maxima are some 4 spreads large; taking them out and adding them back rounds to float32 there.
    torch.testing.assert_close(
        log_matmul_exp(left, right).double(), summed(left, right), rtol=1e-5, atol=1e-5 + 4 * spread * 2**-23
    )


@pytest.mark.parametrize("apart", [1.0, 60.0, 200.0, 3000.0])
@pytest.mark.parametrize("forbidden", [False, True])
def test_gradients_are_shares_however_far_apart(apart: float, forbidden: bool) -> None:
    left = torch.tensor([[0.0, -apart, -apart]], requires_grad=True)
    right = torch.tensor([[-torch.inf if forbidden else -2 * apart, 0.0, 1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    log_matmul_exp(left, right).sum().backward()
    expected = [x.detach().double().requires_grad_() for x in (left, right)]
    summed(*expected).sum().backward()
    for x, y in zip((left, right), expected, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-6)


def test_nothing_but_forbidden_entries_is_forbidden_without_a_gradient() -> None:
    left = torch.tensor([[0.0, -torch.inf], [1.0, 2.0]], requires_grad=True)
    right = torch.tensor([[-torch.inf, 3.0], [0.0, 0.0]], requires_grad=True)
    sums = log_matmul_exp(left, right)
    assert sums[0, 0] == -torch.inf
    assert sums.isfinite().sum() == 3
    sums[sums.isfinite()].sum().backward()
    assert left.grad.isfinite().all()
    assert right.grad.isfinite().all()


def test_half_precision_is_summed_in_single() -> None:
    left, right = torch.randn(3, 50), torch.randn(4, 50)
    with torch.autocast("cpu", torch.bfloat16):
        sums = log_matmul_exp(left, right)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), summed(left, right), rtol=1e-6, atol=1e-6)


def test_what_is_no_number_stays_none() -> None:
    left, right = torch.zeros(2, 3), torch.zeros(4, 3)
    left[0, 1], right[2, 0], right[3] = torch.nan, torch.inf, -torch.inf
    sums = log_matmul_exp(left, right)
    assert sums[0].isnan().all() and sums[1, 2].isnan()
    torch.testing.assert_close(sums[1, [0, 1, 3]], torch.tensor([3.0, 3.0, 0]).log())


def test_second_derivatives() -> None:
    left = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    right = (torch.randn(4, 3, dtype=torch.float64) * 300).requires_grad_()
    forbidden = torch.tensor([[True, True, False], [False, True, False], [False, False, False], [True, False, False]])

    def sums(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return log_matmul_exp(left, right.masked_fill(forbidden, -torch.inf))

    assert torch.autograd.gradcheck(sums, (left, right))
    assert torch.autograd.gradgradcheck(sums, (left, right), fast_mode=True)


def test_settings_of_gpus_are_left_alone_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the process's: another thread may be between reading and writing them back."""

    class Untouchable:
        def __getattr__(self, name: str) -> None:
            raise AssertionError(f"{name} was read")

        def __setattr__(self, name: str, value: object) -> None:
            raise AssertionError(f"{name} was written")

    monkeypatch.setattr(torch.backends.cuda, "matmul", Untouchable())
    log_matmul_exp(torch.randn(3, 5), torch.randn(4, 5))
