"""GSM8K: grade-school maths problems; generated, and compared by a number.

    python -m eval.gsm8k --model DIR --data test.jsonl --exemplars train.jsonl --out result.json

Protocol `paper` (OpenCompass gsm8k_gen, the harness of the paper; no chat template):
  - The prompt is `Question: {question}\\nLet's think step by step\\nAnswer:`. 4 worked questions come before it: the
    same text for the exemplar's question, then its reasoning, `The answer is N` and an empty line, on lines of their
    own. The paper's harness has four of its own, which are not from GSM8K. Here they are the first rows of
    --exemplars, without calculator annotations. Without that flag the prompt is 0-shot; `protocol` in the result
    says which it was.
  - Up to 512 new tokens, or as many as the model's context has room for. A text ends before `Question:`, where a
    model begins to invent the next question.
  - The prediction is the last match of -?\\d+(\\.\\d+)? in the text. Commas, units and operators are not parsed:
    `1,000` is read as 000, `16-3` as -3, `10.` as 10.
  - A prediction is correct if it equals gold as a string, or differs from it by less than 1e-6 as a number.

Protocol `standard` (lm-evaluation-harness gsm8k, version 3; no chat template):
  - The prompt is `Question: {question}\\nAnswer:`. 5 train rows come before it in the same form, each with its answer
    and an empty line. The answer is as the file has it, with annotations and `#### N`. The harness draws the five at
    random; here they are the first of --exemplars.
  - Up to 256 new tokens; a text ends before `Question:`, `</s>` or `<|im_end|>`.
  - strict-match, the score: the first match of `#### (-?[0-9.,]+)`. flexible-extract, in `metrics`: the last match of
    -?[$0-9.,]{2,} or -?[0-9]+.
  - A prediction is correct if it is the same string as gold, after commas, `$` and a final full stop are removed from
    both.

Under both, gold is what follows `#### `, without commas, and the score is the percentage of correct answers. Decoding
is greedy. (The authors' harness seems to have sampled at temperature 1, the default of its engine: that is
--temperature 1. A greedy score is repeatable, and chance does not enter it.)

Rows: {question, answer}, where the answer's reasoning ends in `#### N`; the default `id` is the row number, from 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import TextTokenizer
from eval import common, generation
from model import Transformer

PROTOCOLS = {
    "paper": common.Protocol(shots=4, max_new_tokens=512, stop=("Question:",)),
    "standard": common.Protocol(shots=5, max_new_tokens=256, stop=("Question:", "</s>", "<|im_end|>")),
}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator steps, "<<48/2=24>>"


@dataclass(frozen=True)
class Item:
    id: str
    question: str
    answer: str  # the reasoning, '#### ' and the number, as the file has them
    gold: str  # the number, without commas

    @property
    def rationale(self) -> str:
        """The reasoning, without calculator annotations."""
        return ANNOTATION.sub("", self.answer.partition("#### ")[0]).strip()


def read_items(path: str | Path) -> list[Item]:
    """The items of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is unusable; the message names file, line and key.
    """
    return common.read_items(path, parse_item)


def parse_item(row: dict, id: str) -> Item:
    """The item of a row.

    Raises:
        ValueError: a key is missing, or the answer does not end in `#### ` and a number.
    """
    question, answer = common.text_field(row, "question"), common.text_field(row, "answer")
    _, marker, gold = answer.partition("#### ")
    gold = gold.replace(",", "").strip()
    if not marker or not NUMBER.fullmatch(gold):
        raise ValueError(f"key 'answer': expected it to end in '#### ' and a number, got {answer[-40:]!r}")
    return Item(id, question, answer, gold)


def prompt(item: Item, exemplars: Sequence[Item] = (), protocol: str = "paper") -> str:
    """The text that the model continues: each exemplar with its answer, then the question."""
    if protocol == "standard":
        before = "".join(f"Question: {e.question}\nAnswer: {e.answer}\n\n" for e in exemplars)
        return f"{before}Question: {item.question}\nAnswer:"
    before = "".join(f"{prompt(e)}\n{e.rationale}\nThe answer is {e.gold}\n\n" for e in exemplars)
    return f"{before}Question: {item.question}\nLet's think step by step\nAnswer:"


def extract(text: str, protocol: str = "paper") -> str | None:
    """The number in a completion, by the rule of `paper` or by strict-match of `standard`; None where there is none."""
    text = generation.cut(text, PROTOCOLS[protocol].stop)
    if protocol == "standard":
        match = STRICT.search(text)
        return match and bare(match[1])
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def extract_flexible(text: str) -> str | None:
    """The number in a completion, by flexible-extract of `standard`; None where there is none."""
    numbers = FLEXIBLE.findall(generation.cut(text, PROTOCOLS["standard"].stop))
    return bare(numbers[-1]) if numbers else None


def bare(number: str) -> str | None:
    """The number without commas, `$` and a final full stop; None where nothing is left."""
    return number.replace(",", "").replace("$", "").removesuffix(".") or None


def is_correct(prediction: str | None, gold: str, protocol: str = "paper") -> bool:
    """Whether the prediction equals gold, as the protocol compares numbers."""
    if prediction is None:
        return False
    if protocol == "standard":
        return prediction == bare(gold)
    return prediction == gold or abs(float(prediction) - float(gold)) < 1e-6


def judge(item: Item, completion: str, protocol: str) -> dict:
    """{prediction (None without a number), gold, correct}; under `standard` also flexible_prediction and flexible."""
    prediction = extract(completion, protocol)
    judged = {"prediction": prediction, "gold": item.gold, "correct": is_correct(prediction, item.gold, protocol)}
    if protocol == "standard":
        flexible = extract_flexible(completion)
        judged |= {"flexible_prediction": flexible, "flexible": is_correct(flexible, item.gold, protocol)}
    return judged


def evaluate(model: Transformer, tokenizer: TextTokenizer, items: Sequence[Item], **settings) -> dict:
    """The result for these items; generation.evaluate explains the settings. With `standard`, metrics has flexible."""
    return generation.evaluate(
        "gsm8k", PROTOCOLS, prompt, judge, model, tokenizer, items, also=("flexible",), **settings
    )


def main(argv: list[str] | None = None) -> None:
    common.run(
        argv,
        prog="eval.gsm8k",
        description="Score a model on GSM8K.",
        data="data/tiny/gsm8k_test.jsonl",
        read_items=read_items,
        evaluate=evaluate,
        protocols=PROTOCOLS,
    )


if __name__ == "__main__":
    main()
