"""MATH: the rows it reads, the prompts it sends, how it finds an answer in a text and when two answers are equal."""

import json
import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from eval import common, math

PROTOCOLS = ["paper", "standard"]
ROW = {"problem": "What is $1+1$?", "solution": r"It is $\boxed{2}.$", "level": "Level 1", "type": "Algebra"}


def item(gold="2", id="q", solution=None, level=None, subject=None):
    return math.Item(id, "What?", solution or f"So $\\boxed{{{gold}}}$.", gold, level, subject)


def same(first, second, protocol):
    return math.is_correct(first, second, protocol)


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


# --- one spelling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, spelled",
    [
        ("10.", "10"), (r"\$10", "10"), ("$10$", "10"), ("1,000", "1000"), ("-3", "-3"), ("+3", "3"), ("10.00", "10"),
        ("3/4", r"\frac{3}{4}"), (".5", "0.5"), ("0.50", "0.5"), ("00", "00"), ("-.50", "-0.5"), ("", ""),
        (r"10,\!080", "10080"), (r"11,\! 111,\! 111", "11111111"), ("10{,}080", "10080"), ("1,234,567.80", "1234567.8"),
        ("1, 200", "1, 200"), ("(1,200)", "(1, 200)"), ("12,34", "12, 34"), ("0,123", "0, 123"), ("1,2000", "1, 2000"),
        (r"\dfrac12", r"\frac{1}{2}"), (r"\tfrac{1}{2}", r"\frac{1}{2}"), (r"\frac 59", r"\frac{5}{9}"),
        (r"\frac9{19}", r"\frac{9}{19}"), (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
        (r"\frac{-1}{3}", r"-\frac{1}{3}"),
        (r"1+\frac{-1}{3}", r"1+\frac{-1}{3}"), (r"\frac{-1+x}{3}", r"\frac{-1+x}{3}"),
        (r"\frac\pi2", r"\frac{\pi}{2}"),
        (r"\frac{\frac12}{\sqrt3}", r"\frac{\frac{1}{2}}{\sqrt{3}}"), (r"\frac", r"\frac"), (r"\frac{1", r"\frac{1"),
        (r"2\pi/3", r"\frac{2\pi}{3}"), (r"-\sqrt{3}/2", r"-\frac{\sqrt{3}}{2}"), ("1 3/4", r"1\frac{3}{4}"),
        ("x+1/2", "x+1/2"),
        (r"1\frac{4}{5}", r"1\frac{4}{5}"), (r"11\sqrt2", r"11\sqrt{2}"), (r"\sqrt[3]5", r"\sqrt[3]{5}"),
        (r"\sqrt 13", r"\sqrt{1}3"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})"), (r"90^\circ", "90"), (r"90^{\circ}", "90"),
        ("90°", "90"),
        (r"50\%", "50"), (r"x = 5", "5"), ("f(x)=2x", "2x"), (r"x \in [-2,7]", "[-2, 7]"), ("x=y=2", "x=y=2"),
        ("2x=4", "2x=4"),
        (r"\text{Evelyn}", "Evelyn"), (r"\text{no solution}", "nosolution"), (r"5.4 \text{ cents}", "5.4"),
        ("7 square units", "7"),
        (r"864 \mbox{ inches}^2", "864"), (r"15\mbox{ cm}^2", "15"), ("5 cm", "5"), ("10 apples", "10apples"),
        (r"\text{(C)}", "(C)"),
        (r"1 \text{ or } 2", "1, 2"), (r"52_8", "52_{8}"), ("x^10", "x^{10}"), ("x^{10}", "x^{10}"),
        ("x^{2}3", "x^{2}3"),
        (r"2 \cdot x", "2x"), (r"2\times3", "2*3"), (r"\pi\cdot r", r"\pi r"), (r"\cot x", r"\cot x"), ("1 2", "1 2"),
        ("−3", "-3"), ("3–1", "3-1"), ("2π", r"2\pi"), ("(−∞, 2)", r"(-\infty, 2)"), (r"{5}", "5"),
        (r"{1}+{2}", "{1}+{2}"),
        (r"x \le 5", r"x\leq5"), (r"\$18.90", "18.9"), (r"5!", "5!"), ("é", "é"), ("“a”", "“a”"),
        (r"\lbrace 1 \rbrace", r"\{1\}"),
        (r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\begin{pmatrix}1\\-2\end{pmatrix}"),
        ("x " * 200, "x " * 199 + "x"),
    ],
)  # fmt: skip
def test_answers_are_respelled(text, spelled):
    assert math.normalise(text) == spelled


