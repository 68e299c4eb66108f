"""data/sft.py and data/tokenizer.py: templates against exact ids, truncation, batches, every bad row's place."""

import io
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors

from data import download, sft, templates
from data.tokenizer import TextTokenizer

# A tokenizer that shows what it was given: the id of an ASCII character is its code, and every stretch of
# text between special tokens gets "_" in front, as LLaMA-2's tokenizer puts a space there. So the ids tell
# which pieces were tokenised together.
UNK, BOS, EOS = 1, 128, 129
SPECIAL = {
    "<s>": BOS,
    "</s>": EOS,
    "<|im_start|>": 130,
    "<|im_end|>": 131,
    "<|start_header_id|>": 132,
    "<|end_header_id|>": 133,
    "<|eot_id|>": 134,
}


def raw_tokenizer(special=SPECIAL):
    vocab = {"<unk>": UNK, **{chr(code): code for code in range(9, 127)}, **special}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend("_")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


RAW = raw_tokenizer()
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
TOKENIZER = TextTokenizer(RAW, NAMED)


def ids(*pieces):
    """Ids written down by hand: characters as text, special tokens as numbers."""
    return [token for piece in pieces for token in (map(ord, piece) if isinstance(piece, str) else [piece])]


def spoken(*turns):
    """Messages user, assistant, user, ...; a leading ("system", text) pair stays as it is."""
    system = [{"role": "system", "content": turns[0][1]}] if isinstance(turns[0], tuple) else []
    roles = ("user", "assistant") * len(turns)
    return {
        "messages": system
        + [{"role": role, "content": text} for role, text in zip(roles, turns[len(system) :], strict=False)]
    }


def write(folder, rows, name="rows.jsonl"):
    path = Path(folder) / name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows, indent=2) if name.endswith(".json") else lines, encoding="utf-8")
    return path


def load(rows, name="rows.jsonl", tokenizer=TOKENIZER, **options):
    with tempfile.TemporaryDirectory() as folder:
        return sft.load_samples(write(folder, rows, name), tokenizer, **options)


def only_sample(row, **options):
    (sample,), skipped = load([row], **options)
    assert skipped == 0
    return sample


# ------------------------------------------------------------------------------------------------ templates

