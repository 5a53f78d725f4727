"""Make the phone-labelled flite corpus and its unit files: `python recipes/flite/prepare.py --out outputs/flite`.

Debian's flite reads two chapters of Alice's Adventures in Wonderland and three of Jonah, in three voices at three rates
each, and tells when each phone ends. Written under --out: audio/, meta.tsv, align.tsv, the unit files logmel.parquet
and mfcc.parquet and their quantizers; the two unit files are then copied to --units, by default this folder, where they
ship. logmel_frames.parquet, for the preset `frames`, stays under --out: frames are too large to ship.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from hmm_speech.data.unitfile import Phone, atomic_path
from hmm_speech.errors import UserError
from hmm_speech.units.extract import Report, extract_units

HERE = Path(__file__).resolve().parent
TEXTS = (HERE / "alice.txt", HERE / "jonah.txt")
# kal16 is left out: the times that it prints drift away from its audio by up to 0.12 s
VARIANTS = [(voice, stretch) for stretch in (1.0, 0.9, 1.1) for voice in ("slt", "rms", "awb")]
TEST_ONE_IN = 10  # prime to len(VARIANTS), so that every variant is in the test split
SHORTEST, LONGEST = 8, 16  # words an utterance
CLAUSE_END = re.compile(r"(?<=[.!?,;:)])\s+")
TOLERANCE = 0.006  # seconds between the last phone and the end of the audio: one 5 ms step of the voice, and rounding


class Speech(NamedTuple):
    """What flite is to say."""

    id: str
    voice: str
    stretch: float
    split: str
    text: str

    @property
    def speaker(self) -> str:
        return self.voice if self.stretch == 1 else f"{self.voice}-{self.stretch:g}"


def clauses(text: str) -> Iterator[list[str]]:
    """The words of each clause with their punctuation, without quotes and brackets, which flite might spell."""
    text = re.sub(r"(?<=\w)-\n", "-", text).replace("--", ", ").replace("(", ", ")
    text = re.sub(r"[`\"_\[\]*]|'(?=\s|$|[,.!?;:)])|(?<=\s)'", "", text)
    for clause in CLAUSE_END.split(" ".join(text.split())):
        words = [word for word in clause.replace(")", ",").split() if re.search(r"\w", word)]
        if words:
            yield words


def split_text(text: str) -> list[str]:
    """Cut a text into utterances of SHORTEST to about LONGEST words, at punctuation wherever there is some.

    Sentence ends within an utterance become commas, since flite restarts its clock at each sentence.
    """
    utterances: list[list[str]] = []
    current: list[str] = []
    for words in clauses(text):
        if current and len(current) + len(words) > LONGEST:
            utterances.append(current)
            current = []
        current = current + words
        while len(current) > LONGEST + SHORTEST:
            utterances.append(current[:LONGEST])
            current = current[LONGEST:]
        if len(current) >= SHORTEST:
            utterances.append(current)
            current = []
    if current:
        utterances.append(current)
    lines = []
    for words in utterances:
        line = re.sub(r"[^\w' -]+(?=\s)", ",", " ".join(words).lower())
        lines.append(re.sub(r"[^\w']+$", "", line) + ".")
    return lines


def plan(texts: Sequence[Path] = TEXTS) -> list[Speech]:
    """Give each utterance one voice, one rate and a split; nothing is said twice."""
    variants = itertools.cycle(VARIANTS)
    lines = [(path.stem, line) for path in texts for line in split_text(path.read_text(encoding="utf-8"))]
    return [
        Speech(f"{stem}{n:04d}", *next(variants), "test" if n % TEST_ONE_IN == 0 else "train", line)
        for n, (stem, line) in enumerate(lines, start=1)
    ]


def speak(speech: Speech, folder: Path) -> list[Phone]:
    """Write the wav and return its phones; flite prints one `phone:end` pair for each."""
    import soundfile

    path = folder / f"{speech.id}.wav"
    command = ["flite", "-voice", speech.voice, "--setf", f"duration_stretch={speech.stretch}", "-psdur"]
    with atomic_path(path) as beside:
        done = subprocess.run(
            [*command, "-t", speech.text, "-o", str(beside)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0 or not beside.exists():
            raise UserError(f"flite failed on {speech.text!r} (voice {speech.voice}): {done.stderr.strip()}")
        seconds = soundfile.info(str(beside)).duration
    phones, start = [], 0.0
    for pair in done.stdout.split():
        label, _, end = pair.rpartition(":")
        phones.append(Phone(label, start, float(end)))
        start = float(end)
    if not phones or abs(phones[-1].end - seconds) > TOLERANCE:
        raise UserError(
            f"flite's phones end at {start} s but its audio at {seconds:.3f} s for {speech.text!r} (voice "
            f"{speech.voice}); expected both within {TOLERANCE} s, which Debian's flite 2.2 gives"
        )
    return phones


def write_table(path: Path, header: Sequence[str], rows: Iterator[Sequence[object]]) -> None:
    with atomic_path(path) as beside, open(beside, "w", encoding="utf-8", newline="\n") as out:
        out.write("\t".join(header) + "\n")
        out.writelines("\t".join(map(str, row)) + "\n" for row in rows)


def synthesise(speeches: Sequence[Speech], out: Path) -> None:
    """Write audio/, meta.tsv and align.tsv under `out`."""
    if shutil.which("flite") is None:
        raise UserError("flite: command not found; install it with `apt-get install flite` and run this again")
    folder = out / "audio"
    folder.mkdir(parents=True, exist_ok=True)
    for stray in set(folder.glob("*.wav")) - {folder / f"{speech.id}.wav" for speech in speeches}:
        stray.unlink()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each thread only waits for its flite process
        phones = list(pool.map(lambda speech: speak(speech, folder), speeches))
    write_table(
        out / "meta.tsv",
        ("utt", "speaker", "split", "text"),
        ((speech.id, speech.speaker, speech.split, speech.text) for speech in speeches),
    )
    write_table(
        out / "align.tsv",
        ("utt", "start", "end", "phone"),
        (
            (speech.id, f"{phone.start:.3f}", f"{phone.end:.3f}", phone.label)
            for speech, row in zip(speeches, phones, strict=True)
            for phone in row
        ),
    )


def extract(out: Path, name: str, features: str, clusters: int, keep_frames: bool = False) -> Report:
    """Quantize the corpus under `out` to the unit file `name` there, as `hmm-speech units` does."""
    return extract_units(
        out / "audio",
        out / name,
        features=features,
        hop_ms=20,
        clusters=clusters,
        metadata=out / "meta.tsv",
        alignments=out / "align.tsv",
        keep_frames=keep_frames,
    )


def make_frames(out: Path) -> Report:
    """A unit file with log mel frames under `out`; its units are what k-means makes of them with as many clusters as
    the preset has labels."""
    return extract(out, "logmel_frames.parquet", "logmel", clusters=50, keep_frames=True)


def make_units(out: Path, units: Path, kinds: Sequence[str] = ("logmel", "mfcc")) -> list[Report]:
    """Quantize the corpus under `out` and copy the unit files to `units`."""
    reports = []
    for features in kinds:
        report = extract(out, f"{features}.parquet", features, clusters=100)
        with atomic_path(units / report.out.name) as beside:
            shutil.copyfile(report.out, beside)
        reports.append(report)
    return reports


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "outputs" / "flite", help="default: %(default)s")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS, help="plain texts to read (default: those here)")
    parser.add_argument("--units", type=Path, default=HERE, help="folder for the unit files (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        speeches = plan(options.text)
        print(f"flite says {len(speeches)} utterances", flush=True)
        synthesise(speeches, options.out)
        reports = [*make_units(options.out, options.units), make_frames(options.out)]
        for report in reports:
            print(
                f"{report.out}: {report.utterances} utterances, {report.seconds / 60:.1f} min, {report.frames} frames"
            )
            if report.failed:
                raise UserError(f"{report.out}: these files failed: {report.failed}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
