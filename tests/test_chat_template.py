"""A model's own chat_template: where its answers are, what marks them, and the limits under which it renders."""

import json
from pathlib import Path

import pytest
from chat_forms import APPENDING, FORMS, TALKS, THINKING, plain, talk
from hypothesis import example, given
from hypothesis import strategies as st
from test_data import EOS, NAMED, RAW, TOKENIZER, assert_is, folder_with, ids, load, only_sample
from tokenizers import Tokenizer, models, processors

from data import chat_template
from data.chat_template import ChatTemplate
from data.templates import TEMPLATES, jinja_of, resolve_template
from data.tokenizer import TextTokenizer

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny" / "base"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def rendered(source, messages, tools=None):
    """(text, the answers' texts) or the ValueError of one conversation."""
    [found] = ChatTemplate(source, SPECIAL).render([{"messages": messages, "tools": tools}])
    return found if isinstance(found, ValueError) else (found[0], [found[0][start:end] for start, end in found[1]])


def with_template(source):
    return TextTokenizer(RAW, NAMED, source)


# --------------------------------------------------------------------------------------- where answers are


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_is_the_same_with_generation_blocks_and_without(form):
    for messages in TALKS.values():
        if form != "mistral" or messages[0]["role"] != "system":
            marked, unmarked = rendered(FORMS[form], messages), rendered(plain(FORMS[form]), messages)
            assert marked == unmarked
            assert len(marked[1]) == sum(message["role"] == "assistant" for message in messages)


def test_a_text_is_tokenised_once_so_nothing_is_put_in_front_of_an_answer():
    sample = only_sample({"messages": talk("Hi", "Blue")}, tokenizer=with_template(plain(FORMS["zephyr"])))
    assert_is(sample, ids("_<|user|>\nHi", EOS, "_\n<|assistant|>\n"), ids("Blue", EOS, "_\n"))


def test_a_token_across_the_border_belongs_to_the_prompt_it_starts_in():
    vocab = {"<unk>": 0, ":": 1, "a": 2, "\n": 3, "\n\n": 4, "u": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("\n", "\n")], unk_token="<unk>"))
    source = "{% for m in messages %}{{ m.content }}:\n{% endfor %}"  # trim_blocks leaves this line feed
    [sample], _ = load([{"prompt": "u", "response": "\na"}], tokenizer=TextTokenizer(tokenizer, {}, source))
    assert sample.input_ids == [5, 1, 4, 2, 1, 3]
    assert sample.labels == [-100, -100, -100, 2, 1, 3]


def test_a_space_that_offsets_leave_out_counts_as_the_tokens_start():
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    ours = TextTokenizer(tokenizer, {})
    [(found, starts)] = ours.encode_chats(["The red box is on the hill"])
    assert starts == [len(tokenizer.decode(found[:at])) for at in range(len(found))]


def test_a_header_that_the_template_always_appends_is_in_the_ids_and_carries_no_label():
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    for messages in TALKS.values():
        text, answers = rendered(APPENDING, messages)
        honest = rendered(plain(FORMS["llama3"]), messages)
        assert (text, answers) == (honest[0] + header, honest[1])
    row = {"messages": talk("Hi", "Yes")}
    sample = only_sample(row, tokenizer=with_template(plain(APPENDING)))
    assert sample.input_ids[-7:] == ids(132, "_assistant", 133, "_\n\n")[-7:]
    assert [label for label in sample.labels if label != -100] == ids("Yes", 134)


def test_an_appended_header_whose_start_cannot_be_known_is_refused():
    source = "{{ 'no BOS: ' }}{% for m in messages %}{{ m.role + m.content + ';' }}{% endfor %}assistant"
    with pytest.raises(ValueError, match="puts the header of an answer behind every conversation"):
        ChatTemplate(source, SPECIAL)


def test_an_empty_thought_before_the_last_answer_alone_is_no_part_of_the_earlier_ones():
    _, answers = rendered(THINKING, talk("Hi", "\nYes", "So", "No"))
    assert answers == ["\nYes<|im_end|>\n", "<think>\n\n</think>\n\nNo<|im_end|>\n"]


def test_an_earlier_thought_that_the_template_drops_refuses_the_row_with_the_ways_out():
    first, answer, *rest = talk("Hi", "Yes", "So", "No")
    found = rendered(THINKING, [first, answer | {"reasoning_content": "hm"}, *rest])
    assert "does not render turn 2" in str(found) and "--template" in str(found) and "a row's last" in str(found)
    rows = [{"messages": [first, answer | {"reasoning_content": "hm"}, *rest]}] * 4 + [{"messages": rest}]
    with pytest.raises(ValueError, match="4 of 5 rows are bad; --skip-bad-rows leaves them out"):
        load(rows, tokenizer=with_template(THINKING))


def test_generation_blocks_that_are_not_one_for_each_answer_are_refused():
    source = "{% for m in messages %}{{ m.role }}{% endfor %}{% generation %}x{% endgeneration %}"
    assert "marks 1 answers where the row has 2" in str(rendered(source, talk("a", "b", "c", "d")))