# Made of the signs that the rules look at, so that they meet in every order.
SIGNS = [
    "\\frac ", "\\dfrac", "\\sqrt", "\\text", "\\mbox", "\\left", "\\right", "\\{", "\\}", "\\!", "\\,", "\\pm",
    "\\cup", "\\in ", "\\pi", "\\infty", "\\cdot", "\\circ", "\\\\", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "{",
    "}", "(", ")", "[", "]", "^", "_", ",", ".", "=", "+", "-", "*", "/", "%", "$", "!", "~", " ", " ", "\n", "\\",
    "−", "π", "°", "0", "1", "12", "500", "3.50", ".5", "1,000", "x", "yz", "cm", " or ", "degrees",
]  # fmt: skip
rubbish = st.lists(st.sampled_from(SIGNS), max_size=14).map("".join) | st.text(max_size=20)


@given(text=rubbish)
@example(text=r"\lef\left t")
@example(text="1, 200")
@example(text=r"\frac\frac\frac")
@example(text=r"\frac{" * 100 + "}{1}" * 100)
def test_normalisation_is_idempotent(text):
    once = math.normalise(text)
    assert math.normalise(once) == once


FEW = ["1", "2", ".0", ",", " ", "\\frac", "{", "}", "\\left", "(", ")", "$"]  # so few that many texts are equal
pieces = rubbish | st.lists(st.sampled_from(FEW), max_size=4).map("".join)


@given(first=pieces, second=pieces, third=pieces)
@example(first="(" * 150 + "1" + ")" * 149, second=r"\{" * 70 + r"\}" * 70, third="1/0")
def test_equality_is_an_equivalence_and_standard_is_the_wider_one(first, second, third):
    for protocol in PROTOCOLS:
        assert same(first, first, protocol)
        assert same(first, second, protocol) == same(second, first, protocol)
        if same(first, second, protocol) and same(second, third, protocol):
            assert same(first, third, protocol)
    if same(first, second, "paper"):
        assert same(first, second, "standard")


numbers = st.fractions(max_denominator=1000)


def spellings(number):
    """Ways to write a fraction that are all one number."""
    top, bottom, sign = abs(number.numerator), number.denominator, "-" if number < 0 else ""
    yield f"{number.numerator}/{bottom}"
    yield rf"\frac{{{number.numerator}}}{{{bottom}}}"
    yield rf"{sign}\dfrac{{{3 * top}}} {{{3 * bottom}}}"
    yield rf"$x = {sign}\tfrac{{{top}}}{{{bottom}}}$."
    yield rf"\left({sign}\frac{{{top}}}{{{bottom}}}\right)\text{{ cm}}^2"
    if top >= bottom:
        yield rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}"
        yield rf"{sign}{top // bottom} {top % bottom}/{bottom}"
    if bottom == 1:
        yield f"{number.numerator:,}"
        yield f"{number.numerator}.00"
        yield rf"\${number.numerator:,}".replace(",", r",\!")
    if 1000 % bottom == 0:
        yield f"{sign}{top * (1000 // bottom) // 1000}.{top * (1000 // bottom) % 1000:03d}"


@given(number=numbers, other=numbers, data=st.data())
def test_numbers_are_compared_as_exact_rationals(number, other, data):
    first, second = data.draw(st.sampled_from([*spellings(number)])), data.draw(st.sampled_from([*spellings(other)]))
    assert all(same(first, way, "standard") for way in spellings(number))
    assert same(first, second, "standard") == (number == other)


