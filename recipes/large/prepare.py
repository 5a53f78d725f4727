"""Make a unit file of words: `python recipes/large/prepare.py --out outputs/large/words.parquet`.

Each verse of the books of Moses in the King James Version (public domain), as Debian's `bible` prints it, is an
utterance and each word a unit; or each line of --text. Words that training has seldom become one unit for all.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hmm_speech.data.unitfile import UnitCorpus, Utterance, write_units
from hmm_speech.errors import UserError

VERSES = "gen1:1-deu34:12"
TEST_ONE_IN = 10
SELDOM = 5  # occurrences in train below which a word is UNKNOWN
UNKNOWN = "<unk>"


def read_bible(verses: str = VERSES) -> list[str]:
    """The verses, without their references."""
    if shutil.which("bible") is None:
        raise UserError(
            "there is no program `bible`; apt-get install bible-kjv, or give a text of your own with --text"
        )
    done = subprocess.run(
        ["bible", "-f", verses], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0 or not done.stdout.strip():
        raise UserError(f"`bible -f {verses}` failed: {done.stderr.strip() or 'it printed nothing'}")
    return [line.partition(" ")[2] for line in done.stdout.splitlines()]


def words_of(line: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"[a-z]+(?:['-][a-z]+)*", line.lower())


def make_corpus(lines: Sequence[str], seldom: int = SELDOM) -> tuple[UnitCorpus, list[str]]:
    """The corpus and the words that its units stand for, UNKNOWN first; every tenth line is test."""
    sentences = [words for line in lines if (words := words_of(line))]
    split = ["test" if n % TEST_ONE_IN == 0 else "train" for n in range(1, len(sentences) + 1)]
    counts = Counter(word for words, name in zip(sentences, split, strict=True) if name == "train" for word in words)
    kept = sorted((word for word, count in counts.items() if count >= seldom), key=lambda word: (-counts[word], word))
    vocabulary = [UNKNOWN, *kept]
    unit = {word: number for number, word in enumerate(vocabulary)}
    utterances = [
        Utterance(f"line{n:05d}", "", name, np.array([unit.get(word, 0) for word in words], dtype=np.int32))
        for n, (words, name) in enumerate(zip(sentences, split, strict=True), start=1)
    ]
    return UnitCorpus(utterances, 1.0, len(vocabulary), {"text": "words"}), vocabulary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/large/words.parquet"), help="the unit file")
    parser.add_argument("--text", type=Path, nargs="+", help="files of text, a sentence a line, in place of `bible`")
    parser.add_argument("--seldom", type=int, default=SELDOM, help="occurrences that give a word a unit of its own")
    options = parser.parse_args(arguments)
    try:
        if options.text:
            lines = [line for path in options.text for line in path.read_text(encoding="utf-8").splitlines()]
        else:
            lines = read_bible()
        corpus, vocabulary = make_corpus(lines, options.seldom)
        write_units(corpus, options.out)
        options.out.with_suffix(".txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    words = sum(len(utterance.units) for utterance in corpus.utterances)
    print(f"{options.out}: {len(corpus.utterances)} lines, {words} words, {corpus.vocabulary} different ones")
    return 0


if __name__ == "__main__":
    sys.exit(main())
