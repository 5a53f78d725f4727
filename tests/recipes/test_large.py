import importlib.util
import sys
from pathlib import Path

import pytest

from hmm_speech.data.unitfile import read_units

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "large"
TEXTS = FOLDER.parent / "flite"


def script(name: str):
    specification = importlib.util.spec_from_file_location(f"large_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


prepare, scaling = script("prepare"), script("scaling")


def test_words_become_units_and_seldom_ones_share_one(tmp_path):
    text = TEXTS / "alice.txt"
    assert prepare.main(["--out", str(tmp_path / "words.parquet"), "--text", str(text), "--seldom", "3"]) == 0
    corpus = read_units(tmp_path / "words.parquet")
    vocabulary = (tmp_path / "words.txt").read_text().split()
    assert vocabulary[0] == "<unk>" and len(vocabulary) == corpus.vocabulary == len(set(vocabulary))
    lines = [words for line in text.read_text().splitlines() if (words := prepare.words_of(line))]
    assert len(lines) == len(corpus.utterances)
    for words, utterance in zip(lines, corpus.utterances, strict=True):
        said = [vocabulary[unit] for unit in utterance.units]
        assert all(heard in (word, "<unk>") for word, heard in zip(words, said, strict=True))
    assert [u.id for u in corpus.split("test")] == [u.id for u in corpus.utterances[9::10]]
    train = [words for n, words in enumerate(lines, start=1) if n % 10]
    for word in ("alice", "rabbit", "waistcoat-pocket"):
        assert (word in vocabulary) == (sum(words.count(word) for words in train) >= 3)


def test_words_of_a_line():
    assert prepare.words_of("`Oh dear!  Alice's daisy-chain--it WAS 'lost'.") == [
        "oh", "dear", "alice's", "daisy-chain", "it", "was", "lost",
    ]  # fmt: skip


def test_without_the_program_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prepare.main(["--out", str(tmp_path / "words.parquet")]) == 1
    assert "apt-get install bible-kjv" in capsys.readouterr().err
    assert not (tmp_path / "words.parquet").exists()


def test_verses_come_without_their_references(tmp_path, monkeypatch):
    program = tmp_path / "bible"
    program.write_text("#!/bin/sh\necho 'Ge1:1 In the beginning'\necho \"$2\"' God said,'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert prepare.read_bible("gen1:1-2") == ["In the beginning", "God said,"]


@pytest.mark.parametrize("name", list(scaling.MODELS))
def test_every_model_of_the_table_is_measured(name):
    row = scaling.measure(name, 256)
    assert row["frames"] > 1000 and row["parameters"] > 1000
    assert row["forward"] > 0 and row["backward"] > 0 and 0 < row["start"] <= row["peak"]


def test_the_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--sizes", "200", "--models", "cloned, half"])
    scaling.main()
    assert "| cloned, half | 200 |" in capsys.readouterr().out
