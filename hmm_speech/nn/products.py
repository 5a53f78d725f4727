"""Log-sums of exponentials of sums, as matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

# A sum above this lost at most V * 1e-38 / 1e-30 (1e-308 / 1e-290) to underflow, far below rounding.
_SAFE = {torch.float32: 1e-30, torch.float64: 1e-290}


def log_matmul_exp(left: Tensor, right_YV: Tensor) -> Tensor:
    """(..., Y): log sum_v exp(left[..., v] + right[y, v]) from left (..., V), as one scaled matrix product.

    Maxima of rows are taken out first, so every factor lies in [0, 1]. Where a row of ``left`` peaks far from the peaks
    of a row of ``right`` (some 70 nats, often with forbidden entries, -inf) float32 underflows: then the product is
    taken in float64, and what even that loses (660 nats) is summed in log space, pair by pair. A sum of nothing but
    forbidden entries is -inf, with zero gradient.
    """
    with torch.autocast(left.device.type, enabled=False):  # half precision would round the sums
        left, right_YV = (x if x.dtype in _SAFE else x.float() for x in (left, right_YV))
        left_max, right_max = _maximum(left), _maximum(right_YV)
        left, right_YV = left - left_max, right_YV - right_max
        product = left.exp() @ right_YV.exp().T
        if not _all_safe(product):
            product = left.double().exp() @ right_YV.double().exp().T
        logs = product.log() if _all_safe(product) else _mend(product, left, right_YV)
        return logs.to(left.dtype) + left_max + right_max.T


def _maximum(x: Tensor) -> Tensor:
    """(..., 1), a constant; 0 where all is forbidden."""
    top = x.detach().amax(-1, keepdim=True)
    return top.masked_fill(top == -torch.inf, 0)


def _all_safe(product: Tensor) -> bool:
    return not product.numel() or bool(product.detach().amin() > _SAFE[product.dtype])


def _mend(product: Tensor, left: Tensor, right_YV: Tensor) -> Tensor:
    """log product, where entries too small to be right are summed again in log space."""
    lost = product.detach() <= _SAFE[product.dtype]
    *rows, column = lost.nonzero(as_tuple=True)
    terms = (left[tuple(rows)] + right_YV[column]).to(product.dtype)
    feasible = (terms.detach() > -torch.inf).any(-1, keepdim=True)
    sums = torch.where(feasible, terms, 0).logsumexp(-1).masked_fill(~feasible.squeeze(-1), -torch.inf)
    return product.masked_fill(lost, 1).log().index_put((*rows, column), sums)
