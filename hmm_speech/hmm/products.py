"""Log-sums of exponentials of sums, as matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# A sum above this lost at most R * 1e-38 / 1e-30 (1e-308 / 1e-290) to underflow, far below rounding.
_SAFE = {torch.float32: 1e-30, torch.float64: 1e-290}


def log_matmul_exp(left: Tensor, right: Tensor) -> Tensor:
    r"""(..., I, J): :math:`\log \sum_r \exp(l_{ir} + r_{jr})` for rows (..., I, R) and (J, R) or (..., J, R).

    One scaled matrix product. Maxima of rows are taken out first, so every factor lies in [0, 1]. Where a row of
    ``left`` peaks far from the peaks of a row of ``right`` (some 70 nats) float32 underflows: then the product is taken
    in float64, and what even that loses (660 nats) is summed in log space, pair by pair. A sum of nothing but forbidden
    entries, -inf, is -inf with zero gradient.
    """
    with full_precision(left.device.type):
        left, right = (x if x.dtype in _SAFE else x.float() for x in (left, right))
        left_max, right_max = _maximum(left), _maximum(right)
        left, right = left - left_max, right - right_max
        product = left.exp() @ right.exp().mT
        logs = product.log() if _all_safe(product) else _mended_log(product, left, right)
        return logs.to(left.dtype) + left_max + right_max.mT


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products of float32 as they are: neither autocast nor TF32 may shorten their factors.

    TF32 is a setting of the whole process, so that it is touched on GPUs alone, which have it.
    """
    if device_type != "cuda":
        with torch.autocast(device_type, enabled=False):
            yield
        return
    matmul = torch.backends.cuda.matmul
    name, full = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        setattr(matmul, name, before)


def _maximum(x: Tensor) -> Tensor:
    """(..., 1), a constant; 0 where all is forbidden."""
    top = x.detach().amax(-1, keepdim=True)
    return top.masked_fill(top == -torch.inf, 0)


def _all_safe(product: Tensor) -> bool:
    return not product.numel() or bool(product.detach().amin() > _SAFE[product.dtype])


def _mended_log(product: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """log product, -inf where nothing is possible; entries too small to be right are summed again in log space."""
    possible = (left != -torch.inf).to(left.dtype) @ (right != -torch.inf).to(left.dtype).mT > 0
    if not _all_safe(product.masked_fill(~possible, 1)):
        product = left.double().exp() @ right.double().exp().mT
    lost = (product.detach() <= _SAFE[product.dtype]) & possible
    logs = product.masked_fill(lost | ~possible, 1).log().masked_fill(~possible, -torch.inf)
    *leading, row, column = lost.nonzero(as_tuple=True)
    rows = right[column] if right.dim() == 2 else right[(*leading, column)]
    sums = (left[(*leading, row)] + rows).to(product.dtype).logsumexp(-1)
    return logs.index_put((*leading, row, column), sums)
