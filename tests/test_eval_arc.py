"""ARC: the rows it reads, the texts it scores, which choice wins, its command."""

import json
import re

import pytest
import torch
from eval_cases import (
    CONTEXT,
    arc_row,
    assert_refused,
    byte_model,
    byte_tokenizer,
    protocols,
    reference_nll,
    save_byte_model,
    write,
    write_jsonl,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from eval import arc

MODEL, TOKENIZER = byte_model(), byte_tokenizer()


# --- rows and texts ------------------------------------------------------------------------------------------


def test_both_forms_of_arc_rows_are_parsed_alike():
    row = arc_row("q1", "1234", answer="3", stem="Why?", texts=["a", "b", "c", "d"])
    hub = {"id": "q1", "question": "Why?", "answerKey": "3", "choices": {"text": list("abcd"), "label": list("1234")}}
    item = arc.Item("q1", "Why?", ("a", "b", "c", "d"), ("1", "2", "3", "4"), gold=2)
    assert arc.parse_item(row, "q1") == item
    assert arc.parse_item(hub, "q1") == item
    assert arc.parse_item(arc_row(labels="ABCD", answer="D"), "q").gold == 3
    assert arc.parse_item(arc_row(labels="DCBA", answer="D"), "q").gold == 0  # the place in the item's own list


def test_the_arc_texts_are_the_protocols():
    item = arc.parse_item(arc_row(stem="Why?", texts=["a", "b c", "d", "e"]), "q")
    assert arc.choice_texts(item)[1] == "Question: Why?\nAnswer: \nb c"
    assert arc.choice_texts(item, "standard")[1] == "Question: Why?\nAnswer: b c"
    for protocol, counted in (("paper", "Question: Why?\nAnswer: \nb c"), ("standard", " b c")):
        ids, start = arc.scored_ids(item, TOKENIZER, CONTEXT, protocol)[1]
        assert (ids[0], TOKENIZER.decode(ids[start:])) == (TOKENIZER.bos_id, counted)


# --- scores --------------------------------------------------------------------------------------------------


def test_paper_drops_items_without_four_choices_and_counts_them():
    rows = [arc_row("three", "ABC"), arc_row("four", "1234"), arc_row("five", "ABCDE"), arc_row("letters", "ABCD")]
    scored = arc.evaluate(MODEL, TOKENIZER, [arc.parse_item(row, row["id"]) for row in rows])
    assert [row["id"] for row in scored["items"]] == ["four", "letters"]
    assert (scored["n"], scored["dropped"]) == (2, 2)
    assert scored["items"][0]["prediction"] in "1234" and scored["items"][1]["prediction"] in "ABCD"


def test_standard_keeps_three_to_five_choices():
    rows = [arc_row("three", "ABC", "C"), arc_row("five", "ABCDE", "E"), arc_row("numbers", "12345", "5")]
    scored = arc.evaluate(MODEL, TOKENIZER, [arc.parse_item(row, row["id"]) for row in rows], protocol="standard")
    assert [row["id"] for row in scored["items"]] == ["three", "five", "numbers"]
    assert [len(row["nll"]) for row in scored["items"]] == [3, 5, 5]
    assert [row["gold"] for row in scored["items"]] == ["C", "E", "5"]
    assert (scored["n"], scored["dropped"]) == (3, 0)


def test_equal_choices_tie_and_the_first_wins():
    items = [arc.parse_item(arc_row(texts=["same", "same", "same", "same"], answer=key), "q") for key in "ABCD"]
    scored = arc.evaluate(MODEL, TOKENIZER, items, batch_tokens=30)
    assert [row["prediction"] for row in scored["items"]] == ["A"] * 4
    assert [row["correct"] for row in scored["items"]] == [True, False, False, False]


choice = st.text("abcdefgh ", min_size=1, max_size=30).filter(str.strip)
questions = st.lists(st.tuples(choice, st.lists(choice, min_size=4, max_size=4, unique=True)), min_size=1, max_size=4)


@given(questions=questions, batch_tokens=st.integers(1, 400), protocol=protocols, order=st.randoms())
def test_arc_scores_do_not_depend_on_the_order_of_items_or_on_batches(questions, batch_tokens, protocol, order):
    items = [
        arc.parse_item(arc_row(str(i), stem=stem, texts=texts), str(i)) for i, (stem, texts) in enumerate(questions)
    ]
    one_way = {row["id"]: row for row in arc.evaluate(MODEL, TOKENIZER, items, protocol=protocol)["items"]}
    order.shuffle(items)
    other = arc.evaluate(MODEL, TOKENIZER, items, protocol=protocol, batch_tokens=batch_tokens)["items"]
    assert [row["id"] for row in other] == [item.id for item in items]
    for row in other:
        assert row["nll"] == pytest.approx(one_way[row["id"]]["nll"], rel=1e-5)
        assert row["nll"]["ABCD".index(row["prediction"])] == min(row["nll"])
        assert row["prompt_id"] == one_way[row["id"]]["prompt_id"]


def reference_scores(stem, texts, protocol):
    """The definition, one choice at a time: {metric: a number for each choice, the smallest wins}."""
    if protocol == "paper":
        rows = [TOKENIZER.encode(f"Question: {stem}\nAnswer: \n{text}") for text in texts]
        return {"correct": [reference_nll(MODEL, row) / (len(row) - 1) for row in rows]}
    start = len(TOKENIZER.encode(f"Question: {stem}\nAnswer:"))
    nll = [reference_nll(MODEL, TOKENIZER.encode(f"Question: {stem}\nAnswer: {text}"), start) for text in texts]
    return {"correct": nll, "acc_norm": [total / len(text) for total, text in zip(nll, texts, strict=True)]}


@given(questions=questions, protocol=protocols)
def test_arc_gold_scores_100_and_any_other_choice_0(questions, protocol):
    for metric in ("correct", "acc_norm")[: 1 + (protocol == "standard")]:
        right, wrong = [], []
        for i, (stem, texts) in enumerate(questions):
            nll = reference_scores(stem, texts, protocol)[metric]
            best = nll.index(min(nll))
            assume(sorted(nll)[1] - min(nll) > 1e-4)
            right.append(arc.parse_item(arc_row(str(i), stem=stem, texts=texts, answer="ABCD"[best]), str(i)))
            wrong.append(arc.parse_item(arc_row(str(i), stem=stem, texts=texts, answer="ABCD"[best - 1]), str(i)))
        for items, score in ((right, 100), (wrong, 0)):
            scored = arc.evaluate(MODEL, TOKENIZER, items, protocol=protocol)
            assert all(row[metric] is (score == 100) for row in scored["items"])
            assert (scored if metric == "correct" else scored["metrics"][metric])["score"] == score


def test_a_model_that_gives_nan_is_refused():
    broken = byte_model()
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="an NLL of nan"):
        arc.evaluate(broken, TOKENIZER, [arc.parse_item(arc_row(), "q")])


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("bytes") / "model")