ALPACA = (
    "_Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
EXPECTED = {  # template: (prompt ids, answer ids) of the question "Hi" and the answer "Yes"
    "llama2": (ids(BOS, "_[INST] Hi [/INST]"), ids("_Yes", EOS)),
    "mistral": (ids(BOS, "_[INST] Hi[/INST]"), ids("_ Yes", EOS)),
    "llama3": (ids(BOS, 132, "_user", 133, "_\n\nHi", 134, 132, "_assistant", 133, "_\n\n"), ids("_Yes", 134)),
    "qwen3": (ids(130, "_user\nHi", 131, "_\n", 130, "_assistant\n"), ids("_Yes", 131, "_\n")),
    "chatml": (ids(130, "_user\nHi", 131, "_\n", 130, "_assistant\n"), ids("_Yes", 131, "_\n")),
    "alpaca": (ids(ALPACA, "_### Instruction:\nHi\n\n### Response:\n"), ids("_Yes", EOS, "_\n\n")),
    "default": (ids("_Human: Hi", EOS, "_\nAssistant:"), ids("_Yes", EOS, "_\n")),
}
EXPECTED_TURNS = {  # template: prompt, answer, prompt, answer ids of system "Be", "Hi", "Yes", "So", "No"
    "llama2": (
        ids(BOS, "_[INST] <<SYS>>\nBe\n<</SYS>>\n\nHi [/INST]"),
        ids("_Yes", EOS),
        ids(BOS, "_[INST] So [/INST]"),
        ids("_No", EOS),
    ),
    "mistral": (ids(BOS, "_[INST] Be\n\nHi[/INST]"), ids("_ Yes", EOS), ids("_[INST] So[/INST]"), ids("_ No", EOS)),
    "llama3": (
        ids(
            BOS, 132, "_system", 133, "_\n\nBe", 134, 132, "_user", 133, "_\n\nHi", 134, 132, "_assistant", 133, "_\n\n"
        ),
        ids("_Yes", 134),
        ids(132, "_user", 133, "_\n\nSo", 134, 132, "_assistant", 133, "_\n\n"),
        ids("_No", 134),
    ),
    "chatml": (
        ids(130, "_system\nBe", 131, "_\n", 130, "_user\nHi", 131, "_\n", 130, "_assistant\n"),
        ids("_Yes", 131, "_\n"),
        ids(130, "_user\nSo", 131, "_\n", 130, "_assistant\n"),
        ids("_No", 131, "_\n"),
    ),
    "alpaca": (
        ids("_Be", "_### Instruction:\nHi\n\n### Response:\n"),
        ids("_Yes", EOS, "_\n\n"),
        ids("_### Instruction:\nSo\n\n### Response:\n"),
        ids("_No", EOS, "_\n\n"),
    ),
    "default": (
        ids("_System: Be", EOS, "_\n", "_Human: Hi", EOS, "_\nAssistant:"),
        ids("_Yes", EOS, "_\n"),
        ids("_Human: So", EOS, "_\nAssistant:"),
        ids("_No", EOS, "_\n"),
    ),
}


def assert_is(sample, *segments):
    """segments: prompt ids, answer ids, prompt ids, ..."""
    assert sample.input_ids == [token for segment in segments for token in segment]
    assert sample.labels == [token if n % 2 else -100 for n, part in enumerate(segments) for token in part]


def test_the_llama2_template_gives_exactly_these_numbers():
    sample = only_sample({"instruction": "Hi", "output": "No"}, template="llama2")
    assert sample.input_ids == [
        128,
        95,
        91,
        73,
        78,
        83,
        84,
        93,
        32,
        72,
        105,
        32,
        91,
        47,
        73,
        78,
        83,
        84,
        93,
        95,
        78,
        111,
        129,
    ]
    assert sample.labels == [-100] * 19 + [95, 78, 111, 129]


@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_a_template_gives_exactly_these_ids_and_labels(template):
    assert_is(only_sample({"instruction": "Hi", "output": "Yes"}, template=template), *EXPECTED[template])


@pytest.mark.parametrize("template", EXPECTED_TURNS)
def test_every_answer_of_a_conversation_is_labelled_and_nothing_else(template):
    row = spoken(("system", "Be"), "Hi", "Yes", "So", "No")
    assert_is(only_sample(row, template=template), *EXPECTED_TURNS[template])


def test_braces_and_placeholder_names_in_the_data_stay_text():
    row = {"instruction": "{} {q} {0} <BOS>", "output": "{} BOS"}
    assert_is(only_sample(row, template="llama2"), ids(BOS, "_[INST] {} {q} {0} <BOS> [/INST]"), ids("_{} BOS", EOS))


CHAT = (
    "{{ bos_token }}{% for message in messages %}\n    {% if message.role == 'user' %}\n"
    "U:{{ message.content }};{% else %}A:{{ message.content | trim }}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def with_chat_template(source):
    return TextTokenizer(RAW, NAMED, source)


def test_auto_is_the_models_own_chat_template_with_its_bos_once():
    chat = with_chat_template(CHAT)
    sample = only_sample({"prompt": "Hi", "response": " Yes"}, tokenizer=chat)
    assert_is(sample, ids(BOS, "_U:Hi;A:"), ids("Yes", EOS))
    sample = only_sample(spoken("Hi", "Yes", "So", "No"), tokenizer=chat)
    assert_is(sample, ids(BOS, "_U:Hi;A:"), ids("Yes", EOS), ids("_U:So;A:"), ids("No", EOS))


def test_auto_without_a_chat_template_is_the_default_template():
    assert_is(only_sample({"prompt": "Hi", "response": "Yes"}), *EXPECTED["default"])


def test_a_chat_template_sees_no_tools_and_no_clock_and_tojson_does_not_escape_html():
    chat = with_chat_template(
        "{{ tools is none }} {{ strftime_now is defined }}{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    )
    assert_is(
        only_sample({"prompt": "<é>", "response": "Yes"}, tokenizer=chat), ids('_True False"<', UNK, '>"'), ids('"Yes"')
    )


def test_a_row_that_the_chat_template_refuses_is_a_bad_row():
    refusing = with_chat_template("{{ raise_exception('no such roles') }}")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the chat_template refuses the row: no such roles"):
        only_sample({"prompt": "Hi", "response": "Yes"}, tokenizer=refusing)
    two_nones = with_chat_template("{{ messages + none }}")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the chat_template refuses the row"):
        only_sample({"prompt": "Hi", "response": "Yes"}, tokenizer=two_nones)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | length }}",  # a later turn changes what stands before it
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
        "always the same",
    ],
)
def test_a_chat_template_whose_answers_cannot_be_located_is_refused(source):
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .*continuation.*--template"):
        only_sample({"prompt": "Hi", "response": "Yes"}, tokenizer=with_chat_template(source))


