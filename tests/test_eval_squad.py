"""SQuAD: the rows it reads, the prompts it sends, which texts are correct, its scores and its command."""

import json

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
    write_jsonl,
)
from hypothesis import assume, example, given
from hypothesis import strategies as st

from eval import squad
from eval.text import plain_words

QA = {"id": "q1", "question": "Who?", "is_impossible": False, "answers": [{"text": "Rollo", "answer_start": 0}]}
NO_QA = {
    "id": "q2", "question": "Why?", "is_impossible": True, "answers": [],
    "plausible_answers": [{"text": "the Duchy", "answer_start": 3}],
}  # fmt: skip


def squad_json(*questions, context="Rollo led the Duchy.", title="Normans"):
    return {"version": "v2.0", "data": [{"title": title, "paragraphs": [{"context": context, "qas": list(questions)}]}]}


def squad_item(answers=(), plausible=(), id="q"):
    return squad.Item(id, "Title", "A passage.", "What?", tuple(answers), tuple(plausible))


# --- rows and prompts ----------------------------------------------------------------------------------------


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
    data = write(tmp_path / "dev.json", content)
    assert_refused(capsys, squad, ["--model", tmp_path / "no model", "--data", data], fragments)


HUB = {
    "id": "h1", "title": "Normans", "context": "Rollo led the Duchy.", "question": "Who?",
    "answers": {"text": ["Rollo", "the Rollo", "Rollo"], "answer_start": [0, 0, 0]},
}  # fmt: skip
NO_HUB = HUB | {"id": "h2", "question": "Why?", "answers": {"text": [], "answer_start": []}}


def test_the_hubs_rows_are_read_one_a_line_and_have_no_plausible_answers(tmp_path):
    items = squad.read_items(write_jsonl(tmp_path / "dev.jsonl", [HUB, NO_HUB]))
    assert items == [
        squad.Item("h1", "Normans", "Rollo led the Duchy.", "Who?", ("Rollo", "the Rollo"), ()),
        squad.Item("h2", "Normans", "Rollo led the Duchy.", "Why?", (), ()),
    ]
    published = squad_json(
        {**QA, "id": "h1", "answers": [{"text": "Rollo"}, {"text": "the Rollo"}]},
        {**NO_QA, "id": "h2", "plausible_answers": []},
    )
    assert items == squad.read_items(write(tmp_path / "dev.json", published))
    assert squad.references(items[1], "paper") == ("impossible to answer",)


BAD_HUB = [
    ("{", ["not valid JSON"]),
    ([], ["expected a JSON object"]),
    ({key: value for key, value in HUB.items() if key != "id"}, ["key 'id' is missing"]),
    (HUB | {"id": "x", "context": 3}, ["key 'context'", "expected a text", "3"]),
    ({key: value for key, value in NO_HUB.items() if key != "answers"}, ["key 'answers'", "object", "no such key"]),
    (HUB | {"id": "x", "answers": [{"text": "a"}]}, ["key 'answers'", "expected an object", "a list"]),
    (HUB | {"id": "x", "answers": {}}, ["answers: key 'text'", "expected a list of texts", "no such key"]),
    (HUB | {"id": "x", "answers": {"text": "a"}}, ["answers: key 'text'", "expected a list of texts", "a text"]),
    (HUB | {"id": "x", "answers": {"text": ["a", None]}}, ["answers: key 'text'", "expected a text", "None"]),
    (NO_HUB | {"is_impossible": False}, ["'answers'", "0 of them", "is_impossible is false"]),
    (squad_json(QA), ["key 'id' is missing", "data"]),
]


@pytest.mark.parametrize("row, fragments", BAD_HUB)
def test_a_bad_row_of_the_hubs_form_is_refused_by_line_and_key(tmp_path, capsys, row, fragments):
    bad = row if isinstance(row, str) else json.dumps(row)
    data = write(tmp_path / "dev.jsonl", f"{json.dumps(HUB)}\n{bad}\n")
    assert_refused(capsys, squad, ["--model", tmp_path / "no model", "--data", data], ["dev.jsonl:2: ", *fragments])


# --- correct and wrong ---------------------------------------------------------------------------------------


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
        (squad_item(["_"]), "_", True, True), (squad_item(["_", "0"]), "_", True, False),
        (squad_item(["_", "0"]), "0", True, True), (squad_item(["_", "the"]), "the", True, True),
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
        (squad_item(["the"]), "a", 1), (squad_item(["_"]), "_", 1), (squad_item(["_", "0"]), "_", 0),
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


# --- scores --------------------------------------------------------------------------------------------------


squad_items = st.lists(
    st.tuples(st.lists(short_answers, max_size=3), st.lists(short_answers, max_size=2)), min_size=1, max_size=5
).map(lambda rows: [squad_item(a, () if a else p, id=str(i)) for i, (a, p) in enumerate(rows)])  # fmt: skip


def compared_references(item, protocol):
    """The references that count: SQuAD's script ignores one that normalises to nothing beside others."""
    texts = squad.references(item, protocol)
    return [text for text in texts if protocol == "paper" or plain_words(text)] or texts


@given(items=squad_items, protocol=protocols, data=st.data())
@example(items=[squad_item(["İ1"])], protocol="paper", data=None)
@example(items=[squad_item(["_"])], protocol="standard", data=None)
@example(items=[squad_item(["_", "0"])], protocol="standard", data=None)
def test_squad_gold_texts_score_100(items, protocol, data):
    pick = (lambda texts: data.draw(st.sampled_from(texts))) if data else (lambda texts: texts[0])
    texts = {item.id: f" {pick(compared_references(item, protocol))}\nQuestion: x" for item in items}
    result = scored(squad, items, texts, protocol)
    assert result["score"] == 100
    assert {part["score"] for part in result["metrics"].values()} == {100}
    assert [row["id"] for row in result["items"]] == [item.id for item in items]


@given(
    answers=st.lists(
        st.tuples(short_answers, st.sampled_from(["", "x", "unanswerable", "The answer is y. Or", "b b c"]))
    ),
    protocol=protocols,
    order=st.randoms(),
)
def test_the_order_of_items_changes_nothing_but_the_order_of_the_rows(answers, protocol, order):
    answers = [("b c", "b b c"), *answers]
    items = [squad_item([text] if i % 3 else [], id=str(i)) for i, (text, _) in enumerate(answers)]
    texts = {str(i): text for i, (_, text) in enumerate(answers)}
    assert_only_the_rows_are_reordered(squad, items, texts, protocol, order)


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


def test_a_text_that_begins_with_a_newline_has_an_empty_prediction():
    assert scored(squad, [squad_item(["US"])], {"q": "\n\nA: US"}, "paper")["score"] == 0


# --- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_command_writes_what_it_prints(checkpoint, tmp_path, capsys, protocol):
    data = write(tmp_path / "dev.json", squad_json(QA, NO_QA, {**QA, "id": "q3"}))
    flags = ["--model", checkpoint, "--data", data, "--protocol", protocol]
    written = assert_command_writes_what_it_prints(capsys, squad, tmp_path / "out.json", *flags)
    assert written["protocol"] == f"{protocol}, 0-shot, greedy"
