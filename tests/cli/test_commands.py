"""The `hmm-speech` command on a small trained model: decode, evaluate, sample, bench, info, and users' mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hmm_speech import cli
from hmm_speech.data.synthetic import sample_corpus
from hmm_speech.data.textgrid import write_textgrid
from hmm_speech.data.unitfile import Phone, read_units, write_units
from hmm_speech.errors import UserError
from hmm_speech.inference import segments
from hmm_speech.units.alignments import read_textgrid
from tests import runs

ROOT = Path(__file__).resolve().parents[2]
QUIET = ("topology.labels=4", *runs.NETWORKS, *runs.SMALL[1:])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, unit file) of a model trained for three epochs."""
    folder = tmp_path_factory.mktemp("run")
    units = folder / "units.parquet"
    write_units(sample_corpus(60, 40, 12, 4, seed=0), units)
    runs.train(folder / "run", f"data.path={units}", *QUIET, "trainer.max_epochs=2")
    return folder / "run", units


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(x) for x in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout


def test_evaluate_prints_what_training_wrote(trained):
    folder, units = trained
    said = json.loads(run("evaluate", folder / "checkpoints/best.ckpt", units, "--json"))
    written = json.loads((folder / "metrics.json").read_text())
    assert said.pop("bits_per_frame") == pytest.approx(written.pop("bits_per_frame"), rel=1e-6)
    assert said.pop("perplexity") == pytest.approx(written.pop("perplexity"), rel=1e-5)
    assert said == written


