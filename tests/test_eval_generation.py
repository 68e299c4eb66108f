"""eval/generation.py: texts and the likelihoods of choices; test_generation.py has the token ids."""

import dataclasses

import pytest
from eval_cases import CONTEXT, byte_model, byte_tokenizer, reference_nll
from hypothesis import given
from hypothesis import strategies as st

from eval import generation
from eval.common import prompt_id
from eval.generation import choice_nll, cut, generate_texts

MODEL, TOKENIZER = byte_model(), byte_tokenizer()


# --- texts ---------------------------------------------------------------------------------------------------


short_text = st.text("abcdefgh ?", min_size=1, max_size=20)
long_text = st.text("abcdefgh", min_size=CONTEXT - 20, max_size=CONTEXT - 2)  # leaves little room in the context
prompt_texts = st.lists(st.one_of(short_text, long_text), min_size=1, max_size=5)


@given(
    texts=prompt_texts,
    batch_size=st.integers(1, 6),
    max_new_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 1.0]),
    order=st.randoms(),
)
def test_generation_does_not_depend_on_order_batches_or_neighbours(
    texts, batch_size, max_new_tokens, temperature, order
):
    settings = {"stop": ("ab", "\n"), "temperature": temperature, "seed": 3}
    prompts = [(f"item {i}", text) for i, text in enumerate(texts)]
    alone = {
        prompt: generate_texts(MODEL, TOKENIZER, [prompt], max_new_tokens, batch_size=1, **settings)[0]
        for prompt in prompts
    }
    order.shuffle(prompts)
    together = generate_texts(MODEL, TOKENIZER, prompts, max_new_tokens, batch_size=batch_size, **settings)
    assert together == [alone[prompt] for prompt in prompts]


def test_what_is_drawn_depends_on_the_seed_and_the_item():
    def draw(names, temperature, seed):
        prompts = [(name, "How many?") for name in names]
        made = generate_texts(MODEL, TOKENIZER, prompts, 20, temperature=temperature, seed=seed)
        return [row["completion"] for row in made]

    assert len(set(draw("abcd", 1.0, 0))) == 4
    assert draw("abcd", 1.0, 0) == draw("abcd", 1.0, 0)
    assert set(draw("abcd", 1.0, 0)).isdisjoint(draw("abcd", 1.0, 1))
    assert len(set(draw("abcd", 0.0, 0) + draw("abcd", 0.0, 1))) == 1


@given(text=long_text, max_new_tokens=st.integers(1, 25))
def test_a_prompt_near_the_contexts_end_gets_the_tokens_that_fit(text, max_new_tokens):
    never_ends = byte_model(eos_token_id=None)
    room = CONTEXT - (1 + len(text))  # BOS
    (made,) = generate_texts(never_ends, TOKENIZER, [("x", text)], max_new_tokens)
    assert made["new_tokens"] == min(max_new_tokens, room)
    assert not made["finished"]


def test_a_prompt_that_fills_the_context_is_refused_by_its_item():
    with pytest.raises(ValueError, match=f"item long: its prompt of {CONTEXT} tokens .* context of {CONTEXT}"):
        generate_texts(MODEL, TOKENIZER, [("ok", "a"), ("long", "a" * (CONTEXT - 1))], 5)


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
def test_a_completion_is_stopped_and_cut_at_the_first_stop_string(monkeypatch, says, stop, taken, completion):
    """Also at one that is a special token, which decoding leaves out."""
    script, took = TOKENIZER.encode_plain(says), []

    def scripted(model, prompts, max_new_tokens, *, stop, eos_ids, **settings):
        while not took or not (took[-1] in eos_ids or stop(took)):
            took.append(script[len(took)])
        return [list(took)]

    monkeypatch.setattr(generation, "generate", scripted)
    monkeypatch.setattr(MODEL, "config", dataclasses.replace(MODEL.config, eos_token_ids=()))
    (made,) = generate_texts(MODEL, TOKENIZER, [("x", "How many?")], 60, stop=stop)
    assert took == TOKENIZER.encode_plain(taken)
    assert (made["completion"], made["finished"], made["new_tokens"]) == (completion, True, len(took))
    assert made["prompt_id"] == prompt_id("How many?") != prompt_id("How many")


@given(text=st.text("ab\n", max_size=12), stop=st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
def test_a_cut_text_is_the_longest_beginning_without_a_stop_string(text, stop):
    beginnings = [text[:end] for end in range(len(text) + 1)]
    free = [part for part in beginnings if not any(text.startswith(end, at) for at in range(len(part)) for end in stop)]
    assert cut(text, stop) == max(free, key=len)
    assert cut(cut(text, stop), stop) == cut(text, stop)


# --- likelihoods ---------------------------------------------------------------------------------------------


token_ids = st.lists(st.integers(0, 257), max_size=12)


@st.composite
def choice_items(draw):
    """[(ids, start), ...]: choices that begin with the same token or more, and count from any position."""
    beginning = [draw(st.integers(0, 257)), *draw(token_ids)]
    rows = [beginning + draw(token_ids) for _ in range(draw(st.integers(1, 5)))]
    rows = [row if len(row) > 1 else [*row, draw(st.integers(0, 257))] for row in rows]
    return [(row, draw(st.integers(1, len(row) - 1))) for row in rows]


@given(
    items=st.lists(choice_items(), min_size=1, max_size=5),
    batch_tokens=st.integers(1, 300),
    logits_at_once=st.sampled_from([1, 258 * 3, 258 * 50]),
)
def test_choice_nll_is_the_literal_definition_whatever_is_shared(items, batch_tokens, logits_at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "LOGITS_AT_ONCE", logits_at_once)
        got = choice_nll(MODEL, items, batch_tokens)
    for sums, item in zip(got, items, strict=True):
        assert sums == pytest.approx([reference_nll(MODEL, *choice) for choice in item], rel=1e-5, abs=1e-4)


def test_choices_that_begin_with_different_tokens_are_refused():
    with pytest.raises(ValueError, match="item 1: expected its choices to begin with the same token"):
        choice_nll(MODEL, [[([1, 2], 1)], [([1, 2], 1), ([2, 2], 1)]])
