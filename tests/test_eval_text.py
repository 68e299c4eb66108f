"""SQuAD and TriviaQA: the rows they read, the prompts they send, how they normalise, score and refuse."""

import json
import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from eval import common, squad, triviaqa
from eval.text import first_phrase, plain_words

PROTOCOLS = ["paper", "standard"]
QA = {"id": "q1", "question": "Who?", "is_impossible": False, "answers": [{"text": "Rollo", "answer_start": 0}]}
NO_QA = {
    "id": "q2", "question": "Why?", "is_impossible": True, "answers": [],
    "plausible_answers": [{"text": "the Duchy", "answer_start": 3}],
}  # fmt: skip


def squad_json(*questions, context="Rollo led the Duchy.", title="Normans"):
    return {"version": "v2.0", "data": [{"title": title, "paragraphs": [{"context": context, "qas": list(questions)}]}]}


def squad_item(answers=(), plausible=(), id="q"):
    return squad.Item(id, "Title", "A passage.", "What?", tuple(answers), tuple(plausible))


def trivia_item(*aliases, id="q"):
    return triviaqa.Item(id, "What is it?", aliases)


def right(task, item, text, protocol):
    """Whether a generated text answers an item."""
    return task.is_correct(task.extract(text, protocol), item, protocol)


def answering(texts):
    """In place of common.generate_texts: texts by item id, cut as the real one cuts them."""

    def generate_texts(model, tokenizer, prompts, max_new_tokens, *, stop=(), **decoding):
        completions = [common.cut(texts[name], stop) for name, _ in prompts]
        return [
            {"prompt_id": "0" * 16, "completion": text, "new_tokens": len(text), "finished": True}
            for text in completions
        ]

    return generate_texts


def scored(task, items, texts, protocol):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "generate_texts", answering(texts))
        return task.evaluate(None, None, items, protocol=protocol)


# --- normalisation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, phrase",
    [
        ("The Normans", "normans"), ("an answer", "answer"), ("A", ""), ("theatre", "theatre"), ("a the an", ""),
        ("Paris.", "paris"), ("Paris, France", "paris"), ("one\ntwo", "one"), ("3.5", "3"), ("1,000", "1"),
        ("$10", "10"), ("10%", "10"), ("-3", "3"), ("3/4", "34"), ("well-known", "wellknown"), ("it's", "its"),
        ("10th–11th", "10th11th"), ("“Normans”", "normans"), ("Pelé", "pelé"), ("snake_case", "snake_case"),
        ("  two   words ", "two words"), ("A. Lincoln", ""), ("🐎", ""), ("", ""), (".hack", ""), ("İzmir", "izmir"),
    ],
)  # fmt: skip
def test_first_phrase(text, phrase):
    assert first_phrase(text) == phrase


@pytest.mark.parametrize(
    "text, words, words_with_articles",
    [
        ("The Normans.", "normans", "the normans"), ("a theatre", "theatre", "a theatre"), ("A.", "", "a"),
        ("U.S.", "us", "us"), ("1,000", "1000", "1000"), ("$10.00", "1000", "1000"), ("-3", "3", "3"),
        ("well-known", "wellknown", "wellknown"), ("10th–11th", "10th–11th", "10th–11th"), ("3/4", "34", "34"),
        ("“the Normans”", "“ normans”", "“the normans”"), ("Pelé", "pelé", "pelé"),
        ("snake_case", "snakecase", "snakecase"),
        (" two\n words\u2028\t", "two words", "two words"), ("", "", ""), ("the", "", "the"),
        ("the-re", "there", "there"),
    ],
)  # fmt: skip
def test_plain_words(text, words, words_with_articles):
    assert plain_words(text) == words
    assert plain_words(text, articles=True) == words_with_articles


words_and_signs = st.text(st.sampled_from("aAnthe tb.,-’'\n\u2028éİß1🐎"), max_size=20) | st.text(max_size=20)


