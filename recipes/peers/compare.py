"""What hmm_speech and its peers answer in hard cases, and how long they take.

Runs with the peers that are installed and says which are absent; it installs nothing. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import Answer, Problem, cases, truth
from contenders import CONTENDERS, Contender, present

from hmm_speech.hmm import backend

README = Path(__file__).with_name("README.md")
END = "<!-- end -->"
LOG_PARTITION, MARGINALS = 2e-6, 5e-6  # what hmm_speech promises: relative, absolute


@dataclass
class Row:
    """One library's answer to one problem. Errors are NaN where something is NaN, None where it is not offered."""

    case: str
    library: str
    log_partition: str
    error: float | None = None
    marginals: float | None = None
    gradient: float | None = None
    refused: str | None = None

    @property
    def verdict(self) -> str:
        """`ok`, or what is wrong first."""
        if self.refused:
            return self.refused
        if math.isnan(self.error):
            return "log Z NaN"
        if self.error > LOG_PARTITION:
            return "log Z not -inf" if math.isinf(self.error) else f"log Z off by {self.error:.1g}"
        for name, error in (("gradient", self.gradient), ("marginals", self.marginals)):
            if error is not None and not error <= MARGINALS:
                return f"{name} NaN" if math.isnan(error) else f"{name} off by {error:.1g}"
        return "ok"


def log_partition_errors(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """(B,): |found - true| / max(1, |true|), infinite where one of the two alone is infinite."""
    scale = true.abs().clamp(min=1).masked_fill(true.isinf(), 1)
    return torch.where(found == true, 0.0, (found - true).abs() / scale)


def compared(problem: Problem, true: Answer, contender: Contender) -> Row:
    """Ask one library."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = contender.answer(problem)
    except NotImplementedError:
        return Row(problem.name, contender.name, "", refused="not offered")
    except Exception as error:  # whatever a peer raises is its answer
        return Row(problem.name, contender.name, "", refused=f"raises {type(error).__name__}")
    errors = log_partition_errors(answer.log_partition, true.log_partition)
    worst = errors.argmax()
    return Row(
        problem.name,
        contender.name,
        f"{answer.log_partition[worst].item():.10g}",
        errors[worst].item(),
        None if answer.marginals is None else (answer.marginals - true.marginals).abs().max().item(),
        None if answer.gradient is None else (answer.gradient - true.gradient).abs().max().item(),
    )


def rows(quick: bool = False, long: bool = False) -> Iterator[tuple[Problem, Answer, list[Row]]]:
    """Each problem, the truth, and a row for each library that is installed."""
    for problem in cases(quick, long):
        true = truth(problem)
        yield problem, true, [compared(problem, true, contender) for contender in present()]


def _number(error: float | None) -> str:
    return "-" if error is None else "NaN" if math.isnan(error) else "infinite" if math.isinf(error) else f"{error:.1e}"


def case_tables(quick: bool, long: bool) -> str:
    """The summary, then one table a case."""
    names, summary, details = [c.name for c in present()], [], ["### Each case"]
    for problem, true, found in rows(quick, long):
        print(f"  {problem.name}", file=sys.stderr)
        summary.append(f"| {problem.name} | " + " | ".join(row.verdict for row in found) + " |")
        known = ", ".join(f"{z:.10g}" for z in true.log_partition.tolist())
        details += ["", f"**{problem.name}**; log Z: {known}", ""]
        details += ["| | log Z (worst sequence) | error | marginals | gradient |", "|---|---|---|---|---|"]
        for row in found:
            cells = [row.refused or row.log_partition, *map(_number, (row.error, row.marginals, row.gradient))]
            details.append(f"| {row.library} | " + " | ".join(cells) + " |")
    return "\n".join(["| case | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|", *summary, "", *details])


def time_table(quick: bool, long: bool) -> str:
    """Times and memory."""
    from timing import BATCH, measure

    from hmm_speech.benchmark import hardware

    lines = ["| transitions | N | T | | forward, ms | forward + backward, ms | MB |", "|---|---|---|---|---|---|---|"]
    for kind, states, frames, name, forward, both, megabytes in measure(quick):
        lines.append(f"| {kind} | {states} | {frames} | {name} | {forward:.2f} | {both:.2f} | {megabytes:.0f} |")
        print("  " + lines[-1], file=sys.stderr)
    return f"B={BATCH}, float32 (hmmlearn: float64), one core of {hardware()['cpu']}.\n\n" + "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small cases, for tests")
    parser.add_argument("--long", action="store_true", help="T=100,000 too, which takes minutes")
    parser.add_argument("--write", action="store_true", help="also put each part between its markers in README.md")
    parser.add_argument("--only", choices=["cases", "times"], help="one part; both take about a minute")
    options = parser.parse_args(arguments)
    versions = {c.distribution or "torch": c.version() for c in CONTENDERS}
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = [name for name, version in versions.items() if not version]
    head = f"{found}; hmm_speech on {backend().name} kernels." + (f" Absent: {', '.join(absent)}." if absent else "")
    for part, make in (("cases", case_tables), ("times", time_table)):
        if options.only in (None, part):
            text = f"{head}\n\n{make(options.quick, options.long)}"
            print(text, flush=True)
            if options.write:
                begin = f"<!-- {part} by compare.py -->"
                before, rest = README.read_text().split(begin)
                README.write_text(f"{before}{begin}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main()