def test_arc_command_writes_what_it_prints(folder, tmp_path, capsys):
    rows = [arc_row("a", "ABCD"), arc_row("b", "ABC"), arc_row("c", "1234", stem="A line\u2028here?")]
    data, out = tmp_path / "arc.jsonl", tmp_path / "new" / "arc.json"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    arc.main(["--model", str(folder), "--data", str(data), "--out", str(out), "--device", "cpu"])
    written = json.loads(out.read_text(encoding="utf-8"))
    assert (written["task"], written["metric"], written["n"], written["dropped"]) == ("arc", "accuracy", 2, 1)
    assert written["score"] == 50 * sum(item["correct"] for item in written["items"])
    assert [item["id"] for item in written["items"]] == ["a", "c"]
    assert {"id", "prompt_id", "prediction", "gold", "correct", "nll"} == set(written["items"][0])
    assert (written["model"], written["data"], written["dtype"]) == (str(folder), str(data), "fp32")
    assert written["seconds"] > 0 and written["tokens_per_s"] > 0 and "paper" in written["protocol"]
    assert len(written["commit"]) == 40 and isinstance(written["uncommitted_changes"], bool)
    assert [path.name for path in out.parent.iterdir()] == ["arc.json"]
    stdout = capsys.readouterr().out
    assert "items dropped: 1" in stdout
    assert re.search(rf"^arc: {written['score']:.2f}%  n 2  95% \[[\d.]+, [\d.]+\]  [\d.]+ s", stdout, re.MULTILINE)


def test_arc_standard_command_prints_both_accuracies(folder, tmp_path, capsys):
    data, out = write_jsonl(tmp_path / "arc.jsonl", [arc_row("a", "ABC"), arc_row("b", "ABCDE")]), tmp_path / "out.json"
    arc.main(["--model", str(folder), "--data", str(data), "--protocol", "standard", "--out", str(out)])
    written = json.loads(out.read_text())
    assert written["protocol"] == "standard, 0-shot, summed NLL of the choice"
    assert written["metrics"]["acc_norm"]["score"] == 50 * sum(item["acc_norm"] for item in written["items"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("arc: ") and lines[1].startswith("  acc_norm: ")


BAD_ROWS = {
    "{": ["data.jsonl:2", "not valid JSON"],
    "[1]": ["data.jsonl:2", "JSON object", "[1]"],
    json.dumps({**arc_row(), "answerKey": "E"}): ["data.jsonl:2", "answerKey", "'E'", "['A', 'B', 'C', 'D']"],
    json.dumps(arc_row(labels="AABC", answer="A")): ["data.jsonl:2", "answerKey", "'A'"],
    json.dumps({"id": "x", "question": arc_row()["question"]}): ["data.jsonl:2", "'answerKey' is missing"],
    json.dumps({"id": "x", "answerKey": "A"}): ["data.jsonl:2", "'question' is missing"],
    json.dumps({"question": {"stem": "x"}, "answerKey": "A"}): ["data.jsonl:2", "choices", "None"],
    json.dumps({"question": {"choices": []}, "answerKey": "A"}): ["data.jsonl:2", "'stem' is missing"],
    json.dumps(arc_row(texts=["a", "b", "c", 4])): ["data.jsonl:2", "'text'", "4"],
    json.dumps(arc_row(texts=["a", "b", "c", " "])): ["data.jsonl:2", "'text'"],
    json.dumps(arc_row(texts=["a", "b", "c", "\ud800"])): ["data.jsonl:2", "'text'", "surrogate"],
    '{"question": "Q", "choices": {"text": ["a"], "label": []}, "answerKey": "A"}': ["1 texts", "0 labels"],
    json.dumps(arc_row("long", stem="x" * 200)): ["item long", f"expected 2 to {CONTEXT}"],
}


@pytest.mark.parametrize("row, fragments", BAD_ROWS.items())
def test_a_bad_arc_row_is_refused_in_one_line(folder, tmp_path, capsys, row, fragments):
    data = write(tmp_path / "data.jsonl", json.dumps(arc_row()) + f"\n{row}\n")
    assert_refused(capsys, arc, ["--model", folder, "--data", data], fragments)
