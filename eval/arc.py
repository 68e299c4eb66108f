"""ARC: four-choice science questions, scored by likelihood.

    python -m eval.arc --model DIR --data ARC-Easy-Dev.jsonl --out result.json

Protocol `paper` (OpenCompass ARC_{e,c}_ppl, the harness of the paper; zero-shot, no chat template):
  - Items that do not have exactly four choices are dropped, and counted. The paper's sets are the DEV splits:
    567 of the 570 easy and 295 of the 299 challenge items.
  - Each choice makes one text, `Question: {question}\\nAnswer: \\n{choice text}`: a space stands before the second
    newline, and no letter before the choice. The tokenizer adds BOS if it does so by default.
  - A choice's score is the mean NLL over ALL tokens of that text but the first, the question's included.
    The smallest wins; of equal ones the first.
  - Gold is the place of answerKey in the item's own labels (A-D or 1-4). The score is the percentage right.

Rows: {id, question: {stem, choices: [{text, label}, ...]}, answerKey}, as the Allen Institute publishes them, or
{id, question, choices: {text: [...], label: [...]}, answerKey}, as they stand on the Hugging Face hub.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.sft import Sample, collate, length_batches
from data.tokenizer import TextTokenizer
from eval import common
from model import Transformer

PROTOCOL = "paper, 0-shot, mean NLL of the whole text"
LOGITS_AT_ONCE = 2**24  # fp32 logits alive at one time: 64 MiB


@dataclass(frozen=True)
class Item:
    id: str
    question: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]  # of the choices, as the file has them
    gold: int  # index of the right choice


def read_items(path: str | Path) -> list[Item]:
    """Every row of the file, of any number of choices. Raises FileNotFoundError, or ValueError naming file:line."""
    return common.read_items(path, parse_item)


def parse_item(row: dict, id: str) -> Item:
    """One row of either form; ValueError on a missing key, odd choices, or an answerKey that is no choice's label."""
    question, choices = row.get("question"), row.get("choices")
    if isinstance(question, dict):
        stem, choices = common.text_field(question, "stem"), question.get("choices")
    else:
        stem = common.text_field(row, "question")
    if isinstance(choices, dict) and all(isinstance(choices.get(key), list) for key in ("text", "label")):
        if len(choices["text"]) != len(choices["label"]):
            raise ValueError(f"choices: {len(choices['text'])} texts but {len(choices['label'])} labels")
        choices = [
            {"text": text, "label": label} for text, label in zip(choices["text"], choices["label"], strict=True)
        ]
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ValueError(f"choices: expected a list of {{text, label}}, got {choices!r}")
    texts = tuple(common.text_field(choice, "text") for choice in choices)
    labels = tuple(common.text_field(choice, "label") for choice in choices)
    answer = common.text_field(row, "answerKey")
    if labels.count(answer) != 1:
        raise ValueError(f"answerKey {answer!r}: expected one of the labels to be it, got {list(labels)}")
    return Item(id, stem, texts, labels, labels.index(answer))


def choice_texts(item: Item) -> list[str]:
    """The text that is scored for each choice."""
    return [f"Question: {item.question}\nAnswer: \n{choice}" for choice in item.choices]


@torch.inference_mode()
def mean_nll(model: Transformer, token_rows: Sequence[list[int]], batch_tokens: int = 4096) -> list[float]:
    """Mean NLL (nats a token) of each row's tokens but the first, given those before.

    Rows of like length share a forward pass of at most batch_tokens tokens, padding included; which rows share
    one changes the result by rounding only. The head runs on LOGITS_AT_ONCE / V positions at a time, in fp32 from
    the logits on. Every row needs 2 tokens at least. Raises ValueError when an NLL is not finite."""
    device = model.lm_head.weight.device
    chunk = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    means = [0.0] * len(token_rows)
    groups = length_batches([len(ids) for ids in token_rows], batch_tokens)
    for group in common.progress(groups, len(token_rows), "scoring choices"):
        rows = [Sample(id=str(i), input_ids=token_rows[i], labels=token_rows[i]) for i in group]
        input_ids, labels = collate(rows, device)  # (B, T), shifted; -100 on padding
        real = labels != -100
        hidden, targets = model.hidden_states(input_ids)[real], labels[real]  # (N, H), (N,)
        parts = []
        for part, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = model.lm_head(part).float()  # (chunk, V)
            parts.append(logits.logsumexp(-1) - logits.gather(-1, target[:, None]).squeeze(-1))
        nll = torch.cat(parts).double().cpu()  # (N,), row after row
        for i, row in zip(group, nll.split(real.sum(1).tolist()), strict=True):
            mean = row.mean().item()
            if not mean < float("inf"):
                raise ValueError(f"the model gives a text of {len(token_rows[i])} tokens a mean NLL of {mean}")
            means[i] = mean
    return means


def evaluate(model: Transformer, tokenizer: TextTokenizer, items: Sequence[Item], batch_tokens: int = 4096) -> dict:
    """Score the items under protocol `paper`; see the module's head.

    Returns {task, metric, score (percent), n, interval95, protocol, dropped, items}; each of its items holds id,
    prediction and gold (labels), correct, and nll: the mean NLL of every choice."""
    kept = [item for item in items if len(item.choices) == 4]
    if not kept:
        raise ValueError(f"none of the {len(items)} items has exactly four choices")
    context = model.config.max_position_embeddings
    ids_of: dict[str, list[int]] = {}  # by text: equal choices get one and the same number, so that the first wins
    for item in kept:
        for text in choice_texts(item):
            ids_of[text] = tokenizer.encode(text)
            if not 2 <= len(ids_of[text]) <= context:
                raise ValueError(
                    f"item {item.id}: a choice's text has {len(ids_of[text])} tokens, expected 2 to "
                    f"{context} (the model's context)"
                )
    nll_of = dict(zip(ids_of, mean_nll(model, list(ids_of.values()), batch_tokens), strict=True))
    scored = []
    for item in kept:
        nll = [nll_of[text] for text in choice_texts(item)]
        best = nll.index(min(nll))
        labels = {"prediction": item.labels[best], "gold": item.labels[item.gold]}
        scored.append({"id": item.id, **labels, "correct": best == item.gold, "nll": nll})
    return common.result("arc", PROTOCOL, scored, dropped=len(items) - len(kept))


def main(argv: list[str] | None = None) -> None:
    parser = common.argument_parser("eval.arc", "Score a model on ARC as the paper does.", "data/tiny/arc_test.jsonl")
    parser.add_argument(
        "--batch-tokens",
        type=common.positive_int,
        default=4096,
        help="tokens in one forward pass, padding included; %(default)s",
    )
    args = parser.parse_args(argv)
    with common.errors_in_one_line(parser.prog):
        started = time.perf_counter()
        items = read_items(args.data)[: args.limit]
        model, tokenizer = common.load(args)
        scored = evaluate(model, tokenizer, items, args.batch_tokens)
        if scored["dropped"]:
            print(f"{parser.prog}: dropped {scored['dropped']} of {len(items)} items, which do not have four choices")
        common.report(args, scored, time.perf_counter() - started)


if __name__ == "__main__":
    main()
