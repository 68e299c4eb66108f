"""reproduce/cases.py: what it shows is what the run did."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import BASE
from hypothesis import given
from hypothesis import strategies as st
from train_runs import run

from data.sft import Sample, load_samples
from data.tokenizer import TextTokenizer
from reproduce import cases, selection
from reproduce.cases import CATEGORIES, Case, Piece

BASE_TOKENIZER = TextTokenizer.from_pretrained(BASE)
TEXTS = st.text(st.sampled_from("ab 1⟦⟧\\`<>&\"'\n\té€"), min_size=1, max_size=4)
PIECES = st.lists(st.builds(Piece, TEXTS, st.just(1), st.booleans()), max_size=12)


def of(text, *boilerplate, end="</s>"):
    """The category of each word or sign of an answer that `|` cuts into tokens."""
    parts = [Piece(piece, 1) for piece in text.split("|")]
    names = cases.categories(parts + ([Piece(end, 1, special=True)] if end else []), boilerplate)
    return [(part.text, name) for part, name in zip(parts, names, strict=False)]


# ------------------------------------------------------------------------------------------ the run, shown


@pytest.fixture(scope="module")
def logged(checkpoint, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged") / "run"
    run(checkpoint, rows, folder, "--log-selection", "--prune-batch", "8")
    return folder


@pytest.fixture(scope="module")
def loaded(logged, rows):
    samples = {sample.id: sample for sample in load_samples(rows, BASE_TOKENIZER)[0]}
    return selection.read_log(logged), samples, BASE_TOKENIZER, cases.rows_by_id(rows, samples)


def test_a_turn_that_only_calls_a_tool_is_shown_as_its_call():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    assert cases.said(call) == json.dumps(call["tool_calls"]) and cases.said({"content": "Yes"}) == "Yes"


def test_the_planes_decisions_are_those_of_the_log_and_its_thresholds_separate_them(loaded):
    found = cases.plane(loaded[0], [step["step"] for step in loaded[0].steps])
    assert [len(step["batches"]) for step in found["steps"]] == [2] * len(loaded[0].steps)
    for step, record in zip(found["steps"], loaded[0].steps, strict=True):
        for key in ("id", "quadrant", "kept", "backfilled"):
            shown = [value for batch in step["batches"] for value in batch[key]]
            assert shown == [sample[key] for sample in record["samples"]]
        for batch in step["batches"]:
            cuts = batch["thresholds"]
            for ppl, ent, quadrant in zip(batch["ppl"], batch["ent"], batch["quadrant"], strict=True):
                assert (quadrant in (1, 2)) <= (ppl >= cuts["ppl_high"])
                assert (quadrant in (2, 3)) <= (ent <= cuts["ent_low"])
    seen, kept = np.array(found["all"]["seen"]), np.array(found["all"]["kept"])
    assert (seen.sum(), kept.sum()) == (found["all"]["samples"], found["all"]["samples"] / 2)
    assert (kept <= seen).all()


@pytest.mark.parametrize("key", ["quadrant", "kept", "backfilled"])
def test_a_log_that_the_scores_contradict_is_refused(loaded, key):
    steps = json.loads(json.dumps(loaded[0].steps))
    steps[1]["samples"][9][key] = 4 if key == "quadrant" else not steps[1]["samples"][9][key]
    if steps[1]["samples"][9] == loaded[0].steps[1]["samples"][9]:
        steps[1]["samples"][9][key] = 1
    with pytest.raises(ValueError, match=f"step 2, place 8 on: {key} differs from what its scores give"):
        cases.plane(selection.Log(loaded[0].config, steps), [2])
    with pytest.raises(ValueError, match="step 99 is not logged: the run has 1 to"):
        cases.plane(loaded[0], [99])


def test_every_trimmed_token_is_counted_once_and_shares_sum_to_one(loaded):
    groups = cases.token_categories(*loaded, draws=50)
    for group, backfilled in (("Q2", False), ("filled in as Q2", True)):
        digits = "".join(sample["tokens"] for sample in cases.trimmed(loaded[0], backfilled))
        found = groups[group]
        assert (found["pruned"], found["kept"]) == (digits.count("0"), digits.count("1"))
        for what in ("pruned", "kept"):
            assert sum(one[what] for one in found["categories"].values()) == found[what]
            shares = sum(one[f"share_of_{what}"] for one in found["categories"].values())
            assert shares == pytest.approx(1 if found[what] else 0, abs=1e-3)
    assert groups["filled in as Q2"]["samples"] + groups["Q2"]["samples"] > 0
    assert cases.token_table(groups).count("| answer span |") == 1


def test_an_answer_span_is_cut_when_a_token_is_pruned_and_gone_when_all_are(loaded):
    ids = [*BASE_TOKENIZER.encode_plain("4213"), BASE_TOKENIZER.eos_id]
    sample = Sample("a", [0, *ids], [-100, *ids])
    visit = {"id": "a", "kept": True, "trimmed": True, "backfilled": False}
    log = [{**visit, "tokens": tokens} for tokens in ("11110", "11010", "00001")]
    steps = [{"step": 1, "samples": log}]
    run = selection.Log(loaded[0].config, steps)
    groups = cases.token_categories(run, {"a": sample}, BASE_TOKENIZER, {"a": {}}, 10)
    assert groups["Q2"]["answer_spans"] == {"samples": 3, "cut": 2, "gone": 1}
    assert groups["Q2"]["categories"]["answer span"]["interval95"] is None  # one row has no spread
    assert "Q2: 2 of 3 answer spans lost a token, 1 all tokens" in cases.token_table(groups)


def test_rows_are_resampled_with_all_their_tokens():
    """Ten rows that agree give a narrow interval, however few tokens each; ten that disagree give a wide one."""
    same, unlike = np.zeros((10, 2, len(CATEGORIES))), np.zeros((10, 2, len(CATEGORIES)))
    same[:, 0, :2], same[:, 1, :2] = (3, 1), (1, 3)
    unlike[:, 0, :2], unlike[:, 1, :2] = 1, 1
    unlike[::2, 0, 0] = unlike[1::2, 1, 0] = 5
    found = cases._shares(same, 200)["categories"][CATEGORIES[0]]
    assert (found["lift"], found["interval95"]) == (3, [3, 3])
    low, high = cases._shares(unlike, 200)["categories"][CATEGORIES[0]]["interval95"]
    assert low < 0.8 < 1.25 < high


def test_the_command_writes_everything_and_reads_a_log_whose_last_line_is_cut(logged, tmp_path, capsys):
    with (logged / "selection.jsonl").open("a") as log:
        log.write('{"step": 99, "samp')
    cases.main([str(logged), "--out", str(tmp_path / "shown"), "--step", "2"])
    assert "| answer span |" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "shown").iterdir()}
    assert {"plane.json", "tokens.json", "quadrants.md", "pruned.md", "pruned.html"} <= names
    assert [step["step"] for step in json.loads((tmp_path / "shown" / "plane.json").read_text())["steps"]] == [2]


def test_a_run_that_cannot_be_shown_is_refused_in_one_line(checkpoint, rows, tmp_path, capsys):
    run(checkpoint, rows, tmp_path / "quiet", "--max-steps", "1")
    run(checkpoint, rows, tmp_path / "random", "--max-steps", "1", "--sample-pruner", "random", "--log-selection")
    messages = {"quiet": "--log-selection writes it", "random": "expected a run of --sample-pruner qtuning, got random"}
    for name, message in messages.items():
        with pytest.raises(SystemExit, match="2"):
            cases.main([str(tmp_path / name)])
        assert message in capsys.readouterr().err


def test_rows_of_a_quadrant_come_with_the_scores_of_their_step(loaded):
    text = cases.quadrant_rows(loaded[0], loaded[3], num=2)
    lines = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([^|]+) \| What is number (\d+)\?", text, re.MULTILINE)
    assert len(lines) >= 6
    for step, ppl, ent, became, number in lines:
        record = next(s for s in loaded[0].steps[int(step) - 1]["samples"] if s["id"] == f"r{number}")
        assert (ppl, ent) == (f"{record['ppl']:.2f}", f"{record['ent']:.2f}")
        assert ("dropped" in became) == (not record["kept"])


# ------------------------------------------------------------------------------------------------- pieces


@given(st.lists(st.integers(0, 2047), max_size=30))
def test_pieces_join_to_the_decoded_text_and_hold_every_token_once(ids):
    parts = cases.pieces(BASE_TOKENIZER, ids)
    assert "".join(part.text for part in parts) == BASE_TOKENIZER.tokenizer.decode(ids, skip_special_tokens=False)
    assert sum(part.num_tokens for part in parts) == len(ids)


@given(st.text(max_size=12))
def test_a_character_of_several_tokens_is_one_piece(text):
    parts = cases.pieces(BASE_TOKENIZER, BASE_TOKENIZER.encode_plain(text))
    assert "\ufffd" in text or not any("\ufffd" in part.text for part in parts)
    assert "".join(part.text for part in parts) == text or "</s>" in text or "<s>" in text


# --------------------------------------------------------------------------------------------- categories


@given(PIECES)
def test_every_piece_has_one_category(parts):
    names = cases.categories(parts)
    assert len(names) == len(parts)
    assert set(names) <= set(CATEGORIES)
    assert [name == "end of text" for name in names] == [part.special for part in parts]


def test_whitespace_around_the_text_is_the_templates_and_special_tokens_are_their_own():
    parts = [Piece(" ", 1), Piece("\n", 1), Piece("It", 1), Piece("<|im_end|>", 1, True), Piece("\n", 1)]
    names = ["chat template", "chat template", "answer span", "end of text", "chat template"]
    assert cases.categories(parts) == names


def test_what_follows_the_mark_is_the_answer():
    found = dict(of("He| has| 2|.| The| answer| is| |3|.|5|.| Bye| all|!"))
    assert [found[word] for word in ("3", "5")] == ["answer span"] * 2
    assert [found[word] for word in (" The", " answer", " is", " ")] == ["answer mark"] * 4
    assert (found[" Bye"], found["!"], found[" 2"]) == ("other words", "formatting", "numbers and symbols")
    found = of("So| 2|\n|####| |1|8", end="<|im_end|>")
    assert [name for _, name in found[2:]] == ["formatting", "answer mark", "answer mark", "answer span", "answer span"]
    assert of("####| Title|\n|and| some| more")[0][1] != "answer mark"  # not the last line: a heading


def test_a_short_answer_is_all_answer_but_for_its_full_stop():
    assert [name for _, name in of("The| red| Sea|.")] == ["answer span"] * 3 + ["formatting"]
    assert {name for _, name in of("The| red| Sea| dries")} == {"other words"}
    found = dict(of("What| fun|!| Oslo| Good| day|.", "What fun!", "Good day."))
    assert found == dict.fromkeys(found, "boilerplate") | {" Oslo": "answer span"}


def test_openings_closings_and_connectives_are_boilerplate():
    for text in ("Here| is| a| list|:", "Sure|,", "Once| upon| a| time", "Dear| Ms| Day|,", "I| hope| this| helps|."):
        assert {name for _, name in of(text + "|\n|more| words| than| three|.")[: text.count("|") + 1]} == {
            "boilerplate"
        }
    found = of("It| rains|.| Therefore|,| we| stay|.| And| so| on|.")
    assert [name for _, name in found[3:6]] == ["boilerplate", "boilerplate", "other words"]
    assert found[9] == (" so", "other words")


def test_signs_are_symbols_in_an_expression_and_punctuation_elsewhere():
    found = of("He| has| |(|1|0|-|8|)|/|2| =| $|1|,|000|,| x|=|y|,| ice|-|cold| (|so|)| 5|.")
    symbols = [text for text, name in found if name == "numbers and symbols"]
    assert symbols == [" ", "(", "1", "0", "-", "8", ")", "/", "2", " =", " $", "1", ",", "000", "=", " 5"]
    assert [text for text, name in found if name == "formatting"] == [",", ",", "-", " (", ")", "."]


def test_a_lists_marks_are_formatting():
    found = of("1|.| Eat| 2| figs|\n|-| Run| far|\n|*| |Rest| well")
    assert [text for text, name in found if name == "formatting"] == ["1", ".", "\n", "-", "\n", "*", " "]
    assert dict(found)[" 2"] == "numbers and symbols"


# ------------------------------------------------------------------------------------------- pruned, shown


@given(PIECES, st.data())
def test_brackets_hold_exactly_the_pruned_pieces(parts, data):
    parts = [Piece(re.sub(r"\s", "x", part.text), 1) for part in parts]
    pruned = data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)))
    split = re.split(r"(?<!\\)((?:\\\\)*)([⟦⟧])", cases.pruned_text(parts, pruned))
    inside, kept, lost = False, "", ""
    for i in range(0, len(split), 3):
        text = re.sub(r"\\(.)", r"\1", split[i] + (split[i + 1] if i + 1 < len(split) else ""))
        kept, lost = (kept, lost + text) if inside else (kept + text, lost)
        inside = not inside
    both = zip(parts, pruned, strict=True)
    texts = {True: "", False: ""}
    for part, flag in both:
        texts[flag] += part.text
    assert (lost, kept) == (texts[True], texts[False])


def test_pruned_whitespace_is_made_visible():
    parts = [Piece(text, 1) for text in ("So", "\n", " 1", " ", "\t", "2")]
    assert cases.pruned_text(parts, [False, True, True, True, True, False]) == "So⟦↵ 1␣⇥⟧2"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.stack, self.lost, self.answer = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.stack.append((tag, dict(attributes).get("class")))
        if tag == "del":
            self.lost.append("")

    def handle_endtag(self, tag):
        self.stack.pop()

    def handle_data(self, text):
        if ("p", "answer") in self.stack:
            self.answer += text
        if self.stack and self.stack[-1][0] == "del":
            self.lost[-1] += text


@given(PIECES, st.data())
def test_html_marks_exactly_the_pruned_pieces_and_its_text_is_the_answer(parts, data):
    parts = [*parts, Piece("<i>&amp;", 1)]
    pruned = data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)))
    record = {"id": "<b>", "step": 1, "quadrant": 2, "backfilled": False, "ppl": 2.0, "ent": 1.0, "tokens": "01"}
    page = cases.pruned_html([Case(record, "<i>&", parts, cases.categories(parts), pruned)])
    found = Page(page.replace('<meta charset="utf-8">', "").replace("<!doctype html>", ""))
    assert found.answer == "".join(part.text for part in parts)
    assert found.lost == [part.text for part, flag in zip(parts, pruned, strict=True) if flag]
    assert "<b>" not in page
    assert "&lt;i&gt;&amp;" in page


def test_a_case_says_which_pieces_lost_a_token(loaded):
    shown = cases.cases(*loaded, num=6)
    assert shown
    for case in shown:
        assert sum(part.num_tokens for part in case.parts) == len(case.record["tokens"])
        if all(part.num_tokens == 1 for part in case.parts):
            assert "".join("01"[not lost] for lost in case.pruned) == case.record["tokens"]
        assert "".join(part.text for part in case.parts).strip().startswith("It is")
    assert all(cases.caption(case).split(",")[0] in cases.pruned_markdown(shown) for case in shown)
