"""Train, valid and test, for corpora that do not say."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hmm_speech.data.unitfile import Utterance

SPLITS = ("train", "valid", "test")
VALID_ONE_IN = 12
TEST_ONE_IN = 10


def _hash(purpose: str, name: str) -> int:
    """A hash of an id that no process, platform or version changes; `purpose` keeps the two drawings independent."""
    return int.from_bytes(hashlib.blake2b(f"{purpose}:{name}".encode(), digest_size=8).digest(), "big")


def _draw(names: Sequence[str], purpose: str, one_in: int) -> set[str]:
    """One in `one_in` of the names; at least one where that leaves another, so that small corpora work too."""
    if len(names) < 2:
        return set()
    drawn = {name for name in names if _hash(purpose, name) % one_in == 0}
    if not drawn or len(drawn) == len(names):
        drawn = {min(names, key=lambda name: _hash(purpose, name))}
    return drawn


def assign_splits(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Give the corpus a test and a valid split where it has none.

    An utterance without a split (the empty string) counts as `train`. Where no utterance is `test`, one in ten of
    `train` becomes so; then, where none is `valid`, one in twelve of what is left of `train`. The choice depends on the
    utterance's id alone, so it survives reordering and added files. Splits that have an utterance are left as they are.

    Returns a new list in the same order; the arguments are not changed.
    """
    split = {utterance.id: utterance.split or "train" for utterance in utterances}
    for name, one_in in (("test", TEST_ONE_IN), ("valid", VALID_ONE_IN)):
        if name not in split.values():
            drawn = _draw([key for key, value in split.items() if value == "train"], name, one_in)
            split.update(dict.fromkeys(drawn, name))
    return [
        utterance
        if utterance.split == split[utterance.id]
        else dataclasses.replace(utterance, split=split[utterance.id])
        for utterance in utterances
    ]


def hashed_share(name: str) -> float:
    """A number in [0, 1) that follows from an id alone: those below a share are that share of the ids."""
    return _hash("share", name) / 2**64
