"""ARC: multiple-choice science questions, scored by likelihood.

    python -m eval.arc --model DIR --data ARC-Easy-Dev.jsonl --out result.json

Protocol `paper` (OpenCompass ARC_{e,c}_ppl, the harness of the paper; zero-shot, no chat template):
  - Items that do not have exactly four choices are dropped, and counted. The paper's sets are the DEV splits:
    567 of the 570 easy and 295 of the 299 challenge items.
  - Each choice makes one text, `Question: {question}\\nAnswer: \\n{choice text}`: a space stands before the second
    newline, and no letter before the choice. The tokenizer adds BOS if it does so by default.
  - A choice's score is the mean NLL over ALL tokens of that text but the first, the question's included.
    The smallest wins; of equal ones the first.

Protocol `standard` (lm-evaluation-harness arc_easy and arc_challenge; zero-shot, no chat template):
  - All items are kept; three to five choices occur. The figures that the field quotes are of the TEST splits.
  - The text is `Question: {question}\\nAnswer: {choice text}`. Only the choice counts: the tokens that come after
    those of `Question: {question}\\nAnswer:`.
  - acc, the score: the smallest summed NLL wins. acc_norm, in `metrics`: the smallest sum divided by the number of
    characters of the choice. Of equal ones the first.

Gold is the place of answerKey in the item's own labels (A-E or 1-4). The score is the percentage right.

Rows: {id, question: {stem, choices: [{text, label}, ...]}, answerKey}, as the Allen Institute publishes them, or
{id, question, choices: {text: [...], label: [...]}, answerKey}, as they stand on the Hugging Face hub.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import TextTokenizer
from eval import common, generation
from model import Transformer

PROTOCOL = {
    "paper": "paper, 0-shot, mean NLL of the whole text",
    "standard": "standard, 0-shot, summed NLL of the choice",
}


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


def prompt(item: Item, protocol: str = "paper") -> str:
    """What stands before each choice."""
    return f"Question: {item.question}\nAnswer:" + (" " if protocol == "standard" else " \n")


def choice_texts(item: Item, protocol: str = "paper") -> list[str]:
    """The text that is scored for each choice."""
    return [prompt(item, protocol) + choice for choice in item.choices]


def scored_ids(item: Item, tokenizer: TextTokenizer, context: int, protocol: str) -> list[tuple[list[int], int]]:
    """For each choice the tokens of its text, and the place of the first that counts."""
    # the space before a choice belongs to the choice, as tokenizers have it
    before = tokenizer.encode(prompt(item, protocol).rstrip()) if protocol == "standard" else []
    choices = []
    for text in choice_texts(item, protocol):
        ids = tokenizer.encode(text)
        if not 2 <= len(ids) <= context:
            raise ValueError(
                f"item {item.id}: a choice's text has {len(ids)} tokens, expected 2 to {context} (the model's context)"
            )
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False))
        choices.append((ids, max(1, sum(1 for _ in same))))
    return choices


def evaluate(
    model: Transformer,
    tokenizer: TextTokenizer,
    items: Sequence[Item],
    *,
    protocol: str = "paper",
    batch_tokens: int | None = None,
) -> dict:
    """Score the items; see the module's head. batch_tokens: see generation.choice_nll.

    Returns common.result's {task, metric, score (percent), n, interval95, protocol, metrics, ..., items} with
    `dropped`, the number of items that `paper` leaves out. Each item holds id, prompt_id (of the choices' texts),
    prediction and gold (labels), correct, and nll of every choice: under `paper` the mean, under `standard` the
    sum; there also prediction_norm and acc_norm (whether that one is right)."""
    common.check_protocol(protocol)
    kept = [item for item in items if protocol == "standard" or len(item.choices) == 4]
    if not kept:
        raise ValueError(f"none of the {len(items)} items has exactly four choices")
    choices = [scored_ids(item, tokenizer, model.config.max_position_embeddings, protocol) for item in kept]
    # Equal choices are scored once, and so get one and the same number: the first of them wins.
    distinct = [[choice for i, choice in enumerate(row) if choice not in row[:i]] for row in choices]
    sums = generation.choice_nll(model, distinct, batch_tokens)
    scored = []
    for item, row, unlike, nll_of in zip(kept, choices, distinct, sums, strict=True):
        nll = [nll_of[unlike.index(choice)] for choice in row]
        if protocol == "paper":
            nll = [total / (len(ids) - start) for total, (ids, start) in zip(nll, row, strict=True)]
        best = nll.index(min(nll))
        made = {"id": item.id, "prompt_id": common.prompt_id("\n\n".join(choice_texts(item, protocol)))}
        made |= {"prediction": item.labels[best], "gold": item.labels[item.gold], "correct": best == item.gold}
        if protocol == "standard":
            norm = [total / len(choice) for total, choice in zip(nll, item.choices, strict=True)]
            best = norm.index(min(norm))
            made |= {"prediction_norm": item.labels[best], "acc_norm": best == item.gold}
        scored.append({**made, "nll": nll})
    return common.result(
        "arc",
        PROTOCOL[protocol],
        scored,
        also=("acc_norm",),
        tokens=sum(len(ids) for row in choices for ids, _ in row),
        dropped=len(items) - len(kept),
    )


def main(argv: list[str] | None = None) -> None:
    common.run(
        argv,
        prog="eval.arc",
        description="Score a model on ARC.",
        data="data/tiny/arc_test.jsonl",
        read_items=read_items,
        evaluate=evaluate,
    )


if __name__ == "__main__":
    main()