@given(text=words_and_signs)
def test_normalisation_is_idempotent(text):
    assert first_phrase(first_phrase(text)) == first_phrase(text)
    for articles in (False, True):
        once = plain_words(text, articles)
        assert plain_words(once, articles) == once


# --- SQuAD: rows and prompts ---------------------------------------------------------------------------------


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def test_squad_questions_are_read_in_order(tmp_path):
    again = {**QA, "id": "q3", "answers": [{"text": "Rollo"}, {"text": "a leader"}, {"text": "Rollo"}]}
    without = {key: value for key, value in NO_QA.items() if key != "plausible_answers"} | {"id": "q4"}
    data = squad_json(QA, NO_QA)
    data["data"].append({"title": "Next", "paragraphs": [{"context": "One\u2028line.", "qas": [again, without]}]})
    items = squad.read_items(write(tmp_path / "dev.json", data))
    context = "Rollo led the Duchy."
    assert items == [
        squad.Item("q1", "Normans", context, "Who?", ("Rollo",), ()),
        squad.Item("q2", "Normans", context, "Why?", (), ("the Duchy",)),
        squad.Item("q3", "Next", "One\u2028line.", "Who?", ("Rollo", "a leader"), ()),
        squad.Item("q4", "Next", "One\u2028line.", "Why?", (), ()),
    ]


def test_the_squad_prompts():
    item, other = squad_item(["an answer", "two"]), squad_item((), ["a guess"])
    paper = squad.prompt(item, [other], "paper")
    question = f"A passage.\n{squad.INSTRUCTION}\nQuestion: What?\nAnswer:"
    assert "impossible to answer" in squad.INSTRUCTION and squad.INSTRUCTION.endswith(":")
    assert paper == f"{question} impossible to answer\n\n{question}"
    question = "Title: Title\n\nBackground: A passage.\n\nQuestion: What?\n\nAnswer:"
    assert (
        squad.prompt(other, [item, other], "standard")
        == f"{question} an answer\n\n{question} unanswerable\n\n{question}"
    )


BAD_SQUAD = {
    "{": ["dev.json:1:2", "not valid JSON"],
    "[]": ["one JSON object", "got a list"],
    "{}": ["dev.json: key 'data'", "expected a list", "no such key"],
    json.dumps({"data": []}): ["expected at least one question"],
    json.dumps({"data": ["x"]}): ["dev.json: data[0]: expected an object", "a text"],
    json.dumps({"data": [{"title": "T"}]}): ["data[0]: key 'paragraphs'", "expected a list"],
    json.dumps({"data": [{"paragraphs": []}]}): ["data[0]: key 'title' is missing"],
    json.dumps(squad_json(QA, context=3)): ["data[0].paragraphs[0]: key 'context'", "expected a text", "3"],
    json.dumps(squad_json(QA, {**QA, "question": " "})): ["data[0].paragraphs[0].qas[1]: key 'question'"],
    json.dumps(squad_json({**QA, "is_impossible": None})): ["qas[0]: key 'is_impossible'", "true or false", "null"],
    json.dumps(squad_json({**QA, "answers": []})): ["qas[0]: key 'answers'", "0 of them", "is_impossible is false"],
    json.dumps(squad_json({**NO_QA, "answers": QA["answers"]})): ["'answers'", "1 of them", "is_impossible is true"],
    json.dumps(squad_json({**QA, "answers": [{"text": "a"}, {}]})): ["qas[0]: answers[1]: key 'text' is missing"],
    json.dumps(squad_json({**QA, "answers": "a"})): ["qas[0]: key 'answers': expected a list", "a text"],
    json.dumps(squad_json({**NO_QA, "plausible_answers": [{"text": 1}]})): ["plausible_answers[0]: key 'text'", "1"],
    json.dumps(squad_json(QA, QA)): ["dev.json", "'q1'"],
}  # fmt: skip


