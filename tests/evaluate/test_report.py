"""metrics.json: exactly the keys that others rely on, strict JSON, whole files, and a table that reads."""

import base64
import json
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from hmm_speech.errors import UserError
from hmm_speech.evaluate.html import write_html
from hmm_speech.evaluate.report import build_metrics, print_metrics, write_metrics

BOUNDARY = {"precision": 0.7, "recall": 0.8, "f1": 0.75, "r_value": 0.77}
LABELS = {"pnmi": 0.64, "phone_purity": 0.6, "cluster_purity": 0.3, "boundary": BOUNDARY}
FULL = {
    "bits_per_frame": 3.0,
    "frames": 8345,
    "parameters": 203123,
    "baselines": {"unigram": 6.5, "bigram": 3.6, "trigram": 3.3},
    "states": LABELS,
    "units": {**LABELS, "pnmi": 0.57},
    "uniform": {"boundary": {**BOUNDARY, "f1": 0.47}},
}
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def printed(metrics) -> str:
    stream = StringIO()
    print_metrics(metrics, Console(file=stream, width=100))
    return stream.getvalue()


def test_keys_and_order_are_those_of_the_design():
    got = build_metrics(**FULL)
    assert list(got) == [
        "bits_per_frame",
        "perplexity",
        "frames",
        "parameters",
        "baselines",
        "states",
        "units",
        "uniform",
    ]
    assert got == {**FULL, "perplexity": 8.0}
    assert list(got["states"]) == list(got["units"]) == list(LABELS)
    assert list(got["states"]["boundary"]) == list(BOUNDARY)


def test_what_does_not_apply_is_null_under_the_same_keys():
    got = build_metrics(bits_per_frame=None, frames=10, parameters=3)

    def leaves(value):
        return [leaf for child in value.values() for leaf in leaves(child)] if isinstance(value, dict) else [value]

    def keys(value):
        return {key: keys(child) for key, child in value.items()} if isinstance(value, dict) else None

    assert keys(got) == keys(build_metrics(**FULL))
    assert [leaf for leaf in leaves(got) if leaf is not None] == [10, 3]


def test_numbers_are_plain():
    got = build_metrics(
        bits_per_frame=torch.tensor(2.0),
        frames=np.int64(5),
        parameters=torch.tensor(7),
        baselines={name: np.float32(1.5) for name in ("unigram", "bigram", "trigram")},
    )
    assert type(got["bits_per_frame"]) is type(got["perplexity"]) is type(got["baselines"]["bigram"]) is float
    assert type(got["frames"]) is type(got["parameters"]) is int
    assert got["perplexity"] == 4.0


def test_what_json_cannot_hold_becomes_null_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="bits_per_frame is inf"), pytest.warns(UserWarning, match="perplexity is inf"):
        got = build_metrics(bits_per_frame=float("inf"), frames=1, parameters=1)
    assert got["bits_per_frame"] is got["perplexity"] is None
    with pytest.warns(UserWarning, match=r"units\.boundary\.f1 is nan"):
        build_metrics(**{**FULL, "units": {"boundary": {"f1": float("nan")}}})
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(tmp_path / "metrics.json", {"bits_per_frame": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_are_refused():
    with pytest.raises(UserError, match=r"states\.boundary\.: unknown keys \['R'\]"):
        build_metrics(**{**FULL, "states": {"boundary": {"R": 1.0}}})


def test_file_reads_back_and_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "run" / "metrics.json"
    metrics = build_metrics(**FULL)
    write_metrics(path, metrics)
    write_metrics(path, metrics)
    assert json.loads(path.read_text()) == metrics
    assert path.read_text().endswith("}\n")
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]


def test_table_shows_the_model_beside_its_baselines():
    text = printed(build_metrics(**FULL))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["this"] == ["this", "model", "3.000", "8.00"]
    assert lines["bigram"] == ["bigram", "3.600", "12.13", "+16.7", "%"]
    assert lines["states"] == ["states", "0.640", "0.600", "0.300", "0.700", "0.800", "0.750", "0.770"]
    assert lines["units"][1] == "0.570"
    assert lines["uniform"] == ["uniform", "-", "-", "-", "0.700", "0.800", "0.470", "0.770"]
    assert "8,345 test frames, 203,123 parameters" in text


def test_table_without_phones_and_without_likelihood():
    metrics = build_metrics(bits_per_frame=None, frames=10, parameters=3)
    text = printed(metrics)
    assert "R-value" not in text
    assert "this model" in text
    scored = printed(build_metrics(**{**FULL, "units": None, "uniform": None}))
    assert "R-value" in scored


def test_table_reads_metrics_json(tmp_path):
    metrics = build_metrics(**FULL)
    write_metrics(tmp_path / "metrics.json", metrics)
    assert printed(json.loads((tmp_path / "metrics.json").read_text())) == printed(metrics)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.sources, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_one_file_with_the_figures_inside(tmp_path):
    (tmp_path / "a.png").write_bytes(PIXEL)
    path = tmp_path / "report.html"
    write_html(path, build_metrics(**FULL), {"States < phones": tmp_path / "a.png"}, title="A & B")
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert page.tags.count("table") == 2
    assert page.sources == ["data:image/png;base64," + base64.b64encode(PIXEL).decode()]
    assert "A &amp; B" in text
    assert "States &lt; phones" in text
    assert "<td>3.600</td>" in text


def test_html_without_phones_or_figures(tmp_path):
    write_html(tmp_path / "report.html", build_metrics(bits_per_frame=1.0, frames=10, parameters=3))
    assert Page((tmp_path / "report.html").read_text()).tags.count("table") == 1


def test_html_names_a_bad_figure(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    for name, message in (("a.png", "is not a PNG file"), ("b.png", "cannot be read")):
        with pytest.raises(UserError, match=message):
            write_html(tmp_path / "report.html", build_metrics(**FULL), {"x": tmp_path / name})
    assert not (tmp_path / "report.html").exists()
