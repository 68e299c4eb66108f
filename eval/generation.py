"""Text and likelihoods from a model: a KV cache, batched decoding, the NLL of answer choices.

Every rank calls `generate_texts` and `choice_nll` with the same input; the ranks share the work, and each gets all
results. `generate` runs where it is called.

Shapes: B rows, T positions, H hidden size, V vocabulary, d head size.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from data.sft import check_token_ids
from data.tokenizer import TextTokenizer
from eval.common import Protocol, check_protocol, how, over_ranks, prompt_id, result
from model import Attend, Transformer, attention, visible
from training.head import compute_dtype
from training.ranks import seeded

LOGITS_AT_ONCE = 2**24  # fp32 logits alive at one time: 64 MiB

# --- the cache -------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every layer; slot p of row b holds position p of that row.

    Rows of different lengths lie side by side. Each writes at its own positions and sees no slot after them. So the
    keys and values of padding are overwritten before they can be read.
    """

    def __init__(self, model: Transformer, rows: int, slots: int):
        cfg, weight = model.config, model.lm_head.weight
        shape = (cfg.num_hidden_layers, rows, cfg.num_key_value_heads, slots, cfg.head_dim)
        self.keys = torch.zeros(shape, dtype=compute_dtype(weight), device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.window = cfg.sliding_window

    def attend(self, position_ids: Tensor) -> Attend:
        """Attention of new tokens at these positions (B, T) to their rows so far; it stores their keys and values.

        Raises:
            ValueError: a position has no slot.
        """
        slots = int(position_ids.max()) + 1
        if slots > self.keys.shape[3]:
            raise ValueError(f"position {slots - 1} does not fit: the cache has {self.keys.shape[3]} slots")
        rows = torch.arange(len(position_ids), device=position_ids.device)[:, None]
        seen = visible(position_ids, slots, self.window)

        def attend_layer(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, position_ids] = k.transpose(1, 2)
            values[rows, :, position_ids] = v.transpose(1, 2)
            return attention(q, keys[:, :, :slots], values[:, :, :slots], seen)

        return attend_layer

    def take_rows(self, rows: list[int]) -> None:
        """Make these the rows of the cache, in this order; a row may be left out, or be there several times."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys[:, index], self.values[:, index]


def with_cache(model: Transformer, input_ids: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
    """Hidden states (B, T, H) of tokens that follow those in the cache, which stores their keys and values."""
    return model.hidden_states(input_ids, position_ids, cache.attend(position_ids))


def continue_rows(model: Transformer, parts: list[list[int]], starts: list[int], cache: KVCache) -> Tensor:
    """Hidden states (B, T, H) of token ids, part b at the positions starts[b], starts[b] + 1, ... of row b.

    Shorter parts are padded on the right; T is the length of the longest.
    """
    device, longest = cache.keys.device, max(map(len, parts))
    input_ids = torch.tensor([part + [0] * (longest - len(part)) for part in parts], device=device)
    position_ids = torch.tensor(starts, device=device)[:, None] + torch.arange(longest, device=device)
    return with_cache(model, input_ids, position_ids, cache)


def shared_length(rows: list[list[int]]) -> int:
    """The number of tokens with which all rows begin, at most one less than the shortest row has."""
    equal = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return min(sum(1 for _ in equal), min(map(len, rows)) - 1)


# --- token ids -------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    eos_ids: tuple[int, ...] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    temperature: float = 0.0,
    generators: list[torch.Generator] | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> list[list[int]]:
    """The new ids that continue each prompt; greedy decoding, or sampling where `temperature` is above 0.

    Batching does not change the ids of a prompt; for sampled ids this needs `generators`.

    Args:
        prompts:        token ids, at least one per prompt; lengths may differ.
        max_new_tokens: limit of the new ids of each prompt.
        eos_ids:        a row ends with the first of these; default: the EOS ids of the config. With () no id ends it.
        stop:           called with the new ids of a row after every token; True ends the row.
        temperature:    0 takes the most likely token; above 0, draws from softmax(logits / temperature).
        generators:     one source of randomness per prompt; default: torch's own for all.
        batch_size:     rows decoded together, shortest prompts first; a row that has ended leaves the batch.
        progress:       show a progress bar.
    Returns:
        The new ids of each prompt, in the order of the prompts, with the EOS if one ended the row.
    Raises:
        ValueError: a prompt is empty, or with max_new_tokens it passes max_position_embeddings.
    """
    eos_ids = model.config.eos_token_ids if eos_ids is None else eos_ids
    limit = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; expected at least one token id")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} it passes the model's "
                f"max_position_embeddings {limit}"
            )

    def ended(new_ids: list[int]) -> bool:
        return new_ids[-1] in eos_ids or (stop is not None and stop(new_ids))

    continued: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with tqdm(total=len(prompts), desc="generate", unit="row", disable=not progress) as bar:
        for start in range(0, len(prompts), batch_size):
            rows = by_length[start : start + batch_size]
            sources = None if generators is None else [generators[i] for i in rows]
            pick = functools.partial(_pick, temperature=temperature, generators=sources)
            new_ids = _decode(model, [prompts[i] for i in rows], max_new_tokens, pick, ended)
            for i, row in zip(rows, new_ids, strict=True):
                continued[i] = row
            bar.update(len(rows))
    return continued


def _decode(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    pick: Callable[[Tensor, list[int]], list[int]],
    ended: Callable[[list[int]], bool],
) -> list[list[int]]:
    """The new ids of each prompt, decoded as one batch.

    Args:
        pick:  from the logits (B, V) of these rows, the next id of each.
        ended: whether a row with these new ids leaves the batch.
    """
    slots = max(map(len, prompts)) + max_new_tokens
    shared = shared_length(prompts) if len(prompts) > 1 else 0
    cache = KVCache(model, 1 if shared else len(prompts), slots)
    if shared:  # the same exemplars before every question, for example: they run once
        continue_rows(model, [prompts[0][:shared]], [0], cache)
        cache.take_rows([0] * len(prompts))

    new_ids: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # those in the batch
    parts, starts = [prompt[shared:] for prompt in prompts], [shared] * len(prompts)
    for _ in range(max_new_tokens):
        hidden = continue_rows(model, parts, starts, cache)
        last = torch.stack([states[len(part) - 1] for states, part in zip(hidden, parts, strict=True)])
        for row, new_id in zip(rows, pick(model.lm_head(last).float(), rows), strict=True):
            new_ids[row].append(new_id)
        stay = [j for j, row in enumerate(rows) if not ended(new_ids[row])]
        if not stay:
            break
        if len(stay) < len(rows):
            cache.take_rows(stay)
        rows, starts = [rows[j] for j in stay], [starts[j] + len(parts[j]) for j in stay]
        parts = [new_ids[row][-1:] for row in rows]
    return new_ids


def _pick(logits: Tensor, rows: list[int], temperature: float, generators: list[torch.Generator] | None) -> list[int]:
    """The next id of each of these rows of a batch; logits (B, V)."""
    if temperature <= 0:
        return logits.argmax(-1).tolist()
    probabilities = (logits / temperature).softmax(-1)
    if generators is None:
        return torch.multinomial(probabilities, 1)[:, 0].tolist()
    pairs = zip(probabilities, rows, strict=True)
    return torch.cat([torch.multinomial(p, 1, generator=generators[row]) for p, row in pairs]).tolist()


# --- texts -----------------------------------------------------------------------------------------------------


def generate_texts(
    model: Transformer,
    tokenizer: TextTokenizer,
    prompts: Sequence[tuple[str, str]],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[dict]:
    """{prompt_id, completion, new_tokens, finished} for each prompt, in the order of the prompts.

    A completion ends before the first of the `stop` strings or at EOS: then it is finished. Otherwise it ends at its
    limit: max_new_tokens, or less where the prompt and the new tokens would pass the model's context.

    With temperature 0, neither the order of the prompts nor batch_size changes a completion, except through rounding
    between almost equal logits. The same holds above 0: the draws of an item depend on (seed, item id) alone.

    Args:
        prompts: pairs of item id and text.
        stop:    a string that is a token of the vocabulary, such as <|im_end|>, ends a completion like EOS.
    Raises:
        ValueError: a prompt leaves no room for a new token, or has one that the model does not embed.
    """
    context, device = model.config.max_position_embeddings, model.lm_head.weight.device
    ids = [tokenizer.encode(text) for _, text in prompts]
    limits = [min(max_new_tokens, context - len(row)) for row in ids]
    for (name, _), row, limit in zip(prompts, ids, limits, strict=True):
        if limit < 1:
            raise ValueError(
                f"item {name}: its prompt of {len(row)} tokens leaves no room in the model's context of {context}"
            )
        check_token_ids(f"item {name}", [row], tokenizer, model.config.vocab_size)
    # Only rows with the same limit share a batch, so that no result depends on the lengths of other rows.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # and so by limit, the largest first
    groups = []
    for _, same_limit in itertools.groupby(order, key=lambda i: limits[i]):
        rows = list(same_limit)
        groups += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    stop_ids = [tokenizer.token_id(text) for text in stop]
    eos_ids = (*model.config.eos_token_ids, *(stop_id for stop_id in stop_ids if stop_id is not None))
    # A token is at least one byte long, so this many last tokens hold a stop string that has just been completed.
    # One token more: some decoders drop the space with which the first token begins.
    tail = max((len(text.encode()) for text in stop), default=0) + 1

    def stopped(new_ids: list[int]) -> bool:
        text = tokenizer.decode(new_ids[-tail:])
        return any(end in text for end in stop)

    def work(group: list[int]) -> list[dict]:
        rows = generate(
            model,
            [ids[i] for i in group],
            limits[group[0]],
            eos_ids=eos_ids,
            stop=stopped if stop else None,
            temperature=temperature,
            generators=[seeded(seed, prompts[i][0], device=device) for i in group] if temperature else None,
            batch_size=batch_size,
        )
        made = []
        for i, row in zip(group, rows, strict=True):
            text = tokenizer.decode(row)
            completion = cut(text, stop)
            finished = row[-1] in eos_ids or completion != text
            made.append({"prompt_id": prompt_id(prompts[i][1]), "completion": completion})
            made[-1] |= {"new_tokens": len(row), "finished": finished}
        return made

    costs = [len(row) + limit for row, limit in zip(ids, limits, strict=True)]
    return over_ranks(groups, costs, work, "generating")


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the `stop` strings; all of it where there is none."""
    return text[: min((text.index(end) for end in stop if end in text), default=len(text))]


def evaluate(
    task: str,
    protocols: dict[str, Protocol],
    prompt: Callable[..., str],
    judge: Callable[..., dict],
    model: Transformer,
    tokenizer: TextTokenizer,
    items: Sequence,
    *,
    metric: str = "accuracy",
    also: Sequence[str] = (),
    protocol: str = "paper",
    exemplars: Sequence = (),
    max_new_tokens: int | None = None,
    **decoding: float,
) -> dict:
    """The result of a benchmark that generates: common.result with max_new_tokens and unfinished.

    Each item holds its id and the keys of `generate_texts` and of `judge`. `unfinished` is the number of completions
    that a limit of tokens ended.

    Args:
        protocols:      the benchmark's, by name.
        prompt:         returns the text for (item, exemplars, protocol).
        judge:          returns {prediction, gold, correct, ...} for (item, completion, protocol).
        metric, also:   see common.result.
        protocol:       the name of the one to follow.
        exemplars:      worked items, put before each question.
        max_new_tokens: default: the protocol's number.
        decoding:       temperature, batch_size and seed of `generate_texts`.
    Raises:
        ValueError: no such protocol, no item, or a prompt that leaves no room for a new token.
    """
    check_protocol(protocol)
    max_new_tokens = max_new_tokens or protocols[protocol].max_new_tokens
    prompts = [(item.id, prompt(item, exemplars, protocol)) for item in items]
    stop = protocols[protocol].stop
    generated = generate_texts(model, tokenizer, prompts, max_new_tokens, stop=stop, **decoding)
    return result(
        task,
        how(protocol, len(exemplars), decoding.get("temperature", 0)),
        [
            {"id": item.id, **made, **judge(item, made["completion"], protocol)}
            for item, made in zip(items, generated, strict=True)
        ],
        metric=metric,
        also=also,
        tokens=sum(made["new_tokens"] for made in generated),
        max_new_tokens=max_new_tokens,
        unfinished=sum(not made["finished"] for made in generated),
    )


# --- likelihoods -----------------------------------------------------------------------------------------------


@torch.no_grad()
def choice_nll(
    model: Transformer, items: Sequence[Sequence[tuple[list[int], int]]], batch_tokens: int | None = None
) -> list[list[float]]:
    """The summed NLL (nats) of each choice of each item: of its tokens `start` and after, given all before.

    The tokens with which all choices of an item begin run once; the rest of each choice continues on a copy of
    their keys and values. Items of similar lengths share a pass; the passes change a result by rounding only. The
    head runs only on the positions that are read, LOGITS_AT_ONCE / V at a time, and its logits are fp32.

    Args:
        items:        an item is a list of choices, a choice is (ids, start) with 1 <= start < len(ids).
        batch_tokens: padded tokens of a pass; default: 16384 on a GPU, and 1024 on a CPU, where more would only
                      add padding.
    Raises:
        ValueError: the choices of an item begin with different tokens, or an NLL is not finite.
    """
    batch_tokens = batch_tokens or (16_384 if model.lm_head.weight.is_cuda else 1024)
    shared = [shared_length([ids for ids, _ in item]) for item in items]
    own = [max(len(ids) for ids, _ in item) - length for length, item in zip(shared, items, strict=True)]
    if min(shared) < 1:
        raise ValueError(f"item {shared.index(min(shared))}: expected its choices to begin with the same token")

    def tokens(group: list[int]) -> int:
        """Of both passes, each padded to its longest row."""
        rows = sum(len(items[i]) for i in group)
        return len(group) * max(shared[i] for i in group) + rows * max(own[i] for i in group)

    groups: list[list[int]] = []
    for i in sorted(range(len(items)), key=lambda i: (-(own[i] // 4), -shared[i])):  # similar in both lengths
        if groups and tokens([*groups[-1], i]) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])

    def work(group: list[int]) -> list[list[float]]:
        return _batch_nll(model, [items[i] for i in group], [shared[i] for i in group])

    return over_ranks(groups, [tokens([i]) for i in range(len(items))], work, "scoring choices")


def _batch_nll(
    model: Transformer, items: list[Sequence[tuple[list[int], int]]], shared: list[int]
) -> list[list[float]]:
    """choice_nll of one batch; the choices of item k have their first shared[k] tokens in common."""
    rows = [(k, ids, start) for k, item in enumerate(items) for ids, start in item]
    width, rest = max(shared), max(len(ids) - 1 - shared[k] for k, ids, _ in rows)
    cache = KVCache(model, len(items), width + rest)

    beginnings = [item[0][0][:length] for item, length in zip(items, shared, strict=True)]
    hidden = continue_rows(model, beginnings, [0] * len(items), cache).flatten(0, 1)
    if rest:  # otherwise each choice has one token of its own, and nothing follows it
        cache.take_rows([k for k, _, _ in rows])
        parts = [ids[shared[k] : -1] for k, ids, _ in rows]
        own = continue_rows(model, parts, [shared[k] for k, _, _ in rows], cache).flatten(0, 1)
        hidden = torch.cat([hidden, own])

    # The tokens to score, (item, row, position): first those that the choices of an item share, where the row is None.
    tokens = [(k, None, t) for k, item in enumerate(items) for t in range(min(s for _, s in item), shared[k])]
    tokens += [(k, row, t) for row, (k, ids, s) in enumerate(rows) for t in range(max(s, shared[k]), len(ids))]

    def state(k: int, row: int | None, t: int) -> int:
        """The index in `hidden` of the state before token t; the first token of a row follows the shared part."""
        return k * width + t - 1 if t <= shared[k] else len(items) * width + row * rest + t - 1 - shared[k]

    states = torch.tensor([state(*token) for token in tokens], device=hidden.device)
    targets = [items[k][0][0][t] if row is None else rows[row][1][t] for k, row, t in tokens]
    nll = dict(zip(tokens, _token_nll(model, hidden[states], targets), strict=True))

    sums: list[list[float]] = [[] for _ in items]
    for row, (k, ids, start) in enumerate(rows):
        total = sum(nll[k, None, t] for t in range(start, shared[k]))
        total += sum(nll[k, row, t] for t in range(max(start, shared[k]), len(ids)))
        if not total < math.inf:
            raise ValueError(f"the model gives a text of {len(ids)} tokens an NLL of {total}")
        sums[k].append(total)
    return sums


def _token_nll(model: Transformer, hidden: Tensor, targets: list[int]) -> list[float]:
    """The NLL of targets[n] after hidden state n: (N, H), N ids -> N numbers."""
    chunk = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = []
    for states, target in zip(
        hidden.split(chunk), torch.tensor(targets, device=hidden.device).split(chunk), strict=True
    ):
        logits = model.lm_head(states).float()  # (chunk, V)
        parts.append(logits.logsumexp(-1) - logits.gather(-1, target[:, None]).squeeze(-1))
    return torch.cat(parts).tolist()
