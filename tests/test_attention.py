"""pruners/attention.py: attention maps against torch's own, and the two scores that are read from them."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import FAMILIES, families, ids, small_model

from data.sft import Sample, load_samples
from data.tokenizer import TextTokenizer
from model import Transformer
from pruners.attention import (
    attention_maps,
    fastv_scores,
    queries_and_keys,
    received_attention,
    sparsevlm_text_score,
    sparsevlm_text_scores,
    sparsevlm_text_tokens,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(families, ids, st.integers(1, 3))
@settings(max_examples=30)
def test_queries_and_keys_are_those_that_the_last_layer_attends_with(family, tokens, num_layers):
    model, outputs = small_model(num_hidden_layers=num_layers, **FAMILIES[family]), []
    attention = model.model["layers"][-1].self_attn
    hook = attention.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(torch.tensor([tokens]))
    q, k, x = queries_and_keys(model, torch.tensor([tokens]))
    hook.remove()
    assert len(outputs) == 1  # the last layer itself need not run for its queries and keys
    v = attention.v_proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    distance = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
    hidden = (distance < 0) | (distance >= (model.config.sliding_window or len(tokens)))
    weights = (q @ k.transpose(-1, -2) / attention.head_dim**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    expected = attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(outputs[0], expected, rtol=1e-4, atol=1e-5)


@st.composite
def layers(draw):
    """(queries, keys, hidden, attended, answer) of rows of unlike length: prompts first, answers to the end."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(3, 9))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    seed = draw(st.integers(0, 1000))
    lengths = torch.tensor(draw(st.lists(st.integers(3, length), min_size=rows, max_size=rows)))
    prompts = torch.tensor([draw(st.integers(1, int(n) - 1)) for n in lengths])
    places = torch.arange(length)
    attended = places < lengths[:, None]
    queries, keys = (
        normal(rows, kv_heads * group, length, 4, seed=seed),
        normal(rows, kv_heads, length, 4, seed=seed + 1),
    )
    return queries, keys, normal(rows, length, 6, seed=seed + 2), attended, attended & (places >= prompts[:, None])


@given(layers())
def test_attention_a_head_at_a_time_is_the_attention_of_all_heads(layer):
    queries, keys, *_ = layer
    heads, length = queries.shape[1:3]
    values = torch.eye(length).expand(len(queries), keys.shape[1], length, length)
    whole = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    assert len(list(attention_maps(queries, keys))) == heads
    for head, each in enumerate(attention_maps(queries, keys)):
        torch.testing.assert_close(each, whole[:, head])


@given(layers())
def test_received_attention_sums_to_one_over_the_row_and_is_zero_on_padding(layer):
    queries, keys, _, attended, _ = layer
    received = received_attention(queries, keys, attended)
    torch.testing.assert_close(received.sum(-1), torch.ones(len(received)))
    assert (received[~attended] == 0).all() and (received[attended] > 0).all()


@given(layers(), st.integers(1, 4))
def test_more_padding_changes_neither_received_attention_nor_the_sparsevlm_score(layer, extra):
    def padded(x, at):
        junk = 7 * normal(*x.shape[:at], extra, *x.shape[at + 1 :], seed=9)
        return torch.cat([x, junk if x.is_floating_point() else torch.zeros(junk.shape, dtype=torch.bool)], dim=at)

    wide = [padded(x, at) for x, at in zip(layer, (2, 2, 1, 1, 1), strict=True)]
    for score in (lambda q, k, h, seen, answer: received_attention(q, k, seen), sparsevlm_text_score):
        torch.testing.assert_close(score(*wide)[:, :-extra], score(*layer), rtol=1e-4, atol=1e-5)
        assert (score(*wide)[:, -extra:] == 0).all()


@given(layers())
def test_the_sparsevlm_score_is_standardised_over_the_answer_and_does_not_count_heads(layer):
    queries, keys, hidden, attended, answer = layer
    score = sparsevlm_text_score(*layer)
    assert score.isfinite().all() and (score[~answer] == 0).all()
    assert (score.sum(-1).abs() < 1e-3).all()
    assert (score.square().sum(-1) / answer.sum(-1) < 1.001).all()  # the mean of two standardised scores
    twice = sparsevlm_text_score(queries.repeat(1, 2, 1, 1), keys.repeat(1, 2, 1, 1), hidden, attended, answer)
    torch.testing.assert_close(twice, score, rtol=1e-3, atol=1e-4)


