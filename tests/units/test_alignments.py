import pytest

from hmm_speech.data.unitfile import Phone
from hmm_speech.errors import UserError
from hmm_speech.units.alignments import read_alignments, read_lab, read_textgrid

LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 0.8
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 0.8
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 0.8
            text = "say ""hi"" 3"
    item [2]:
        class = "TextTier"
        name = "points"
        xmin = 0
        xmax = 0.8
        points: size = 1
        points [1]:
            number = 0.4
            mark = "x"
    item [3]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 0.8
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.25
            text = "hh"
        intervals [2]:
            xmin = 0.25
            xmax = 0.5
            text = ""
        intervals [3]:
            xmin = 0.5
            xmax = 0.8
            text = "a""y"
"""
SHORT = """File type = "ooTextFile"
"TextGrid"

0
0.8
<exists>
1
"IntervalTier"
"anything"
0
0.8
3
0
0.25
"hh"
0.25
0.5
""
0.5
0.8
"a""y"
"""
EXPECTED = [Phone("hh", 0.0, 0.25), Phone("sil", 0.25, 0.5), Phone('a"y', 0.5, 0.8)]


@pytest.mark.parametrize("text", [LONG, SHORT, LONG.replace('"phones"', '"speaker 1 - phones"')])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_textgrid(tmp_path, text, encoding):
    (tmp_path / "a.TextGrid").write_text(text, encoding=encoding)
    assert read_textgrid(tmp_path / "a.TextGrid") == EXPECTED


@pytest.mark.parametrize("text", ["", "hello", LONG[:-200], LONG.replace("size = 3", "size = 9"), "\x00\xff"])
def test_textgrids_that_are_broken_are_refused_by_name(tmp_path, text):
    (tmp_path / "a.TextGrid").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"a\.TextGrid"):
        read_textgrid(tmp_path / "a.TextGrid")


def test_a_textgrid_without_phones_names_its_tiers(tmp_path):
    (tmp_path / "a.TextGrid").write_text(LONG.replace('"phones"', '"syllables"'))
    with pytest.raises(UserError, match=r"words.*syllables.*expected one named phones"):
        read_textgrid(tmp_path / "a.TextGrid")


@pytest.mark.parametrize(
    "text",
    [
        "0 2500000 hh\n2500000 5000000 sil\n5000000 8000000 a -12.5\n",
        "0.0 0.25 hh\n0.25 0.5 sil\n0.5 0.8 a\n",
        "separator ;\nnfields 1\n#\n 0.25 100 hh\n 0.5 100 sil\n 0.8 100 a\n",
    ],
)
def test_lab(tmp_path, text):
    (tmp_path / "a.lab").write_text(text)
    assert read_lab(tmp_path / "a.lab") == [Phone("hh", 0.0, 0.25), Phone("sil", 0.25, 0.5), Phone("a", 0.5, 0.8)]


@pytest.mark.parametrize("text", ["0 1\n", "zero 1 a\n", "0.5 0.2 a\n", "-1.0 0.2 a\n", "0.0 nan a\n"])
def test_labs_that_are_wrong_are_refused_by_name(tmp_path, text):
    (tmp_path / "a.lab").write_text(text)
    with pytest.raises(UserError, match=r"a\.lab"):
        read_lab(tmp_path / "a.lab")


def test_a_folder_by_the_names_of_its_files(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "one.TextGrid").write_text(SHORT)
    (tmp_path / "two.lab").write_text("0.0 0.25 hh\n")
    alignments = read_alignments(tmp_path)
    assert alignments.get("one") == EXPECTED
    assert alignments.get("two") == [Phone("hh", 0.0, 0.25)]
    assert alignments.get("three") is None


def test_a_folder_with_two_files_for_one_utterance_or_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no \.TextGrid"):
        read_alignments(tmp_path)
    (tmp_path / "one.TextGrid").write_text(SHORT)
    (tmp_path / "one.lab").write_text("0.0 0.25 hh\n")
    with pytest.raises(UserError, match="both for the utterance 'one'"):
        read_alignments(tmp_path)


def test_table_with_columns_and_rows_in_any_order(tmp_path):
    (tmp_path / "a.tsv").write_text(
        "phone\tend\tutt\tstart\tscore\nb\t0.2\tu1\t0.1\t9\nx\t0.7\tu2\t0.0\t9\n\na\t0.1\tu1\t0.0\t9\n"
    )
    alignments = read_alignments(tmp_path / "a.tsv")
    assert alignments.get("u1") == [Phone("a", 0.0, 0.1), Phone("b", 0.1, 0.2)]
    assert alignments.get("u2") == [Phone("x", 0.0, 0.7)]
    assert alignments.get("u3") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("utt\tstart\tend\nu\t0\t1\n", "expected tab-separated utt, start, end, phone"),
        ("utt\tstart\tend\tphone\nu\t0\t0.1\ta\nu\tzero\t1\ta\n", "line 3"),
        ("utt\tstart\tend\tphone\nu\t0\n", "line 2"),
        ("", "header"),
    ],
)
def test_tables_that_are_wrong_are_refused_by_line(tmp_path, text, words):
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_alignments(tmp_path / "a.tsv")


def test_times_that_run_backwards_are_refused_by_utterance(tmp_path):
    (tmp_path / "a.tsv").write_text("utt\tstart\tend\tphone\nu1\t0.5\t0.1\ta\n")
    with pytest.raises(UserError, match=r"a\.tsv: utt 'u1': phone 'a'"):
        read_alignments(tmp_path / "a.tsv").get("u1")


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_alignments(tmp_path / "missing")
