"""GSM8K: grade-school maths, generated and compared by the last number.

    python -m eval.gsm8k --model DIR --data test.jsonl --out result.json

Protocol `paper` (OpenCompass gsm8k_gen, the harness of the paper; no chat template):
  - The prompt is `Question: {question}\\nLet's think step by step\\nAnswer:`. With --exemplars, worked questions
    stand before it: the same text of the exemplar's question, then its reasoning, `The answer is N` and an empty
    line, each on lines of its own. The paper's harness puts four in (its own, none of GSM8K's); here the default
    is none, and `protocol` in the result says how many there were.
  - Up to 512 new tokens, or as many as the model's context has room for. A text is cut at `Question:`, where a
    model starts to make up the next question (and is stopped here, to save time).
  - Decoding is greedy. (The authors' harness seems to have sampled at temperature 1, by the defaults of its
    engine; greedy can be repeated, and does not mix luck into the score.)
  - The prediction is the last match of -?\\d+(\\.\\d+)? in the text. Commas, units and operators are not
    understood: `1,000` is read as 000, `16-3` as -3, `10.` as 10.
  - Gold is what follows `#### `, commas removed. Right if the strings are equal or the numbers differ by less
    than 1e-6. The score is the percentage right.

Rows: {question, answer}, the answer's reasoning ending in `#### N`; `id` if there is one, else the row number from 0.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import TextTokenizer
from eval import common
from model import Transformer

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator steps, "<<48/2=24>>"


@dataclass(frozen=True)
class Item:
    id: str
    question: str
    rationale: str  # the reasoning before '#### ', without calculator annotations
    gold: str  # the number after it, without commas


def read_items(path: str | Path) -> list[Item]:
    """Every row of the file. Raises FileNotFoundError, or ValueError naming file:line and key."""
    return common.read_items(path, parse_item)


def parse_item(row: dict, id: str) -> Item:
    """One row; ValueError on a missing key, or an answer that does not end in `#### ` and a number."""
    question, answer = common.text_field(row, "question"), common.text_field(row, "answer")
    rationale, marker, gold = answer.partition("#### ")
    gold = gold.replace(",", "").strip()
    if not marker or not NUMBER.fullmatch(gold):
        raise ValueError(f"key 'answer': expected it to end in '#### ' and a number, got {answer[-40:]!r}")
    return Item(id, question, ANNOTATION.sub("", rationale).strip(), gold)


def question_text(question: str) -> str:
    return f"Question: {question}\nLet's think step by step\nAnswer:"


def exemplar_text(exemplars: Sequence[Item]) -> str:
    """What stands before the question's own text: each exemplar answered, then an empty line."""
    return "".join(f"{question_text(e.question)}\n{e.rationale}\nThe answer is {e.gold}\n\n" for e in exemplars)


def extract_number(text: str) -> str | None:
    """The last number before the first `Question:`, as it is written; None where there is none."""
    numbers = NUMBER.findall(text.split("Question:")[0])
    return numbers[-1] if numbers else None


def is_correct(prediction: str | None, gold: str) -> bool:
    return prediction is not None and (prediction == gold or abs(float(prediction) - float(gold)) < 1e-6)


def evaluate(
    model: Transformer,
    tokenizer: TextTokenizer,
    items: Sequence[Item],
    exemplars: Sequence[Item] = (),
    max_new_tokens: int = 512,
    batch_size: int = 16,
) -> dict:
    """Score the items under protocol `paper`; see the module's head.

    Returns {task, metric, score (percent), n, interval95, protocol, max_new_tokens, unfinished, exemplars, items}:
    unfinished counts the texts that the token limit ended, exemplars is the text before every question; each item
    holds id, prediction (None where there is no number), gold, correct, prompt's question, text, new_tokens."""
    if not items:
        raise ValueError("expected at least one item to score, got none")
    before = exemplar_text(exemplars)
    prompts = [(item.id, before + question_text(item.question)) for item in items]
    generated = common.generate_texts(model, tokenizer, prompts, max_new_tokens, batch_size, stop="Question:")
    scored = []
    for item, made in zip(items, generated, strict=True):
        prediction = extract_number(made["text"])
        correct = is_correct(prediction, item.gold)
        row = {"id": item.id, "prediction": prediction, "gold": item.gold, "correct": correct}
        scored.append({**row, "question": item.question, **made})
    return common.result(
        "gsm8k",
        f"paper, {len(exemplars)}-shot, greedy",
        scored,
        max_new_tokens=max_new_tokens,
        unfinished=sum(not made["finished"] for made in generated),
        exemplars=before,
    )


def main(argv: list[str] | None = None) -> None:
    parser = common.argument_parser(
        "eval.gsm8k", "Score a model on GSM8K as the paper does.", "data/tiny/gsm8k_test.jsonl"
    )
    parser.add_argument("--exemplars", help="worked questions to put before each, rows like those of --data")
    parser.add_argument("--shots", type=common.positive_int, help="how many of them, from the first; default all")
    parser.add_argument("--max-new-tokens", type=common.positive_int, default=512, help="%(default)s")
    parser.add_argument(
        "--batch-size", type=common.positive_int, default=16, help="prompts generated together; %(default)s"
    )
    args = parser.parse_args(argv)
    with common.errors_in_one_line(parser.prog):
        started = time.perf_counter()
        items = read_items(args.data)[: args.limit]
        exemplars = read_items(args.exemplars)[: args.shots] if args.exemplars else []
        if args.shots and len(exemplars) < args.shots:
            raise ValueError(f"--shots {args.shots}: --exemplars gives {len(exemplars)}")
        model, tokenizer = common.load(args)
        scored = evaluate(model, tokenizer, items, exemplars, args.max_new_tokens, args.batch_size)
        if scored["unfinished"]:
            print(f"{parser.prog}: {scored['unfinished']} of {scored['n']} answers ran into the limit of new tokens")
        common.report(args, scored, time.perf_counter() - started)


if __name__ == "__main__":
    main()
