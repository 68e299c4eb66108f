"""GSM8K: the rows it reads, the prompts it sends, how it finds and compares numbers, its command."""

import json
import re

import pytest
from eval_cases import (
    CONTEXT,
    assert_refused,
    byte_model,
    byte_tokenizer,
    protocols,
    save_byte_model,
    write,
    write_jsonl,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from eval import generation, gsm8k
from eval.common import prompt_id

MODEL, TOKENIZER = byte_model(), byte_tokenizer()


# --- the number ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, number",
    [
        ("10.", "10"), ("$10", "10"), ("10.00", "10.00"), ("-3", "-3"), ("3.", "3"), (".5", "5"), ("50%", "50"),
        ("no number", None), ("", None), ("two", None),
        ("first 7, then 8 apples", "8"), ("The answer is 18.\n", "18"), ("#### 18", "18"), ("1.5.", "1.5"),
        # quirks of protocol `paper`: neither commas nor subtraction are understood
        ("1,000", "000"), ("$1,234.50", "234.50"), ("16-3", "-3"), ("1/2", "2"), ("1e3", "3"), ("1.2.3", "3"),
        ("18\nQuestion: what is 2+2?\nAnswer: 4", "18"), ("Question: 4", None), ("question: 4", "4"),
        ("18 Question : 4", "4"),
    ],
)  # fmt: skip
def test_paper_extracts_the_last_number_before_the_next_question(text, number):
    assert gsm8k.extract(text) == number


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("#### 10.", "10", "10"), ("#### 10", "10", "10"), ("#### 1,000", "1000", "1000"), ("#### -3", "-3", "-3"),
        ("#### 10.00", "10.00", "10.00"), ("#### 3/4", "3", "4"), ("So 5.\n#### 6\n#### 7", "6", "7"),
        ("no number", None, None), ("", None, None), ("####", None, None), ("####7", None, "7"),
        # quirks of protocol `standard`: strict-match knows no `$`, one full stop is no number but three are
        ("#### $10", None, "10"), ("$10", None, "10"), ("10.", None, "10"), ("It is 10%.", None, "10"),
        ("1,000", None, "1000"), ("-$3.50", None, "-3.50"), ("3/4", None, "4"), ("#### .", None, None),
        ("16-3", None, "-3"), ("18, or so.", None, "18"), ("$18 in all ...", None, ".."),
        ("#### 18\n\nQuestion: 2+2?\nAnswer: #### 4", "18", "18"), ("It is 18.<|im_end|>4", None, "18"),
    ],
)  # fmt: skip
def test_standard_extracts_strictly_and_flexibly(text, strict, flexible):
    assert gsm8k.extract(text, "standard") == strict
    assert gsm8k.extract_flexible(text) == flexible


@pytest.mark.parametrize(
    "prediction, gold, correct",
    [
        ("18", "18", True), ("18.00", "18", True), ("018", "18", True), ("17", "18", False), (None, "18", False),
        ("-3", "3", False), ("0.3333333", "0.3333334", True), ("0.33333", "0.33334", False),
        ("18.0000011", "18", False), ("000", "1000", False), ("9" * 400, "18", False), ("0", "0", True),
    ],
)  # fmt: skip
def test_paper_compares_numbers_as_strings_or_to_a_millionth(prediction, gold, correct):
    assert gsm8k.is_correct(prediction, gold) is correct


@pytest.mark.parametrize(
    "prediction, gold, correct",
    [("18", "18", True), ("18.00", "18", False), ("1000", "1,000", True), ("-3", "3", False), (None, "3", False)],
)
def test_standard_compares_numbers_as_strings(prediction, gold, correct):
    assert gsm8k.is_correct(prediction, gold, "standard") is correct


no_digits = st.text(max_size=40).filter(lambda text: not re.search(r"\d", text) and "Question:" not in text)


@given(before=st.text(max_size=40), number=st.integers(-(10**9), 10**9), after=no_digits, question=st.text(max_size=40))
def test_a_plainly_written_gold_number_is_always_right(before, number, after, question):
    text = f"{before} The answer is {number}{after}"
    assume("Question:" not in text)
    assert gsm8k.is_correct(gsm8k.extract(text), str(number))
    assert gsm8k.extract(f"{text}Question:{question}") == gsm8k.extract(text)


number_like = st.text("0123456789-$.,/ #\n", max_size=20)


