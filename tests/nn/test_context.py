import pytest
import torch
from torch import Tensor

from hmm_speech.errors import UserError
from hmm_speech.nn.context import (
    Context,
    ConvolutionContext,
    GRUContext,
    LastUnits,
    LSTMContext,
    TransformerContext,
)

V, D, H, T = 7, 3, 8, 12
CONTEXTS = {
    "gru": (GRUContext, {"layers": 2}),
    "lstm": (LSTMContext, {}),
    "convolution": (ConvolutionContext, {"layers": 2, "width": 3}),
    "transformer": (TransformerContext, {"layers": 2, "heads": 2}),
    "last_unit": (LastUnits, {}),
    "last_units": (LastUnits, {"n": 3}),
}


def make(name: str, observes: str, hop: int) -> Context:
    torch.manual_seed(0)
    kind, options = CONTEXTS[name]
    return kind(V, D, observes=observes, dim=H, hop=hop, **options).eval()


def observations(observes: str, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if observes == "units":
        return torch.randint(V, (batch, T), generator=generator)
    return torch.randn(batch, T, D, generator=generator)


everything = pytest.mark.parametrize("name", CONTEXTS)
sources = pytest.mark.parametrize("observes", ["units", "frames"])
hops = pytest.mark.parametrize("hop", [1, 3])


@everything
@sources
@hops
@pytest.mark.parametrize("changed", [0, 4])
def test_a_frame_changes_contexts_from_hop_frames_on_and_none_before(
    name: str, observes: str, hop: int, changed: int
) -> None:
    context, before = make(name, observes, hop), observations(observes)
    after = before.clone()
    after[:, changed] = (after[:, changed] + 1) % V if observes == "units" else after[:, changed] + 1
    first, second = context(before), context(after)
    torch.testing.assert_close(first[:, : changed + hop], second[:, : changed + hop], rtol=0, atol=1e-6)
    assert ((first[:, changed + hop] - second[:, changed + hop]).abs().amax(-1) > 1e-4).all()


@everything
@sources
@hops
def test_shapes_and_what_follows_an_end_changes_nothing(name: str, observes: str, hop: int) -> None:
    context, observed = make(name, observes, hop), observations(observes)
    whole = context(observed)
    assert whole.shape == (2, T, H) == (2, T, context.dim)
    for time in (1, hop, 5):
        torch.testing.assert_close(context(observed[:1, :time]), whole[:1, :time], rtol=1e-5, atol=1e-6)


@everything
def test_every_parameter_learns(name: str) -> None:
    context = make(name, "units", 1)
    context(observations("units")).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in context.parameters())


@pytest.mark.parametrize(("n", "known"), [(1, 1), (3, 3)])
def test_last_units_know_n_units(n: int, known: int) -> None:
    torch.manual_seed(0)
    context, units = LastUnits(V, n=n, dim=H).eval(), observations("units")
    again = units.clone()
    again[:, : T - 1 - known] = 0
    torch.testing.assert_close(context(units)[:, -1], context(again)[:, -1])
    again[:, T - 1 - known] = (units[:, T - 1 - known] + 1) % V
    assert not torch.allclose(context(units)[:, -1], context(again)[:, -1])


def test_dropout_is_for_training_alone() -> None:
    context = GRUContext(V, dim=H, dropout=0.5)
    units = observations("units")
    assert not torch.equal(context(units), context(units))
    assert torch.equal(context.eval()(units), context(units))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (GRUContext, {"observes": "sounds"}, "context.observes is 'sounds'"),
        (GRUContext, {"observes": "frames"}, "--keep-frames"),
        (GRUContext, {"hop": 0}, "context.hop is 0"),
        (LSTMContext, {"layers": 0}, "context.layers is 0"),
        (LastUnits, {"n": 0}, "context.n is 0"),
        (TransformerContext, {"dim": 12, "heads": 4}, "a multiple of twice context.heads, 8"),
    ],
)
def test_what_cannot_be_is_told(kind: type[Context], options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(V, **options)