def test_a_chat_template_that_rewrites_earlier_turns_is_refused_only_where_it_does():
    thinks = with_chat_template(
        "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}A{% else %}"
        "{% if loop.last %}(think){% endif %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert_is(only_sample(spoken("Hi", "Yes"), tokenizer=thinks), ids("_UHiA"), ids("(think)Yes"))
    with pytest.raises(ValueError, match="turn 2 as a continuation"):
        only_sample(spoken("Hi", "Yes", "So", "No"), tokenizer=thinks)


def test_a_chat_template_that_does_not_compile_is_refused():
    with pytest.raises(ValueError, match="chat_template does not compile"):
        templates.resolve_template("auto", with_chat_template("{% for m in messages %}"))


def test_an_unknown_template_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown template 'vicuna': expected one of auto, llama2, mistral"):
        templates.resolve_template("vicuna", TOKENIZER)


@pytest.mark.parametrize(
    ("template", "token"),
    [
        ("chatml", r"<\|im_start\|>"),
        ("llama3", r"<\|start_header_id\|>"),
        ("llama2", "<BOS>"),
        ("default", "<EOS>"),
        ("auto", "<EOS>"),
    ],
)
def test_a_template_is_refused_where_the_tokenizer_lacks_its_token(template, token):
    named = {"bos_token": "<s>"} if template == "llama3" else {}
    bare = TextTokenizer(raw_tokenizer({"<s>": BOS, "</s>": EOS}), named)
    with pytest.raises(ValueError, match=f"needs the token {token}"):
        templates.resolve_template(template, bare)


# ---------------------------------------------------------------------------------------------------- forms


def test_the_five_forms_of_a_row_give_the_same_sample():
    forms = [
        {"instruction": "Hi\nyou", "output": "Yes"},
        {"instruction": "Hi", "input": "you", "output": "Yes"},
        {"prompt": "Hi\nyou", "response": "Yes"},
        {"question": "Hi\nyou", "answer": "Yes"},
        {"messages": [{"role": "user", "content": "Hi\nyou"}, {"role": "assistant", "content": "Yes"}]},
        {"conversations": [{"from": "human", "value": "Hi\nyou"}, {"from": "gpt", "value": "Yes"}]},
    ]
    samples, _ = load(forms)
    assert {(tuple(s.input_ids), tuple(s.labels)) for s in samples} == {
        (tuple(samples[0].input_ids), tuple(samples[0].labels))
    }
    assert_is(samples[0], ids("_Human: Hi\nyou", EOS, "_\nAssistant:"), ids("_Yes", EOS, "_\n"))


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"instruction": "Hi", "input": "", "output": "Yes"}, "Hi"),
        ({"instruction": "Hi", "input": None, "output": "Yes"}, "Hi"),
        ({"instruction": "", "input": "you", "output": "Yes"}, "you"),
        ({"instruction": "Hi", "output": "Yes", "history": [], "system": "", "source": "x"}, "Hi"),
        (
            {
                "conversations": [
                    {"from": "system", "value": ""},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Yes"},
                ]
            },
            "Hi",
        ),
    ],
)
def test_what_is_empty_adds_nothing_to_the_question(row, question):
    assert sft.to_messages(row) == spoken(question, "Yes")["messages"]


def test_ids_are_the_rows_own_or_their_number_and_always_unique():
    row = {"prompt": "Hi", "response": "Yes"}
    rows = [{**row, "id": "2"}, row, row, {**row, "id": 7}, {**row, "id": "2"}, {**row, "id": None}]
    assert [sample.id for sample in load(rows)[0]] == ["2", "1", "2#2", "7", "2#4", "5"]


def test_a_skipped_row_does_not_shift_the_numbers_of_the_others():
    rows = [{"prompt": "Hi", "response": "Yes"}, {"prompt": "Hi"}, {"prompt": "So", "response": "No"}]
    samples, skipped = load(rows, skip_bad_rows=True)
    assert ([sample.id for sample in samples], skipped) == (["0", "2"], 1)