@pytest.mark.parametrize(
    "first, second, paper, standard",
    [
        ("0.5", ".5", True, True), ("0.5", r"\frac12", False, True), ("3/4", "6/8", False, True),
        ("1,000", "1000", True, True),
        ("0.333", r"\frac13", False, False), ("10.00", "10", True, True), ("-3", "3", False, False),
        ("50%", "50", True, True),
        ("1/0", "2/0", False, False), ("1/0", r"\frac{1}{0}", True, True), ("007", "7", False, True),
        ("-0", "0", False, True),
        (r"1\frac12", "3/2", False, True), (r"\frac{1}{-2}", "-0.5", False, True), ("5", "x=5", True, True),
        ("1,-2", "-2, 1", False, True), (r"\{1,2\}", "2, 1", False, True), (r"\{1\}", "1", False, False),
        ("1,1", "1", False, False),
        ("(1,2)", "(2,1)", False, False), ("(1,2)", "[1,2]", False, False), ("(3,4]", r"\left(3, 4\right]", True, True),
        ("(1/2, 3)", r"\left(\frac{1}{2},3\right)", False, True), ("(1,2)", "1,2", False, False),
        ("(C)", r"\text{C}", False, True),
        (r"(0,9)\cup(9,36)", r"(9, 36) \cup (0, 9)", False, True), (r"(0,9)\cup(9,36)", "(0,36)", False, False),
        (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}", False, True),
        (r"\{1\pm\sqrt5,-2\}", r"-2,1+\sqrt5,1-\sqrt5", False, True),
        (r"\pm 3", "-3, 3", False, True), (r"x \equiv 3 \pmod{5}", r"x\equiv3\pmod5", False, False),
        (r"\begin{pmatrix}-1/3\\2\end{pmatrix}", r"\begin{bmatrix} \frac{-1}{3} \\ 2.0 \end{bmatrix}", False, True),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False, False),
        (r"\frac{\sqrt{3}}{3}", r"\sqrt{3}/3", True, True),
        (r"\frac{-\sqrt{3}}{3}", r"-\frac{\sqrt{3}}{3}", True, True),
        ("x=1, y=2", "1,2", False, True), ("x=1 or x=2", "2,1", False, True), ("52_8", "52_{8}", True, True),
        ("52_8", "52", False, False),
        (r"6\text{ PM}", "6", True, True), ("Evelyn", "evelyn", False, False), (r"2\sqrt{5}", r"2 \sqrt 5", True, True),
        ("1,200", "1, 200", False, False), ("", "0", False, False), ("", "", True, True),
        # what is not understood, and so is not equal
        ("2(x+1)", "2x+2", False, False), ("x+1", "1+x", False, False),
        (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}", False, False),
        ("10^3", "1000", False, False), ("50%", "0.5", False, False), ("two", "2", False, False),
        (r"\sqrt{4}", "2", False, False),
    ],
)  # fmt: skip
def test_answers_that_are_equal_and_different(first, second, paper, standard):
    assert same(first, second, "paper") is paper
    assert same(first, second, "standard") is standard


def test_no_answer_is_wrong():
    assert not math.is_correct(None, "", "paper") and not math.is_correct(None, "", "standard")


def test_numbers_and_nestings_past_pythons_limits_are_compared_as_texts():
    for text in ("9" * 5000, "(" * 5000 + ")" * 5000, r"\frac{" * 5000, r"\{" * 149 + "," + r"\}" * 149):
        assert same(text, text + " ", "standard") and not same(text, "1", "standard")


# --- gold texts, and the order of items ----------------------------------------------------------------------


def scored(items, texts, protocol, **more):
    def generate_texts(model, tokenizer, prompts, max_new_tokens, *, stop=(), **decoding):
        completions = [common.cut(texts[name], stop) for name, _ in prompts]
        return [
            {"prompt_id": "0" * 16, "completion": text, "new_tokens": len(text), "finished": bool(text)}
            for text in completions
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "generate_texts", generate_texts)
        return math.evaluate(None, None, items, protocol=protocol, **more)


balanced = st.recursive(
    st.lists(st.sampled_from([sign for sign in SIGNS if sign not in ("{", "}", "\\")])).map("".join),
    lambda inner: st.tuples(inner, inner).map(lambda parts: f"{parts[0]} {{{parts[1]}}}"),
    max_leaves=4,
)
golds = balanced.filter(str.strip).map(str.strip)


