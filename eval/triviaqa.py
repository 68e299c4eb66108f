"""TriviaQA: trivia questions without a passage; generated, and compared with every alias of the answer.

    python -m eval.triviaqa --model DIR --data trivia-dev.qa.csv --out result.json [--protocol standard]

Protocol `paper` (OpenCompass triviaqa_gen, the harness of the paper; zero-shot, no chat template):
  - The prompt is an instruction, `Q: {question}?` and `A:`, on lines of their own. The instruction asks for a short
    reply that begins with `The answer is`; its other words are ours, not the harness's.
  - Up to 50 new tokens. The prediction is the first line that is not blank, in lower case. It is cut to what follows
    the last `answer is`, then the last `a:`, then the last `answer:`, and eval.text.first_phrase normalises the rest.
  - A prediction is correct if it contains an alias that first_phrase has normalised. So `us` is found in `russia`; and
    as an alias too ends at its first full stop, `S. Africa` is found in every text with an s. An alias that normalises
    to the empty string (an emoji, `A. Lincoln`) matches every answer: `always_correct` counts the items with one.
  - Decoding is greedy. The authors' harness seems to have sampled at temperature 1 (--temperature 1).

Protocol `standard` (lm-evaluation-harness triviaqa):
  - The prompt is `Question: {question}?` and `Answer:`, on lines of their own. Decoding is greedy and stops at a
    newline, full stop or comma; up to 256 new tokens.
  - A prediction is correct if it equals an alias except for case and ASCII punctuation (eval.text.without_punctuation).
    Only the ends of the prediction lose their spaces, so `x y` is not the alias `x - y`, which has two spaces left.
    `value` is no alias unless the list has it, and an exemplar is answered with the first alias of its list.
    The prediction of `St. Louis` ends at `St` and is wrong, where `St Louis` is correct: the stop strings are the
    harness's.
  - Unlike in the harness, an alias that normalises to the empty string is ignored: an empty prediction equals it there.
    Exemplars are the first rows of --exemplars; the harness draws its own.

Both harnesses put a question mark after every question, even if it ends in one, and so do we: `...??`.

Rows; the suffix and the keys tell the form:
  - .jsonl or .json: {question, answer: {value, aliases}} as on the Hugging Face hub (its other keys are ignored), or
    {question, answer, aliases}, or {context, answer, aliases} with a context `Question: ...?\\nAnswer:`;
  - .csv or .tsv: question, tab, a Python list of aliases; no header.
The id is `id` or `question_id`; default: the row number, from 0. Under `paper` the answer itself is an alias too, and
an exemplar is answered with it.
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import TextTokenizer
from eval import common, generation
from eval.text import first_phrase, without_punctuation
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
    aliases: tuple[str, ...]  # as the file lists them
    value: str | None = None  # the answer's usual name, which the list may lack; None where the file has none

    @property
    def names(self) -> tuple[str, ...]:
        """The usual name, if there is one, and the aliases; each once."""
        return tuple(dict.fromkeys((self.value, *self.aliases) if self.value else self.aliases))


# --- rows ------------------------------------------------------------------------------------------------------


def read_items(path: str | Path) -> list[Item]:
    """The items of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is unusable; the message names file, line and key.
    """
    if Path(path).suffix not in (".csv", ".tsv"):
        return common.read_items(path, parse_item)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8: {error}") from None
    # csv takes lines as they are given. Split only at "\n": a field may hold other line separators.
    rows = csv.reader((line + "\n" for line in text.split("\n")), delimiter="\t", strict=True)
    items = []
    try:
        for row in rows:
            if row:  # a blank line is an empty row
                items.append(parse_fields(row, str(len(items))))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}:{rows.line_num}: {error}") from None
    if not items:
        raise ValueError(f"{path}: expected at least one row, got none")
    return items


def parse_fields(fields: list[str], id: str) -> Item:
    """The item of a .csv row, question and list of aliases."""
    if len(fields) != 2:
        raise ValueError(f"expected two fields (question, tab, list of aliases), got {len(fields)}")
    try:
        aliases = ast.literal_eval(fields[1].strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # all of what literal_eval raises
        raise ValueError(f"second field: expected a Python list of aliases, got {fields[1][:80]!r}") from None
    return Item(id, common.text_field({"question": fields[0]}, "question"), alias_texts({"aliases": aliases}))


def parse_item(row: dict, id: str) -> Item:
    """The item of a JSON row in any of the three forms.

    Raises:
        ValueError: a key is missing or unusable.
    """
    if "context" in row and "question" not in row:
        context = common.text_field(row, "context")
        question = context.removeprefix("Question: ").removesuffix("\nAnswer:")
        if context != f"Question: {question}\nAnswer:":
            raise ValueError(f"key 'context': expected 'Question: ...\\nAnswer:', got {context!r}")
    else:
        question = common.text_field(row, "question")
    if isinstance(row.get("answer"), dict):
        with common.naming("key 'answer'"):
            value, aliases = common.text_field(row["answer"], "value"), alias_texts(row["answer"])
    else:
        value, aliases = common.text_field(row, "answer"), alias_texts(row)
    question_id = row.get("question_id")
    return Item(id if question_id is None else str(question_id), question, aliases, value)


def alias_texts(row: dict) -> tuple[str, ...]:
    """The texts of row["aliases"]; ValueError where it is not a list of at least one text."""
    aliases = row.get("aliases")
    if not isinstance(aliases, list) or not aliases:
        raise ValueError(f"key 'aliases': expected a list of texts, got {aliases!r}")
    return tuple(common.text_field({"aliases": alias}, "aliases") for alias in aliases)


# --- prompt and answer -----------------------------------------------------------------------------------------


def prompt(item: Item, exemplars: Sequence[Item], protocol: str) -> str:
    """The text that the model continues: each exemplar with its answer and an empty line, then the question."""
    lead = " The answer is " if protocol == "paper" else " "
    answered = [f"{question_text(e, protocol)}{lead}{accepted(e, protocol)[0]}\n\n" for e in exemplars]
    return "".join(answered) + question_text(item, protocol)


def question_text(item: Item, protocol: str) -> str:
    """The question as the protocol asks it, up to `A:` or `Answer:`."""
    if protocol == "paper":
        return f"{INSTRUCTION}\nQ: {item.question}?\nA:"
    return f"Question: {item.question}?\nAnswer:"


def accepted(item: Item, protocol: str) -> tuple[str, ...]:
    """The correct answers, as the file has them; the first is the answer of an exemplar."""
    return item.names if protocol == "paper" else item.aliases


def extract(text: str, protocol: str) -> str:
    """The prediction in a generated text; empty where there is none."""
    if protocol == "standard":
        return generation.cut(text, PROTOCOLS["standard"].stop).strip()
    line = text.strip().split("\n")[0].lower()
    for lead in ("answer is", "a:", "answer:"):
        line = line.split(lead)[-1]
    return first_phrase(line.strip())


def is_correct(prediction: str, item: Item, protocol: str) -> bool:
    """Whether the prediction contains (`paper`) or equals (`standard`) an alias, both normalised."""
    if protocol == "paper":
        return any(first_phrase(alias) in prediction for alias in accepted(item, protocol))
    letters = without_punctuation(prediction)
    return letters != "" and letters in map(without_punctuation, accepted(item, protocol))


def always_correct(item: Item) -> bool:
    """Whether protocol `paper` finds an alias of the item in every text."""
    return is_correct("", item, "paper")


# --- scoring ---------------------------------------------------------------------------------------------------


def judge(item: Item, completion: str, protocol: str) -> dict:
    """{prediction, gold (the correct answers), correct}."""
    prediction, gold = extract(completion, protocol), list(accepted(item, protocol))
    return {"prediction": prediction, "gold": gold, "correct": is_correct(prediction, item, protocol)}


def evaluate(
    model: Transformer, tokenizer: TextTokenizer, items: Sequence[Item], *, protocol: str = "paper", **settings
) -> dict:
    """The result for these items; generation.evaluate explains the settings.

    Under `paper` it has always_correct, the number of items for which every text is correct.
    """
    metric = "contains an alias" if protocol == "paper" else "exact"
    whole = generation.evaluate(
        "triviaqa", PROTOCOLS, prompt, judge, model, tokenizer, items, metric=metric, protocol=protocol, **settings
    )
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