def test_named_templates_without_a_default_are_refused(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}]
    tokenizer = TextTokenizer.from_pretrained(folder_with(tmp_path, tokenizer_config=NAMED | {"chat_template": named}))
    with pytest.raises(ValueError, match="chat_template has tool_use, rag but no 'default'; name another --templ"):
        resolve_template("auto", tokenizer)
    assert resolve_template("default", tokenizer).end_id == EOS


@pytest.mark.parametrize(
    "template", [5, {"default": "x"}, ["x"], [{"name": "default"}], [{"name": "default", "template": 1}], []]
)
def test_a_chat_template_that_is_no_text_is_refused_by_file_and_key(tmp_path, template):
    with pytest.raises(ValueError, match=r"tokenizer_config.json: chat_template: expected a text or a list of"):
        TextTokenizer.from_pretrained(folder_with(tmp_path, tokenizer_config={"chat_template": template}))


# ------------------------------------------------------------------------------------------ named templates

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
talks = st.builds(
    lambda system, turns: talk(*(text for turn in turns for text in turn), system=system),
    st.just("") | words,
    st.lists(st.tuples(words, words), min_size=1, max_size=3),
)


@pytest.fixture(scope="module")
def jinja():
    return {name: ChatTemplate(jinja_of(slots), SPECIAL) for name, slots in TEMPLATES.items()}


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=talks)
@example(talk("{} {{ x }} \n", "{% if %} '\"\\n"))
@example(talk("\n", "\r\n\t", system="'"))
def test_the_jinja_form_of_a_named_template_renders_its_slots_and_marks_the_same_answers(jinja, name, messages):
    slots, text, answers, before, system = TEMPLATES[name], "", [], "", messages[0]["role"] == "system"

    def filled(slot, content=""):
        slot = (slot,) if isinstance(slot, str) else slot
        return "".join(
            {"<BOS>": "<s>", "<EOS>": "</s>"}.get(piece) or content.join(piece.split("{}")) for piece in slot
        )

    text = filled(slots.get("start", ()))
    turns = (
        messages
        if system or "default_system" not in slots
        else [{"role": "system", "content": slots["default_system"]}, *messages]
    )
    for message in turns:
        part = filled(slots[message["role"]], before + message["content"])
        inside = message["role"] == "system" and isinstance(slots["system"], str)
        before = part if inside else ""
        text += "" if inside else part
        answers += [part] if message["role"] == "assistant" else []
    [found] = jinja[name].render([{"messages": messages, "tools": None}])
    assert (found[0], [found[0][start:end] for start, end in found[1]]) == (text, answers)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_knows_the_token_that_ends_its_answers(name):
    ends = {"llama3": 134, "chatml": 131, "qwen3": 131}
    assert resolve_template(name, TOKENIZER).end_id == ends.get(name, EOS)
    as_chat = with_template(jinja_of(TEMPLATES[name]))
    assert resolve_template("auto", as_chat).end_id == ends.get(name, EOS)


@pytest.mark.parametrize(
    "source", ["{% for m in messages %}{{ m.content }};{% endfor %}", "{{ raise_exception('x') }}"]
)
def test_a_template_without_an_end_token_has_none(source):
    assert resolve_template("auto", with_template(source)).end_id is None


# --------------------------------------------------------------------------------------------------- limits

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWING = "{% set n = namespace(x='ab') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
BEYOND = {
    LOOP: "did not finish in 1 s",
    "{{ 'a' * 3000000000 }}": "needs more than 256 MiB of memory",
    "{{ 'a'.center(3000000000) }}": "needs more than 256 MiB of memory",
    "{{ [0] * 3000000000 }}": "needs more than 256 MiB of memory",
    GROWING: "needs more than 256 MiB of memory",
    "{{ 'a' * 9000000 }}": "renders more than 8388608 characters",
}


@pytest.fixture
def low_limits(monkeypatch):
    """The same limits, reached sooner."""
    monkeypatch.setattr(chat_template, "LIMITS", {"seconds": 1, "memory": 2**28, "length": 2**23})


@pytest.mark.parametrize("source", BEYOND)
def test_a_chat_template_that_passes_a_limit_ends_in_one_line_and_soon(low_limits, source):
    with pytest.raises(ValueError) as caught:
        rendered(source, talk("Hi", "Yes"))
    assert BEYOND[source] in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("; name another --template")


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ messages[5].x.y }}",
        "{{ 'a' ** 2 }}",
        "{{ '\\ud800' }}",
        "{{ ''.__class__ }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ (10 ** 400) | float }}",
    ],
)
def test_what_a_chat_template_raises_refuses_the_row(source):
    assert "chat_template" in str(rendered("{{ messages[0].content }}" + source, talk("Hi", "Yes")))


def test_the_process_ends_with_the_template():
    chat = ChatTemplate("{{ messages[0].content }}", SPECIAL)
    process = chat.process
    assert process.poll() is None
    del chat
    assert process.poll() is not None


def test_a_tokenizer_that_panics_is_one_line(tmp_path, capfd):
    path = folder_with(tmp_path) / "tokenizer.json"
    broken = json.loads(path.read_text()) | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    path.write_text(json.dumps(broken))
    with pytest.raises(
        ValueError, match=r"tokenizer.json: not a readable tokenizer.json: the tokenizers library failed"
    ):
        TextTokenizer.from_pretrained(tmp_path)
    assert capfd.readouterr().err == ""
