"""Rows as files have them: what each key of a row or a turn trains, and how bad rows are reported."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import EOS, NAMED, RAW, TOKENIZER, assert_is, ids, load, only_sample, write

from data import sft
from data.tokenizer import TextTokenizer

# It takes tools, calls and thoughts; a tool's answer comes back under its own role.
TALKATIVE = TextTokenizer(
    RAW,
    NAMED,
    "{% if tools %}T{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role[0] }}:"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}!{{ call.function.name }}{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}",
)
SILENT = TextTokenizer(
    RAW,
    NAMED,
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role[0] }}:{{ m.content }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}",
)
ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
GET = {"role": "tool", "content": "42", "tool_call_id": "1"}
GOOD, BAD = {"prompt": "Hi", "response": "Yes"}, {"prompt": "Hi", "response": ""}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def turns(*messages, **keys):
    return {"messages": list(messages), **keys}


# ------------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("flags", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": None}, {"train": 0}])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, TALKATIVE])
def test_a_turn_of_weight_0_or_not_to_train_has_no_label_and_all_others_have(tokenizer, flags):
    row = turns(ASK, SAY | flags, {"role": "user", "content": "So"}, {"role": "assistant", "content": "No"})
    sample = only_sample(row, tokenizer=tokenizer)
    plain = only_sample(turns(ASK, SAY, *row["messages"][2:]), tokenizer=tokenizer)
    assert sample.input_ids == plain.input_ids
    first = plain.labels.index(ord("Y"))
    last = next(at for at in range(first, len(plain.labels)) if plain.labels[at] == -100)
    first -= plain.labels[first - 1] != -100  # the "_" that this tokenizer puts in front
    assert sample.labels == plain.labels[:first] + [-100] * (last - first) + plain.labels[last:]


def test_weight_1_and_train_true_change_nothing():
    for flags in ({"weight": 1, "train": True}, {"weight": 1.0, "train": 1}):
        assert only_sample(turns(ASK, SAY | flags)) == only_sample(turns(ASK, SAY))


@pytest.mark.parametrize("flags", [{"weight": 0.5}, {"weight": "0"}, {"weight": -1}, {"train": 0.5}, {"train": "no"}])
def test_another_weight_is_refused_by_name(flags):
    (key,) = flags
    for row in (turns(ASK, SAY | flags), turns(ASK | flags, SAY)):
        with pytest.raises(ValueError, match=rf"messages, turn [12]: {key}: expected"):
            only_sample(row)


def test_a_row_without_a_turn_to_train_is_bad():
    with pytest.raises(ValueError, match="expected an answer token to train on"):
        only_sample(turns(ASK, SAY | {"weight": 0}))


@pytest.mark.parametrize("role", ["assistant", "gpt", "bot", "chatgpt", "bard", "model"])
def test_these_roles_are_the_assistant(role):
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": role, "value": "Yes"}]}
    assert sft.to_messages(row) == [ASK, SAY]


# ------------------------------------------------------------------------------------- system and history


def test_system_and_history_of_an_alpaca_row_come_before_its_question_and_every_answer_trains():
    row = {"instruction": "So", "input": "", "output": "No", "system": "Be", "history": [["Hi", "Yes"]]}
    assert_is(
        only_sample(row),
        ids("_System: Be", EOS, "_\n", "_Human: Hi", EOS, "_\nAssistant:"),
        ids("_Yes", EOS, "_\n"),
        ids("_Human: So", EOS, "_\nAssistant:"),
        ids("_No", EOS, "_\n"),
    )


def test_no_blank_line_follows_a_rows_own_system_text_in_the_alpaca_template():
    row = {"instruction": "Hi", "output": "Yes", "system": "Be"}
    assert_is(
        only_sample(row, template="alpaca"),
        ids("_Be", "_### Instruction:\nHi\n\n### Response:\n"),
        ids("_Yes", EOS, "_\n\n"),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "response": "Yes", "system": 5}, "system: expected a text, got 5"),
        ({"prompt": "Hi", "response": "Yes", "history": "Hi"}, "history: expected a list of .question, answer., got a"),
        ({"prompt": "Hi", "response": "Yes", "history": [["Hi"]]}, "history, turn 1: expected .question, answer., got"),
        (
            {"prompt": "Hi", "response": "Yes", "history": [["Hi", ""]]},
            "history, turn 1: expected a text, got an empty",
        ),
        (turns(ASK, SAY, history=[["a", "b"]]), "key 'history' is not supported beside 'messages'"),
        (turns({"role": "system", "content": "Be"}, ASK, SAY, system="Do"), "system: the row has another one"),
        (turns(ASK, SAY, functions=[{}]), "key 'functions' is not supported"),
        (turns(ASK, SAY, images=["a.png"]), "key 'images' is not supported"),
        (turns(ASK, SAY, system_prompt="Be"), "key 'system_prompt' is not supported"),
        (GOOD | {"input": "Hm"}, "key 'input' is not supported beside 'prompt': make it part of 'prompt', or leave it"),
        ({"question": "Hi", "answer": "Yes", "context": "Hm"}, "key 'context' is not supported beside 'question'"),
        ({"question": "Hi", "answer": "Yes", "options": {"A": "Yes"}}, "key 'options' is not supported beside"),
        (
            {"instruction": "Hi", "output": "Yes", "passage": "Hm"},
            "key 'passage' is not supported beside 'instruction'",
        ),
        ({"instruction": "Hi", "input": 0, "output": "Yes"}, "input: expected a text, got 0"),
        (turns(ASK, SAY, tools="{"), "tools: expected a list, got a text that is no JSON"),
        (turns(ASK, SAY, tools=[1]), "tools: expected a list of objects"),
        (turns(ASK, GET, SAY), "tool turns between two of the assistant; got user, tool, assistant"),
        (turns(ASK, CALL, GET), "got user, assistant, tool"),
        (turns(ASK, SAY | {"reasoning_content": 5}), "turn 2, 'reasoning_content': expected a text, got 5"),
        (turns(ASK, SAY | {"tool_calls": ["\ud800"]}), "turn 2: expected Unicode text"),
    ],
)
def test_what_cannot_be_read_is_refused_by_key(row, message):
    with pytest.raises(ValueError, match=message):
        only_sample(row, tokenizer=TALKATIVE)


def test_a_system_key_beside_turns_is_the_system_turn():
    assert sft.to_messages(turns(ASK, SAY, system="Be")) == [{"role": "system", "content": "Be"}, ASK, SAY]


# -------------------------------------------------------------------------------- tools, calls and thoughts


def test_tools_calls_and_thoughts_reach_a_chat_template_that_renders_them():
    row = turns(ASK, CALL, GET, SAY | {"reasoning_content": "hm"}, tools=TOOLS)
    assert_is(
        only_sample(row, tokenizer=TALKATIVE),
        ids("_T" + json.dumps(TOOLS) + "u:Hi;a:"),
        ids("!f;"),
        ids("t:42;a:"),
        ids("(hm)Yes;"),
    )
    assert only_sample(row | {"tools": json.dumps(TOOLS)}, tokenizer=TALKATIVE) == only_sample(row, tokenizer=TALKATIVE)


@pytest.mark.parametrize("key", ["thinking", "reasoning"])
def test_other_names_of_a_thought_are_read_as_in_transformers(key):
    row = turns(ASK, SAY | {"reasoning_content": "hm"})
    assert only_sample(turns(ASK, SAY | {key: "hm"}), tokenizer=TALKATIVE) == only_sample(row, tokenizer=TALKATIVE)


LEFT_OUT = [
    (turns(ASK, SAY, tools=TOOLS), "tools"),
    (turns(ASK, CALL, GET, SAY), "tool_calls"),
    (turns(ASK, SAY | {"reasoning_content": "hm"}), "reasoning_content"),
]


@pytest.mark.parametrize(("row", "key"), [*LEFT_OUT, (turns({"role": "system", "content": "Be"}, ASK, SAY), "content")])
def test_what_a_chat_template_leaves_out_is_refused_by_key(row, key):
    with pytest.raises(ValueError, match=f"the chat_template leaves out the (row's )?'{key}'"):
        only_sample(row, tokenizer=SILENT)


@pytest.mark.parametrize("answer", ["Well. <think>hm</think>Yes", "<think>so</think>Hm <think>hm</think>Yes"])
def test_an_answer_that_a_chat_template_cuts_is_refused(answer):
    cut = "{{ m.content.split('</think>')[-1].split('<think>')[-1] }}"
    cuts = TextTokenizer(RAW, NAMED, SILENT.chat_template.replace("{{ m.content }}", cut))
    assert only_sample(turns(ASK, SAY), tokenizer=cuts) == only_sample(turns(ASK, SAY), tokenizer=SILENT)
    with pytest.raises(ValueError, match="the chat_template leaves out the 'content' of turn 2"):
        only_sample(turns(ASK, SAY | {"content": answer}), tokenizer=cuts)


@pytest.mark.parametrize(("row", "key"), [*LEFT_OUT, (turns(ASK, SAY, GET, SAY), "tool")])
def test_what_a_named_template_has_no_place_for_is_refused_by_key(row, key):
    with pytest.raises(ValueError, match=f"'{key}': template 'default' has no place for it"):
        only_sample(row, template="default")


# ----------------------------------------------------------------------------------------- bad rows, counted


@given(st.lists(st.booleans(), min_size=1, max_size=8).filter(lambda good: not all(good)))
def test_one_error_counts_the_bad_rows_names_the_first_three_and_the_flag(good):
    rows = [GOOD if ok else BAD for ok in good]
    bad = [number for number, ok in enumerate(good, start=1) if not ok]
    with pytest.raises(ValueError) as caught:
        load(rows)
    message = str(caught.value)
    wrong = "response: expected a text, got an empty one"
    named = "; ".join(f"line {number}: {wrong}" for number in bad[1:3])
    assert f"rows.jsonl:{bad[0]}: {wrong}{'; ' if named else ''}{named} (" in message
    if not any(good):
        assert message.endswith(f"(all {len(bad)} rows are bad)")
    elif len(bad) == 1:
        assert message.endswith("(1 row is bad; --skip-bad-rows leaves it out)")
    else:
        assert message.endswith(f"({len(bad)} of {len(good)} rows are bad; --skip-bad-rows leaves them out)")
    assert "\n" not in message
    if any(good):
        samples, skipped = load(rows, skip_bad_rows=True)
        assert (len(samples), skipped) == (sum(good), len(bad))


def test_a_row_of_a_json_list_is_named_by_its_number_and_id_and_by_its_line_if_there_are_lines(tmp_path):
    rows = [GOOD, BAD | {"id": "x7"}]
    path = write(tmp_path, rows, "rows.json")
    with pytest.raises(ValueError, match=r"rows.json:6: row 2 of 2: id 'x7': response: expected"):
        sft.load_samples(path, TOKENIZER)
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"rows.json: row 2 of 2: id 'x7': response: expected"):
        sft.load_samples(path, TOKENIZER)


def test_the_place_of_a_row_has_its_number_in_a_json_list_and_its_line_if_there_are_lines(tmp_path):
    rows = [GOOD, GOOD | {"id": "x7"}]
    lines = write(tmp_path, rows)
    lists = write(tmp_path, rows, "lists.json")
    one = tmp_path / "one.json"
    one.write_text(json.dumps(rows) + "\n")
    assert [sft.row_place(path, 1) for path in (lines, lists, one)] == [
        f"{lines}:2",
        f"{lists}:6: row 2 of 2",
        f"{one}: row 2 of 2",
    ]


def test_a_token_that_the_model_does_not_embed_is_named_with_both_sizes():
    rows = [sample.input_ids for sample in load([GOOD], template="chatml")[0]]
    sft.check_token_ids("rows.jsonl", rows, TOKENIZER, 132)
    with pytest.raises(ValueError, match=r"rows.jsonl: the token '<\|im_end\|>' has id 131, but the model embeds 131 "):
        sft.check_token_ids("rows.jsonl", rows, TOKENIZER, 131)
    sft.check_token_ids("rows.jsonl", [[], []], TOKENIZER, 0)
