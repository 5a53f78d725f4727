"""Phone times from a TSV, a folder of TextGrids or a folder of .lab files."""

from __future__ import annotations

import array
import os
import re
from pathlib import Path
from typing import Protocol

import numpy as np

from hmm_speech.data.unitfile import Phone
from hmm_speech.errors import UserError

PHONE_TIERS = ("phones", "phone", "phonemes", "phoneme", "segments", "segment")
SILENCE = "sil"  # the label of a TextGrid interval without text
_HTK_UNIT = 1e-7  # HTK counts in 100 ns


class Alignments(Protocol):
    """The phones of each utterance."""

    def get(self, utt: str) -> list[Phone] | None:
        """The phones in time order, or None where the utterance has no alignment."""


def read_alignments(path: str | os.PathLike[str]) -> Alignments:
    """Open `--alignments`: a TSV with the header `utt start end phone` (seconds), or a folder.

    A folder holds `<utt>.TextGrid` (Praat, long or short; the interval tier named phones, or the only one) or
    `<utt>.lab`: lines `start end label` in seconds or, where all are whole numbers, in HTK's 100 ns; or, after a line
    `#`, xlabel's `end colour label`. Folders are searched recursively. Raises UserError naming the file and the line.
    """
    path = Path(path)
    if path.is_dir():
        return _Folder(path)
    if path.is_file():
        return _Table(path)
    raise UserError(f"{path}: no such file or folder; expected a TSV (utt start end phone), TextGrids or .lab files")


def _ordered(phones: list[Phone], source: str) -> list[Phone]:
    phones = sorted(phones, key=lambda phone: (phone.start, phone.end))
    for phone in phones:
        if not (np.isfinite([phone.start, phone.end]).all() and 0 <= phone.start <= phone.end):
            raise UserError(
                f"{source}: phone {phone.label!r} from {phone.start} to {phone.end} s; expected 0 <= start <= end"
            )
    return phones


class _Table:
    """A TSV held as flat arrays: 20 bytes a phone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._utts: dict[str, int] = {}
        labels: dict[str, int] = {}
        owner, label, start, end = array.array("i"), array.array("i"), array.array("d"), array.array("d")
        number = 1
        try:
            with open(path, encoding="utf-8-sig") as lines:
                header = [name.strip() for name in lines.readline().rstrip("\r\n").split("\t")]
                if not {"utt", "start", "end", "phone"} <= set(header):
                    raise UserError(f"{path}: the header is {header}, expected tab-separated utt, start, end, phone")
                places = [header.index(name) for name in ("utt", "start", "end", "phone")]
                for number, line in enumerate(lines, start=2):  # noqa: B007 (the error below names it)
                    if not line.strip():
                        continue
                    values = line.rstrip("\r\n").split("\t")
                    utt, first, last, phone = (values[place].strip() for place in places)
                    start.append(float(first))
                    end.append(float(last))
                    owner.append(self._utts.setdefault(utt, len(self._utts)))
                    label.append(labels.setdefault(phone, len(labels)))
        except (IndexError, UnicodeDecodeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path}: line {number} cannot be read ({error}); expected utt, start and end in seconds, and phone"
            ) from None
        order = np.argsort(np.asarray(owner), kind="stable")
        self._bounds = np.searchsorted(np.asarray(owner)[order], np.arange(len(self._utts) + 1))
        self._label, self._names = np.asarray(label)[order], list(labels)
        self._start, self._end = np.asarray(start)[order], np.asarray(end)[order]

    def get(self, utt: str) -> list[Phone] | None:
        if utt not in self._utts:
            return None
        first, last = self._bounds[self._utts[utt] : self._utts[utt] + 2]
        phones = [
            Phone(self._names[self._label[i]], float(self._start[i]), float(self._end[i])) for i in range(first, last)
        ]
        return _ordered(phones, f"{self._path}: utt {utt!r}")


class _Folder:
    """A folder of TextGrid or .lab files, each read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in (".textgrid", ".lab") or not path.is_file():
                continue
            if path.stem in self._files:
                raise UserError(
                    f"{folder}: {self._files[path.stem]} and {path} are both for the utterance {path.stem!r}"
                )
            self._files[path.stem] = path
        if not self._files:
            raise UserError(f"{folder}: holds no .TextGrid and no .lab file; expected one named after each utterance")

    def get(self, utt: str) -> list[Phone] | None:
        path = self._files.get(utt)
        if path is None:
            return None
        return read_textgrid(path) if path.suffix.lower() == ".textgrid" else read_lab(path)


def _text(path: Path) -> str:
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not text in UTF-8 or UTF-16 ({error})") from None


_TOKEN = re.compile(r'"((?:[^"]|"")*)"|<([^>]*)>|(?<![\w.])([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)(?![\w.\]])')


def read_textgrid(path: str | os.PathLike[str]) -> list[Phone]:
    """The phones of one Praat TextGrid, long or short form: both are the same sequence of numbers and strings."""
    path = Path(path)
    # the long form adds names (`xmin =`) and bracketed counters, which no token matches
    tokens: list[str | float] = []
    for match in _TOKEN.finditer(_text(path)):
        text, flag, number = match.groups()
        tokens.append(float(number) if number is not None else flag if flag is not None else "'" + text)
    tiers: dict[str, list[Phone]] = {}
    try:
        if tokens[1] != "'TextGrid":
            raise ValueError("it does not say that it is one")
        position = tokens.index("exists") + 2
        for _ in range(int(tokens[position - 1])):
            kind, name, count = tokens[position], str(tokens[position + 1])[1:], int(tokens[position + 4])
            position += 5
            width = 3 if kind == "'IntervalTier" else 2
            if width == 3:
                rows = [tokens[position + 3 * i : position + 3 * i + 3] for i in range(count)]
                tiers[name] = [
                    Phone(str(text)[1:].replace('""', '"').strip() or SILENCE, float(start), float(end))
                    for start, end, text in rows
                ]
            position += width * count
    except (IndexError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a TextGrid ({error})") from None
    named = [name for name in tiers if name.strip().lower().split(" - ")[-1] in PHONE_TIERS]
    if len(named) != 1 and len(tiers) != 1:
        raise UserError(
            f"{path}: has the interval tiers {list(tiers)}; expected one named {PHONE_TIERS[0]}, or just one"
        )
    return _ordered(tiers[named[0] if len(named) == 1 else next(iter(tiers))], str(path))


def read_lab(path: str | os.PathLike[str]) -> list[Phone]:
    """The phones of one .lab file: HTK's, the same in seconds, or xlabel's."""
    path = Path(path)
    lines = [line.strip() for line in _text(path).splitlines()]
    xlabel = "#" in lines
    if xlabel:
        lines = lines[lines.index("#") + 1 :]
    rows = [(number, line.split()) for number, line in enumerate(lines, start=1) if line]
    htk = not xlabel and all(len(row) > 1 and row[0].isdigit() and row[1].isdigit() for _, row in rows)
    phones, previous = [], 0.0
    for number, row in rows:
        try:
            label = row[2]
            if xlabel:
                start, end = previous, float(row[0])
                previous = end
            else:
                start, end = (float(value) * (_HTK_UNIT if htk else 1.0) for value in row[:2])
        except (IndexError, ValueError):
            raise UserError(
                f"{path}: line {number} is {' '.join(row)!r}, expected `start end label`, or `end colour label` after #"
            ) from None
        phones.append(Phone(label, round(start, 7), round(end, 7)))
    return _ordered(phones, str(path))
