"""SQuAD 2.0: questions on a passage, half of which it does not answer; generated and compared as short texts.

    python -m eval.squad --model DIR --data dev-v2.0.json --out result.json [--protocol standard]

Protocol `paper` (OpenCompass squad20_gen, the harness of the paper; zero-shot, no chat template):
  - The prompt is the passage, a line of instruction, `Question: {question}` and `Answer:`, a line each. The
    instruction names `impossible to answer` as the answer to give where the passage has none; its other words are
    ours, not the harness's.
  - Up to 50 new tokens. The prediction is the first line in lower case (a text that starts with a newline predicts
    nothing), of that what follows the last `answer is`, of that what eval.text.first_phrase leaves.
  - Right if it equals what first_phrase leaves of any reference, exactly; the score is the percentage right. The
    references of a question without an answer are `impossible to answer` and the dataset's plausible answers: a
    plausible wrong span counts as right.
  - Greedy here. The authors' harness seems to have sampled at temperature 1 (--temperature 1).

Protocol `standard` (SQuAD's own script, as lm-evaluation-harness runs it):
  - The prompt is `Title: ...`, `Background: ...` (the passage), `Question: ...` and `Answer:`, empty lines between.
    Greedy, stopped at a newline; up to 256 new tokens.
  - Prediction and references are compared by eval.text.plain_words: lower case, no punctuation, no articles.
    exact: equal to a reference; f1: the best F1 over references of the words in common, counted with repetition.
    The score is exact; metrics hold f1, and both for questions with (HasAns) and without an answer (NoAns).
  - A generation says that there is no answer by being empty, or nothing but the word `unanswerable`; then, and only
    then, it is right (exact and f1 1) where there is none. The prompt does not ask for that word, so that 0-shot
    NoAns is low; exemplars show it. lm-evaluation-harness takes only the empty text for `no answer`, and besides
    reports best_exact and best_f1 at a threshold on the word's likelihood; we do not.

Rows: the published JSON, {data: [{title, paragraphs: [{context, qas: [{id, question, is_impossible, answers:
[{text}], plausible_answers: [{text}]}]}]}]}. plausible_answers may be missing. Exemplars come from a file like it.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import TextTokenizer
from eval import common, generation
from eval.statistics import measure
from eval.text import first_phrase, plain_words
from model import Transformer
from training.files import json_kind

IMPOSSIBLE = "impossible to answer"
UNANSWERABLE = "unanswerable"
INSTRUCTION = f"Using the passage above, give a short answer, or say `{IMPOSSIBLE}` if the passage does not hold it:"
PROTOCOLS = {
    "paper": common.Protocol(shots=0, max_new_tokens=50, stop=("\n",)),
    "standard": common.Protocol(shots=0, max_new_tokens=256, stop=("\n",)),
}


@dataclass(frozen=True)
class Item:
    id: str
    title: str
    context: str
    question: str
    answers: tuple[str, ...]  # none where the question has no answer
    plausible: tuple[str, ...]  # wrong spans that look like one, where it has none


# --- rows ------------------------------------------------------------------------------------------------------


def read_items(path: str | Path) -> list[Item]:
    """Every question, in the file's order. Raises FileNotFoundError, or ValueError naming file and place, such as
    `dev.json: data[3].paragraphs[0].qas[2]: key 'question' is missing ...`."""
    whole, items = read_object(path), []
    with naming(path):
        for article, in_data in children(whole, "data"):
            with naming(in_data):
                title = common.text_field(article, "title")
            for paragraph, in_article in children(article, "paragraphs", in_data):
                with naming(in_article):
                    context = common.text_field(paragraph, "context")
                for question, in_paragraph in children(paragraph, "qas", in_article):
                    with naming(in_paragraph):
                        items.append(parse_item(question, title, context))
        if not items:
            raise ValueError("expected at least one question, got none")
    return items


def read_object(path: str | Path) -> dict:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number or a nesting past Python's limits
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(whole, dict):
        raise ValueError(f"{path}: expected SQuAD's one JSON object, got {json_kind(whole)}")
    return whole


@contextlib.contextmanager
def naming(place: str | Path) -> Iterator[None]:
    """Put the place before a ValueError's message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def children(parent: dict, key: str, place: str = "") -> Iterator[tuple[dict, str]]:
    """The objects of the list parent[key], each with its place: that of the parent, and `key[i]`."""
    at = f"{place}: " if place else ""
    if not isinstance(parent.get(key), list):
        got = f"got {json_kind(parent[key])}" if key in parent else "there is no such key"
        raise ValueError(f"{at}key {key!r}: expected a list, {got}")
    for i, child in enumerate(parent[key]):
        where = f"{place}.{key}[{i}]".removeprefix(".")
        if not isinstance(child, dict):
            raise ValueError(f"{where}: expected an object, got {json_kind(child)}")
        yield child, where


