import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmm_speech.data.splits import SPLITS, assign_splits
from hmm_speech.data.unitfile import Utterance


def corpus(names, split=""):
    return [Utterance(name, "s", split, np.zeros(1, np.int32)) for name in names]


def by_split(utterances):
    return {name: {u.id for u in utterances if u.split == name} for name in SPLITS}


def test_draws_one_in_ten_and_one_in_twelve():
    counts = {name: len(ids) for name, ids in by_split(assign_splits(corpus(f"u{n}" for n in range(12000)))).items()}
    assert counts["test"] == pytest.approx(1200, abs=100)
    assert counts["valid"] == pytest.approx(900, abs=90)
    assert sum(counts.values()) == 12000


def test_the_drawing_never_changes():
    # pinned: another hash would move utterances between the splits of every corpus that is in use
    drawn = by_split(assign_splits(corpus(f"u{n}" for n in range(40))))
    assert (drawn["test"], drawn["valid"]) == ({"u17", "u24", "u25", "u30", "u5", "u8"}, {"u37"})


@given(st.sets(st.text(min_size=1, max_size=5), min_size=30, max_size=60), st.randoms())
def test_depends_on_the_id_alone(names, random):
    names = sorted(names)
    drawn = by_split(assign_splits(corpus(names)))
    shuffled = names.copy()
    random.shuffle(shuffled)
    assert by_split(assign_splits(corpus(shuffled))) == drawn
    assert all(drawn.values())


def test_splits_that_are_there_stay():
    given_ = corpus(["a", "b"], "test") + corpus([f"u{n}" for n in range(100)], "train")
    drawn = by_split(assign_splits(given_))
    assert drawn["test"] == {"a", "b"}
    assert 0 < len(drawn["valid"]) < 30

    both = given_ + corpus(["v"], "valid")
    assert [u.split for u in assign_splits(both)] == [u.split for u in both]


@pytest.mark.parametrize(("count", "expected"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (4, (2, 1, 1))])
def test_small_corpora_get_what_they_can(count, expected):
    drawn = by_split(assign_splits(corpus(f"x{n}" for n in range(count))))
    assert tuple(len(drawn[name]) for name in SPLITS) == expected


def test_nothing_is_drawn_from_elsewhere_and_arguments_stay():
    utterances = corpus(["a", "b"], "test")
    assert [u.split for u in assign_splits(utterances)] == ["test", "test"]
    blank = corpus(["a", "b", "c"])
    assign_splits(blank)
    assert {u.split for u in blank} == {""}
