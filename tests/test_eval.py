"""The scorers: what they read, what they send to the model, how they score it, and how they refuse bad input."""

import contextlib
import dataclasses
import json
import math
import os
import re
import socket
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
from eval import arc, common, compare, gsm8k
from reproduce import bench_eval

REPO = Path(__file__).parent.parent
CONTEXT = 160


def make_model(seed=0, eos_token_id=1, context=CONTEXT):
    """A random Transformer over bytes, its weights large enough for choices to differ well beyond rounding."""
    torch.manual_seed(seed)
    config = model_module.ModelConfig.from_dict(
        {
            "model_type": "llama", "vocab_size": 258, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": context, "bos_token_id": 0, "eos_token_id": eos_token_id,
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


def reference_nll(model, ids, start=1):
    """The definition, literally: one text by itself, all its logits at once, float64, one token after the other."""
    logp = model(torch.tensor([ids])).double().log_softmax(-1)[0]
    return -sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids)))


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
)
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
)
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


# --- GSM8K: rows and prompts ---------------------------------------------------------------------------------


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


def gsm8k_items(golds):
    return [
        gsm8k.Item(str(i), "How many" + " many" * (5 - i % 6) + f" {i}?", f"So {g}.\n#### {g}", str(g))
        for i, g in enumerate(golds)
    ]


@given(
    golds=st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=7),
    batch_size=st.integers(1, 9),
    wrong=st.sets(st.integers(0, 6)),
    protocol=st.sampled_from(common.PROTOCOLS),
    order=st.randoms(),
)
def test_gold_texts_score_100_and_each_wrong_one_costs_its_share(
    model, tokenizer, golds, batch_size, wrong, protocol, order
):
    items = gsm8k_items(golds)
    wrong = {i for i in wrong if i < len(items)}
    says = {"paper": " 1 and 2. The answer is {}.", "standard": " 1 and 2.\n#### {}"}[protocol]
    texts = {
        gsm8k.prompt(item, protocol=protocol): says.format(int(item.gold) + (i in wrong))
        for i, item in enumerate(items)
    }
    order.shuffle(items)

    def answering(model, prompts, max_new_tokens, **settings):
        assert all(row[0] == tokenizer.bos_id for row in prompts) and len(prompts) <= batch_size
        return [[*tokenizer.encode_plain(texts[tokenizer.decode(row)]), tokenizer.eos_id] for row in prompts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "generate", answering)
        scored = gsm8k.evaluate(
            model, tokenizer, items, protocol=protocol, max_new_tokens=40, batch_size=batch_size
        )
    assert [row["id"] for row in scored["items"]] == [item.id for item in items]
    assert [row["correct"] for row in scored["items"]] == [int(item.id) not in wrong for item in items]
    assert scored["score"] == pytest.approx(100 * (len(items) - len(wrong)) / len(items))
    assert (scored["n"], scored["unfinished"], scored["protocol"]) == (len(items), 0, f"{protocol}, 0-shot, greedy")
    if protocol == "standard":
        assert scored["metrics"]["flexible"] == {key: scored[key] for key in ("score", "n", "interval95")}


# --- generation ----------------------------------------------------------------------------------------------


short_text = st.text("abcdefgh ?", min_size=1, max_size=20)
long_text = st.text("abcdefgh", min_size=CONTEXT - 20, max_size=CONTEXT - 2)  # little room is left behind it
prompt_texts = st.lists(st.one_of(short_text, long_text), min_size=1, max_size=5)


