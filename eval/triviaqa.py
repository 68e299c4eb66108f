"""TriviaQA: trivia questions without a passage; generated, and compared with every alias of the answer.

    python -m eval.triviaqa --model DIR --data trivia-dev.qa.csv --out result.json [--protocol standard]

Protocol `paper` (OpenCompass triviaqa_gen, the harness of the paper; zero-shot, no chat template):
  - The prompt is a line of instruction, `Q: {question}?` and `A:`, a line each. The instruction asks for a short
    reply that begins with `The answer is`; its other words are ours, not the harness's.
  - Up to 50 new tokens. The prediction is the first line that is not blank, in lower case; of that what follows the
    last `answer is`, then the last `a:`, then the last `answer:`; of that what eval.text.first_phrase leaves.
  - Right if what first_phrase leaves of any alias stands anywhere in it. That finds `us` in `russia`, and, as an alias
    too ends at its first full stop, `S. Africa` in every text with an s. An alias of which nothing is left (an emoji,
    `A. Lincoln`) is found in any text: items with one are counted as `always_correct`.
  - Greedy here. The authors' harness seems to have sampled at temperature 1 (--temperature 1).

Protocol `standard` (lm-evaluation-harness triviaqa):
  - The prompt is `Question: {question}?` and `Answer:`, a line each. Greedy, stopped at a newline, full stop or
    comma; up to 256 new tokens.
  - Right if prediction and an alias are equal but for case, ASCII punctuation and spacing (eval.text.plain_words,
    articles kept; an alias of which nothing is left is not compared). `St. Louis` ends at `St` and is wrong where
    `St Louis` is right: the stops are the harness's.

Both harnesses put a question mark after a question that has one already, and so do we: `...??`.

Rows, told apart by the suffix and the keys:
  - .jsonl or .json: {question, answer: {value, aliases}} as on the Hugging Face hub (its other keys are not read), or
    {question, answer, aliases}, or {context, answer, aliases} with a context `Question: ...?\\nAnswer:`;
  - .csv or .tsv: question, tab, a Python list of aliases; no header.
An id is `id` or `question_id`, or else the row's number from 0. The aliases include the answer itself.
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import TextTokenizer
from eval import common, generation
from eval.text import first_phrase, plain_words
from model import Transformer

INSTRUCTION = "Reply to the question with as few words as you can, and let the reply begin with 'The answer is '."
PROTOCOLS = {
    "paper": common.Protocol(shots=0, max_new_tokens=50, stop=()),  # no newline: the first line may be blank
    "standard": common.Protocol(shots=0, max_new_tokens=256, stop=("\n", ".", ",")),
}


@dataclass(frozen=True)
class Item:
    id: str
    question: str
    aliases: tuple[str, ...]  # the answer's first name stands first


# --- rows ------------------------------------------------------------------------------------------------------


def read_items(path: str | Path) -> list[Item]:
    """Every row of the file. Raises FileNotFoundError, or ValueError naming file:line and what is wrong."""
    if Path(path).suffix not in (".csv", ".tsv"):
        return common.read_items(path, parse_item)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8: {error}") from None
    # csv takes the lines as they are given: split at "\n" alone, for a field may hold other line separators
    rows = csv.reader((line + "\n" for line in text.split("\n")), delimiter="\t", strict=True)
    items = []
    try:
        for row in rows:
            if row:  # csv gives a blank line as an empty row
                items.append(parse_fields(row, str(len(items))))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}:{rows.line_num}: {error}") from None
    if not items:
        raise ValueError(f"{path}: expected at least one row, got none")
    return items


def parse_fields(fields: list[str], id: str) -> Item:
    """One row of a .csv file: question and list of aliases."""
    if len(fields) != 2:
        raise ValueError(f"expected two fields (question, tab, list of aliases), got {len(fields)}")
    try:
        aliases = ast.literal_eval(fields[1].strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # all that literal_eval raises
        raise ValueError(f"second field: expected a Python list of aliases, got {fields[1][:80]!r}") from None
    return Item(id, common.text_field({"question": fields[0]}, "question"), alias_texts({"aliases": aliases}))


def parse_item(row: dict, id: str) -> Item:
    """One JSON row of any of the three forms; ValueError on a missing key."""
    if "context" in row and "question" not in row:
        context = common.text_field(row, "context")
        question = context.removeprefix("Question: ").removesuffix("\nAnswer:")
        if context != f"Question: {question}\nAnswer:":
            raise ValueError(f"key 'context': expected 'Question: ...\\nAnswer:', got {context!r}")
    else:
        question = common.text_field(row, "question")
    if isinstance(row.get("answer"), dict):
        first, aliases = common.text_field(row["answer"], "value"), alias_texts(row["answer"])
    else:
        first, aliases = common.text_field(row, "answer"), alias_texts(row)
    question_id = row.get("question_id")
    return Item(id if question_id is None else str(question_id), question, tuple(dict.fromkeys([first, *aliases])))


def alias_texts(row: dict) -> tuple[str, ...]:
    aliases = row.get("aliases")
    if not isinstance(aliases, list) or not aliases:
        raise ValueError(f"key 'aliases': expected a list of texts, got {aliases!r}")
    return tuple(common.text_field({"aliases": alias}, "aliases") for alias in aliases)


# --- prompt and answer -----------------------------------------------------------------------------------------


def prompt(item: Item, exemplars: Sequence[Item], protocol: str) -> str:
    """What the model reads: each exemplar with its answer and an empty line after it, then the item without."""
    lead = " The answer is " if protocol == "paper" else " "
    answered = [f"{question_text(e, protocol)}{lead}{e.aliases[0]}\n\n" for e in exemplars]
    return "".join(answered) + question_text(item, protocol)


def question_text(item: Item, protocol: str) -> str:
    if protocol == "paper":
        return f"{INSTRUCTION}\nQ: {item.question}?\nA:"
    return f"Question: {item.question}?\nAnswer:"


def extract(text: str, protocol: str) -> str:
    """The prediction in a generated text; empty where there is none."""
    if protocol == "standard":
        return generation.cut(text, PROTOCOLS["standard"].stop).strip()
    line = text.strip().split("\n")[0].lower()
    for lead in ("answer is", "a:", "answer:"):
        line = line.split(lead)[-1]
    return first_phrase(line.strip())


def is_correct(prediction: str, item: Item, protocol: str) -> bool:
    """Whether the prediction holds an alias (`paper`) or is one (`standard`), as the protocol normalises both."""
    if protocol == "paper":
        return any(first_phrase(alias) in prediction for alias in item.aliases)
    words = plain_words(prediction, articles=True)
    return words != "" and words in [plain_words(alias, articles=True) for alias in item.aliases]


def always_correct(item: Item) -> bool:
    """Whether protocol `paper` finds an alias of the item in any text."""
    return is_correct("", item, "paper")


# --- scoring ---------------------------------------------------------------------------------------------------


def judge(item: Item, completion: str, protocol: str) -> dict:
    """{prediction, gold (the aliases), correct}."""
    prediction = extract(completion, protocol)
    return {"prediction": prediction, "gold": list(item.aliases), "correct": is_correct(prediction, item, protocol)}


def evaluate(
    model: Transformer, tokenizer: TextTokenizer, items: Sequence[Item], *, protocol: str = "paper", **settings
) -> dict:
    """The result for these items; generation.evaluate explains the settings.

    Under `paper` it has always_correct, the number of items that any text answers correctly.
    """
    parts = {"protocols": PROTOCOLS, "protocol": protocol, "prompt": prompt, "judge": judge}
    metric = "contains an alias" if protocol == "paper" else "exact"
    whole = generation.evaluate("triviaqa", model, tokenizer, items, **parts, metric=metric, **settings)
    return whole | {"always_correct": sum(map(always_correct, items))} if protocol == "paper" else whole


def main(argv: list[str] | None = None) -> None:
    common.run(
        argv,
        prog="eval.triviaqa",
        description="Score a model on TriviaQA.",
        data=None,
        read_items=read_items,
        evaluate=evaluate,
        protocols=PROTOCOLS,
    )


if __name__ == "__main__":
    main()
