"""GSM8K: grade-school maths, generated and compared by a number.

    python -m eval.gsm8k --model DIR --data test.jsonl --exemplars train.jsonl --out result.json

Protocol `paper` (OpenCompass gsm8k_gen, the harness of the paper; no chat template):
  - The prompt is `Question: {question}\\nLet's think step by step\\nAnswer:`. Before it stand 4 worked questions:
    the same text of the exemplar's question, then its reasoning, `The answer is N` and an empty line, each on
    lines of its own. The paper's harness has four of its own, none of GSM8K's; here they are the first rows of
    --exemplars, without their calculator annotations. Without that flag there are none: `protocol` in the result
    says how many there were.
  - Up to 512 new tokens, or as many as the model's context has room for. A text is cut at `Question:`, where a
    model starts to make up the next question (and is stopped here, to save time).
  - The prediction is the last match of -?\\d+(\\.\\d+)? in the text. Commas, units and operators are not
    understood: `1,000` is read as 000, `16-3` as -3, `10.` as 10.
  - Right if the prediction and gold are equal as strings, or differ by less than 1e-6 as numbers.

Protocol `standard` (lm-evaluation-harness gsm8k, version 3; no chat template):
  - The prompt is `Question: {question}\\nAnswer:`. Before it stand 5 train rows in the same form, each with its
    answer as the file has it, annotations and `#### N` included, then an empty line. The harness draws the five
    at random; here they are the first of --exemplars.
  - Up to 256 new tokens; a text ends before `Question:`, `</s>` or `<|im_end|>`.
  - strict-match, the score: the first match of `#### (-?[0-9.,]+)`. flexible-extract, in `metrics`: the last
    match of -?[$0-9.,]{2,} or -?[0-9]+.
  - Right if prediction and gold are the same string, once commas, `$` and a last full stop are taken out of both.

Under both, gold is what follows `#### `, commas removed, and the score is the percentage right. Decoding is
greedy. (The authors' harness seems to have sampled at temperature 1, by the defaults of its engine: that is
--temperature 1. Greedy can be repeated, and does not mix luck into the score.)

Rows: {question, answer}, the answer's reasoning ending in `#### N`; `id` if there is one, else the row number from 0.
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
    answer: str  # reasoning, '#### ' and the number, as the file has them
    gold: str  # the number, without commas

    @property
    def rationale(self) -> str:
        """The reasoning, without calculator annotations."""
        return ANNOTATION.sub("", self.answer.partition("#### ")[0]).strip()


def read_items(path: str | Path) -> list[Item]:
    """Every row of the file. Raises FileNotFoundError, or ValueError naming file:line and key."""
    return common.read_items(path, parse_item)


def parse_item(row: dict, id: str) -> Item:
    """One row; ValueError on a missing key, or an answer that does not end in `#### ` and a number."""
    question, answer = common.text_field(row, "question"), common.text_field(row, "answer")
    _, marker, gold = answer.partition("#### ")
    gold = gold.replace(",", "").strip()
    if not marker or not NUMBER.fullmatch(gold):
        raise ValueError(f"key 'answer': expected it to end in '#### ' and a number, got {answer[-40:]!r}")
    return Item(id, question, answer, gold)


def prompt(item: Item, exemplars: Sequence[Item] = (), protocol: str = "paper") -> str:
    """The text that the model continues: the exemplars, answered, then the item's question."""
    if protocol == "standard":
        before = "".join(f"Question: {e.question}\nAnswer: {e.answer}\n\n" for e in exemplars)
        return f"{before}Question: {item.question}\nAnswer:"
    before = "".join(f"{prompt(e)}\n{e.rationale}\nThe answer is {e.gold}\n\n" for e in exemplars)
    return f"{before}Question: {item.question}\nLet's think step by step\nAnswer:"


def extract(text: str, protocol: str = "paper") -> str | None:
    """The number that a completion answers with: `paper` as it is written, `standard` by strict-match; None if none."""
    text = generation.cut(text, PROTOCOLS[protocol].stop)
    if protocol == "standard":
        match = STRICT.search(text)
        return match and bare(match[1])
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def extract_flexible(text: str) -> str | None:
    """The number that a completion answers with, by flexible-extract of protocol `standard`."""
    numbers = FLEXIBLE.findall(generation.cut(text, PROTOCOLS["standard"].stop))
    return bare(numbers[-1]) if numbers else None


def bare(number: str) -> str | None:
    """Without commas, `$` and a last full stop; None where nothing is left."""
    return number.replace(",", "").replace("$", "").removesuffix(".") or None


def is_correct(prediction: str | None, gold: str, protocol: str = "paper") -> bool:
    if prediction is None:
        return False
    if protocol == "standard":
        return prediction == bare(gold)
    return prediction == gold or abs(float(prediction) - float(gold)) < 1e-6


def judge(item: Item, completion: str, protocol: str) -> dict:
    """{prediction (None: no number), gold, correct}; under `standard` also flexible_prediction and flexible."""
    prediction = extract(completion, protocol)
    judged = {"prediction": prediction, "gold": item.gold, "correct": is_correct(prediction, item.gold, protocol)}
    if protocol == "standard":
        flexible = extract_flexible(completion)
        judged |= {"flexible_prediction": flexible, "flexible": is_correct(flexible, item.gold, protocol)}
    return judged


def evaluate(model: Transformer, tokenizer: TextTokenizer, items: Sequence[Item], **settings) -> dict:
    """The result for these items; generation.evaluate explains the settings. Under `standard`, metrics has flexible."""
    parts = {"protocols": PROTOCOLS, "prompt": prompt, "judge": judge}
    return generation.evaluate("gsm8k", model, tokenizer, items, **parts, also=("flexible",), **settings)


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