@given(
    texts=prompt_texts,
    batch_size=st.integers(1, 6),
    max_new_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 1.0]),
    order=st.randoms(),
)
def test_generation_does_not_depend_on_order_batches_or_neighbours(
    model, tokenizer, texts, batch_size, max_new_tokens, temperature, order
):
    settings = {"stop": ("ab", "\n"), "temperature": temperature, "seed": 3}
    prompts = [(f"item {i}", text) for i, text in enumerate(texts)]
    alone = {
        prompt: common.generate_texts(model, tokenizer, [prompt], max_new_tokens, batch_size=1, **settings)[0]
        for prompt in prompts
    }
    order.shuffle(prompts)
    together = common.generate_texts(model, tokenizer, prompts, max_new_tokens, batch_size=batch_size, **settings)
    assert together == [alone[prompt] for prompt in prompts]


def test_what_is_drawn_depends_on_the_seed_and_the_item(model, tokenizer):
    def draw(names, temperature, seed):
        prompts = [(name, "How many?") for name in names]
        made = common.generate_texts(model, tokenizer, prompts, 20, temperature=temperature, seed=seed)
        return [row["completion"] for row in made]

    assert len(set(draw("abcd", 1.0, 0))) == 4
    assert draw("abcd", 1.0, 0) == draw("abcd", 1.0, 0)
    assert set(draw("abcd", 1.0, 0)).isdisjoint(draw("abcd", 1.0, 1))
    assert len(set(draw("abcd", 0.0, 0) + draw("abcd", 0.0, 1))) == 1


@given(text=long_text, max_new_tokens=st.integers(1, 25))
def test_a_prompt_near_the_contexts_end_gets_the_tokens_that_fit(tokenizer, text, max_new_tokens):
    never_ends = make_model(eos_token_id=None)
    room = CONTEXT - (1 + len(text))  # BOS
    (made,) = common.generate_texts(never_ends, tokenizer, [("x", text)], max_new_tokens)
    assert made["new_tokens"] == min(max_new_tokens, room)
    assert not made["finished"]


def test_a_prompt_that_fills_the_context_is_refused_by_its_item(model, tokenizer):
    with pytest.raises(ValueError, match=f"item long: its prompt of {CONTEXT} tokens .* context of {CONTEXT}"):
        common.generate_texts(model, tokenizer, [("ok", "a"), ("long", "a" * (CONTEXT - 1))], 5)


@pytest.mark.parametrize(
    "says, stop, taken, completion",
    [
        ("It is 18.\nQuestion: And then?", ("Question:",), "It is 18.\nQuestion:", "It is 18.\n"),
        ("18 Question: And then?", ("\n", "Question:"), "18 Question:", "18 "),
        ("It is 18, or", ("\n", ".", ","), "It is 18,", "It is 18"),
        ("\nIt", ("\n",), "\n", ""),
        ("18</s>And", ("Question:", "</s>"), "18</s>", "18"),
    ],
)
def test_a_completion_is_stopped_and_cut_at_the_first_stop_string(
    model, tokenizer, monkeypatch, says, stop, taken, completion
):
    """Also at one that is a special token, which decoding leaves out."""
    script, took = tokenizer.encode_plain(says), []

    def scripted(model, prompts, max_new_tokens, *, stop, eos_ids, **settings):
        while not took or not (took[-1] in eos_ids or stop(took)):
            took.append(script[len(took)])
        return [list(took)]

    monkeypatch.setattr(common, "generate", scripted)
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eos_token_ids=()))
    (made,) = common.generate_texts(model, tokenizer, [("x", "How many?")], 60, stop=stop)
    assert took == tokenizer.encode_plain(taken)
    assert (made["completion"], made["finished"], made["new_tokens"]) == (completion, True, len(took))
    assert made["prompt_id"] == common.prompt_id("How many?") != common.prompt_id("How many")