def parse_item(question: dict, title: str, context: str) -> Item:
    """One of `qas`; ValueError on a missing key, or answers that do not fit is_impossible."""
    impossible = question.get("is_impossible")
    if not isinstance(impossible, bool):  # SQuAD 1.1 has no such key
        raise ValueError(f"key 'is_impossible': expected true or false (SQuAD 2.0), got {json_kind(impossible)}")
    id, asked = common.text_field(question, "id"), common.text_field(question, "question")
    answers = answer_texts(question, "answers")
    if bool(answers) == impossible:
        raise ValueError(f"key 'answers': {len(answers)} of them, but is_impossible is {json_kind(impossible)}")
    plausible = answer_texts(question, "plausible_answers") if impossible and "plausible_answers" in question else ()
    return Item(id, title, context, asked, answers, plausible)


def answer_texts(question: dict, key: str) -> tuple[str, ...]:
    """The distinct texts of a list of answers, in its order."""
    texts = {}
    for answer, place in children(question, key):
        with naming(place):
            texts[common.text_field(answer, "text")] = True
    return tuple(texts)


# --- prompt and answer -----------------------------------------------------------------------------------------


def prompt(item: Item, exemplars: Sequence[Item], protocol: str) -> str:
    """What the model reads: each exemplar with an answer and an empty line after it, then the item without."""
    answered = [f"{question_text(e, protocol)} {references(e, protocol)[0]}\n\n" for e in exemplars]
    return "".join(answered) + question_text(item, protocol)


def question_text(item: Item, protocol: str) -> str:
    if protocol == "paper":
        return f"{item.context}\n{INSTRUCTION}\nQuestion: {item.question}\nAnswer:"
    return f"Title: {item.title}\n\nBackground: {item.context}\n\nQuestion: {item.question}\n\nAnswer:"


def references(item: Item, protocol: str) -> tuple[str, ...]:
    """The right answers, as the file has them."""
    if item.answers:
        return item.answers
    return (IMPOSSIBLE, *item.plausible) if protocol == "paper" else (UNANSWERABLE,)


def extract(text: str, protocol: str) -> str:
    """The prediction in a generated text; empty where there is none."""
    line = text.split("\n")[0]
    return first_phrase(line.lower().split("answer is")[-1]) if protocol == "paper" else line.strip()


def is_correct(prediction: str, item: Item, protocol: str) -> bool:
    """Whether the prediction equals a reference, as the protocol normalises both."""
    if protocol == "paper":
        return prediction in map(first_phrase, references(item, protocol))
    return plain_words(prediction) in word_references(item)


def word_references(item: Item) -> list[str]:
    """References of protocol `standard`, normalised; an empty prediction says that there is no answer."""
    if not item.answers:
        return ["", UNANSWERABLE]
    return [words for words in map(plain_words, item.answers) if words] or [""]


def best_f1(prediction: str, item: Item) -> float:
    """F1 (0 to 1) against the reference it is best for; 0 or 1 where there is no answer."""
    if not item.answers:
        return float(is_correct(prediction, item, "standard"))
    return max(f1(plain_words(prediction), words) for words in word_references(item))


def f1(first: str, second: str) -> float:
    """Harmonic mean of precision and recall of the words two texts have in common, with repetition: 2 c / (m + n).
    Two empty texts have 1."""
    first_words, second_words = Counter(first.split()), Counter(second.split())
    total = first_words.total() + second_words.total()
    return 2 * (first_words & second_words).total() / total if total else 1.0


# --- scoring ---------------------------------------------------------------------------------------------------


def judge(item: Item, completion: str, protocol: str) -> dict:
    """{prediction, gold (the references), correct (exact match), answerable}; under `standard` also f1, in [0, 1]."""
    prediction = extract(completion, protocol)
    judged = {"prediction": prediction, "gold": list(references(item, protocol))}
    judged |= {"correct": is_correct(prediction, item, protocol), "answerable": bool(item.answers)}
    return judged | {"f1": best_f1(prediction, item)} if protocol == "standard" else judged


def evaluate(model: Transformer, tokenizer: TextTokenizer, items: Sequence[Item], **settings) -> dict:
    """The result for these items; generation.evaluate explains the settings.

    metrics has HasAns_exact and NoAns_exact; under `standard` also f1, HasAns_f1 and NoAns_f1.
    """
    parts = {"protocols": PROTOCOLS, "prompt": prompt, "judge": judge}
    whole = generation.evaluate("squad", model, tokenizer, items, **parts, metric="exact", also=("f1",), **settings)
    for split, answerable in (("HasAns", True), ("NoAns", False)):
        rows = [row for row in whole["items"] if row["answerable"] == answerable]
        for metric, key in (("exact", "correct"), ("f1", "f1")):
            if rows and key in rows[0]:
                whole["metrics"][f"{split}_{metric}"] = measure([row[key] for row in rows])
    return whole


def main(argv: list[str] | None = None) -> None:
    common.run(
        argv,
        prog="eval.squad",
        description="Score a model on SQuAD 2.0.",
        data=None,
        read_items=read_items,
        evaluate=evaluate,
        protocols=PROTOCOLS,
    )


if __name__ == "__main__":
    main()
