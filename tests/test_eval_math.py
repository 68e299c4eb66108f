"""MATH: the rows it reads, the prompts it sends, how it finds an answer in a text, its scores and its command."""

import json

import pytest
from eval_cases import (
    PROTOCOLS,
    TEX_SIGNS,
    assert_command_writes_what_it_prints,
    assert_only_the_rows_are_reordered,
    assert_refused,
    protocols,
    scored,
    write,
    write_jsonl,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from eval import math

ROW = {"problem": "What is $1+1$?", "solution": r"It is $\boxed{2}.$", "level": "Level 1", "type": "Algebra"}


def item(gold="2", id="q", solution=None, level=None, subject=None):
    return math.Item(id, "What?", solution or f"So $\\boxed{{{gold}}}$.", gold, level, subject)


# --- rows and prompts ----------------------------------------------------------------------------------------


def test_math_rows_are_read(tmp_path):
    plain = {"problem": "A\u2028line?", "solution": r"\boxed{1} or \boxed{\frac12}"}
    full = {**ROW, "answer": "two", "level": 1, "subject": "Algebra", "unique_id": "test/a/1.json", "id": 5}
    assert math.read_items(write_jsonl(tmp_path / "x.jsonl", [ROW, plain, full, {**ROW, "id": 5}])) == [
        math.Item("0", ROW["problem"], ROW["solution"], "2", "1", "Algebra"),
        math.Item("1", "A\u2028line?", plain["solution"], r"\frac12", None, None),
        math.Item("test/a/1.json", ROW["problem"], ROW["solution"], "two", "1", "Algebra"),
        math.Item("5", ROW["problem"], ROW["solution"], "2", "1", "Algebra"),
    ]


def test_the_math_prompts():
    shot = item("4", solution="Four: $\\boxed{4}$.")
    assert math.prompt(item(), [shot], "paper") == (
        "Problem:\nWhat?\nSolution:\nFour: $\\boxed{4}$.\nFinal Answer: The final answer is $4$.\n\n"
        "Problem:\nWhat?\nSolution:\n"
    )
    assert math.prompt(item(), [shot], "standard") == (
        "Problem:\nWhat?\n\nSolution: Four: $\\boxed{4}$.\n\nProblem:\nWhat?\n\nSolution:"
    )


# --- the answer in a text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, boxed",
    [
        (r"so $\boxed{10}$.", "10"), (r"\boxed{10.}", "10."), (r"\boxed{\$10}", r"\$10"), (r"\boxed{1,000}", "1,000"),
        (r"\boxed{-3}", "-3"), (r"\boxed{10.00}", "10.00"), (r"\boxed{3/4}", "3/4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\frac{\sqrt{3}}{2^{10}}} and", r"\frac{\sqrt{3}}{2^{10}}"), (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\left\{1,2\right.}", r"\left\{1,2\right."), (r"\boxed {5}", "5"), (r"\boxed 5", "5"),
        (r"\boxed\pi", r"\pi"),
        (r"\fbox{7}", "7"), (r"\boxed{ x }", "x"), (r"\boxed{}", ""), (r"\boxed{{5}}", "{5}"),
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{1} and \boxed{2", "1"), (r"\boxed{2", None), (r"\boxed", None), (r"\boxedly{2}", None),
        ("2", None), ("", None),
    ],
)  # fmt: skip
def test_the_last_closed_box_is_found(text, boxed):
    assert math.last_boxed(text) == boxed


@pytest.mark.parametrize(
    "text, outer, inner",
    [
        (r"\boxed{\boxed{5}}", "5", "5"), (r"\boxed{\boxed{5}, \fbox{6}}", "5,6", "6"),
        (r"\boxed{\boxed{3}+2}", "3+2", "3"),
        (r"\boxed{x=\boxed{5}}", "x=5", "5"), (r"\boxed{1} or \boxed{\boxed{\boxed{2}}}", "2", "2"),
        (r"\boxed{\boxed{5}", "5", "5"), (r"\boxed\boxed{5}", "5", "5"), (r"\boxed{5\boxed}", "5", "5\\boxed"),
        (r"\boxed{\boxed{5} and", "5", "5"), (r"\boxed{5} and \boxed{6", "5", "5"), (r"\boxed{", None, None),
    ],
)  # fmt: skip
def test_nested_boxes_are_one_answer_under_standard_and_the_inner_one_counts_under_paper(text, outer, inner):
    assert math.last_boxed(text) == inner
    found = math.extract(text, "standard")
    assert (found and found.replace(" ", "")) == outer
    assert math.extract(text, "paper") == (text if inner is None else inner)


@pytest.mark.parametrize(
    "text, paper, standard",
    [
        (r"\boxed{4}. Problem: 2? \boxed{5}", "5", "4"), (r"Problem: 2? \boxed{5}", "5", None),
        ("So on. Final Answer: The final answer is $7$. I hope.", "7", None), ("The answer is 7", "7", None),
        ("THE ANSWER IS: 7.", "7", None),
        ("It is so.\nFinal Answer: The final answer is 24.", "24", None), ("The final answer is $1.$", "$1", None),
        ("The final answer: 12 apples. x", "12 apples", None),
        ("It is 8. The answer is $x=3$ and. The answer is 9", "x=3", None), ("The answer is 3.5", "3", None),
        ("It is 8. More", "It is 8", None), ("no answer", "no answer", None), ("", "", None),
        ("The answer is", "", None),
        (r"The answer is 6. Or \boxed{7}", "7", "7"),
    ],
)  # fmt: skip
def test_the_answer_is_found_as_the_protocol_finds_it(text, paper, standard):
    assert math.extract(text, "paper") == paper
    assert math.extract(text, "standard") == standard


def test_no_answer_is_wrong():
    assert not math.is_correct(None, "", "paper") and not math.is_correct(None, "", "standard")


# --- scores --------------------------------------------------------------------------------------------------


balanced = st.recursive(
    st.lists(st.sampled_from([sign for sign in TEX_SIGNS if sign not in ("{", "}", "\\")])).map("".join),
    lambda inner: st.tuples(inner, inner).map(lambda parts: f"{parts[0]} {{{parts[1]}}}"),
    max_leaves=4,
)
golds = balanced.filter(str.strip).map(str.strip)


@given(gold=st.lists(golds, min_size=1, max_size=4), protocol=protocols, after=st.text(max_size=9))
def test_gold_texts_score_100(gold, protocol, after):
    assume("\\" not in after)
    items = [item(text, id=str(i)) for i, text in enumerate(gold)]
    texts = {each.id: f" Problem solved. Hence ${each.solution}$ {after}".replace("Problem", "It") for each in items}
    assert [math.last_boxed(each.solution) for each in items] == [each.gold for each in items]
    assert scored(math, items, texts, protocol)["score"] == 100


@given(
    answers=st.lists(st.tuples(golds, st.sampled_from([r"\boxed{2}", "The answer is 2.", "", r"Problem: \boxed{x}"]))),
    protocol=protocols,
    order=st.randoms(),
)  # fmt: skip
def test_the_order_of_items_changes_nothing_but_the_order_of_the_rows(answers, protocol, order):
    answers = [("2", r"\boxed{2}"), *answers]
    items = [item(gold, id=str(i), level=str(i % 3), subject="AB"[i % 2]) for i, (gold, _) in enumerate(answers)]
    texts = {str(i): text for i, (_, text) in enumerate(answers)}
    assert_only_the_rows_are_reordered(math, items, texts, protocol, order)


def test_the_result_is_broken_down_by_level_and_subject():
    items = [
        item("1", "a", level="5", subject="Algebra"),
        item("2", "b", level="5"),
        item("3", "c", subject="Geometry"),
    ]
    result = scored(math, items, {"a": r"\boxed{1}", "b": r"\boxed{x}", "c": ""}, "standard")
    assert (result["score"], result["n"], result["unfinished"]) == (pytest.approx(100 / 3), 3, 1)
    metrics = {name: (part["score"], part["n"]) for name, part in result["metrics"].items()}
    assert metrics == {"level 5": (50, 2), "Algebra": (100, 1), "Geometry": (0, 1)}
    assert [row["prediction"] for row in result["items"]] == ["1", "x", None]
    assert scored(math, items[:1], {"a": ""}, "paper", max_new_tokens=7)["max_new_tokens"] == 7


def test_only_standard_stops_before_the_next_problem():
    runs_on = {"q": r"\boxed{4}. Problem: 2? \boxed{2}"}
    assert scored(math, [item("2")], runs_on, "paper")["score"] == 100
    stopped = scored(math, [item("4")], runs_on, "standard")
    assert (stopped["score"], stopped["items"][0]["completion"]) == (100, r"\boxed{4}. ")


# --- the command ---------------------------------------------------------------------------------------------


BAD_ROWS = {
    "{": ["rows.jsonl:2", "not valid JSON"],
    json.dumps({"solution": r"\boxed{2}"}): ["rows.jsonl:2", "'problem' is missing"],
    json.dumps({"problem": "2?"}): ["rows.jsonl:2", "'solution' is missing"],
    json.dumps({"problem": "2?", "solution": "It is 2."}): ["rows.jsonl:2", "'solution'", r"\boxed{...}", "It is 2."],
    json.dumps({"problem": "2?", "solution": r"\boxed{2"}): ["rows.jsonl:2", "'solution'", r"\boxed{...}"],
    json.dumps({**ROW, "answer": 2}): ["rows.jsonl:2", "'answer'", "expected a text", "2"],
    json.dumps({**ROW, "level": [1]}): ["rows.jsonl:2", "'level'", "[1]"],
    json.dumps({**ROW, "id": "0"}): ["rows.jsonl", "'0'"],
}


@pytest.mark.parametrize("row, fragments", BAD_ROWS.items())
def test_a_bad_math_row_is_refused_in_one_line_that_names_it(tmp_path, capsys, row, fragments):
    data = write(tmp_path / "rows.jsonl", json.dumps(ROW) + f"\n{row}\n")
    assert_refused(capsys, math, ["--model", tmp_path / "no model", "--data", data], fragments)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_command_writes_what_it_prints(checkpoint, tmp_path, capsys, protocol):
    data = write_jsonl(tmp_path / "rows.jsonl", [{**ROW, "problem": f"{i}?"} for i in range(3)])
    shots = write_jsonl(tmp_path / "shots.jsonl", [{**ROW, "problem": "3?"}])
    flags = ["--model", checkpoint, "--data", data, "--protocol", protocol, "--exemplars", shots, "--shots", 1]
    written = assert_command_writes_what_it_prints(capsys, math, tmp_path / "out.json", *flags)
    assert written["protocol"] == f"{protocol}, 1-shot, greedy"
    assert all(row["gold"] == "2" for row in written["items"])
    assert list(written["metrics"]) == ["Algebra", "level 1"]