ENDS = [{"prompt": "Hi", "response": "Yes"}, {"question": "Hi", "answer": "Yes"}]
BAD_ROWS = [
    ([1, 2], "expected a JSON object, got a list"),
    ("text", "expected a JSON object, got a text"),
    (None, "expected a JSON object, got null"),
    (
        {},
        "expected the keys of one form (instruction and output or prompt and response or question and "
        "answer or messages or conversations), got no keys",
    ),
    ({"text": "Hi"}, "messages or conversations), got text"),
    ({"instruction": "Hi", "input": "you"}, "messages or conversations), got instruction, input"),
    ({"prompt": "Hi", "response": "Yes", "question": "Hi", "answer": "Yes"}, "the keys of one form"),
    ({"instruction": "Hi", "output": ""}, "output: expected a text, got an empty one"),
    ({"instruction": "Hi", "output": " \n"}, "output: expected a text, got an empty one"),
    ({"instruction": "Hi", "output": None}, "output: expected a text, got null"),
    ({"instruction": "Hi", "output": 4}, "output: expected a text, got 4"),
    ({"instruction": "", "output": "Yes"}, "instruction: expected a text, got an empty one"),
    ({"instruction": ["Hi"], "input": "you", "output": "Yes"}, "instruction: expected a text, got a list"),
    ({"instruction": "Hi", "input": {"a": 1}, "output": "Yes"}, "input: expected a text, got an object"),
    ({"prompt": "Hi", "response": True}, "response: expected a text, got true"),
    ({"prompt": "\ud83d", "response": "Yes"}, "prompt: expected Unicode text, got half of a surrogate pair"),
    ({"prompt": "Hi", "response": "Yes", "id": ["a"]}, "id: expected a text or a whole number, got a list"),
    ({"prompt": "Hi", "response": "Yes", "system": ["Be"]}, "system: expected a text, got a list"),
    ({"instruction": "Hi", "output": "Yes", "history": ["a"]}, "history, turn 1: expected [question, answer]"),
    ({"messages": "Hi"}, "messages: expected a list of turns, got a text"),
    ({"messages": []}, "tool turns between two of the assistant; got no turn"),
    ({"messages": ["Hi"]}, "messages, turn 1: expected an object whose 'role' is one of system, user, human"),
    ({"messages": [{"role": "cat", "content": "Hi"}]}, 'got {"role": "cat", "content": "Hi"}'),
    ({"messages": [{"from": "human", "value": "Hi"}]}, "messages, turn 1: expected an object whose 'role'"),
    ({"messages": [{"role": ["user"], "content": "Hi"}]}, "turn 1: expected an object whose 'role' is one"),
    (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt"}]},
        "conversations, turn 2, 'value': expected a text, got null",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages, turn 1, 'content': expected a text, got a list",
    ),
    (spoken(("system", "Be")), "got system"),
    (spoken("Hi"), "got user"),
    (spoken("Hi", "Yes", "So"), "got user, assistant, user"),
    ({"messages": spoken("Hi", "Yes")["messages"][1:]}, "got assistant"),
    (
        {"messages": spoken("Hi", "Yes")["messages"] * 2 + spoken(("system", "Be"))["messages"]},
        "got user, assistant, user, assistant, system",
    ),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS)