@given(text=st.text("ab\n", max_size=12), stop=st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
def test_a_cut_text_is_the_longest_beginning_without_a_stop_string(text, stop):
    beginnings = [text[:end] for end in range(len(text) + 1)]
    free = [part for part in beginnings if not any(text.startswith(end, at) for at in range(len(part)) for end in stop)]
    assert common.cut(text, stop) == max(free, key=len)
    assert common.cut(common.cut(text, stop), stop) == common.cut(text, stop)


# --- ARC -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x1e"])
def test_only_a_newline_ends_a_row(tmp_path, separator):
    data = tmp_path / "rows.jsonl"
    rows = [{"question": f"One{separator}two?", "answer": f"So{separator}1.\n#### 1"}] * 2
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert [item.question for item in gsm8k.read_items(data)] == [rows[0]["question"]] * 2


def test_both_forms_of_arc_rows_are_parsed_alike():
    row = arc_row("q1", "1234", answer="3", stem="Why?", texts=["a", "b", "c", "d"])
    hub = {"id": "q1", "question": "Why?", "answerKey": "3", "choices": {"text": list("abcd"), "label": list("1234")}}
    item = arc.Item("q1", "Why?", ("a", "b", "c", "d"), ("1", "2", "3", "4"), gold=2)
    assert arc.parse_item(row, "q1") == item
    assert arc.parse_item(hub, "q1") == item
    assert arc.parse_item(arc_row(labels="ABCD", answer="D"), "q").gold == 3
    assert arc.parse_item(arc_row(labels="DCBA", answer="D"), "q").gold == 0  # the place in the item's own list


def test_the_arc_texts_are_the_protocols(tokenizer):
    item = arc.parse_item(arc_row(stem="Why?", texts=["a", "b c", "d", "e"]), "q")
    assert arc.choice_texts(item)[1] == "Question: Why?\nAnswer: \nb c"
    assert arc.choice_texts(item, "standard")[1] == "Question: Why?\nAnswer: b c"
    for protocol, counted in (("paper", "Question: Why?\nAnswer: \nb c"), ("standard", " b c")):
        ids, start = arc.scored_ids(item, tokenizer, CONTEXT, protocol)[1]
        assert (ids[0], tokenizer.decode(ids[start:])) == (tokenizer.bos_id, counted)


def test_paper_drops_items_without_four_choices_and_counts_them(model, tokenizer):
    rows = [arc_row("three", "ABC"), arc_row("four", "1234"), arc_row("five", "ABCDE"), arc_row("letters", "ABCD")]
    scored = arc.evaluate(model, tokenizer, [arc.parse_item(row, row["id"]) for row in rows])
    assert [row["id"] for row in scored["items"]] == ["four", "letters"]
    assert (scored["n"], scored["dropped"]) == (2, 2)
    assert scored["items"][0]["prediction"] in "1234" and scored["items"][1]["prediction"] in "ABCD"


def test_standard_keeps_three_to_five_choices(model, tokenizer):
    rows = [arc_row("three", "ABC", "C"), arc_row("five", "ABCDE", "E"), arc_row("numbers", "12345", "5")]
    scored = arc.evaluate(model, tokenizer, [arc.parse_item(row, row["id"]) for row in rows], protocol="standard")
    assert [row["id"] for row in scored["items"]] == ["three", "five", "numbers"]
    assert [len(row["nll"]) for row in scored["items"]] == [3, 5, 5]
    assert [row["gold"] for row in scored["items"]] == ["C", "E", "5"]
    assert (scored["n"], scored["dropped"]) == (3, 0)


def test_equal_choices_tie_and_the_first_wins(model, tokenizer):
    items = [arc.parse_item(arc_row(texts=["same", "same", "same", "same"], answer=key), "q") for key in "ABCD"]
    scored = arc.evaluate(model, tokenizer, items, batch_tokens=30)
    assert [row["prediction"] for row in scored["items"]] == ["A"] * 4
    assert [row["correct"] for row in scored["items"]] == [True, False, False, False]


token_ids = st.lists(st.integers(0, 257), max_size=12)


@st.composite
def choice_items(draw):
    """[(ids, start), ...]: choices that begin alike, with at least one token each, and count from any place on."""
    beginning = [draw(st.integers(0, 257)), *draw(token_ids)]
    rows = [beginning + draw(token_ids) for _ in range(draw(st.integers(1, 5)))]
    rows = [row if len(row) > 1 else [*row, draw(st.integers(0, 257))] for row in rows]
    return [(row, draw(st.integers(1, len(row) - 1))) for row in rows]


@given(
    items=st.lists(choice_items(), min_size=1, max_size=5),
    batch_tokens=st.integers(1, 300),
    logits_at_once=st.sampled_from([1, 258 * 3, 258 * 50]),
)
def test_choice_nll_is_the_literal_definition_whatever_is_shared(model, items, batch_tokens, logits_at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "LOGITS_AT_ONCE", logits_at_once)
        got = common.choice_nll(model, items, batch_tokens)
    for sums, item in zip(got, items, strict=True):
        assert sums == pytest.approx([reference_nll(model, *choice) for choice in item], rel=1e-5, abs=1e-4)


def test_choices_that_begin_with_different_tokens_are_refused(model):
    with pytest.raises(ValueError, match="item 1: expected its choices to begin with the same token"):
        common.choice_nll(model, [[([1, 2], 1)], [([1, 2], 1), ([2, 2], 1)]])


choice = st.text("abcdefgh ", min_size=1, max_size=30).filter(str.strip)
questions = st.lists(st.tuples(choice, st.lists(choice, min_size=4, max_size=4, unique=True)), min_size=1, max_size=4)
protocols = st.sampled_from(common.PROTOCOLS)


@given(questions=questions, batch_tokens=st.integers(1, 400), protocol=protocols, order=st.randoms())
def test_arc_scores_do_not_depend_on_the_order_of_items_or_on_batches(
    model, tokenizer, questions, batch_tokens, protocol, order
):
    items = [
        arc.parse_item(arc_row(str(i), stem=stem, texts=texts), str(i)) for i, (stem, texts) in enumerate(questions)
    ]
    one_way = {row["id"]: row for row in arc.evaluate(model, tokenizer, items, protocol=protocol)["items"]}
    order.shuffle(items)
    other = arc.evaluate(model, tokenizer, items, protocol=protocol, batch_tokens=batch_tokens)["items"]
    assert [row["id"] for row in other] == [item.id for item in items]
    for row in other:
        assert row["nll"] == pytest.approx(one_way[row["id"]]["nll"], rel=1e-5)
        assert row["nll"]["ABCD".index(row["prediction"])] == min(row["nll"])
        assert row["prompt_id"] == one_way[row["id"]]["prompt_id"]


def reference_scores(model, tokenizer, stem, texts, protocol):
    """The definition, one choice at a time: {metric: a number for each choice, the smallest wins}."""
    if protocol == "paper":
        rows = [tokenizer.encode(f"Question: {stem}\nAnswer: \n{text}") for text in texts]
        return {"correct": [reference_nll(model, row) / (len(row) - 1) for row in rows]}
    start = len(tokenizer.encode(f"Question: {stem}\nAnswer:"))
    nll = [reference_nll(model, tokenizer.encode(f"Question: {stem}\nAnswer: {text}"), start) for text in texts]
    return {"correct": nll, "acc_norm": [total / len(text) for total, text in zip(nll, texts, strict=True)]}


@given(questions=questions, protocol=protocols)
def test_arc_gold_scores_100_and_any_other_choice_0(model, tokenizer, questions, protocol):
    for metric in ("correct", "acc_norm")[: 1 + (protocol == "standard")]:
        right, wrong = [], []
        for i, (stem, texts) in enumerate(questions):
            nll = reference_scores(model, tokenizer, stem, texts, protocol)[metric]
            best = nll.index(min(nll))
            assume(sorted(nll)[1] - min(nll) > 1e-4)
            right.append(arc.parse_item(arc_row(str(i), stem=stem, texts=texts, answer="ABCD"[best]), str(i)))
            wrong.append(arc.parse_item(arc_row(str(i), stem=stem, texts=texts, answer="ABCD"[best - 1]), str(i)))
        for items, score in ((right, 100), (wrong, 0)):
            scored = arc.evaluate(model, tokenizer, items, protocol=protocol)
            assert all(row[metric] is (score == 100) for row in scored["items"])
            assert (scored if metric == "correct" else scored["metrics"][metric])["score"] == score


def test_an_unknown_protocol_is_refused(model, tokenizer):
    for task, item in ((arc, arc.parse_item(arc_row(), "q")), (gsm8k, *gsm8k_items([1]))):
        with pytest.raises(ValueError, match="protocol 'ours': expected one of paper, standard"):
            task.evaluate(model, tokenizer, [item], protocol="ours")


def test_a_model_that_gives_nan_is_refused(tokenizer):
    broken = make_model()
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="an NLL of nan"):
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