def test_evaluate_writes_a_report(trained, tmp_path):
    folder, units = trained
    assert "bits per frame" in run("evaluate", folder / "checkpoints/best.ckpt", units, "--out", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png;base64,") >= 3 and page.rstrip().endswith("</html>")


def test_decode_parquet(trained, tmp_path):
    folder, units = trained
    run("decode", folder / "checkpoints/best.ckpt", units, "--out", tmp_path)
    rows = pq.read_table(tmp_path / "decoded.parquet").to_pylist()
    corpus = read_units(units)
    assert [row["id"] for row in rows] == [u.id for u in corpus.utterances]
    for row, utterance in zip(rows, corpus.utterances, strict=True):
        assert row["units"] == list(utterance.units) and len(row["states"]) == len(row["units"])
        assert row["labels"] == [state // 3 for state in row["states"]]
        assert row["score"] <= row["log_likelihood"] + 1e-4
        assert row["segments"][0]["start"] == 0
        assert row["segments"][-1]["end"] == pytest.approx(len(row["units"]) / corpus.frame_rate)


def test_decode_textgrid(trained, tmp_path):
    folder, units = trained
    run("decode", folder / "checkpoints/best.ckpt", units, "--out", tmp_path, "--format", "textgrid", "--split", "test")
    corpus = read_units(units)
    assert {x.stem for x in tmp_path.glob("*.TextGrid")} == {u.id for u in corpus.split("test")}
    phones = read_textgrid(tmp_path / f"{corpus.split('test')[0].id}.TextGrid")
    expected = corpus.split("test")[0].phones
    assert [p.label for p in phones] == [p.label for p in expected]
    np.testing.assert_allclose([p[1:] for p in phones], [p[1:] for p in expected], atol=1e-5)


def test_samples_are_reproducible_and_in_the_vocabulary(trained, tmp_path):
    checkpoint = trained[0] / "checkpoints/best.ckpt"
    lines = run("sample", checkpoint, "--num", 3, "--frames", 20, "--seed", 5).splitlines()
    assert len(lines) == 3 and all(len(line.split()) == 21 for line in lines)
    assert lines == run("sample", checkpoint, "--num", 3, "--frames", 20, "--seed", 5).splitlines()
    assert lines != run("sample", checkpoint, "--num", 3, "--frames", 20, "--seed", 6).splitlines()
    run("sample", checkpoint, "--num", 3, "--frames", 20, "--seed", 5, "--out", tmp_path / "s.parquet")
    corpus = read_units(tmp_path / "s.parquet")
    assert [" ".join([u.id, *map(str, u.units)]) for u in corpus.utterances] == lines
    assert corpus.vocabulary == 12 and corpus.utterances[0].phones[-1].end == pytest.approx(0.4)


def test_samples_follow_the_model(trained):
    """Unigram of many samples beside the model's own marginal of the second frame, exact by summing over states."""
    import torch

    from hmm_speech.checkpoint import load
    from hmm_speech.inference import sample

    model = load(trained[0] / "checkpoints/best.ckpt")
    drawn = np.stack([u.units for u in sample(model, 20_000, 2, seed=1).utterances])
    with torch.no_grad():
        first, arcs = model.initial().exp(), model.transition().exp()
        every = torch.arange(model.topology.num_states)
        start = model.emission.predict(every, torch.zeros(len(every), 0, dtype=torch.int64)).exp()
        unigram = first @ start
        pairs = torch.zeros(12, 12)
        for last in range(12):
            after = model.emission.predict(every, torch.full((len(every), 1), last)).exp()
            pairs[last] = (first * start[:, last]) @ arcs @ after
    np.testing.assert_allclose(np.bincount(drawn[:, 0], minlength=12) / 20_000, unigram, atol=0.015)
    found = np.zeros((12, 12))
    np.add.at(found, (drawn[:, 0], drawn[:, 1]), 1 / 20_000)
    np.testing.assert_allclose(found, pairs, atol=0.015)


def test_mistakes_are_told_without_a_traceback(trained, tmp_path, monkeypatch, capsys):
    checkpoint, units = trained[0] / "checkpoints/best.ckpt", trained[1]
    other = tmp_path / "other.parquet"
    write_units(sample_corpus(6, 10, 7, 2, seed=0), other)
    for arguments, message in (
        (("decode", tmp_path / "none.ckpt", units, "--out", tmp_path), "none.ckpt: no such file"),
        (("decode", units, units, "--out", tmp_path), "is no checkpoint"),
        (("decode", checkpoint, other, "--out", tmp_path), "vocabulary of 7 units, the model was trained on 12"),
        (("decode", checkpoint, units, "--out", tmp_path, "--format", "csv"), "--format: got 'csv'"),
        (("decode", checkpoint, units, "--out", units), "is a file, expected a folder"),
        (
            ("decode", checkpoint, units, "--out", tmp_path, "--split", "dev"),
            "split: got 'dev', expected one of train, valid, test",
        ),
        (("evaluate", checkpoint, units, "--out", tmp_path / "r.pdf"), "expected the name of a report ending in .html"),
        (("sample", checkpoint, "--num", 0), "--num: got 0"),
        (("bench", "--threads", 0), "--threads: got 0"),
        (("sample", checkpoint, "--out", units / "in_a_file.parquet"), str(units)),  # the system's own error
    ):
        monkeypatch.setattr(sys, "argv", ["hmm-speech", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr().err
        assert ended.value.code == 1 and message in told and "Traceback" not in told, told


def test_units_of_another_quantizer_are_refused(tmp_path):
    """The same number of units, but not the same units: scores would be nonsense without a word."""
    from types import SimpleNamespace

    from hmm_speech.inference import read_corpus

    corpus = sample_corpus(6, 10, 7, 2, seed=0)
    corpus.made["quantizer"] = "aaaa"
    write_units(corpus, tmp_path / "units.parquet")
    for known, refused in (("bbbb", True), ("aaaa", False), (None, False)):
        model = SimpleNamespace(hparams={"quantizer": known, "vocabulary": 7}, emission=object(), context=None)
        model.hparams = type("Values", (dict,), {"__getattr__": dict.__getitem__})(model.hparams)
        if refused:
            with pytest.raises(UserError, match=r"made by quantizer aaaa, .* by bbbb"):
                read_corpus(model, tmp_path / "units.parquet")
        else:
            assert len(read_corpus(model, tmp_path / "units.parquet").utterances) == 6


def test_an_interrupted_run_says_how_it_goes_on(trained, tmp_path):
    overrides = [f"data.path={trained[1]}", f"hydra.run.dir={tmp_path / 'run'}", *QUIET]
    overrides += ["trainer.max_epochs=100000", "callbacks.early_stopping=null"]
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run behind a shell's &
    )  # fmt: skip
    try:
        for _ in range(1200):
            if (tmp_path / "run/checkpoints/last.ckpt").exists():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stdout + stderr
    said = " ".join([overrides[0], *overrides[2:]])
    said = f"python train.py {said} ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'} hydra.run.dir={tmp_path / 'run'}"
    assert f"go on with: {said}\n" in stderr
    log = (tmp_path / "run/train.log").read_text()
    assert "units.parquet: " in log and "4 labels x 3 states" in log and f"run folder: {tmp_path / 'run'}" in log


@pytest.mark.parametrize("epochs", ["abc", "0", "-1"])
def test_a_number_of_epochs_is_checked_first(epochs):
    command = [sys.executable, str(ROOT / "train.py"), f"trainer.max_epochs={epochs}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "trainer.max_epochs is" in done.stderr and "Traceback" not in done.stderr


def test_bench_measures_and_writes(tmp_path):
    said = run("bench", "--quick", "--seconds", 0, "--out", tmp_path / "bench.json")
    assert "dense" in said and "shared" in said and "…" not in said
    written = json.loads((tmp_path / "bench.json").read_text())
    assert {row["kind"] for row in written["rows"]} == {"dense", "shared"}
    assert all(row["largest_difference"] < 3e-6 and row["ratio"] > 0 for row in written["rows"])


def test_info_names_the_backend():
    assert "native" in run("info")
    done = subprocess.run(
        [sys.executable, "-m", "hmm_speech.cli", "info"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "HMM_SPEECH_NO_NATIVE": "1"},
    )  # fmt: skip
    assert done.returncode == 1 and "reference: HMM_SPEECH_NO_NATIVE is set" in done.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys, runpy; sys.argv = ['hmm-speech', '--help']\n"
        "try: runpy.run_module('hmm_speech.cli', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'lightning', 'sklearn', 'pyarrow', 'matplotlib', 'hydra', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_segments():
    assert segments(np.array([3, 3, 1]), 50.0) == [Phone("3", 0.0, 0.04), Phone("1", 0.04, 0.06)]
    assert segments(np.array([], dtype=int), 50.0) == []


def test_textgrids_fill_gaps(tmp_path):
    write_textgrid(tmp_path / "x.TextGrid", {"phones": [Phone('a"b', 0.5, 1.0)]}, 2.0)
    assert [(p.label, p.start, p.end) for p in read_textgrid(tmp_path / "x.TextGrid") if p.label == 'a"b'] == [
        ('a"b', 0.5, 1.0)
    ]
    text = (tmp_path / "x.TextGrid").read_text()
    assert "intervals: size = 3" in text and 'a""b' in text
    with pytest.raises(UserError):
        read_units(tmp_path / "x.TextGrid")
