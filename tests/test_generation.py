"""eval/generation.py: batched decoding with a KV cache against recomputing each row, stops, and draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import FAMILIES, VOCAB, families, ids, small_model

from eval.generation import KVCache, generate, with_cache


def greedy_by_recomputation(model, prompt, steps, eos_ids=()):
    row = list(prompt)
    for _ in range(steps):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        if row[-1] in eos_ids:
            break
    return row[len(prompt) :]


@given(
    families,
    st.one_of(st.just([]), ids),
    st.lists(ids, min_size=1, max_size=5),
    st.integers(1, 4),
    st.sets(st.integers(0, VOCAB - 1), max_size=8),
)
@settings(max_examples=50)
def test_cached_batched_generation_equals_recomputing_each_row_alone(family, beginning, ends, batch_size, eos_ids):
    model, prompts = small_model(1, **FAMILIES[family]), [beginning + end for end in ends]
    expected = [greedy_by_recomputation(model, prompt, 6, eos_ids) for prompt in prompts]
    assert generate(model, prompts, 6, eos_ids=tuple(eos_ids), batch_size=batch_size) == expected


def test_a_full_cache_refuses_the_next_token():
    model = small_model()
    cache = KVCache(model, rows=1, slots=3)
    with_cache(model, torch.tensor([[1, 2, 3]]), torch.arange(3)[None], cache)
    with pytest.raises(ValueError, match="position 3 does not fit: the cache has 3 slots"):
        with_cache(model, torch.tensor([[4]]), torch.tensor([[3]]), cache)


def test_generation_ends_at_the_configs_eos_and_where_stop_says():
    prompt = [4, 8]
    free = generate(small_model(1), [prompt], 8)[0]
    assert len(free) == 8
    eos = free[3]
    ended = generate(small_model(1, eos_token_ids=(eos,)), [prompt], 8)[0]
    assert ended == free[: free.index(eos) + 1]
    assert generate(small_model(1), [prompt], 8, stop=lambda new: len(new) == 5)[0] == free[:5]


def test_sampling_follows_its_generator_and_zero_temperature_is_greedy():
    model = small_model(1)

    def draw(seed, temperature):
        return generate(model, [[1, 2]], 12, temperature=temperature, generators=[torch.Generator().manual_seed(seed)])

    assert draw(0, 2.0) == draw(0, 2.0)
    assert draw(0, 2.0) != draw(1, 2.0)
    assert draw(0, 1e-4) == draw(1, 0.0)


def test_what_a_prompt_draws_does_not_depend_on_its_neighbours():
    model, prompts = small_model(1, eos_token_ids=(3,)), [[1, 2], [4, 5, 6], [7], [4, 5, 6]]

    def draw(prompts, seeds, batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return generate(model, prompts, 12, temperature=2.0, generators=generators, batch_size=batch_size)

    alone = [draw([prompt], [seed], 1)[0] for seed, prompt in enumerate(prompts)]
    assert len(set(map(len, alone))) > 1  # rows leave the batch at different times
    assert alone[1] != alone[3]
    assert [draw(prompts, range(4), batch_size) for batch_size in (1, 3, 4)] == [alone] * 3


def test_generation_refuses_an_empty_prompt_and_one_that_would_leave_the_context():
    model = small_model()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], 3)
    with pytest.raises(ValueError, match=r"prompt 0 has 38 tokens.*max_new_tokens 3.*max_position_embeddings 40"):
        generate(model, [[1] * 38], 3)
    assert len(generate(model, [[1] * 38], 2)[0]) == 2