numbers = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@given(values=numbers, order=st.randoms())
def test_a_bootstrap_interval_holds_the_mean_whatever_the_order(values, order):
    measured = common.measure(values)
    (low, high), score = measured["interval95"], measured["score"]
    assert score == pytest.approx(100 * sum(values) / len(values))
    assert 100 * min(values) - 1e-9 <= low <= score + 1e-9 and score - 1e-9 <= high <= 100 * max(values) + 1e-9
    order.shuffle(values)
    assert common.measure(values) == measured


def test_a_bootstrap_interval_of_many_values_is_the_normal_one():
    values = [i / 999 for i in range(1000)]
    margin = 1.96 * math.sqrt(1 / 12 / 1000)
    assert common.bootstrap_interval(values) == pytest.approx((0.5 - margin, 0.5 + margin), abs=1e-3)


# --- two results, item by item -------------------------------------------------------------------------------


def result_of(values, **changes):
    """A result file: item i has values[i]."""
    items = [{"id": f"i{i}", "prompt_id": f"p{i}", "correct": value} for i, value in enumerate(values)]
    return {"task": "arc", "protocol": "paper", "items": items, **changes}


@pytest.mark.parametrize(
    "only_a, only_b, p",
    [(0, 0, 1), (3, 3, 1), (1, 0, 1), (5, 0, 2 / 32), (1, 9, 2 * 11 / 1024), (9, 1, 2 * 11 / 1024), (2, 3, 1)],
)
def test_mcnemar_p_of_worked_numbers(only_a, only_b, p):
    assert compare.mcnemar_p(only_a, only_b) == pytest.approx(p)


