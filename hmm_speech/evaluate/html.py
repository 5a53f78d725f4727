"""A report on one page of HTML that needs no other file: the tables of the metrics, and the figures inside it."""

import base64
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path

from hmm_speech.data.unitfile import atomic_path
from hmm_speech.errors import UserError
from hmm_speech.evaluate.report import Metrics, has_phones, likelihood_rows, phone_rows, to_json

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #d8dee4 }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
tbody tr:first-child { font-weight: 600; color: #0b5fa5 }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto } figcaption { color: #57606a }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: .85rem }
"""
NOTES = """<p>Bits per frame compare only within one unit file. Each n-gram interpolates all lower orders, with weights
tuned on the valid split. PNMI is I(phone; label) / H(phone) over frames. A boundary is a change of label; it counts
as found within 20 ms of a phone boundary, each of which is matched at most once, and the ends of utterances do not
count. Read F1 beside the R-value, which falls with over-segmentation. <em>Uniform</em>: equal segments, as many as
the utterance has phones.</p>"""


def write_html(
    path: str | os.PathLike[str],
    metrics: Metrics,
    figures: Mapping[str, str | os.PathLike[str]] | None = None,
    title: str = "Evaluation",
) -> None:
    """Write the report.

    Args:
        path: the HTML file, replaced as a whole.
        metrics: what :func:`~hmm_speech.evaluate.report.build_metrics` returned.
        figures: PNG files by caption, in the order to show.
        title: heading of the page.

    Raises:
        UserError: a figure that is missing or no PNG file.
    """
    tables = _table("Likelihood", likelihood_rows(metrics))
    if has_phones(metrics):
        tables += _table("Phones", phone_rows(metrics))
    size = f"{metrics['frames']:,} test frames, {metrics['parameters']:,} parameters"
    pictures = "".join(_figure(caption, Path(file)) for caption, file in (figures or {}).items())
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n<p>{size}</p>\n{tables}{NOTES}\n"
        f"{pictures}<h2>metrics.json</h2>\n<pre>{escape(to_json(metrics))}</pre>\n</body>\n</html>\n"
    )
    with atomic_path(path) as beside:
        beside.write_text(page, encoding="utf-8")


def _table(title: str, rows: list[list[str]]) -> str:
    def line(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows[1:])
    return f"<h2>{title}</h2>\n<table>\n<thead>{line(rows[0], 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"


def _figure(caption: str, file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"figures: {file} cannot be read ({error.strerror}); draw it first") from error
    if not data.startswith(b"\x89PNG\r\n"):
        raise UserError(f"figures: {file} is not a PNG file; pass the files that hmm_speech.evaluate.figures writes")
    source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
    caption = escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>\n'