@given(text=st.one_of(st.text(max_size=40), number_like, number_like.map("#### {}".format)))
def test_an_extracted_number_is_extracted_from_itself(text):
    paper, strict, flexible = gsm8k.extract(text), gsm8k.extract(text, "standard"), gsm8k.extract_flexible(text)
    assert paper is None or gsm8k.extract(paper) == paper
    number = re.compile(r"(?=.*\d).*[^.]")  # `standard` also takes `..` for one, and takes one stop off `3..`
    assert not (strict and number.fullmatch(strict)) or gsm8k.extract(f"#### {strict}", "standard") == strict
    assert not (flexible and number.fullmatch(flexible)) or gsm8k.extract_flexible(flexible) == flexible


@given(number=st.integers(-(10**9), 10**9), commas=st.booleans())
def test_a_gold_answer_is_right_under_standard_strictly_and_flexibly(number, commas):
    item = gsm8k.parse_item({"question": "?", "answer": f"So 3.\n#### {number:,}" if commas else f"#### {number}"}, "x")
    assert gsm8k.is_correct(gsm8k.extract(item.answer, "standard"), item.gold, "standard")
    assert gsm8k.is_correct(gsm8k.extract_flexible(item.answer), item.gold, "standard")


# --- rows and prompts ----------------------------------------------------------------------------------------


def test_gsm8k_rows_are_parsed(tmp_path):
    rows = [
        {"question": "Q1?", "answer": "He has 48/2 = <<48/2=24>>24.\nSo 70,000.\n#### 70,000"},
        {"id": 7, "question": "Q2?", "answer": "#### -5"},
    ]
    first, second = gsm8k.read_items(write_jsonl(tmp_path / "x.jsonl", rows))
    assert first == gsm8k.Item("0", "Q1?", rows[0]["answer"], "70000")
    assert first.rationale == "He has 48/2 = 24.\nSo 70,000."
    assert second == gsm8k.Item("7", "Q2?", "#### -5", "-5")
    assert second.rationale == ""


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x1e"])
def test_only_a_newline_ends_a_row(tmp_path, separator):
    data = tmp_path / "rows.jsonl"
    rows = [{"question": f"One{separator}two?", "answer": f"So{separator}1.\n#### 1"}] * 2
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert [item.question for item in gsm8k.read_items(data)] == [rows[0]["question"]] * 2


def test_the_gsm8k_prompts_are_the_protocols():
    shots = [gsm8k.Item("a", "Q1?", "Be<<1+2=3>>cause.\nSo.\n#### 3", "3"), gsm8k.Item("b", "Q2?", "Yes.\n#### 4", "4")]
    item = gsm8k.Item("c", "Q?", "#### 5", "5")
    assert gsm8k.prompt(item) == "Question: Q?\nLet's think step by step\nAnswer:"
    assert gsm8k.prompt(item, shots) == (
        "Question: Q1?\nLet's think step by step\nAnswer:\nBecause.\nSo.\nThe answer is 3\n\n"
        "Question: Q2?\nLet's think step by step\nAnswer:\nYes.\nThe answer is 4\n\n"
        "Question: Q?\nLet's think step by step\nAnswer:"
    )
    assert gsm8k.prompt(item, shots, "standard") == (
        "Question: Q1?\nAnswer: Be<<1+2=3>>cause.\nSo.\n#### 3\n\n"
        "Question: Q2?\nAnswer: Yes.\n#### 4\n\n"
        "Question: Q?\nAnswer:"
    )


# --- scores --------------------------------------------------------------------------------------------------


def gsm8k_items(golds):
    return [
        gsm8k.Item(str(i), "How many" + " many" * (5 - i % 6) + f" {i}?", f"So {g}.\n#### {g}", str(g))
        for i, g in enumerate(golds)
    ]


@given(
    golds=st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=7),
    batch_size=st.integers(1, 9),
    wrong=st.sets(st.integers(0, 6)),
    protocol=protocols,
    order=st.randoms(),
)
def test_gold_texts_score_100_and_each_wrong_one_costs_its_share(golds, batch_size, wrong, protocol, order):
    items = gsm8k_items(golds)
    wrong = {i for i in wrong if i < len(items)}
    says = {"paper": " 1 and 2. The answer is {}.", "standard": " 1 and 2.\n#### {}"}[protocol]
    texts = {
        gsm8k.prompt(item, protocol=protocol): says.format(int(item.gold) + (i in wrong))
        for i, item in enumerate(items)
    }
    order.shuffle(items)

    def answering(model, prompts, max_new_tokens, **settings):
        assert all(row[0] == TOKENIZER.bos_id for row in prompts) and len(prompts) <= batch_size
        return [[*TOKENIZER.encode_plain(texts[TOKENIZER.decode(row)]), TOKENIZER.eos_id] for row in prompts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "generate", answering)
        scored = gsm8k.evaluate(MODEL, TOKENIZER, items, protocol=protocol, max_new_tokens=40, batch_size=batch_size)
    assert [row["id"] for row in scored["items"]] == [item.id for item in items]
    assert [row["correct"] for row in scored["items"]] == [int(item.id) not in wrong for item in items]
    assert scored["score"] == pytest.approx(100 * (len(items) - len(wrong)) / len(items))
    assert (scored["n"], scored["unfinished"], scored["protocol"]) == (len(items), 0, f"{protocol}, 0-shot, greedy")
    if protocol == "standard":
        assert scored["metrics"]["flexible"] == {key: scored[key] for key in ("score", "n", "interval95")}


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("bytes") / "model")