@given(only_a=st.integers(0, 40), only_b=st.integers(0, 40))
def test_mcnemar_p_is_the_share_of_all_throws_of_a_fair_coin(only_a, only_b):
    n = only_a + only_b
    ways = [math.comb(n, heads) for heads in range(n + 1)]
    as_uneven = sum(way for heads, way in enumerate(ways) if abs(2 * heads - n) >= abs(only_a - only_b))
    assert compare.mcnemar_p(only_a, only_b) == pytest.approx(as_uneven / 2**n)


@given(
    pairs=st.one_of(
        st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30),
        st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30),
    ),
    order=st.randoms(),
)
def test_comparing_the_other_way_round_turns_the_signs_and_nothing_else(pairs, order):
    a, b = (result_of(side) for side in zip(*pairs, strict=True))
    order.shuffle(b["items"])
    forth, back = compare.compare(a, b), compare.compare(b, a)
    low, high = forth["interval95"]
    assert back["interval95"] == (-high, -low)
    assert back["difference"] == -forth["difference"] == pytest.approx(forth["score_a"] - forth["score_b"])
    assert low - 1e-9 <= forth["difference"] <= high + 1e-9
    assert (back["score_a"], back["score_b"]) == (forth["score_b"], forth["score_a"])
    for one, other in (("only_a", "only_b"), ("both_right", "both_right"), ("both_wrong", "both_wrong")):
        assert back.get(one) == forth.get(other)
    assert back.get("mcnemar_p") == forth.get("mcnemar_p")
    if isinstance(pairs[0][0], bool):
        cells = [forth[name] for name in ("both_right", "only_a", "only_b", "both_wrong")]
        assert cells == [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]


