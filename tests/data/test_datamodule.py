from pathlib import Path

import numpy as np
import pytest

from hmm_speech.data.datamodule import SyntheticDataModule, UnitDataModule
from hmm_speech.data.synthetic import sample_corpus
from hmm_speech.data.unitfile import write_units
from hmm_speech.errors import UserError


def test_loaders_cover_their_splits(tmp_path: Path) -> None:
    corpus = sample_corpus(utterances=30)
    write_units(corpus, tmp_path / "units.parquet")
    data = UnitDataModule(str(tmp_path / "units.parquet"), batch_size=4)
    for split, loader in (
        ("train", data.train_dataloader()),
        ("valid", data.val_dataloader()),
        ("test", data.test_dataloader()),
    ):
        rows = corpus.split(split)
        seen = []
        for batch in loader:
            for units, length, index in zip(batch.units, batch.lengths, batch.index, strict=True):
                assert np.array_equal(units[:length], rows[index].units)
                seen.append(int(index))
        assert sorted(seen) == list(range(len(rows)))


def test_frames_per_batch_is_the_mean() -> None:
    data = SyntheticDataModule(batch_size=4)
    lengths = [len(utterance.units) for utterance in data.corpus.split("train")]
    assert data.frames_per_batch == pytest.approx(4 * np.mean(lengths))


def test_a_corpus_without_a_split_is_refused(tmp_path: Path) -> None:
    corpus = sample_corpus(utterances=6)
    corpus.utterances = corpus.split("test")
    write_units(corpus, tmp_path / "units.parquet")
    with pytest.raises(UserError, match="no utterance in the train split"):
        _ = UnitDataModule(str(tmp_path / "units.parquet")).corpus


def test_synthetic_labels_are_the_phones() -> None:
    corpus = sample_corpus(utterances=6, seed=3)
    for utterance in corpus.utterances:
        assert utterance.phones[0].start == 0
        assert utterance.phones[-1].end == pytest.approx(len(utterance.units) / corpus.frame_rate)
    again = sample_corpus(utterances=6, seed=3)
    assert all(np.array_equal(a.units, b.units) for a, b in zip(corpus.utterances, again.utterances, strict=True))
    with pytest.raises(UserError, match=r"data\.vocabulary is 1; expected an integer of at least 2"):
        sample_corpus(vocabulary=1)


@pytest.mark.parametrize("option", [{"seed": "abc"}, {"seed": -1}, {"num_workers": -1}, {"numbers": -1}])
def test_numbers_out_of_range_are_refused(option: dict) -> None:
    name, value = next(iter(option.items()))
    with pytest.raises(UserError, match=rf"data\.{name} is {value!r}; expected an integer of at least 0"):
        _ = SyntheticDataModule(**option).corpus
