"""TriviaQA: the rows it reads, the prompts it sends, which texts are correct, its scores and its command."""

import json
import re

import pytest
from eval_cases import (
    PROTOCOLS,
    assert_command_writes_what_it_prints,
    assert_only_the_rows_are_reordered,
    assert_refused,
    protocols,
    right,
    scored,
    short_answers,
    write,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from eval import triviaqa
from eval.text import without_punctuation


def trivia_item(*aliases, id="q"):
    return triviaqa.Item(id, "What is it?", aliases)


# --- rows and prompts ----------------------------------------------------------------------------------------


HORSE = triviaqa.Item("7", "What is a Garron?", ("Horse", "Equus, caballus", "🐎"))


def test_the_forms_of_triviaqa_rows_are_read_alike(tmp_path):
    aliases = ["Equus, caballus", "🐎", "Horse"]
    answer = {
        "value": "Horse",
        "aliases": aliases,
        "normalized_aliases": ["x"],
        "normalized_value": "horse",
        "type": "W",
    }
    rows = [
        {"question": "What is a Garron?", "question_id": "7", "answer": answer},
        {"question": "What is a Garron?", "id": 7, "answer": "Horse", "aliases": aliases},
        {"context": "Question: What is a Garron?\nAnswer:", "id": "7", "answer": "Horse", "aliases": aliases},
    ]
    expected = triviaqa.Item("7", HORSE.question, tuple(aliases), "Horse")
    assert expected.names == HORSE.names == HORSE.aliases
    for row in rows:
        lines = json.dumps(row, ensure_ascii=False) + "\n"
        assert triviaqa.read_items(write(tmp_path / "rows.jsonl", lines)) == [expected]
        assert triviaqa.read_items(write(tmp_path / "rows.json", [row])) == [expected]


def test_triviaqa_csv_rows_are_read(tmp_path):
    lines = [
        "What is a Garron?\t['Horse', \"Equus, caballus\", '🐎']",
        '"What is a ""sou-wester""?"\t"[""It\'s a hat"", \'Hat\\u2028s\']"\r',
        "",
        "Who said \u2028 it?\t['x\x85y']",
    ]
    items = triviaqa.read_items(write(tmp_path / "dev.csv", "\n".join(lines) + "\n"))
    assert items == [
        triviaqa.Item("0", HORSE.question, HORSE.aliases),
        triviaqa.Item("1", 'What is a "sou-wester"?', ("It's a hat", "Hat\u2028s")),
        triviaqa.Item("2", "Who said \u2028 it?", ("x\x85y",)),
    ]
    assert triviaqa.read_items(write(tmp_path / "dev.tsv", "\ufeffQ?\t['a']")) == [triviaqa.Item("0", "Q?", ("a",))]


GOOD_ROW = json.dumps({"question": "2?", "answer": "two", "aliases": ["2"]})
BAD_TRIVIA = {
    ("rows.jsonl", "{"): ["rows.jsonl:2", "not valid JSON"],
    ("rows.jsonl", '{"answer": "x", "aliases": ["x"]}'): ["rows.jsonl:2", "'question' is missing"],
    ("rows.jsonl", '{"question": "?", "aliases": ["x"]}'): ["rows.jsonl:2", "'answer' is missing"],
    ("rows.jsonl", '{"question": "?", "answer": "x"}'): ["rows.jsonl:2", "key 'aliases'", "list of texts", "None"],
    ("rows.jsonl", '{"question": "?", "answer": "x", "aliases": []}'): ["rows.jsonl:2", "key 'aliases'", "[]"],
    ("rows.jsonl", '{"question": "?", "answer": "x", "aliases": ["x", 3]}'): ["rows.jsonl:2", "'aliases'", "3"],
    ("rows.jsonl", '{"question": "?", "answer": {"aliases": ["x"]}}'): ["rows.jsonl:2", "'value' is missing"],
    ("rows.jsonl", '{"question": "?", "answer": {"value": "x"}}'): ["rows.jsonl:2: key 'answer'", "'aliases'", "None"],
    ("rows.jsonl", '{"question": "?", "answer": {"value": 3, "aliases": ["x"]}}'): ["2: key 'answer'", "'value'", "3"],
    ("rows.jsonl", '{"context": "Who?", "answer": "x", "aliases": ["x"]}'): ["rows.jsonl:2", "'context'", "'Who?'"],
    ("rows.csv", "Who?"): ["rows.csv:2", "two fields", "got 1"],
    ("rows.csv", "Who?\tx\ty"): ["rows.csv:2", "two fields", "got 3"],
    ("rows.csv", "Who?\tHorse"): ["rows.csv:2", "Python list", "'Horse'"],
    ("rows.csv", "Who?\t'Horse'"): ["rows.csv:2", "'aliases'", "list of texts"],
    ("rows.csv", "Who?\t[]"): ["rows.csv:2", "'aliases'", "[]"],
    ("rows.csv", "Who?\t['x', 4]"): ["rows.csv:2", "'aliases'", "4"],
    ("rows.csv", "\t['x']"): ["rows.csv:2", "'question'"],
    ("rows.csv", '"Who?\t[\'x\']'): ["rows.csv:", "end of data"],
    ("rows.txt", GOOD_ROW): ["rows.txt", ".json"],
}  # fmt: skip


@pytest.mark.parametrize("file, fragments", BAD_TRIVIA.items())
def test_a_bad_triviaqa_row_is_refused_in_one_line_that_names_it(tmp_path, capsys, file, fragments):
    name, row = file
    good = "Two?\t['2']" if name.endswith(".csv") else GOOD_ROW
    data = write(tmp_path / name, f"{good}\n{row}\n")
    assert_refused(capsys, triviaqa, ["--model", tmp_path / "no model", "--data", data], fragments)


@pytest.mark.parametrize("name", ["none.csv", "none.json", "empty.csv", "empty.jsonl"])
def test_a_missing_or_empty_triviaqa_file_is_refused(tmp_path, capsys, name):
    if name.startswith("empty"):
        write(tmp_path / name, "\n")
    assert_refused(capsys, triviaqa, ["--model", tmp_path / "no model", "--data", tmp_path / name], [name])


def test_the_triviaqa_prompts_add_a_question_mark_whatever_the_question_ends_in():
    item, other = trivia_item("Horse"), triviaqa.Item("b", "Name it", ("a cat", "Cat"))
    assert triviaqa.prompt(item, [], "standard") == "Question: What is it??\nAnswer:"
    assert (
        triviaqa.prompt(item, [other], "standard")
        == "Question: Name it?\nAnswer: a cat\n\nQuestion: What is it??\nAnswer:"
    )
    lead = triviaqa.INSTRUCTION
    assert "The answer is " in lead and "\n" not in lead
    assert triviaqa.prompt(item, [other], "paper") == (
        f"{lead}\nQ: Name it?\nA: The answer is a cat\n\n{lead}\nQ: What is it??\nA:"
    )


# --- correct and wrong ---------------------------------------------------------------------------------------


BUSH = trivia_item("George W. Bush", "the Bush")
LOUIS = trivia_item("St. Louis", "Pelé")
USA = trivia_item("US")


@pytest.mark.parametrize(
    "item, text, paper, standard",
    [
        (HORSE, " horse", True, True), (HORSE, "HORSE.\nQ: x", True, True),
        (HORSE, "The answer is Horse.", True, False),
        (HORSE, "cat", True, False), (HORSE, "", True, False), (HORSE, "Equus", True, False),  # its emoji is everywhere
        (BUSH, "George W. Bush", True, False), (BUSH, "George W Bush", True, True), (BUSH, "GEORGE W", True, False),
        (BUSH, "the bush", True, True), (BUSH, "Bush", True, False),
        (BUSH, "ambush", True, False), (BUSH, "George", False, False),
        (LOUIS, "St. Louis", True, False), (LOUIS, "St Louis", True, True), (LOUIS, "St. Paul", True, False),
        (LOUIS, "Pele", False, False), (LOUIS, "“Pelé”", True, False),
        (LOUIS, "'Pelé'", True, True), (LOUIS, "Saint Louis", False, False),
        (USA, "Russia", True, False), (USA, "u-s", True, True), (USA, "", False, False),
        (USA, "The U.S.", False, False),
        (USA, "\n\nA: US\nA: no", True, False), (USA, "the answer: US", True, False),
        (USA, "The answer is US. A: no", False, False),
        (USA, "answer is x answer is us", True, False), (USA, "Q\nus", False, False),
        (trivia_item("x", "!!!"), "", True, False),
    ],
)  # fmt: skip
def test_triviaqa_texts_that_are_right_and_wrong(item, text, paper, standard):
    assert right(triviaqa, item, text, "paper") is paper
    assert right(triviaqa, item, text, "standard") is standard


def test_standard_knows_the_listed_aliases_alone_and_keeps_their_spaces():
    item = triviaqa.Item("q", "Who?", ("Allium cepa", "x - y", "p  q "), "Onion")
    texts = {
        "onion": False, "allium cepa": True, "Allium  cepa": False, " ALLIUM CEPA! ": True,
        "x y": False, "x  y": True, "x-y": False, "x - y": True, "p  q": False,
    }  # fmt: skip
    assert {text: right(triviaqa, item, text, "standard") for text in texts} == texts
    assert right(triviaqa, item, "It is an onion", "paper") and not right(triviaqa, item, "x  y z", "standard")
    assert triviaqa.prompt(USA, [item], "standard").startswith("Question: Who??\nAnswer: Allium cepa\n\n")
    assert "The answer is Onion\n\n" in triviaqa.prompt(USA, [item], "paper")
    assert triviaqa.judge(item, "", "standard")["gold"] == ["Allium cepa", "x - y", "p  q "]
    assert triviaqa.judge(item, "", "paper")["gold"] == ["Onion", "Allium cepa", "x - y", "p  q "]


# --- scores --------------------------------------------------------------------------------------------------


def test_a_blank_first_line_ends_a_text_where_the_protocol_says_so():
    blank = {"q": "\n\nA: US"}
    assert scored(triviaqa, [USA], blank, "paper")["score"] == 100
    assert scored(triviaqa, [USA], blank, "standard")["score"] == 0


def test_items_that_any_text_gets_right_are_counted_under_paper():
    items = [HORSE, trivia_item("Lincoln", "A. Lincoln", id="l"), trivia_item("hat", id="h")]
    texts = {item.id: "nothing of the kind" for item in items}
    paper = scored(triviaqa, items, texts, "paper")
    assert paper["always_correct"] == 2
    assert [row["correct"] for row in paper["items"]] == [True, True, False]
    standard = scored(triviaqa, items, texts, "standard")
    assert "always_correct" not in standard and standard["score"] == 0


trivia_items = st.lists(st.lists(short_answers, min_size=1, max_size=3), min_size=1, max_size=5).map(
    lambda rows: [trivia_item(*aliases, id=str(i)) for i, aliases in enumerate(rows)]
)


@given(items=trivia_items, protocol=protocols, data=st.data())
def test_triviaqa_gold_texts_score_100(items, protocol, data):
    golds = [data.draw(st.sampled_from(item.aliases)) for item in items]
    if protocol == "standard":  # its stops end an alias at the first full stop or comma
        golds = [re.sub("[.,]", "", text) for text in golds]
        assume(all(map(without_punctuation, golds)))
        assume(all(text == text.strip() for text in golds))
        items = [trivia_item(*item.aliases, text, id=item.id) for item, text in zip(items, golds, strict=True)]
    texts = {item.id: f" {text}\nQ: x" for item, text in zip(items, golds, strict=True)}
    assert scored(triviaqa, items, texts, protocol)["score"] == 100


@given(
    answers=st.lists(st.tuples(short_answers, st.sampled_from(["", "x", "The answer is y. Or", "b b c"]))),
    protocol=protocols,
    order=st.randoms(),
)
def test_the_order_of_items_changes_nothing_but_the_order_of_the_rows(answers, protocol, order):
    answers = [("b c", "b b c"), *answers]
    items = [trivia_item(text, id=str(i)) for i, (text, _) in enumerate(answers)]
    texts = {str(i): text for i, (_, text) in enumerate(answers)}
    assert_only_the_rows_are_reordered(triviaqa, items, texts, protocol, order)


# --- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_command_writes_what_it_prints(checkpoint, tmp_path, capsys, protocol):
    data = write(tmp_path / "trivia.csv", "What is 1?\t['one', '1']\nWhat is 2?\t['two']\n")
    flags = ["--model", checkpoint, "--data", data, "--protocol", protocol]
    written = assert_command_writes_what_it_prints(capsys, triviaqa, tmp_path / "out.json", *flags)
    assert written["protocol"] == f"{protocol}, 0-shot, greedy"