@pytest.mark.parametrize("content, fragments", BAD_SQUAD.items())
def test_a_bad_squad_file_is_refused_in_one_line_that_names_the_place(tmp_path, capsys, content, fragments):
    assert_refused(capsys, squad, write(tmp_path / "dev.json", content), fragments)


def assert_refused(capsys, task, data, fragments):
    with pytest.raises(SystemExit) as stopped:
        task.main(["--model", str(data.parent / "no model"), "--data", str(data)])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith(f"{task.__name__}: ") and captured.err.count("\n") == 1
    for fragment in fragments:
        assert fragment in captured.err


# --- SQuAD: right and wrong ----------------------------------------------------------------------------------

HAS = squad_item(["the Norman Conquest", "1066"])
NO = squad_item((), ["the Duchy of Normandy"])


@pytest.mark.parametrize(
    "item, text, paper, standard",
    [
        (HAS, " the Norman Conquest", True, True), (HAS, " Norman conquest.", True, True),
        (HAS, "1066\nmore", True, True),
        (HAS, "\n1066", False, False), (HAS, " The answer is 1066.", True, False), (HAS, "1066, or so", True, False),
        (HAS, "Norman Conquest of England", False, False), (HAS, "", False, False), (HAS, "unanswerable", False, False),
        (HAS, "impossible to answer", False, False), (HAS, "The answer is the answer is: a 1066", True, False),
        (NO, "Impossible to answer.", True, False), (NO, "It is impossible to answer", False, False),
        (NO, "the answer is impossible to answer", True, False), (NO, "duchy of Normandy", True, False),
        (NO, "", False, True), (NO, "\nx", False, True), (NO, "The.", False, True), (NO, " Unanswerable.", False, True),
        (NO, "It is unanswerable", False, False), (squad_item(["."]), "", True, True),
        (squad_item([".", "x"]), "", True, False),
        (squad_item(["unanswerable"]), "unanswerable", True, True), (squad_item(["Pelé"]), "Pele", False, False),
    ],
)  # fmt: skip
def test_squad_texts_that_are_right_and_wrong(item, text, paper, standard):
    assert right(squad, item, text, "paper") is paper
    assert right(squad, item, text, "standard") is standard


@pytest.mark.parametrize(
    "item, text, f1",
    [
        (HAS, "the Norman Conquest", 1), (HAS, "Norman Conquest of England", 2 / 3), (HAS, "1066", 1),
        (HAS, "England", 0),
        (HAS, "conquest conquest", 1 / 2), (HAS, "", 0), (NO, "", 1), (NO, "unanswerable", 1),
        (NO, "it is unanswerable", 0),
        (squad_item(["a b b"]), "b b c", 4 / 5), (squad_item(["the", "x y"]), "x", 2 / 3),
        (squad_item(["the"]), "a", 1),
    ],
)  # fmt: skip
def test_f1_of_worked_answers(item, text, f1):
    assert squad.best_f1(squad.extract(text, "standard"), item) == pytest.approx(f1)


bags = st.lists(st.sampled_from("bcdefg"), max_size=6).map(" ".join)


@given(first=bags, second=bags)
def test_f1_is_symmetric_one_on_equal_bags_zero_on_disjoint_ones_and_within(first, second):
    value = squad.f1(first, second)
    assert value == squad.f1(second, first)
    assert 0 <= value <= 1
    same, common_words = sorted(first.split()) == sorted(second.split()), set(first.split()) & set(second.split())
    assert (value == 1) == same
    assert (value == 0) == (not same and not common_words)


@given(first=bags, second=bags)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(first, second):
    bag, shared = second.split(), 0
    for word in first.split():
        if word in bag:
            bag.remove(word)
            shared += 1
    assume(shared)
    precision, recall = shared / len(first.split()), shared / len(second.split())
    assert squad.f1(first, second) == pytest.approx(2 * precision * recall / (precision + recall))


# --- gold texts, and the order of items ----------------------------------------------------------------------