def test_a_bad_row_is_named_by_its_line_and_can_be_skipped(tmp_path, bad, message):
    rows = [ENDS[0], bad, ENDS[1]]
    for name, line in (("rows.jsonl", 2), ("rows.json", 6)):
        path = write(tmp_path, rows, name)
        with pytest.raises(ValueError) as caught:
            sft.load_samples(path, TOKENIZER)
        assert str(caught.value).startswith(f"{path}:{line}: ") and message in str(caught.value)
        samples, skipped = sft.load_samples(path, TOKENIZER, skip_bad_rows=True)
        assert ([sample.id for sample in samples], skipped) == (["0", "2"], 1)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"prompt": "Hi", "response" "Yes"}', "not valid JSON: Expecting ':' delimiter at column 29"),
        (b'{"prompt": "Hi"', "not valid JSON: Expecting ',' delimiter at column 16"),
        (b'{"prompt": "\xff", "response": "Yes"}', "not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"{} {}", "not valid JSON: Extra data at column 4"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_jsonl_line_is_named_by_its_line_and_can_be_skipped(tmp_path, raw, message):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ENDS[0]).encode()
    path.write_bytes(good + b"\n\n" + raw + b"\n" + good)
    with pytest.raises(ValueError) as caught:
        sft.load_samples(path, TOKENIZER)
    assert str(caught.value).startswith(f"{path}:3: {message}")
    samples, skipped = sft.load_samples(path, TOKENIZER, skip_bad_rows=True)
    assert ([sample.id for sample in samples], skipped) == (["0", "2"], 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.json", '[{"prompt": "Hi"},\n {"prompt" "Hi"}]', ":2:12: not valid JSON: Expecting ':' delimiter"),
        ("rows.json", '{"prompt": "Hi"}\n{"prompt": "Hi"}', ":2:1: not valid JSON: Extra data; if it has one"),
        ("rows.json", '{"prompt": "Hi"}', ": expected a JSON list of rows, got an object"),
        ("rows.json", "", ":1:1: not valid JSON"),
        ("rows.json", "[" * 100_000, ": not valid JSON"),
        ("rows.json", "[]", ": expected rows, got none"),
        ("rows.jsonl", "\n \n", ": expected rows, got none"),
        ("rows.csv", "a,b", ": expected a .json or .jsonl file, got suffix '.csv'"),
        ("rows.jsonl", "{}\n[]\n", ":1: expected the keys of one form"),
    ],
)
@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_a_file_without_a_good_row_is_an_error_even_when_skipping(tmp_path, name, text, message, skip_bad_rows):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        sft.load_samples(tmp_path / name, TOKENIZER, skip_bad_rows=skip_bad_rows)
    assert str(caught.value).startswith(f"{tmp_path / name}{message}")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: no such file"):
        sft.load_samples(tmp_path / "none.jsonl", TOKENIZER)


def test_all_rows_bad_names_the_first(tmp_path):
    path = write(tmp_path, [{"prompt": "Hi"}, 3])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .* got prompt; line 2: .*got 3 \(all 2 rows are bad\)"):
        sft.load_samples(path, TOKENIZER, skip_bad_rows=True)


def test_only_a_line_feed_ends_a_line_and_marks_and_blank_lines_are_skipped(tmp_path):
    text = "a\u2028b\u2029c\x85d"
    row = json.dumps({"prompt": text, "response": "Yes"}, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + row.encode() + b"\r\n   \n" + row.encode())
    assert sft.read_rows(path) == [(2, json.loads(row)), (4, json.loads(row))]
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf[" + row.encode() + b"]")
    assert sft.read_rows(path) == [(None, json.loads(row))]


# --------------------------------------------------------------------------------------------- properties

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
conversation = st.builds(
    lambda system, turns: spoken(*system, *(t for turn in turns for t in turn)),
    st.lists(st.tuples(st.just("system"), text), max_size=1),
    st.lists(st.tuples(text, text), min_size=1, max_size=3),
)
template = st.sampled_from(list(templates.TEMPLATES))


@given(conversation, template, st.integers(2, 200))
def test_a_label_is_its_own_input_id_or_ignored_and_the_length_is_kept(row, template, max_length):
    try:
        sample = only_sample(row, template=template, max_length=max_length)
    except ValueError as error:
        assert "expected an answer token to train on, got none" in str(error)
        return
    assert len(sample.labels) == len(sample.input_ids) <= max_length
    assert all(label in (-100, token) for label, token in zip(sample.labels, sample.input_ids, strict=True))
    assert sample.labels[0] == -100 and any(label != -100 for label in sample.labels)


@given(st.lists(conversation, min_size=1, max_size=5), template, st.integers(100, 200), st.integers(1, 4))
def test_a_rows_ids_depend_neither_on_its_neighbours_nor_on_the_file_form_nor_on_the_chunk(
    rows, template, max_length, chunk
):
    options = {"template": template, "max_length": max_length}
    together, _ = load(rows, **options)
    assert together == load(rows, "rows.json", **options)[0]
    for sample, row in zip(together, rows, strict=True):
        alone = only_sample(row, **options)
        assert (sample.input_ids, sample.labels) == (alone.input_ids, alone.labels)
    resolved = templates.resolve_template(template, TOKENIZER)
    assert together == list(sft._encode_rows(rows, resolved, max_length, chunk=chunk))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 80))
