"""What a model knows of the past: h_t from the frames (units or vectors) up to t - hop, for transitions and emissions.

Shapes: B utterances, T frames, H the width of a context (``dim``). Every context is causal, so what pads a batch past
an utterance's end changes nothing before it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmm_speech.errors import UserError, check_size

OBSERVES = ("units", "frames")


class Past(nn.Module):
    """(B, T, dim): p_t = E[x_{t - hop}], an embedding of units or a linear map of frames.

    Where there is no frame t - hop, before an utterance's start, p_t is a learned vector.
    """

    def __init__(self, observes: str, vocabulary: int, dimension: int | None, dim: int, hop: int) -> None:
        super().__init__()
        self.hop = hop
        self.embedding = nn.Embedding(vocabulary, dim) if observes == "units" else nn.Linear(dimension, dim)
        self.before = nn.Parameter(torch.randn(dim))

    def forward(self, observed: Tensor) -> Tensor:
        batch, time = observed.shape[:2]
        known = self.embedding(observed[:, : max(time - self.hop, 0)])
        return torch.cat([self.before.expand(batch, min(self.hop, time), -1), known], 1)


class Context(nn.Module):
    """h_t = dropout(f(p_1 ... p_t)), p_t the vector of frame t - hop; a subclass gives the causal map f, ``summary``.

    Args:
        vocabulary: number of units, V.
        dimension: of a frame; None where the data have no frames.
        observes: ``units`` (embedded) or ``frames`` (mapped linearly).
        dim: H.
        hop: h_t knows frames up to t - hop; 1 is everything before frame t.
        dropout: of each p_t's and h_t's entries.

    Raises:
        UserError: an argument is out of its range, or frames are asked for and there are none.
    """

    observes = "units"

    def __init__(
        self,
        vocabulary: int,
        dimension: int | None = None,
        *,
        observes: str = "units",
        dim: int = 256,
        hop: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if observes not in OBSERVES:
            raise UserError(f"context.observes is {observes!r}; expected one of {', '.join(OBSERVES)}")
        if observes == "frames" and dimension is None:
            raise UserError(
                "context.observes is 'frames', but the data have none; make the unit file with --keep-frames, or set "
                "context.observes=units"
            )
        _check_sizes(dim=dim, hop=hop)
        self.observes, self.dim, self.hop, self.dropout = observes, dim, hop, nn.Dropout(dropout)
        self.past = Past(observes, vocabulary, dimension, dim, hop)

    def forward(self, observed: Tensor) -> Tensor:
        """(B, T, H) from units (B, T) or frames (B, T, D)."""
        past_BTH = self.dropout(self.past(observed))
        return self.dropout(self.summary(past_BTH))

    def summary(self, past_BTH: Tensor) -> Tensor:
        """(B, T, H): row t depends on rows up to t."""
        raise NotImplementedError


class _RecurrentContext(Context):
    cell: type[nn.RNNBase]

    def __init__(self, vocabulary: int, dimension: int | None = None, *, layers: int = 1, **options) -> None:
        super().__init__(vocabulary, dimension, **options)
        _check_sizes(layers=layers)
        between = self.dropout.p if layers > 1 else 0.0
        self.network = self.cell(self.dim, self.dim, layers, batch_first=True, dropout=between)

    def summary(self, past_BTH: Tensor) -> Tensor:
        return self.network(past_BTH)[0]


class GRUContext(_RecurrentContext):
    """Gated recurrent units (Cho et al. 2014, arXiv:1406.1078, equations 5 to 8; torch's variant), ``layers`` deep."""

    cell = nn.GRU


class LSTMContext(_RecurrentContext):
    """Long short-term memory (Hochreiter and Schmidhuber 1997, with forget gates), ``layers`` deep."""

    cell = nn.LSTM


class ConvolutionContext(Context):
    """Residual causal convolutions, x + W relu(conv(layernorm(x))), whose dilation doubles from layer to layer.

    ``layers`` of them with kernels of ``width`` see 1 + (width - 1) (2^layers - 1) frames (van den Oord et al. 2016,
    arXiv:1609.03499, figure 3).
    """

    def __init__(
        self, vocabulary: int, dimension: int | None = None, *, layers: int = 4, width: int = 2, **options
    ) -> None:
        super().__init__(vocabulary, dimension, **options)
        _check_sizes(layers=layers, width=width)
        self.blocks = nn.ModuleList(_CausalConvolution(self.dim, width, 2**layer) for layer in range(layers))
        self.norm = nn.LayerNorm(self.dim)

    def summary(self, past_BTH: Tensor) -> Tensor:
        for block in self.blocks:
            past_BTH = past_BTH + self.dropout(block(past_BTH))
        return self.norm(past_BTH)


class _CausalConvolution(nn.Module):
    def __init__(self, dim: int, width: int, dilation: int) -> None:
        super().__init__()
        self.reach = (width - 1) * dilation
        self.norm = nn.LayerNorm(dim)
        self.inner = nn.Conv1d(dim, dim, width, dilation=dilation)
        self.outer = nn.Linear(dim, dim)

    def forward(self, x_BTH: Tensor) -> Tensor:
        padded_BHT = F.pad(self.norm(x_BTH).transpose(1, 2), (self.reach, 0))
        return self.outer(F.relu(self.inner(padded_BHT)).transpose(1, 2))


class TransformerContext(Context):
    """Pre-norm Transformer blocks with a causal mask (Vaswani et al. 2017, arXiv:1706.03762, sections 3.2 and 3.5).

    Positions are the paper's sinusoids, so that an utterance may be of any length.
    """

    def __init__(
        self, vocabulary: int, dimension: int | None = None, *, layers: int = 2, heads: int = 4, **options
    ) -> None:
        super().__init__(vocabulary, dimension, **options)
        _check_sizes(layers=layers, heads=heads)
        if self.dim % (2 * heads):
            raise UserError(f"context.dim is {self.dim}; expected a multiple of twice context.heads, {2 * heads}")
        self.blocks = nn.ModuleList(_Attention(self.dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(self.dim)

    def summary(self, past_BTH: Tensor) -> Tensor:
        hidden_BTH = past_BTH + positions(past_BTH.shape[1], self.dim).to(past_BTH)
        for block in self.blocks:
            hidden_BTH = hidden_BTH + self.dropout(block.attend(hidden_BTH))
            hidden_BTH = hidden_BTH + self.dropout(block.feed(hidden_BTH))
        return self.norm(hidden_BTH)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.projections, self.output = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def attend(self, x_BTH: Tensor) -> Tensor:
        heads = self.projections(self.before(x_BTH)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        query, key, value = heads.chunk(3, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


def positions(time: int, dim: int) -> Tensor:
    """(T, dim): sin and cos of t / 10000^(2 i / dim), i = 0 ... dim / 2 - 1 (Vaswani et al. 2017, section 3.5)."""
    rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    angles = torch.arange(time)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


class LastUnits(Context):
    """h_t = sum_k E_k[x_{t - hop - k}] over k = 0 ... n - 1: the last n units (or frames), and nothing before them."""

    def __init__(self, vocabulary: int, dimension: int | None = None, *, n: int = 1, **options) -> None:
        super().__init__(vocabulary, dimension, **options)
        _check_sizes(n=n)
        self.earlier = nn.ModuleList(
            Past(self.observes, vocabulary, dimension, self.dim, self.hop + k) for k in range(1, n)
        )

    def forward(self, observed: Tensor) -> Tensor:
        h_BTH = self.past(observed)
        for earlier in self.earlier:
            h_BTH = h_BTH + earlier(observed)
        return self.dropout(h_BTH)


def _check_sizes(**values: int) -> None:
    for name, value in values.items():
        check_size(f"context.{name}", value)
