"""data.show and data.legible: a row as it will be trained, legible, escaped, and nothing left out."""

import io
import json
import re
import sys
import unicodedata
from html import unescape

import pytest
from conftest import BASE
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from data import show
from data.legible import MARKS, legible, page, span, token_bytes
from data.sft import Sample, load_samples
from data.tokenizer import TextTokenizer

TINY = TextTokenizer.from_pretrained(BASE)
READ = token_bytes(TINY)
NASTY = "<script>alert(1)</script>\x1b[31m\u202e é 🙂\n& \"quoted\" 'too'"


def sentencepiece():
    """A tokenizer of Llama's kind: "▁" for a space, a token for each byte."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocab = {name: i for i, name in enumerate(names)}
    model = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return TextTokenizer(model, {})


@given(st.text())
@example(NASTY)
def test_the_bytes_of_a_rows_tokens_are_its_text(text):
    assert b"".join(map(READ, TINY.encode_plain(text))) == text.encode()


@given(st.text(alphabet="ab ▁é🙂"))
def test_sentencepiece_tokens_stand_for_spaces_and_bytes(text):
    tokenizer = sentencepiece()
    ids = tokenizer.encode_plain(text.replace(" ", "▁"))
    assert b"".join(map(token_bytes(tokenizer), ids)) == text.replace("▁", " ").encode()


def test_added_tokens_stand_for_themselves_and_unknown_ids_are_marked():
    assert READ(TINY.eos_id) == b"</s>"
    assert READ(10**6).decode() == "‹no token 1000000›"


@given(st.binary() | st.text())
@example("\x1b[2J")
@example("\u202e\ud800")
@example("é".encode()[:1])
def test_nothing_that_moves_the_cursor_or_the_reading_direction_is_left(data):
    for letter in legible(data).replace(MARKS["\n"], ""):
        assert unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp")
        assert letter in "\u200c\u200d" or unicodedata.category(letter) != "Cf"
    legible(data).encode()  # and any file can hold it


@given(st.binary() | st.text())
@example("<script>alert(1)</script>")
def test_a_piece_of_html_is_its_text_again_when_read(data):
    piece = span(data, "answer", 'a "title" <b>')
    inner = re.fullmatch(r'<span class="answer" title="[^"<>]*">([^<>]*)</span>', piece)[1]
    assert unescape(inner) == legible(data)


@pytest.fixture
def nasty_rows(tmp_path):
    path = tmp_path / "nasty.jsonl"
    rows = [{"instruction": "Say it.", "output": "It."}, {"id": "<b>", "instruction": NASTY, "output": NASTY}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shown(capsys, *argv):
    show.main([str(word) for word in argv])
    return capsys.readouterr().out


def test_the_parts_of_a_row_are_its_masked_prompt_and_its_answer(capsys, nasty_rows):
    out = shown(capsys, nasty_rows, "--model", BASE, "--row", "0")
    (sample, _), _ = load_samples(nasty_rows, TINY)
    text = "".join(legible(READ(token)) for token in sample.input_ids)
    head, prompt, answer = re.fullmatch(r"(row 0: .*)\n\[prompt\]\n([\s\S]*)\[answer\]\n([\s\S]*)\n\n", out).groups()
    assert (prompt + answer).replace("|", "").replace("\n", "") == text.replace("\n", "")
    num_answer = sum(label != -100 for label in sample.labels)
    assert answer.count("|") == num_answer - 1
    assert head == f"row 0: {len(sample.labels) - num_answer} prompt tokens, {num_answer} answer tokens, not cut"


def test_the_first_token_is_never_trained():
    sample = Sample("", [5, 6, 7], [5, -100, 7])
    assert list(show.parts(sample)) == [(False, [0, 1]), (True, [2])]


def test_colour_is_for_terminals_without_no_color(nasty_rows, monkeypatch):
    def printed(is_terminal, no_color):
        stdout = io.StringIO()
        stdout.isatty = lambda: is_terminal
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setenv("NO_COLOR", no_color)
        show.main([str(nasty_rows), "--model", str(BASE), "--row", "<b>"])
        return stdout.getvalue()

    assert "\033" not in printed(True, "1")
    assert "\033" not in printed(False, "")
    coloured = printed(True, "")
    assert show.SHADES[0] in coloured
    codes = "|".join(map(re.escape, (show.DIM, *show.SHADES, show.RESET)))
    assert "\033" not in re.sub(codes, "", coloured)  # the row's own escape codes are marked


def test_a_cut_row_says_how_long_it_was(capsys, nasty_rows):
    sample = load_samples(nasty_rows, TINY)[0][1]
    whole = len(sample.input_ids)
    assert f"cut, 20 of {whole} tokens" in shown(capsys, nasty_rows, "--model", BASE, "--row", "1", "--max-length", 20)
    exact = shown(capsys, nasty_rows, "--model", BASE, "--row", "<b>", "--max-length", whole)
    assert "not cut" in exact


def test_ids_and_labels_are_listed_on_request(capsys, nasty_rows):
    out = shown(capsys, nasty_rows, "--model", BASE, "--row", "0", "--ids")
    sample = load_samples(nasty_rows, TINY)[0][0]
    listed = [tuple(map(int, line.split()[:3])) for line in out.split("token\n")[1].strip("\n").split("\n")]
    assert listed == list(zip(range(len(sample.labels)), sample.input_ids, sample.labels, strict=True))


def test_the_page_holds_every_token_escaped_and_loads_nothing(capsys, nasty_rows, tmp_path):
    shown(capsys, nasty_rows, "--model", BASE, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and "<b>" not in text and "\x1b" not in text and "\u202e" not in text
    assert not re.search(r"https?:|src=|href=|url\(|@import", text)
    samples, _ = load_samples(nasty_rows, TINY)
    found = [unescape(re.sub("<[^>]*>", "", row)) for row in re.findall(r'<pre class="row">(.*?)</pre>', text, re.S)]
    assert found == ["".join(legible(READ(token)) for token in sample.input_ids) for sample in samples]
    titles = re.findall(r'class="(answer|prompt)[^"]*" title="position \d+, id (\d+), label (-?\d+)"', text)
    expected = [pair for s in samples for pair in zip(s.input_ids, s.labels, strict=True)]
    assert [(int(token), int(label)) for _, token, label in titles] == expected
    assert all((kind == "prompt") == (label == "-100") for kind, _, label in titles)


def test_without_a_row_the_first_three_are_shown(capsys, rows):
    out = shown(capsys, rows, "--model", BASE)
    assert re.findall(r"^row (\w+):", out, re.M) == ["r0", "r1", "r2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--row", "r99"], "--row r99: {rows} has no such id, and 40 usable rows, numbered from 0"),
        (["--row", "40"], "--row 40: {rows} has no such id, and 40 usable rows, numbered from 0"),
        (["--template", "nonsense"], "nonsense"),
        (["--max-length", "1"], "max_length"),
    ],
)
def test_wrong_input_ends_with_one_line_and_status_2(capsys, rows, argv, message):
    with pytest.raises(SystemExit) as ended:
        show.main([str(rows), "--model", str(BASE), *argv])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message.format(rows=rows) in error and error.startswith("data.show: ") and error.count("\n") == 1


def test_a_pages_title_is_escaped():
    assert "<title>&lt;/title&gt;</title>" in page("</title>", "")
