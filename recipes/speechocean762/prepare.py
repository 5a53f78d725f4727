"""From the download of speechocean762 to a unit file: `python recipes/speechocean762/prepare.py CORPUS`.

CORPUS is the unpacked archive of https://www.openslr.org/101 (WAVE/, train/, test/, resource/). Written under --out:
meta.tsv, which lists the audio files with speaker, split, text, gender and age, the unit file (logmel.parquet for the
default features) and its quantizer. Audio files that are missing or broken are named, the rest is written, and the
exit code is then 1. The corpus carries no phone times; --alignments adds some.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hmm_speech.data.unitfile import atomic_path
from hmm_speech.errors import UserError
from hmm_speech.units.audio import AudioFile, AudioList
from hmm_speech.units.command import print_report, progress_bar
from hmm_speech.units.extract import extract_units

COLUMNS = ("utt", "speaker", "split", "text", "gender", "age", "audio")
NAMES_SHOWN = 20
OUT = Path("outputs/speechocean762")  # where the presets of this recipe look


def read_pairs(path: Path) -> dict[str, str]:
    """A Kaldi table: a key, white space, and the rest of the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected the layout of the corpus' own download: WAVE/, and train/ and "
            "test/ with wav.scp, utt2spk, text, spk2gender and spk2age"
        ) from None
    return {parts[0]: parts[1] if len(parts) > 1 else "" for parts in (line.split(None, 1) for line in lines) if parts}


def read_corpus(corpus: Path) -> list[dict[str, str]]:
    """A row for each utterance that the corpus lists, `audio` relative to the corpus."""
    rows = []
    for split in ("train", "test"):
        folder = corpus / split
        speakers, texts = read_pairs(folder / "utt2spk"), read_pairs(folder / "text")
        genders, ages = read_pairs(folder / "spk2gender"), read_pairs(folder / "spk2age")
        for utt, audio in read_pairs(folder / "wav.scp").items():
            if utt not in speakers:
                raise UserError(f"{folder / 'utt2spk'}: has no speaker for {utt!r}, which wav.scp lists")
            speaker = speakers[utt]
            values = (utt, speaker, split, texts.get(utt, ""), genders.get(speaker, ""), ages.get(speaker, ""), audio)
            rows.append(dict(zip(COLUMNS, (" ".join(value.split()) for value in values), strict=True)))
    return rows


def write_meta(rows: Sequence[dict[str, str]], corpus: Path, out: Path) -> None:
    """meta.tsv, its paths relative to itself, so that `hmm-speech units DIR/meta.tsv` works too."""
    back = Path(os.path.relpath(corpus.resolve(), out.resolve())).as_posix()
    with atomic_path(out / "meta.tsv") as beside, open(beside, "w", encoding="utf-8", newline="\n") as table:
        table.write("\t".join(COLUMNS) + "\n")
        table.writelines("\t".join({**row, "audio": f"{back}/{row['audio']}"}.values()) + "\n" for row in rows)


def prepare(options: argparse.Namespace) -> int:
    """Read the corpus' tables, tell which files are missing, and make the units of the others."""
    start = time.monotonic()
    rows = read_corpus(options.corpus)
    present = [row for row in rows if (options.corpus / row["audio"]).is_file()]
    missing = [row["audio"] for row in rows if not (options.corpus / row["audio"]).is_file()]
    if not present:
        raise UserError(
            f"{options.corpus}: holds none of the {len(rows)} files that wav.scp lists, such as {missing[:1]}"
        )
    write_meta(present, options.corpus, options.out)
    files = [AudioFile(row["utt"], options.corpus / row["audio"], row["audio"]) for row in present]
    name = re.sub(r"[^\w.-]+", "-", Path(options.features).name)
    with progress_bar() as progress:
        report = extract_units(
            AudioList(files, rows={row["utt"]: row for row in present}),
            options.out / f"{name}.parquet",
            features=options.features,
            clusters=options.clusters,
            quantizer=options.quantizer,
            alignments=options.alignments,
            seed=options.seed,
            progress=progress,
        )
    print_report(report, time.monotonic() - start)
    if missing:
        more = f"\n  and {len(missing) - NAMES_SHOWN} more" if len(missing) > NAMES_SHOWN else ""
        names = "".join(f"\n  {name}" for name in missing[:NAMES_SHOWN])
        print(f"listed in wav.scp, but not on disk ({len(missing)} of {len(rows)}):{names}{more}", file=sys.stderr)
    return 1 if missing or report.failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, metavar="CORPUS")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"where to write ({OUT} by default)")
    parser.add_argument("--features", default="logmel", help="logmel (the default), mfcc, or BUNDLE:LAYER")
    parser.add_argument("--clusters", type=int, default=None, help="size of the vocabulary (100)")
    parser.add_argument("--quantizer", type=Path, help="a quantizer that an earlier run saved, instead of fitting one")
    parser.add_argument("--alignments", type=Path, help="phone times: a TSV `utt start end phone`, TextGrids or .lab")
    parser.add_argument("--seed", type=int, default=0)
    try:
        return prepare(parser.parse_args(arguments))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