@example(10, 10, 20)  # both sides half the budget: nothing is cut
@example(50, 7, 14)  # an answer of just half the budget is not short
@example(7, 50, 14)
@example(1000, 1, 2)
def test_truncation_fills_the_budget_and_cuts_no_short_side(prompt, answer, budget):
    kept_prompt, kept_answer = sft.kept_lengths(prompt, answer, budget)
    assert 0 <= kept_prompt <= prompt and 0 <= kept_answer <= answer
    assert kept_prompt + kept_answer == min(prompt + answer, budget)
    if 2 * answer < budget:
        assert kept_answer == answer
    elif 2 * prompt < budget:
        assert kept_prompt == prompt
    elif prompt + answer > budget:
        assert kept_answer == budget * answer // (prompt + answer)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4), st.integers(2, 90))
def test_truncation_keeps_the_head_of_every_prompt_and_answer(lengths, max_length):
    numbers = iter(range(1000))
    turns = [([next(numbers) for _ in range(p)], [next(numbers) for _ in range(a)]) for p, a in lengths]
    sample = sft.to_sample("0", turns, max_length)
    left, expected, labels = max_length, [], []
    for prompt, answer in turns:
        p, a = sft.kept_lengths(len(prompt), len(answer), left) if left else (0, 0)
        expected += prompt[:p] + answer[:a]
        labels += [-100] * p + answer[:a]
        left -= p + a
    assert (sample.input_ids, sample.labels) == (expected, labels)
    assert len(expected) == min(max_length, sum(p + a for p, a in lengths))


def test_a_long_row_is_cut_to_exactly_these_tokens():
    row = {"prompt": "abcdefghij", "response": "0123456789"}  # 27 and 12 tokens: 19 * 12 // (27 + 12) is 5
    assert_is(only_sample(row, template="llama2", max_length=19), ids(BOS, "_[INST] abcde"), ids("_0123"))


def test_a_row_whose_answer_is_cut_away_is_a_bad_row(tmp_path):
    path = write(tmp_path, [{"prompt": "long " * 100, "response": "Yes"}])
    with pytest.raises(ValueError, match=r"jsonl:1: expected an answer token to train on, got none in 4"):
        sft.load_samples(path, TOKENIZER, max_length=4)
    with pytest.raises(ValueError, match="max_length: expected at least 2 tokens, got 1"):
        sft.load_samples(path, TOKENIZER, max_length=1)


# --------------------------------------------------------------------------------------------------- batches

sample = st.integers(2, 9).flatmap(
    lambda length: st.builds(
        sft.Sample,
        st.just("0"),
        st.lists(st.integers(0, 99), min_size=length, max_size=length),
        st.lists(st.integers(-100, 99), min_size=length, max_size=length),
    )
)


@given(st.lists(sample, min_size=1, max_size=5))
def test_collate_pairs_each_token_with_the_label_after_it_and_pads_with_ignored_labels(samples):
    input_ids, labels = sft.collate(samples)
    assert input_ids.dtype == labels.dtype == torch.int64
    assert input_ids.shape == labels.shape == (len(samples), max(len(s.input_ids) for s in samples) - 1)
    for row, s in enumerate(samples):
        n = len(s.input_ids) - 1
        assert input_ids[row, :n].tolist() == s.input_ids[:-1] and labels[row, :n].tolist() == s.labels[1:]
        assert labels[row, n:].tolist() == [-100] * (input_ids.shape[1] - n)


def test_collate_refuses_no_samples():
    with pytest.raises(ValueError, match="expected at least one sample"):
        sft.collate([])


# -------------------------------------------------------------------------------------------------- tokenizer