def test_sparsevlm_prefers_the_answer_token_that_reads_and_resembles_the_part_of_the_prompt_that_it_is_about():
    # tokens: first, a rater, an unrelated prompt token; then an answer: like the rater, like the unrelated one, neither
    hidden = torch.tensor([[[0.0, 0, 0], [6, 0, 0], [0, 1, 0], [6, 0, 0], [0, 1, 0], [0, 0, 1]]])
    attended = torch.ones(1, 6, dtype=torch.bool)
    answer = torch.tensor([[False, False, False, True, True, True]])
    score = sparsevlm_text_score(hidden[:, None], hidden[:, None], hidden, attended, answer)
    assert score[0].argmax() == 3
    assert torch.equal(sparsevlm_text_tokens(score, answer, 0.4)[0].nonzero()[:, 0], torch.tensor([3]))


def test_among_like_answer_tokens_sparsevlm_prefers_those_that_attend_most_to_the_prompt():
    queries, keys, hidden = normal(1, 2, 7, 4), normal(1, 1, 7, 4, seed=1), normal(1, 7, 6, seed=2)
    hidden[0, 2:] = hidden[0, 2]  # tokens 0 and 1 are the prompt: the guide is token 1
    answer = torch.arange(7)[None] >= 2
    score = sparsevlm_text_score(queries, keys, hidden, torch.ones_like(answer), answer)
    reading = sum(A[0, 2:, 1] for A in attention_maps(queries, keys))
    assert torch.equal(score[0, 2:].argsort(), reading.argsort())


def test_an_answer_without_a_prompt_scores_flat():
    attended = torch.ones(1, 4, dtype=torch.bool)
    answer = torch.tensor([[False, True, True, True]])  # the first token alone is no guide
    score = sparsevlm_text_score(normal(1, 2, 4, 4), normal(1, 2, 4, 4), normal(1, 4, 6), attended, answer)
    assert (score == 0).all()


# ------------------------------------------------------------------------- scores of a model's last layer


@pytest.mark.parametrize("pass_tokens", [1, 4096])
def test_attention_scores_of_a_batch_are_those_of_each_row_alone_and_belong_to_its_labels(
    checkpoint, rows, pass_tokens
):
    model = Transformer.from_pretrained(checkpoint)
    whole, cut = load_samples(rows, TextTokenizer.from_pretrained(checkpoint))[0][:2]
    cut = dataclasses.replace(cut, input_ids=cut.input_ids[:9], labels=[*cut.labels[:8], cut.input_ids[8]])
    for scores in (fastv_scores, sparsevlm_text_scores):
        found = scores(model, [whole, cut], pass_tokens, nullcontext())
        for sample, values in zip((whole, cut), found, strict=True):
            answer = torch.tensor([sample.labels]) != -100
            every = torch.ones_like(answer)
            with torch.no_grad():
                q, k, hidden = queries_and_keys(model, torch.tensor([sample.input_ids]))
            if scores is fastv_scores:
                expected = received_attention(q, k, every)
            else:
                expected = sparsevlm_text_score(q, k, hidden, every, answer)
            torch.testing.assert_close(values, expected[answer], rtol=1e-3, atol=1e-5)


def test_a_row_past_the_models_window_is_refused():
    model = small_model(**FAMILIES["mistral"])
    row = Sample("long", [1, 2, 3, 4], [-100, 2, 3, 4])
    with pytest.raises(ValueError, match="a row has 4 tokens, and the model attends to windows of 3; --max-length 3"):
        fastv_scores(model, [row], 100, nullcontext())
    short = dataclasses.replace(row, input_ids=[1, 2, 3], labels=[-100, 2, 3])
    assert len(fastv_scores(model, [short], 100, nullcontext())[0]) == 2