@given(gold=st.lists(golds, min_size=1, max_size=4), protocol=st.sampled_from(PROTOCOLS), after=st.text(max_size=9))
def test_gold_texts_score_100(gold, protocol, after):
    assume("\\" not in after)
    items = [item(text, id=str(i)) for i, text in enumerate(gold)]
    texts = {each.id: f" Problem solved. Hence ${each.solution}$ {after}".replace("Problem", "It") for each in items}
    assert [math.last_boxed(each.solution) for each in items] == [each.gold for each in items]
    assert scored(items, texts, protocol)["score"] == 100


@given(
    answers=st.lists(st.tuples(golds, st.sampled_from([r"\boxed{2}", "The answer is 2.", "", r"Problem: \boxed{x}"]))),
    protocol=st.sampled_from(PROTOCOLS),
    order=st.randoms(),
)  # fmt: skip
def test_the_order_of_items_changes_nothing_but_the_order_of_the_rows(answers, protocol, order):
    answers = [("2", r"\boxed{2}"), *answers]
    items = [item(gold, id=str(i), level=str(i % 3), subject="AB"[i % 2]) for i, (gold, _) in enumerate(answers)]
    texts = {str(i): text for i, (_, text) in enumerate(answers)}
    one_way = scored(items, texts, protocol)
    order.shuffle(items)
    other = scored(items, texts, protocol)
    assert [row["id"] for row in other["items"]] == [each.id for each in items]
    assert sorted(other.pop("items"), key=lambda row: int(row["id"])) == one_way.pop("items")
    assert other == one_way


def test_the_result_is_broken_down_by_level_and_subject():
    items = [
        item("1", "a", level="5", subject="Algebra"),
        item("2", "b", level="5"),
        item("3", "c", subject="Geometry"),
    ]
    result = scored(items, {"a": r"\boxed{1}", "b": r"\boxed{x}", "c": ""}, "standard")
    assert (result["score"], result["n"], result["unfinished"]) == (pytest.approx(100 / 3), 3, 1)
    metrics = {name: (part["score"], part["n"]) for name, part in result["metrics"].items()}
    assert metrics == {"level 5": (50, 2), "Algebra": (100, 1), "Geometry": (0, 1)}
    assert [row["prediction"] for row in result["items"]] == ["1", "x", None]
    assert scored(items[:1], {"a": ""}, "paper", max_new_tokens=7)["max_new_tokens"] == 7


def test_only_standard_stops_before_the_next_problem():
    runs_on = {"q": r"\boxed{4}. Problem: 2? \boxed{2}"}
    assert scored([item("2")], runs_on, "paper")["score"] == 100
    stopped = scored([item("4")], runs_on, "standard")
    assert (stopped["score"], stopped["items"][0]["completion"]) == (100, r"\boxed{4}. ")


# --- rows, prompts, the command line -------------------------------------------------------------------------


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


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
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(ROW) + "\n" + row + "\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        math.main(["--model", str(tmp_path / "no model"), "--data", str(data)])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("eval.math: ") and captured.err.count("\n") <= 2  # 2: it says that it is 0-shot
    for fragment in fragments:
        assert fragment in captured.err


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_command_writes_what_it_prints(checkpoint, tmp_path, capsys, protocol):
    data = write_jsonl(tmp_path / "rows.jsonl", [{**ROW, "problem": f"{i}?"} for i in range(3)])
    shots, out = write_jsonl(tmp_path / "shots.jsonl", [{**ROW, "problem": "3?"}]), tmp_path / "out.json"
    flags = ["--model", checkpoint, "--data", data, "--out", out, "--limit", 2, "--protocol", protocol]
    math.main([str(flag) for flag in [*flags, "--exemplars", shots, "--shots", 1, "--max-new-tokens", 5]])
    written, printed = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out.splitlines()
    assert (written["task"], written["n"], written["protocol"]) == ("math", 2, f"{protocol}, 1-shot, greedy")
    assert written["score"] == 50 * sum(row["correct"] for row in written["items"])
    assert all(row["new_tokens"] <= 5 and row["gold"] == "2" for row in written["items"])
    assert list(written["metrics"]) == ["Algebra", "level 1"]
    assert re.match(rf"math: {written['score']:.2f}%  n 2  95% ", printed[0])
    assert [line.split(":")[0].strip() for line in printed[1:] if "%" in line] == ["Algebra", "level 1"]
