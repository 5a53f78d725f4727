import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmm_speech.data.batching import BucketBatchSampler, collate
from hmm_speech.data.unitfile import Utterance
from hmm_speech.errors import UserError


def test_collate_pads_and_keeps_the_index() -> None:
    rows = [
        (4, Utterance("a", "", "train", np.array([3, 1], np.int32))),
        (9, Utterance("b", "", "train", np.arange(3))),
    ]
    batch = collate(rows)
    assert batch.units.tolist() == [[3, 1, 0], [0, 1, 2]]
    assert batch.lengths.tolist() == [2, 3] and batch.index.tolist() == [4, 9]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 500), min_size=4, max_size=60),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 3),
)
def test_each_utterance_comes_once_over_all_processes(
    lengths: list[int], batch_size: int, world_size: int, shuffle: bool, epoch: int
) -> None:
    samplers = [
        BucketBatchSampler(lengths, batch_size, shuffle=shuffle, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in samplers]
    assert sorted(i for rank in batches for batch in rank for i in batch) == list(range(len(lengths)))
    assert [len(rank) for rank in batches] == [len(samplers[0])] * world_size
    assert all(1 <= len(batch) <= max(batch_size, 2 if world_size > 1 else 1) for rank in batches for batch in rank)


def test_an_order_follows_from_seed_and_epoch_alone() -> None:
    lengths = list(range(1, 40))

    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = BucketBatchSampler(lengths, 4, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4) and order(0, 3) != order(1, 3)


def test_batches_hold_utterances_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, size=200).tolist()
    spans = [
        max(lengths[i] for i in b) / min(lengths[i] for i in b) for b in BucketBatchSampler(lengths, 10, shuffle=True)
    ]
    assert np.median(spans) < 1.3


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="batch_size is 0"):
        BucketBatchSampler([1, 2], 0)
    with pytest.raises(UserError, match="the valid split has 1 utterances for 2 processes"):
        BucketBatchSampler([5], 4, world_size=2, split="valid")