def test_a_paired_interval_is_narrower_than_two_scores_apart():
    right = [i % 2 == 0 for i in range(200)]
    better = [value or i < 20 for i, value in enumerate(right)]
    compared = compare.compare(result_of(right), result_of(better))
    assert (compared["difference"], compared["only_a"], compared["only_b"]) == (5, 0, 10)
    assert compared["mcnemar_p"] == pytest.approx(2 / 2**10)
    low, high = compared["interval95"]
    assert 1.5 < low < 2.5 and 7.5 < high < 9  # 5 points give or take 2 * sqrt(0.05 * 0.95 / 200)


def test_compare_command_prints_and_writes(tmp_path, capsys):
    a, b, out = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "new" / "out.json"
    a.write_text(json.dumps(result_of([True, False, False, True])))
    b.write_text(json.dumps(result_of([True, True, True, False])))
    compare.main([str(a), str(b), "--out", str(out)])
    written = json.loads(out.read_text())
    assert (written["a"], written["n"], written["difference"], written["mcnemar_p"]) == (str(a), 4, 25, 1)
    printed = capsys.readouterr().out
    assert "A 50.00%  B 75.00%" in printed and "B - A +25.00 points" in printed
    assert "both right 1, only a 1, only b 2, both wrong 0" in printed


OTHER_RESULTS = {
    "task": (result_of([True], task="gsm8k"), ["one task", "'arc'", "'gsm8k'"]),
    "protocol": (result_of([True], protocol="standard"), ["one protocol", "'paper'", "'standard'"]),
    "more items": (result_of([True, True]), ["same items", "'i1' in B only"]),
    "other items": (result_of([True], items=[{"id": "x", "prompt_id": "p0", "correct": True}]), ["'i0' in A only"]),
    "other prompts": (result_of([True], items=[{"id": "i0", "prompt_id": "x", "correct": True}]), ["item 'i0'"]),
    "no metric": (result_of([None]), ["--metric correct", "item 'i0' has None"]),
    "no result": ({"task": "arc"}, ["b.json", "'protocol'"]),
    "no prompt ids": (result_of([True], items=[{"id": "i0", "correct": True}]), ["b.json: items[0]", "prompt_id"]),
    "a list": ([1], ["b.json", "'task'"]),
}


@pytest.mark.parametrize("other, fragments", OTHER_RESULTS.values(), ids=OTHER_RESULTS)
def test_results_that_do_not_pair_are_refused_in_one_line(tmp_path, capsys, other, fragments):
    for name, whole in (("a.json", result_of([True])), ("b.json", other)):
        (tmp_path / name).write_text(json.dumps(whole))
    assert_refused(capsys, compare.main, "eval.compare", [tmp_path / "a.json", tmp_path / "b.json"], fragments)


