"""MATH: competition problems; generated, and compared by the answer in the box.

    python -m eval.math --model DIR --data math500.jsonl --exemplars train.jsonl --out result.json

Protocol `paper` (OpenCompass math_gen, the harness of the paper; no chat template):
  - The prompt is `Problem:`, the problem, and `Solution:`, on lines of their own. 4 worked problems come before it in
    the same form, each with its solution, a line `Final Answer: The final answer is $...$.` and an empty line.
    The paper's harness has four of its own (Minerva's; none boxes its answer) that end in one more sentence. Here
    they are the first rows of --exemplars, whose solutions box their answers. Without that flag the prompt is
    0-shot; `protocol` in the result says which it was.
  - Up to 512 new tokens, or as many as the model's context has room for; no string stops a text.
  - The prediction is the last closed \\boxed{...} of the whole text, the inner one of nested boxes. If a model
    continues with problems of its own, it is the answer to the last of them.
  - Without a box, the text is split at full stops, and the first piece with `final answer` or `answer is` counts. The
    prediction is what follows those words there, or the content of the first pair of dollars after them. Without
    such a piece, the prediction is the text before the first full stop. So `3.5` without a box is read as 3.
  - A prediction is correct if `tex.normalise` gives the same for it and gold. (The harness has two normalisers of its
    own; this one does not repeat them line by line.)

Protocol `standard` (prompt and stop string of lm-evaluation-harness's minerva_math; no chat template):
  - The prompt is `Problem:`, the problem, an empty line, `Solution:`. 4 rows of --exemplars come before it in the same
    form, each with its solution and an empty line.
  - Up to 512 new tokens; a text ends before the next `Problem:`.
  - The prediction is the last closed \\boxed{...} that is not in another box, without the boxes in it; a text without
    one has no prediction. It is correct if `tex.canonical` gives the same for it and gold: exact numbers, sets,
    tuples, intervals. There is no algebra; other answers are compared as normalised strings. (This equality and the
    treatment of nested boxes are ours; lm-evaluation-harness asks SymPy.)

Under both, gold is the row's `answer`, or else the last box of its solution, as `standard` reads it. The score is the
percentage of correct answers, and `metrics` has it for each level and subject. Decoding is greedy. (The authors'
harness seems to have sampled at temperature 1: that is --temperature 1.)

Rows: {problem, solution, answer?, level?, subject? or type?, unique_id? or id?}; level is 5 or `Level 5`. The default
id is the row number, from 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import TextTokenizer
from eval import common, generation
from eval.statistics import measure
from eval.tex import argument, canonical, normalise
from model import Transformer

PROTOCOLS = {
    "paper": common.Protocol(shots=4, max_new_tokens=512, stop=()),
    "standard": common.Protocol(shots=4, max_new_tokens=512, stop=("Problem:",)),
}


@dataclass(frozen=True)
class Item:
    id: str
    problem: str
    solution: str
    gold: str  # as the row writes it
    level: str | None
    subject: str | None


def read_items(path: str | Path) -> list[Item]:
    """The items of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is unusable; the message names file, line and key.
    """
    return common.read_items(path, parse_item)


def parse_item(row: dict, id: str) -> Item:
    """The item of a row; its id is `unique_id` if the row has one.

    Raises:
        ValueError: a key is missing or unusable, or the solution has no answer.
    """
    problem, solution = common.text_field(row, "problem"), common.text_field(row, "solution")
    gold = common.text_field(row, "answer") if "answer" in row else outer_boxed(solution)
    if not gold:
        raise ValueError(f"key 'solution': expected its answer in \\boxed{{...}}, got {solution[-40:]!r}")
    level, subject = row.get("level"), row.get("subject", row.get("type"))
    for key, value in (("level", level), ("subject", subject)):
        if not isinstance(value, str | int | None):
            raise ValueError(f"key {key!r}: expected a text or a number, got {value!r}")
    level = None if level is None else str(level).removeprefix("Level ")
    unique_id = row.get("unique_id")
    return Item(id if unique_id is None else str(unique_id), problem, solution, gold, level, subject and str(subject))


# --- prompt and answer ---------------------------------------------------------------------------------------


def prompt(item: Item, exemplars: Sequence[Item], protocol: str) -> str:
    """The text that the model continues: each exemplar with its solution and an empty line, then the problem."""
    if protocol == "standard":
        worked = [f"{prompt(e, (), protocol)} {e.solution}\n\n" for e in exemplars]
        return "".join(worked) + f"Problem:\n{item.problem}\n\nSolution:"
    worked = [
        f"{prompt(e, (), protocol)}{e.solution}\nFinal Answer: The final answer is ${e.gold}$.\n\n" for e in exemplars
    ]
    return "".join(worked) + f"Problem:\n{item.problem}\nSolution:\n"


BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")


def last_boxed(text: str) -> str | None:
    """The content of the last closed \\boxed or \\fbox; None where there is none."""
    for box in reversed(list(BOX.finditer(text))):
        if found := argument(text, box.end()):
            return found[0].strip()
    return None


def outer_boxed(text: str) -> str | None:
    """The content of the last closed box that is in no other box, without the boxes in it; None where there is none."""
    content, at = None, 0
    while box := BOX.search(text, at):
        found, at = argument(text, box.end()), box.end()
        if found and not BOX.fullmatch(found[0]):  # in \boxed\boxed{5} the first box holds no more than a command
            content, at = found
    while content and (inner := BOX.search(content)):
        boxed, end = argument(content, inner.end()) or ("", inner.end())
        content = f"{content[: inner.start()]} {boxed} {content[end:]}"
    return content and content.strip()


def extract(text: str, protocol: str) -> str | None:
    """The answer in a generated text, as it is written; None where there is none."""
    if protocol == "standard":
        return outer_boxed(generation.cut(text, PROTOCOLS[protocol].stop))
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    pieces = text.split(".")
    answer = next((piece for piece in pieces if re.search("final answer|answer is", piece, re.IGNORECASE)), None)
    if answer is None:
        return pieces[0].strip()
    answer = re.split("(?:final )?answer is|final answer", answer, flags=re.IGNORECASE)[-1]
    formula = re.search(r"\$([^$]+)\$", answer)
    return (formula[1] if formula else answer).strip(" :\n")


def is_correct(prediction: str | None, gold: str, protocol: str) -> bool:
    """Whether two answers are equal: in spelling (`paper`) or in meaning (`standard`)."""
    if prediction is None:
        return False
    read = canonical if protocol == "standard" else normalise
    return read(prediction) == read(gold)


def judge(item: Item, completion: str, protocol: str) -> dict:
    """{prediction (None without an answer), gold, correct}."""
    prediction = extract(completion, protocol)
    return {"prediction": prediction, "gold": item.gold, "correct": is_correct(prediction, item.gold, protocol)}


def evaluate(model: Transformer, tokenizer: TextTokenizer, items: Sequence[Item], **settings) -> dict:
    """The result for these items; generation.evaluate explains the settings. metrics has each level and subject."""
    whole = generation.evaluate("math", PROTOCOLS, prompt, judge, model, tokenizer, items, **settings)
    groups: dict[str, list[bool]] = {}
    for item, row in zip(items, whole["items"], strict=True):
        for group in (item.level and f"level {item.level}", item.subject):
            if group is not None:
                groups.setdefault(group, []).append(row["correct"])
    whole["metrics"] |= {group: measure(groups[group]) for group in sorted(groups)}
    return whole


def main(argv: list[str] | None = None) -> None:
    common.run(
        argv,
        prog="eval.math",
        description="Score a model on MATH.",
        data=None,
        read_items=read_items,
        evaluate=evaluate,
        protocols=PROTOCOLS,
    )


if __name__ == "__main__":
    main()