# One line of an answer, as the datasets have them: something in it that is neither sign nor article, and no words
# that the extraction takes for a lead-in.
gold = (
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12)
    .map(str.strip)
    .filter(lambda text: first_phrase(text) and not re.search("answer is|a:|answer:", text.lower()))
)
squad_items = st.lists(
    st.tuples(st.lists(gold, max_size=3), st.lists(gold, max_size=2)), min_size=1, max_size=5
).map(lambda rows: [squad_item(a, () if a else p, id=str(i)) for i, (a, p) in enumerate(rows)])  # fmt: skip
trivia_items = st.lists(st.lists(gold, min_size=1, max_size=3), min_size=1, max_size=5).map(
    lambda rows: [trivia_item(*aliases, id=str(i)) for i, aliases in enumerate(rows)]
)


@given(items=squad_items, protocol=st.sampled_from(PROTOCOLS), data=st.data())
@example(items=[squad_item(["İ1"])], protocol="paper", data=None)
def test_squad_gold_texts_score_100(items, protocol, data):
    pick = (lambda texts: data.draw(st.sampled_from(texts))) if data else (lambda texts: texts[0])
    texts = {item.id: f" {pick(squad.references(item, protocol))}\nQuestion: x" for item in items}
    result = scored(squad, items, texts, protocol)
    assert result["score"] == 100
    assert {part["score"] for part in result["metrics"].values()} == {100}
    assert [row["id"] for row in result["items"]] == [item.id for item in items]


@given(items=trivia_items, protocol=st.sampled_from(PROTOCOLS), data=st.data())
def test_triviaqa_gold_texts_score_100(items, protocol, data):
    golds = [data.draw(st.sampled_from(item.aliases)) for item in items]
    if protocol == "standard":  # its stops end an alias at the first full stop or comma
        golds = [re.sub("[.,]", "", text) for text in golds]
        assume(all(plain_words(text, articles=True) for text in golds))
        assume(all(text == text.strip() for text in golds))
        items = [trivia_item(*item.aliases, text, id=item.id) for item, text in zip(items, golds, strict=True)]
    texts = {item.id: f" {text}\nQ: x" for item, text in zip(items, golds, strict=True)}
    assert scored(triviaqa, items, texts, protocol)["score"] == 100


@given(
    answers=st.lists(st.tuples(gold, st.sampled_from(["", "x", "unanswerable", "The answer is y. Or", "b b c"]))),
    task=st.sampled_from([squad, triviaqa]),
    protocol=st.sampled_from(PROTOCOLS),
    order=st.randoms(),
)  # fmt: skip
def test_the_order_of_items_changes_nothing_but_the_order_of_the_rows(answers, task, protocol, order):
    answers = [("b c", "b b c"), *answers]
    if task is triviaqa:
        items = [trivia_item(text, id=str(i)) for i, (text, _) in enumerate(answers)]
    else:
        items = [squad_item([text] if i % 3 else [], id=str(i)) for i, (text, _) in enumerate(answers)]
    texts = {str(i): text for i, (_, text) in enumerate(answers)}
    one_way = scored(task, items, texts, protocol)
    order.shuffle(items)
    other = scored(task, items, texts, protocol)
    assert [row["id"] for row in other["items"]] == [item.id for item in items]
    assert sorted(other.pop("items"), key=lambda row: int(row["id"])) == one_way.pop("items")
    assert other == one_way