def test_a_file_that_is_no_result_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{")
    assert_refused(capsys, compare.main, "eval.compare", [tmp_path / "a.json"] * 2, ["a.json", "not valid JSON"])
    assert_refused(capsys, compare.main, "eval.compare", [tmp_path / "none.json"] * 2, ["none.json: no such file"])


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


def test_gsm8k_command_writes_what_it_prints(folder, tmp_path, capsys):
    rows = [{"question": f"{i}?", "answer": f"So {i}.\n#### {i}"} for i in range(6)]
    data, shots = write_jsonl(tmp_path / "g.jsonl", rows[:4]), write_jsonl(tmp_path / "shots.jsonl", rows[4:])
    out = tmp_path / "g.json"
    common_flags = ["--model", str(folder), "--data", str(data), "--max-new-tokens", "9", "--out", str(out)]
    gsm8k.main([*common_flags, "--limit", "3"])
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

    gsm8k.main([*common_flags, "--exemplars", str(shots), "--shots", "1", "--temperature", "0.5", "--seed", "7"])
    shot = json.loads(out.read_text(encoding="utf-8"))
    assert (shot["n"], shot["protocol"]) == (4, "paper, 1-shot, temperature 0.5")
    assert (shot["exemplars"], shot["shots"], shot["seed"]) == (str(shots), 1, 7)
    text = "Question: 4?\nLet's think step by step\nAnswer:\nSo 4.\nThe answer is 4\n\n"
    assert shot["items"][0]["prompt_id"] == common.prompt_id(f"{text}Question: 0?\nLet's think step by step\nAnswer:")

    gsm8k.main([*common_flags, "--protocol", "standard", "--exemplars", str(shots), "--shots", "2"])
    standard = json.loads(out.read_text(encoding="utf-8"))
    assert (standard["max_new_tokens"], standard["shots"]) == (9, 2)
    assert standard["protocol"] == "standard, 2-shot, greedy" and standard["metrics"]["flexible"]["n"] == 4
    assert re.search(r"^  flexible: \S+%  n 4 ", capsys.readouterr().out, re.MULTILINE)


ON_RANKS = """
import os, sys
from eval import arc, common, gsm8k
folder, data, out, *ports = sys.argv[1:]
os.environ["MASTER_PORT"] = ports[0]  # each group of processes meets in a place of its own
arc.main(["--model", folder, "--data", f"{data}/arc.jsonl", "--batch-tokens", "200", "--out", f"{out}/arc.json"])
os.environ["MASTER_PORT"] = ports[1]
sampled = ["--batch-size", "2", "--max-new-tokens", "20", "--temperature", "1"]
gsm8k.main(["--model", folder, "--data", f"{data}/gsm8k.jsonl", *sampled, "--out", f"{out}/gsm8k.json"])
def broken(model, prompts, *_, **__):
    if common.this_rank()[0] == common.this_rank()[1] - 1:
        raise ValueError("no luck on the last rank")
    return [[7]] * len(prompts)
common.generate = broken
os.environ["MASTER_PORT"] = ports[2]
gsm8k.main(["--model", folder, "--data", f"{data}/gsm8k.jsonl", *sampled])
"""


def test_any_number_of_ranks_writes_the_same_files_and_reports_one_ranks_error(folder, tmp_path):
    names = ["some", "more", "items", "of", "unlike", "length"]
    write_jsonl(tmp_path / "arc.jsonl", [arc_row(name, stem=f"Why {name}?" * i) for i, name in enumerate(names, 1)])
    rows = [{"question": f"How {name}?" * i, "answer": "#### 2"} for i, name in enumerate(names, 1)]
    write_jsonl(tmp_path / "gsm8k.jsonl", rows)
    (tmp_path / "score.py").write_text(ON_RANKS)
    written = {}
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [str(free.getsockname()[1]) for free in sockets]
    for world in (1, 2):
        out = tmp_path / str(world)
        command = [sys.executable, str(tmp_path / "score.py"), str(folder), str(tmp_path), str(out), *ports]
        shared = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
        shared["MASTER_ADDR"] = "127.0.0.1"
        ranks = [
            subprocess.Popen(
                command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for rank in range(world)
        ]
        try:
            said = [process.communicate(timeout=120) for process in ranks]
        finally:
            for process in ranks:
                process.kill()  # a rank that waits for one that is gone
        assert [process.returncode for process in ranks] == [2] * world, said
        assert said[0][1].splitlines()[-1] == "eval.gsm8k: no luck on the last rank"
        assert all(rank[0] == "" and "no luck" not in rank[1] for rank in said[1:])
        written[world] = [json.loads((out / name).read_text()) for name in ("arc.json", "gsm8k.json")]
        for whole in written[world]:
            assert whole.pop("world_size") == world
            assert whole.pop("seconds") > 0 and whole.pop("tokens_per_s") > 0
    assert written[1] == written[2]


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
    twice = write_jsonl(tmp_path / "twice.jsonl", [{**json.loads(good), "id": "same"}] * 2)
    no_weights = tmp_path / "no weights"
    make_tokenizer(no_weights)
    cases = [
        ({"--data": tmp_path / "none.jsonl"}, ["none.jsonl"]),
        ({"--data": tmp_path}, [str(tmp_path)]),
        ({"--data": empty}, ["empty.jsonl", "expected at least one row"]),
        ({"--data": twice}, ["twice.jsonl", "2 items have the id 'same'"]),
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
        other = write_jsonl(tmp_path / "other.jsonl", [{"question": "3?", "answer": "#### 3"}])
        cases.append(({"--shots": 2, "--exemplars": other}, ["other.jsonl", "at least 2 rows, got 1"]))
        cases.append(({"--exemplars": other}, ["other.jsonl", "at least 4 rows, got 1"]))
        cases.append(({"--shots": 1, "--exemplars": data}, ["good.jsonl", "row 0 is also scored, as item 0"]))
        cases.append(({"--shots": 2}, ["--shots 2", "needs --exemplars"]))
        cases.append(({"--exemplars": empty}, ["empty.jsonl"]))
    for changed, fragments in cases:
        flags = {"--model": folder, "--data": data, **changed}
        flags = [part for pair in flags.items() for part in pair]
        assert_refused(capsys, task.main, task.__name__, flags, fragments)


@pytest.mark.parametrize(
    "flags",
    [
        ["--limit", "0"], ["--limit", "-1"], ["--limit", "x"], ["--dtype", "fp16"], ["--nope"], ["--protocol", "ours"],
        ["--temperature", "-1"], ["--temperature", "nan"], ["--temperature", "warm"], ["--seed", "x"],
    ],
)
def test_unknown_flags_and_values_are_refused(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        gsm8k.main(flags)
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_the_modules_run_from_the_repository_root(tmp_path):
    command = [sys.executable, "-m", "eval.gsm8k", "--data", str(tmp_path / "none.jsonl")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"eval.gsm8k: {tmp_path / 'none.jsonl'}: no such file\n"


def test_the_benchmark_finds_both_ways_to_say_the_same(folder, tmp_path, capsys):
    row = {"question": "How many?", "answer": "#### 2"}
    files = {
        "--arc": write_jsonl(tmp_path / "a.jsonl", [arc_row("a"), arc_row("b", stem="Who?"), arc_row("c", "ABC")]),
        "--gsm8k": write_jsonl(tmp_path / "g.jsonl", [{**row, "question": f"{'So ' * i}how?"} for i in range(4)]),
        "--exemplars": write_jsonl(tmp_path / "e.jsonl", [{**row, "question": "?"}] * 5),
    }
    flags = [str(part) for pair in files.items() for part in pair]
    out = ["--max-new-tokens", "5", "--batch-size", "3", "--out", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit):
        bench_eval.main(["--model", str(folder), *flags, *out])  # 4 shots do not fit in this model's context
    assert "leaves no room" in capsys.readouterr().err
    wide = tmp_path / "wide"
    make_model(context=640).save_pretrained(wide)
    make_tokenizer(wide)
    bench_eval.main(["--model", str(wide), *flags, *out])
    written = json.loads((tmp_path / "out.json").read_text())
    for task, n in (("arc, paper", 2), ("arc, standard", 3), ("gsm8k, paper", 4), ("gsm8k, standard", 4)):
        assert written[task]["n"] == written[task]["same_answers"] == n
    assert written["gsm8k, standard"]["same_completions"] == 4 and written["gsm8k, standard"]["shots"] == 5
    assert written["arc, standard"]["largest_nll_difference"] < 1e-3
