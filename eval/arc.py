"""ARC: multiple-choice science questions, scored by likelihood.

    python -m eval.arc --model DIR --data ARC-Easy-Dev.jsonl --out result.json

Protocol `paper` (OpenCompass ARC_{e,c}_ppl, the harness of the paper; zero-shot, no chat template):
  - Items that do not have exactly four choices are dropped, and counted. The paper's sets are the DEV splits:
    567 of the 570 easy and 295 of the 299 challenge items.
  - Each choice makes one text, `Question: {question}\\nAnswer: \\n{choice text}`, with a space before the second
    newline and no letter before the choice. The tokenizer adds BOS if that is its default.
  - The score of a choice is the mean NLL of ALL tokens of that text but the first, including the question's.
    The smallest wins; of equal ones the first.

Protocol `standard` (lm-evaluation-harness arc_easy and arc_challenge; zero-shot, no chat template):
  - All items are kept; they have three to five choices. The numbers that the field quotes are of the TEST splits.
  - The text is `Question: {question}\\nAnswer: {choice text}`. Only the choice counts: the tokens after those of
    `Question: {question}\\nAnswer:`.
  - acc, the score: the smallest summed NLL wins. acc_norm, in `metrics`: the smallest sum divided by the number of
    characters of the choice. Of equal ones the first wins.

Gold is the position of answerKey in the item's own labels (A-E or 1-4). The score is the percentage of correct items.

Rows: {id, question: {stem, choices: [{text, label}, ...]}, answerKey}, as the Allen Institute publishes them, or
{id, question, choices: {text: [...], label: [...]}, answerKey}, as on the Hugging Face hub.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.sft import check_token_ids
from data.tokenizer import TextTokenizer
from eval import common, generation
from model import Transformer

DESCRIPTION = {
    "paper": "paper, 0-shot, mean NLL of the whole text",
    "standard": "standard, 0-shot, summed NLL of the choice",
}


@dataclass(frozen=True)
class Item:
    id: str
    question: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]  # of the choices, as the file has them
    gold: int  # index of the correct choice


def read_items(path: str | Path) -> list[Item]:
    """The items of a file, with any number of choices.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is unusable; the message names file, line and key.
    """
    return common.read_items(path, parse_item)


def parse_item(row: dict, id: str) -> Item:
    """The item of a row in either form.

    Raises:
        ValueError: a key is missing, the choices are unusable, or answerKey is not the label of exactly one choice.
    """
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
        raise ValueError(f"answerKey {answer!r}: expected it once among the labels, got {list(labels)}")
    return Item(id, stem, texts, labels, labels.index(answer))


def prompt(item: Item, protocol: str = "paper") -> str:
    """The text before each choice."""
    return f"Question: {item.question}\nAnswer:" + (" " if protocol == "standard" else " \n")


def choice_texts(item: Item, protocol: str = "paper") -> list[str]:
    """The text of each choice, with the question."""
    return [prompt(item, protocol) + choice for choice in item.choices]


def scored_ids(item: Item, tokenizer: TextTokenizer, context: int, protocol: str) -> list[tuple[list[int], int]]:
    """For each choice, the token ids of its text and the index of the first that counts.

    Raises:
        ValueError: a text has fewer than 2 tokens or more than `context`.
    """
    # Tokenizers put the space before a choice into the token of the choice.
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
    """The result for these items: common.result with `dropped`, the number of items that `paper` leaves out.

    Each item holds id, prompt_id (of the texts of its choices), prediction and gold (labels), correct, and nll, one
    number per choice: the mean under `paper`, the sum under `standard`. With `standard` it also holds prediction_norm
    and acc_norm (whether that one is correct), and metrics has acc_norm.

    Args:
        batch_tokens: see generation.choice_nll.
    Raises:
        ValueError: no such protocol, no item is left, or a text that is too long for the model's context or has a
            token that it does not embed.
    """
    common.check_protocol(protocol)
    kept = [item for item in items if protocol == "standard" or len(item.choices) == 4]
    if not kept:
        raise ValueError(f"none of the {len(items)} items has exactly four choices")
    choices = [scored_ids(item, tokenizer, model.config.max_position_embeddings, protocol) for item in kept]
    for item, row in zip(kept, choices, strict=True):
        check_token_ids(f"item {item.id}", (ids for ids, _ in row), tokenizer, model.config.vocab_size)
    # Equal choices are scored once and so have exactly the same NLL: the first of them wins.
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
        DESCRIPTION[protocol],
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