def test_squad_metrics_are_split_by_whether_there_is_an_answer():
    items = [
        squad_item(["b c"], id="1"),
        squad_item(["b"], id="2"),
        squad_item(id="3"),
        squad_item(id="4"),
        squad_item(id="5"),
    ]
    texts = {"1": "b", "2": "b", "3": "b", "4": "", "5": "unanswerable"}
    result = scored(squad, items, texts, "standard")
    metrics = {name: (round(part["score"], 4), part["n"]) for name, part in result["metrics"].items()}
    assert (result["score"], result["n"], result["metric"]) == (60, 5, "exact")
    assert metrics == {
        "f1": (73.3333, 5), "HasAns_exact": (50, 2), "HasAns_f1": (83.3333, 2),
        "NoAns_exact": (66.6667, 3), "NoAns_f1": (66.6667, 3),
    }  # fmt: skip
    paper = scored(squad, items[:1], texts, "paper")
    assert (paper["score"], list(paper["metrics"])) == (0, ["HasAns_exact"])


# --- TriviaQA ------------------------------------------------------------------------------------------------

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
    for row in rows:
        lines = json.dumps(row, ensure_ascii=False) + "\n"
        assert triviaqa.read_items(write(tmp_path / "rows.jsonl", lines)) == [HORSE]
        assert triviaqa.read_items(write(tmp_path / "rows.json", [row])) == [HORSE]


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
    assert_refused(capsys, triviaqa, write(tmp_path / name, f"{good}\n{row}\n"), fragments)


@pytest.mark.parametrize("name", ["none.csv", "none.json", "empty.csv", "empty.jsonl"])
def test_a_missing_or_empty_triviaqa_file_is_refused(tmp_path, capsys, name):
    if name.startswith("empty"):
        write(tmp_path / name, "\n")
    assert_refused(capsys, triviaqa, tmp_path / name, [name])


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


def test_a_blank_first_line_ends_a_text_where_the_protocol_says_so():
    blank = {"q": "\n\nA: US"}
    assert scored(triviaqa, [USA], blank, "paper")["score"] == 100
    assert scored(triviaqa, [USA], blank, "standard")["score"] == 0
    assert scored(squad, [squad_item(["US"])], blank, "paper")["score"] == 0


def test_items_that_any_text_gets_right_are_counted_under_paper():
    items = [HORSE, trivia_item("Lincoln", "A. Lincoln", id="l"), trivia_item("hat", id="h")]
    texts = {item.id: "nothing of the kind" for item in items}
    paper = scored(triviaqa, items, texts, "paper")
    assert paper["always_correct"] == 2
    assert [row["correct"] for row in paper["items"]] == [True, True, False]
    standard = scored(triviaqa, items, texts, "standard")
    assert "always_correct" not in standard and standard["score"] == 0


# --- the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_both_commands_write_what_they_print(checkpoint, tmp_path, capsys, protocol):
    dev = write(tmp_path / "dev.json", squad_json(QA, NO_QA, {**QA, "id": "q3"}))
    trivia = write(tmp_path / "trivia.csv", "What is 1?\t['one', '1']\nWhat is 2?\t['two']\n")
    out = tmp_path / "out.json"
    for task, data in ((squad, dev), (triviaqa, trivia)):
        flags = [
            "--model",
            str(checkpoint),
            "--data",
            str(data),
            "--out",
            str(out),
            "--limit",
            "2",
            "--protocol",
            protocol,
        ]
        task.main([*flags, "--max-new-tokens", "5"])
        written = json.loads(out.read_text(encoding="utf-8"))
        printed = capsys.readouterr().out.splitlines()
        assert (written["task"], written["n"]) == (task.__name__.removeprefix("eval."), 2)
        assert written["protocol"] == f"{protocol}, 0-shot, greedy"
        assert written["score"] == 50 * sum(row["correct"] for row in written["items"])
        assert all(
            {"id", "prompt_id", "completion", "prediction", "gold", "correct"} <= set(row) for row in written["items"]
        )
        assert all(row["new_tokens"] <= 5 for row in written["items"])
        assert re.match(rf"{written['task']}: {written['score']:.2f}%  n 2  95% ", printed[0])
        assert [line.split(":")[0].strip() for line in printed[1:] if "%" in line] == list(written["metrics"])
    with pytest.raises(ValueError, match="protocol 'other'"):
        squad.evaluate(None, None, [], protocol="other")
