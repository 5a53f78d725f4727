"""Tab-separated tables with a header."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hmm_speech.errors import UserError

_SPLIT_NAMES = {"train": "train", "valid": "valid", "test": "test", "": "", "dev": "valid", "validation": "valid"}


def read_table(path: str | os.PathLike[str], required: Sequence[str]) -> list[dict[str, str]]:
    """Read a TSV with a header that has at least the required columns; values are stripped, quotes are not special."""
    try:
        with open(path, encoding="utf-8-sig") as lines:
            header = [name.strip() for name in lines.readline().rstrip("\r\n").split("\t")]
            missing = [name for name in required if name not in header]
            if missing:
                raise UserError(
                    f"{path}: the header is {header}, expected tab-separated columns with {', '.join(missing)}"
                )
            rows = []
            for number, line in enumerate(lines, start=2):
                if not line.strip():
                    continue
                values = [value.strip() for value in line.rstrip("\r\n").split("\t")]
                if len(values) != len(header):
                    raise UserError(f"{path}: line {number} has {len(values)} columns, the header {len(header)}")
                rows.append(dict(zip(header, values, strict=True)))
            return rows
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); expected a TSV in UTF-8 with a header") from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """Read `--metadata`: a row for each `utt`, with `speaker` and `split` where the table has them."""
    rows: dict[str, dict[str, str]] = {}
    for row in read_table(path, ("utt",)):
        if row["utt"] in rows:
            raise UserError(f"{path}: utt {row['utt']!r} comes twice; ids must be unique, remove one line")
        rows[row["utt"]] = row
    check_splits(rows, str(path))
    return rows


def check_splits(rows: dict[str, dict[str, str]], source: str) -> None:
    """Bring the column `split` to train, valid, test or the empty string, in place; UserError for another value."""
    for utt, row in rows.items():
        split = row.get("split", "")
        if split not in _SPLIT_NAMES:
            raise UserError(f"{source}: utt {utt!r} has split {split!r}, expected train, valid, test or nothing")
        row["split"] = _SPLIT_NAMES[split]