def test_gsm8k_command_writes_what_it_prints(folder, tmp_path, capsys):
    rows = [{"question": f"{i}?", "answer": f"So {i}.\n#### {i}"} for i in range(6)]
    data, shots = write_jsonl(tmp_path / "g.jsonl", rows[:4]), write_jsonl(tmp_path / "shots.jsonl", rows[4:])
    out = tmp_path / "g.json"
    flags = ["--model", str(folder), "--data", str(data), "--max-new-tokens", "9", "--out", str(out)]
    gsm8k.main([*flags, "--limit", "3"])
    written = json.loads(out.read_text(encoding="utf-8"))
    assert (written["task"], written["n"], written["protocol"]) == ("gsm8k", 3, "paper, 0-shot, greedy")
    assert [item["gold"] for item in written["items"]] == ["0", "1", "2"]
    assert all(item["new_tokens"] <= 9 for item in written["items"])
    keys = {"id", "prompt_id", "completion", "new_tokens", "finished", "prediction", "gold", "correct"}
    assert set(written["items"][0]) == keys
    captured = capsys.readouterr()
    assert re.search(r"^gsm8k: \S+%  n 3 ", captured.out, re.MULTILINE)
    assert "0-shot; protocol paper has 4 shots" in captured.out
    assert f"limit of tokens: {written['unfinished']}" in captured.out

    gsm8k.main([*flags, "--exemplars", str(shots), "--shots", "1", "--temperature", "0.5", "--seed", "7"])
    shot = json.loads(out.read_text(encoding="utf-8"))
    assert (shot["n"], shot["protocol"]) == (4, "paper, 1-shot, temperature 0.5")
    assert (shot["exemplars"], shot["shots"], shot["seed"]) == (str(shots), 1, 7)
    text = "Question: 4?\nLet's think step by step\nAnswer:\nSo 4.\nThe answer is 4\n\n"
    assert shot["items"][0]["prompt_id"] == prompt_id(f"{text}Question: 0?\nLet's think step by step\nAnswer:")

    gsm8k.main([*flags, "--protocol", "standard", "--exemplars", str(shots), "--shots", "2"])
    standard = json.loads(out.read_text(encoding="utf-8"))
    assert (standard["max_new_tokens"], standard["shots"]) == (9, 2)
    assert standard["protocol"] == "standard, 2-shot, greedy" and standard["metrics"]["flexible"]["n"] == 4
    assert re.search(r"^  flexible: \S+%  n 4 ", capsys.readouterr().out, re.MULTILINE)


BAD_ROWS = {
    '{"question": "2?"': ["data.jsonl:2", "not valid JSON"],
    json.dumps({"question": "2?"}): ["data.jsonl:2", "'answer' is missing"],
    json.dumps({"answer": "#### 2"}): ["data.jsonl:2", "'question' is missing"],
    json.dumps({"question": "2?", "answer": "It is 2"}): ["data.jsonl:2", "'answer'", "####", "It is 2"],
    json.dumps({"question": "2?", "answer": "#### two"}): ["data.jsonl:2", "'answer'", "####", "two"],
    json.dumps({"question": "2?", "answer": 2}): ["data.jsonl:2", "'answer'", "expected a text"],
    json.dumps({"id": "long", "question": "x" * 200, "answer": "#### 2"}): ["item long", f"context of {CONTEXT}"],
}


@pytest.mark.parametrize("row, fragments", BAD_ROWS.items())
def test_a_bad_gsm8k_row_is_refused_in_one_line(folder, tmp_path, capsys, row, fragments):
    data = write(tmp_path / "data.jsonl", json.dumps({"question": "2?", "answer": "#### 2"}) + f"\n{row}\n")
    assert_refused(capsys, gsm8k, ["--model", folder, "--data", data], fragments)
