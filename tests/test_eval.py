"""The scorers: what they read, what they send to the model, how they score it, and how they refuse bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import model as model_module
from data.tokenizer import TextTokenizer
from eval import arc, common, gsm8k

REPO = Path(__file__).parent.parent
CONTEXT = 160


def make_model(seed=0, eos_token_id=1):
    """A random Transformer over bytes, its weights large enough for choices to differ well beyond rounding."""
    torch.manual_seed(seed)
    config = model_module.ModelConfig.from_dict(
        {
            "model_type": "llama", "vocab_size": 258, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": eos_token_id,
        }
    )
    model = model_module.Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model.eval()


def make_tokenizer(folder):
    """One token a byte, `<s>` (0) put before a text, `</s>` (1); files as in a Hugging Face folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return TextTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder in Hugging Face layout."""
    folder = tmp_path_factory.mktemp("eval") / "model"
    make_model().save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return TextTokenizer.from_pretrained(folder)


def arc_row(id="q", labels="ABCD", answer=None, stem="Which?", texts=None):
    texts = texts or [f"choice {label}" for label in labels]
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    return {"id": id, "question": {"stem": stem, "choices": choices}, "answerKey": answer or labels[0]}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reference_mean_nll(model, ids):
    """The definition, literally: all logits at once, float64, one token after the other."""
    logp = model(torch.tensor([ids])).double().log_softmax(-1)[0]
    return -sum(logp[t - 1, ids[t]].item() for t in range(1, len(ids))) / (len(ids) - 1)


# --- GSM8K: the number ---------------------------------------------------------------------------------------


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
)
def test_the_last_number_before_the_next_question_is_extracted(text, number):
    assert gsm8k.extract_number(text) == number


@pytest.mark.parametrize(
    "prediction, gold, correct",
    [
        ("18", "18", True), ("18.00", "18", True), ("018", "18", True), ("17", "18", False), (None, "18", False),
        ("-3", "3", False), ("0.3333333", "0.3333334", True), ("0.33333", "0.33334", False),
        ("18.0000011", "18", False), ("000", "1000", False), ("9" * 400, "18", False), ("0", "0", True),
    ],
)
def test_numbers_are_compared_as_strings_or_to_a_millionth(prediction, gold, correct):
    assert gsm8k.is_correct(prediction, gold) is correct


no_digits = st.text(max_size=40).filter(lambda text: not re.search(r"\d", text) and "Question:" not in text)


@given(before=st.text(max_size=40), number=st.integers(-(10**9), 10**9), after=no_digits, question=st.text(max_size=40))
def test_a_plainly_written_gold_number_is_always_right(before, number, after, question):
    text = f"{before} The answer is {number}{after}"
    assume("Question:" not in text)
    assert gsm8k.is_correct(gsm8k.extract_number(text), str(number))
    assert gsm8k.extract_number(f"{text}Question:{question}") == gsm8k.extract_number(text)


# --- GSM8K: rows and prompts ---------------------------------------------------------------------------------


def test_gsm8k_rows_are_parsed(tmp_path):
    rows = [
        {"question": "Q1?", "answer": "He has 48/2 = <<48/2=24>>24.\nSo 70,000.\n#### 70,000"},
        {"id": 7, "question": "Q2?", "answer": "#### -5"},
    ]
    first, second = gsm8k.read_items(write_jsonl(tmp_path / "x.jsonl", rows))
    assert first == gsm8k.Item("0", "Q1?", "He has 48/2 = 24.\nSo 70,000.", "70000")
    assert second == gsm8k.Item("7", "Q2?", "", "-5")


def test_the_gsm8k_prompt_is_the_papers():
    shots = [gsm8k.Item("a", "Q1?", "Because.\nAnd so.", "3"), gsm8k.Item("b", "Q2?", "Clearly.", "4")]
    assert gsm8k.exemplar_text([]) + gsm8k.question_text("Q?") == "Question: Q?\nLet's think step by step\nAnswer:"
    assert gsm8k.exemplar_text(shots) + gsm8k.question_text("Q?") == (
        "Question: Q1?\nLet's think step by step\nAnswer:\nBecause.\nAnd so.\nThe answer is 3\n\n"
        "Question: Q2?\nLet's think step by step\nAnswer:\nClearly.\nThe answer is 4\n\n"
        "Question: Q?\nLet's think step by step\nAnswer:"
    )


def gsm8k_items(golds):
    return [
        gsm8k.Item(str(i), "How many" + " many" * (5 - i % 6) + f" {i}?", "So.", str(g)) for i, g in enumerate(golds)
    ]


@given(
    golds=st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=7),
    batch_size=st.integers(1, 9),
    wrong=st.sets(st.integers(0, 6)),
)
def test_gold_texts_score_100_and_each_wrong_one_costs_its_share(model, tokenizer, golds, batch_size, wrong):
    items = gsm8k_items(golds)
    wrong = {i for i in wrong if i < len(items)}

    def answering(model, prompts, max_new_tokens, *, stop, batch_size):
        texts = {
            gsm8k.question_text(item.question): f" 1 and 2. The answer is {int(item.gold) + (i in wrong)}."
            for i, item in enumerate(items)
        }
        assert all(row[0] == tokenizer.bos_id for row in prompts)
        return [[*tokenizer.encode_plain(texts[tokenizer.decode(row)]), tokenizer.eos_id] for row in prompts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "generate", answering)
        scored = gsm8k.evaluate(model, tokenizer, items, max_new_tokens=40, batch_size=batch_size)
    assert [row["id"] for row in scored["items"]] == [item.id for item in items]
    assert [row["correct"] for row in scored["items"]] == [i not in wrong for i in range(len(items))]
    assert scored["score"] == pytest.approx(100 * (len(items) - len(wrong)) / len(items))
    assert (scored["n"], scored["unfinished"], scored["protocol"]) == (len(items), 0, "paper, 0-shot, greedy")


# --- generation ----------------------------------------------------------------------------------------------


short_text = st.text("abcdefgh ?", min_size=1, max_size=20)
long_text = st.text("abcdefgh", min_size=CONTEXT - 20, max_size=CONTEXT - 2)  # little room is left behind it
prompt_texts = st.lists(st.one_of(short_text, long_text), min_size=1, max_size=5)


@given(texts=prompt_texts, batch_size=st.integers(1, 6), max_new_tokens=st.integers(1, 30), order=st.randoms())
def test_generation_does_not_depend_on_order_batches_or_neighbours(
    model, tokenizer, texts, batch_size, max_new_tokens, order
):
    shuffled = list(enumerate(texts))
    order.shuffle(shuffled)
    alone = [common.generate_texts(model, tokenizer, [("x", text)], max_new_tokens, 1, "ab")[0] for text in texts]
    together = common.generate_texts(
        model, tokenizer, [("x", text) for _, text in shuffled], max_new_tokens, batch_size, "ab"
    )
    assert together == [alone[i] for i, _ in shuffled]


@given(text=long_text, max_new_tokens=st.integers(1, 25))
def test_a_prompt_near_the_contexts_end_gets_the_tokens_that_fit(tokenizer, text, max_new_tokens):
    never_ends = make_model(eos_token_id=None)
    room = CONTEXT - (1 + len(text))  # BOS
    (made,) = common.generate_texts(never_ends, tokenizer, [("x", text)], max_new_tokens, 4, "no such text")
    assert made["new_tokens"] == min(max_new_tokens, room)
    assert not made["finished"]


def test_a_prompt_that_fills_the_context_is_refused_by_its_item(model, tokenizer):
    with pytest.raises(ValueError, match=f"item long: its prompt of {CONTEXT} tokens .* context of {CONTEXT}"):
        common.generate_texts(model, tokenizer, [("ok", "a"), ("long", "a" * (CONTEXT - 1))], 5, 4, "stop")


def test_generation_stops_where_the_next_question_starts(model, tokenizer, monkeypatch):
    script = tokenizer.encode_plain("It is 18.\nQuestion: And then? Answer: 19")
    taken = []

    def scripted(model, prompts, max_new_tokens, *, stop, batch_size):
        while not stop(script[: len(taken)]):
            taken.append(script[len(taken)])
        return [list(taken)]

    monkeypatch.setattr(common, "generate", scripted)
    scored = gsm8k.evaluate(model, tokenizer, [gsm8k.Item("x", "How many?", "", "18")], max_new_tokens=60)
    assert tokenizer.decode(taken) == "It is 18.\nQuestion:"
    assert (scored["score"], scored["unfinished"]) == (100, 0)


# --- ARC -----------------------------------------------------------------------------------------------------


def test_both_forms_of_arc_rows_are_parsed_alike():
    row = arc_row("q1", "1234", answer="3", stem="Why?", texts=["a", "b", "c", "d"])
    hub = {"id": "q1", "question": "Why?", "answerKey": "3", "choices": {"text": list("abcd"), "label": list("1234")}}
    item = arc.Item("q1", "Why?", ("a", "b", "c", "d"), ("1", "2", "3", "4"), gold=2)
    assert arc.parse_item(row, "q1") == item
    assert arc.parse_item(hub, "q1") == item
    assert arc.parse_item(arc_row(labels="ABCD", answer="D"), "q").gold == 3
    assert arc.parse_item(arc_row(labels="DCBA", answer="D"), "q").gold == 0  # the place in the item's own list


def test_the_arc_text_is_the_papers():
    item = arc.parse_item(arc_row(stem="Why?", texts=["a", "b c", "d", "e"]), "q")
    assert arc.choice_texts(item)[1] == "Question: Why?\nAnswer: \nb c"


def test_items_without_four_choices_are_dropped_and_counted(model, tokenizer):
    rows = [arc_row("three", "ABC"), arc_row("four", "1234"), arc_row("five", "ABCDE"), arc_row("letters", "ABCD")]
    scored = arc.evaluate(model, tokenizer, [arc.parse_item(row, row["id"]) for row in rows])
    assert [row["id"] for row in scored["items"]] == ["four", "letters"]
    assert (scored["n"], scored["dropped"]) == (2, 2)
    assert scored["items"][0]["prediction"] in "1234" and scored["items"][1]["prediction"] in "ABCD"


def test_equal_choices_tie_and_the_first_wins(model, tokenizer):
    items = [arc.parse_item(arc_row(texts=["same", "same", "same", "same"], answer=key), "q") for key in "ABCD"]
    scored = arc.evaluate(model, tokenizer, items, batch_tokens=30)
    assert [row["prediction"] for row in scored["items"]] == ["A"] * 4
    assert [row["correct"] for row in scored["items"]] == [True, False, False, False]


id_rows = st.lists(st.lists(st.integers(0, 257), min_size=2, max_size=40), min_size=1, max_size=6)


@given(rows=id_rows, batch_tokens=st.integers(1, 300), logits_at_once=st.sampled_from([1, 258 * 3, 258 * 50]))
def test_mean_nll_is_the_literal_definition_whatever_the_batches_and_chunks(model, rows, batch_tokens, logits_at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arc, "LOGITS_AT_ONCE", logits_at_once)
        got = arc.mean_nll(model, rows, batch_tokens)
    assert got == pytest.approx([reference_mean_nll(model, row) for row in rows], rel=1e-5)


choice = st.text("abcdefgh ", min_size=1, max_size=30).filter(str.strip)
questions = st.lists(st.tuples(choice, st.lists(choice, min_size=4, max_size=4, unique=True)), min_size=1, max_size=4)


@given(questions=questions, batch_tokens=st.integers(1, 400), order=st.randoms())
def test_arc_scores_do_not_depend_on_the_order_of_items_or_on_batches(model, tokenizer, questions, batch_tokens, order):
    items = [
        arc.parse_item(arc_row(str(i), stem=stem, texts=texts), str(i)) for i, (stem, texts) in enumerate(questions)
    ]
    one_way = {row["id"]: row for row in arc.evaluate(model, tokenizer, items)["items"]}
    order.shuffle(items)
    other = arc.evaluate(model, tokenizer, items, batch_tokens)["items"]
    assert [row["id"] for row in other] == [item.id for item in items]
    for row in other:
        assert row["nll"] == pytest.approx(one_way[row["id"]]["nll"], rel=1e-5)
        assert row["nll"]["ABCD".index(row["prediction"])] == min(row["nll"])


@given(questions=questions)
def test_arc_gold_scores_100_and_any_other_choice_0(model, tokenizer, questions):
    right, wrong = [], []
    for i, (stem, texts) in enumerate(questions):
        ids = [tokenizer.encode(f"Question: {stem}\nAnswer: \n{text}") for text in texts]
        nll = [reference_mean_nll(model, row) for row in ids]
        best = nll.index(min(nll))
        assume(sorted(nll)[1] - min(nll) > 1e-4)
        right.append(arc.parse_item(arc_row(str(i), stem=stem, texts=texts, answer="ABCD"[best]), str(i)))
        wrong.append(arc.parse_item(arc_row(str(i), stem=stem, texts=texts, answer="ABCD"[best - 1]), str(i)))
    assert arc.evaluate(model, tokenizer, right)["score"] == 100
    assert arc.evaluate(model, tokenizer, wrong)["score"] == 0


def test_a_model_that_gives_nan_is_refused(tokenizer):
    broken = make_model()
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="mean NLL of nan"):
        arc.evaluate(broken, tokenizer, [arc.parse_item(arc_row(), "q")])


# --- the interval --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_correct, n, low, high",
    [(0, 10, 0, 27.7533), (5, 10, 23.6593, 76.3407), (10, 10, 72.2467, 100), (81, 263, 25.53, 36.62)],
)
def test_wilson_interval_of_worked_numbers(num_correct, n, low, high):
    assert common.wilson_interval(num_correct, n) == pytest.approx((low, high), abs=2e-3)


@given(n=st.integers(1, 20000), data=st.data())
def test_wilson_interval_holds_the_score_narrows_with_n_and_is_symmetric(n, data):
    k = data.draw(st.integers(0, n))
    low, high = common.wilson_interval(k, n)
    assert 0 <= low <= 100 * k / n + 1e-9 and 100 * k / n - 1e-9 <= high <= 100
    assert (100 - high, 100 - low) == pytest.approx(common.wilson_interval(n - k, n), abs=1e-9)
    wider, narrower = high - low, common.wilson_interval(4 * k, 4 * n)
    assert narrower[1] - narrower[0] < wider


# --- the command line ----------------------------------------------------------------------------------------


def test_arc_command_writes_what_it_prints(folder, tmp_path, capsys):
    rows = [arc_row("a", "ABCD"), arc_row("b", "ABC"), arc_row("c", "1234", stem="A line\u2028here?")]
    data, out = tmp_path / "arc.jsonl", tmp_path / "new" / "arc.json"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    arc.main(["--model", str(folder), "--data", str(data), "--out", str(out), "--device", "cpu"])
    written = json.loads(out.read_text(encoding="utf-8"))
    assert (written["task"], written["metric"], written["n"], written["dropped"]) == ("arc", "accuracy", 2, 1)
    assert written["score"] == 50 * sum(item["correct"] for item in written["items"])
    assert [item["id"] for item in written["items"]] == ["a", "c"]
    assert {"id", "prediction", "gold", "correct", "nll"} == set(written["items"][0])
    assert (written["model"], written["data"], written["dtype"]) == (str(folder), str(data), "fp32")
    assert written["seconds"] > 0 and "paper" in written["protocol"]
    assert [path.name for path in out.parent.iterdir()] == ["arc.json"]
    stdout = capsys.readouterr().out
    assert "dropped 1 of 3" in stdout
    assert re.search(rf"^arc: {written['score']:.2f}%  n 2  95% \[[\d.]+, [\d.]+\]  [\d.]+ s", stdout, re.MULTILINE)


def test_gsm8k_command_writes_what_it_prints(folder, tmp_path, capsys):
    rows = [{"question": f"{i}?", "answer": f"So {i}.\n#### {i}"} for i in range(4)]
    data, shots = write_jsonl(tmp_path / "g.jsonl", rows), write_jsonl(tmp_path / "shots.jsonl", rows[2:])
    out = tmp_path / "g.json"
    common_flags = ["--model", str(folder), "--data", str(data), "--max-new-tokens", "9", "--out", str(out)]
    gsm8k.main([*common_flags, "--limit", "3"])
    written = json.loads(out.read_text(encoding="utf-8"))
    assert (written["task"], written["n"], written["protocol"]) == ("gsm8k", 3, "paper, 0-shot, greedy")
    assert [item["gold"] for item in written["items"]] == ["0", "1", "2"]
    assert all(item["new_tokens"] <= 9 for item in written["items"])
    gsm8k.main([*common_flags, "--exemplars", str(shots), "--shots", "1"])
    shot = json.loads(out.read_text(encoding="utf-8"))
    assert (shot["n"], shot["protocol"]) == (4, "paper, 1-shot, greedy")
    assert shot["exemplars"] == "Question: 2?\nLet's think step by step\nAnswer:\nSo 2.\nThe answer is 2\n\n"
    assert len(re.findall(r"^gsm8k: \S+%  n [34] ", capsys.readouterr().out, re.MULTILINE)) == 2


def test_an_adapter_scores_like_the_model_it_is_merged_into(folder, tmp_path):
    tuned = model_module.add_lora(model_module.Transformer.from_pretrained(folder), rank=2, alpha=4)
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model_module.save_adapter(tuned, tmp_path / "adapter")
    tuned.save_pretrained(tmp_path / "merged")
    data, out = write_jsonl(tmp_path / "arc.jsonl", [arc_row(), arc_row("r", stem="Who?")]), tmp_path / "out.json"
    nll = {}
    for name, flags in {
        "base": ["--model", str(folder)],
        "adapter": ["--model", str(folder), "--adapter", str(tmp_path / "adapter")],
        "merged": ["--model", str(tmp_path / "merged")],
    }.items():
        arc.main([*flags, "--data", str(data), "--out", str(out)])
        nll[name] = [value for item in json.loads(out.read_text())["items"] for value in item["nll"]]
    assert nll["adapter"] == pytest.approx(nll["merged"], rel=1e-4)
    assert nll["adapter"] != pytest.approx(nll["base"], rel=1e-2)


GOOD_ARC, GOOD_GSM8K = json.dumps(arc_row()), json.dumps({"question": "2?", "answer": "#### 2"})
BAD_ARC_ROWS = {
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
BAD_GSM8K_ROWS = {
    '{"question": "2?"': ["data.jsonl:2", "not valid JSON"],
    json.dumps({"question": "2?"}): ["data.jsonl:2", "'answer' is missing"],
    json.dumps({"answer": "#### 2"}): ["data.jsonl:2", "'question' is missing"],
    json.dumps({"question": "2?", "answer": "It is 2"}): ["data.jsonl:2", "'answer'", "####", "It is 2"],
    json.dumps({"question": "2?", "answer": "#### two"}): ["data.jsonl:2", "'answer'", "####", "two"],
    json.dumps({"question": "2?", "answer": 2}): ["data.jsonl:2", "'answer'", "expected a text"],
    json.dumps({"id": "long", "question": "x" * 200, "answer": "#### 2"}): ["item long", f"context of {CONTEXT}"],
}


def assert_refused(capsys, main, prog, flags, fragments):
    with pytest.raises(SystemExit) as stopped:
        main([str(flag) for flag in flags])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith(f"{prog}: ") and captured.err.count("\n") == 1
    for fragment in fragments:
        assert fragment in captured.err


@pytest.mark.parametrize("row, fragments", BAD_ARC_ROWS.items())
def test_a_bad_arc_row_is_refused_in_one_line(folder, tmp_path, capsys, row, fragments):
    data = tmp_path / "data.jsonl"
    data.write_text(f"{GOOD_ARC}\n{row}\n", encoding="utf-8")
    assert_refused(capsys, arc.main, "eval.arc", ["--model", folder, "--data", data], fragments)


@pytest.mark.parametrize("row, fragments", BAD_GSM8K_ROWS.items())
def test_a_bad_gsm8k_row_is_refused_in_one_line(folder, tmp_path, capsys, row, fragments):
    data = tmp_path / "data.jsonl"
    data.write_text(f"{GOOD_GSM8K}\n{row}\n", encoding="utf-8")
    assert_refused(capsys, gsm8k.main, "eval.gsm8k", ["--model", folder, "--data", data], fragments)


@pytest.mark.parametrize("task, good", [(arc, GOOD_ARC), (gsm8k, GOOD_GSM8K)])
def test_paths_and_flags_that_cannot_be_used_are_refused_in_one_line(folder, tmp_path, capsys, task, good):
    data, empty, three = tmp_path / "good.jsonl", tmp_path / "empty.jsonl", tmp_path / "three.jsonl"
    data.write_text(good + "\n")
    empty.write_text("\n")
    write_jsonl(three, [arc_row("three", "ABC")])
    no_weights = tmp_path / "no weights"
    make_tokenizer(no_weights)
    cases = [
        ({"--data": tmp_path / "none.jsonl"}, ["none.jsonl"]),
        ({"--data": tmp_path}, [str(tmp_path)]),
        ({"--data": empty}, ["empty.jsonl", "expected at least one row"]),
        ({"--model": tmp_path / "no model"}, ["--model", "no model", "no such folder"]),
        ({"--model": no_weights}, ["no weights", "config.json"]),
        ({"--adapter": tmp_path / "no adapter"}, ["--adapter", "no adapter"]),
        ({"--adapter": no_weights}, ["no weights", "adapter_config.json"]),
        ({"--out": tmp_path}, ["--out", "got a folder"]),
        ({"--out": data / "x.json"}, ["good.jsonl"]),
    ]
    if not torch.cuda.is_available():
        cases.append(({"--device": "cuda"}, ["--device cuda"]))
    if task is arc:
        cases.append(({"--data": three}, ["none of the 1 items", "four choices"]))
    else:
        cases.append(({"--shots": 2, "--exemplars": data}, ["--shots 2", "gives 1"]))
        cases.append(({"--shots": 2}, ["--shots 2", "gives 0"]))
        cases.append(({"--exemplars": empty}, ["empty.jsonl"]))
    for changed, fragments in cases:
        flags = {"--model": folder, "--data": data, **changed}
        flags = [part for pair in flags.items() for part in pair]
        assert_refused(capsys, task.main, task.__name__, flags, fragments)


@pytest.mark.parametrize(
    "flags", [["--limit", "0"], ["--limit", "-1"], ["--limit", "x"], ["--dtype", "fp16"], ["--nope"]]
)
def test_unknown_flags_and_values_are_refused(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        arc.main(flags)
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_the_modules_run_from_the_repository_root(tmp_path):
    command = [sys.executable, "-m", "eval.gsm8k", "--data", str(tmp_path / "none.jsonl")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"eval.gsm8k: {tmp_path / 'none.jsonl'}: no such file\n"