def folder_with(folder, raw=RAW, **files):
    raw.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_encode_adds_what_tokenizer_json_adds_and_decode_drops_special_tokens(tmp_path):
    tokenizer = TextTokenizer.from_pretrained(folder_with(tmp_path, tokenizer_config=NAMED))
    assert tokenizer.encode("Hi") == ids(BOS, "_Hi") and tokenizer.encode_plain("Hi") == ids("_Hi")
    assert tokenizer.encode_plain("Hi</s>") == ids("_Hi", EOS)
    assert tokenizer.encode_plain_batch(["Hi", "</s>So"]) == [ids("_Hi"), ids(EOS, "_So")]
    assert tokenizer.decode(ids(BOS, "Hi", EOS)).replace(" ", "") == "Hi"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (BOS, EOS, None)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ids(BOS, "_Hi")),
        ({"add_bos_token": True}, ids(BOS, "_Hi")),
        ({"add_bos_token": False}, ids(BOS, "_Hi")),
        ({"add_eos_token": True}, ids(BOS, "_Hi")),
        ({"add_bos_token": True, "bos_token": None}, ids(BOS, "_Hi")),
    ],
)
def test_encode_follows_tokenizer_json_and_neither_add_bos_token_nor_add_eos_token(tmp_path, config, expected):
    tokenizer = TextTokenizer.from_pretrained(folder_with(tmp_path, tokenizer_config=NAMED | config))
    assert tokenizer.encode("Hi") == expected


@pytest.mark.parametrize(
    ("files", "bos_and_eos"),
    [
        (
            {"tokenizer_config": {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>", "special": 1}}},
            (BOS, EOS),
        ),
        (
            {"tokenizer_config": {"bos_token": None, "eos_token": "<|im_end|>"}, "config": {"bos_token_id": BOS}},
            (None, 131),
        ),
        ({"config": {"bos_token_id": BOS, "eos_token_id": [134, EOS]}}, (BOS, 134)),
        ({"config": {"bos_token_id": None, "eos_token_id": EOS}}, (None, EOS)),
        ({}, (None, None)),
    ],
)
def test_bos_and_eos_come_from_the_tokenizers_config_else_from_the_models(tmp_path, files, bos_and_eos):
    tokenizer = TextTokenizer.from_pretrained(folder_with(tmp_path, **files))
    assert (tokenizer.bos_id, tokenizer.eos_id) == bos_and_eos


def test_a_chat_template_comes_from_its_own_file_else_from_the_config(tmp_path):
    def found(**config):
        return TextTokenizer.from_pretrained(folder_with(tmp_path, tokenizer_config=config)).chat_template

    assert found(chat_template="one") == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    assert found(chat_template=named) == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert found(chat_template="one") == "four"


def test_padding_and_truncation_asked_for_in_tokenizer_json_are_switched_off(tmp_path):
    raw = raw_tokenizer()
    raw.enable_padding(length=8, pad_id=7, pad_token="p")
    raw.enable_truncation(2)
    tokenizer = TextTokenizer.from_pretrained(folder_with(tmp_path, raw))
    assert tokenizer.encode_plain_batch(["Hi", "So long"]) == [ids("_Hi"), ids("_So long")]


def test_an_unreadable_tokenizer_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json: not found; expected a model folder"):
        TextTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a readable tokenizer.json"):
        TextTokenizer.from_pretrained(tmp_path)
    for config, message in (
        ({"eos_token": "<end>"}, "eos_token '<end>' is not in the vocabulary"),
        ({"bos_token": 5}, "bos_token: expected a token, got 5"),
        ([], r"tokenizer_config.json: expected a JSON object, got a list"),
    ):
        with pytest.raises(ValueError, match=message):
            TextTokenizer.from_pretrained(folder_with(tmp_path, tokenizer_config=config))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not valid JSON"):
        TextTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="eos_token 'id 9999' is not in the vocabulary"):
        TextTokenizer.from_pretrained(folder_with(tmp_path, config={"eos_token_id": 9999}))


# --------------------------------------------------------------------------------------------------- download


@pytest.mark.parametrize("name", ["gsm8k", "mathinstruct"])
def test_a_download_without_a_network_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, name):
    def offline(*args, **kwargs):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setattr("sys.argv", ["download", name, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        download.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"data.download: {name}: could not be fetched: OSError: no network\n"
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("size", [9, None])
def test_a_download_that_breaks_off_leaves_no_file(tmp_path, monkeypatch, size):
    def answer(address, timeout):
        body = io.BytesIO(b"1234567")
        body.headers = {} if size is None else {"Content-Length": str(size)}
        return body

    monkeypatch.setattr("urllib.request.urlopen", answer)
    if size is None:  # a server that does not say how much it sends
        download.download("squad", tmp_path)
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"1234567"]
    else:
        with pytest.raises(OSError, match="the connection ended after 7 of 9 bytes"):
            download.download("squad", tmp_path)
        assert list(tmp_path.iterdir()) == []
