import pytest
import torch

from hmm_speech.errors import UserError
from hmm_speech.nn import EmissionTable, ProductEmission, SoftEmission, Topology
from hmm_speech.nn.blocks import count
from hmm_speech.optim import EM

TOPOLOGY = Topology(labels=3)
V = 5


def soft() -> SoftEmission:
    torch.manual_seed(0)
    emission = SoftEmission(TOPOLOGY, V)
    emission.table.assign(torch.randn(3, V).log_softmax(-1))
    return emission


def product(sizes: tuple[int, ...] = (4, 2)) -> ProductEmission:
    torch.manual_seed(0)
    emission = ProductEmission(TOPOLOGY, len(sizes), list(sizes))
    for table in emission.tables:
        table.assign(torch.randn(table.logits.shape).log_softmax(-1))
    return emission


def test_soft_units_cost_the_expected_log_probability() -> None:
    emission, weights = soft(), torch.rand(2, 4, V)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = sum(weights[..., v, None] * emission.table()[:, v] for v in range(V))
    torch.testing.assert_close(emission(weights), expected)
    padded = torch.cat([weights, torch.zeros(2, 1, V)], 1)
    assert torch.equal(emission(padded)[:, 4], torch.zeros(2, 3))


def test_a_unit_that_is_certain_costs_what_a_table_says() -> None:
    emission, table = soft(), EmissionTable(TOPOLOGY, V)
    table.assign(emission.table().detach())
    units = torch.tensor([[0, 3, 4, 1]])
    torch.testing.assert_close(emission(torch.nn.functional.one_hot(units, V).float()), table(units))


@pytest.mark.parametrize("frame", [[0.5, 0.2, 0, 0, 0], [1.5, -0.5, 0, 0, 0], [float("nan"), 1, 0, 0, 0]])
def test_frames_that_are_no_distributions_are_refused(frame: list[float]) -> None:
    frames = torch.tensor([[frame, [0.2] * 5]])
    for reads in (soft(), soft().points):  # points: where training starts from clusters
        with pytest.raises(UserError, match="1 of 2 are no distributions over 5 units"):
            reads(frames)


def test_products_add_the_log_probabilities_of_their_codes() -> None:
    emission = product()
    codes = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]])
    first, second = (table() for table in emission.tables)
    expected = torch.stack([first[:, 3] + second[:, 1], first[:, 0] + second[:, 0]])[None]
    torch.testing.assert_close(emission(codes), expected)
    every = torch.cartesian_prod(torch.arange(4.0), torch.arange(2.0))[None]
    torch.testing.assert_close(emission(every).exp().sum(1), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ([4.0, 0.0], "codebook 0 has 4.0, expected integers from 0 to 3"),
        ([0.0, -1.0], "codebook 1 has -1.0, expected integers from 0 to 1"),
        ([0.5, 0.0], "codebook 0 has 0.5"),
        ([0.0, float("nan")], "codebook 1 has nan"),
    ],
)
def test_codes_that_no_codebook_has_are_refused(frame: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        product()(torch.tensor([[[3.0, 1.0], frame]]))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (None, r"emission\.codebooks is None; expected the size of each codebook"),
        ([4, 2.0], r"emission\.codebooks is \[4, 2\.0\]"),
        ([4, 0], r"emission\.codebooks is \[4, 0\]"),
        ([4], "has 1 sizes, but frames hold 2 numbers each"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: list | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ProductEmission(TOPOLOGY, 2, sizes)


def test_draws_follow_the_tables() -> None:
    states, generator = torch.full((20_000,), 2), torch.Generator().manual_seed(0)
    weights = soft().draw(states, generator)
    assert torch.equal(weights.sum(-1), torch.ones(20_000)) and torch.equal(weights, weights.round())
    torch.testing.assert_close(weights.mean(0), soft().table()[2].exp().detach(), atol=0.015, rtol=0)  # 4 errors
    codes = product().draw(states, generator)
    assert codes.shape == (20_000, 2) and codes.dtype == torch.float32
    for q, table in enumerate(product().tables):
        shares = torch.bincount(codes[:, q].long(), minlength=table.logits.shape[1]) / 20_000
        torch.testing.assert_close(shares, table()[2].exp().detach(), atol=0.015, rtol=0)


def test_em_takes_the_shares_of_frames() -> None:
    for emission, frames in ((soft(), torch.tensor([[[0.5, 0.5, 0, 0, 0], [0, 0, 1.0, 0, 0]]])),
                             (product(), torch.tensor([[[3.0, 0], [3.0, 1.0]]]))):  # fmt: skip
        count(emission, True)
        optimizer = EM(emission.parameters())
        (-emission(frames)[..., 1].sum()).backward()
        optimizer.step()
        table = emission.table if isinstance(emission, SoftEmission) else emission.tables[0]
        expected = [0.25, 0.25, 0.5, 0, 0] if isinstance(emission, SoftEmission) else [0, 0, 0, 1.0]
        torch.testing.assert_close(table()[1].exp().detach(), torch.tensor(expected))


def test_points_of_codes_differ_by_the_number_of_codes() -> None:
    points = product().points(torch.tensor([[3.0, 1.0], [3.0, 0.0], [1.0, 0.0]]))
    assert torch.cdist(points, points).square().round().tolist() == [[0, 2, 4], [2, 0, 2], [4, 2, 0]]
    roots = soft().points(torch.tensor([[0.25, 0.75, 0, 0, 0]]))
    torch.testing.assert_close(roots.square().sum(), torch.tensor(1.0))
