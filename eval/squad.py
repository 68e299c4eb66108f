"""SQuAD 2.0: questions on a passage, half of them without an answer in it; generated, and compared as short texts.

    python -m eval.squad --model DIR --data dev-v2.0.json --out result.json [--protocol standard]

Protocol `paper` (OpenCompass squad20_gen, the harness of the paper; zero-shot, no chat template):
  - The prompt is the passage, an instruction, `Question: {question}` and `Answer:`, on lines of their own. The
    instruction names `impossible to answer` as the answer where the passage has none; its other words are ours, not
    the harness's.
  - Up to 50 new tokens. The prediction is the first line in lower case, after the last `answer is` in it, as
    eval.text.first_phrase normalises it. A text that begins with a newline has an empty prediction.
  - A prediction is correct if it equals a reference that first_phrase has normalised; the score is the percentage of
    correct answers. The references of a question without an answer are `impossible to answer` and the plausible
    answers of the data set: a plausible wrong span counts as correct.
  - Decoding is greedy. The authors' harness seems to have sampled at temperature 1 (--temperature 1).

Protocol `standard` (SQuAD's own script, as lm-evaluation-harness runs it):
  - The prompt is `Title: ...`, `Background: ...` (the passage), `Question: ...` and `Answer:`, separated by empty
    lines. Decoding is greedy and stops at a newline; up to 256 new tokens.
  - eval.text.plain_words normalises prediction and references: lower case, no punctuation, no articles. exact: equal
    to a reference. f1: the F1 of the words in common, counted with repetition, with the best reference. The score is
    exact; metrics has f1, and both for the questions with (HasAns) and without an answer (NoAns).
    An answer that normalises to the empty string (`.`, `_`, `the`) is ignored beside others, so its own text is wrong
    there. Where a question has only such answers, every empty prediction is correct (exact and f1 are 1).
  - A completion says that there is no answer if it is empty or the word `unanswerable` alone. Where there is no
    answer, only such a completion is correct (exact and f1 are 1). The prompt does not ask for that word, so 0-shot
    NoAns is low; exemplars show it. lm-evaluation-harness accepts only the empty text. It also reports best_exact and
    best_f1 at a threshold on the word's likelihood; we do not.

Rows: the published JSON, {data: [{title, paragraphs: [{context, qas: [{id, question, is_impossible, answers:
[{text}], plausible_answers: [{text}]}]}]}]}. plausible_answers may be missing.
A .jsonl file has the rows of the Hugging Face hub (squad_v2), a question a line: {id, title, context, question,
answers: {text: [...], answer_start: [...]}}. A question without an answer has an empty list there. The hub has no
plausible answers, so under `paper` its impossible questions have the one reference `impossible to answer`: the score
is at most that of the published file. Other keys are ignored. Exemplars have either form.
"""

from __future__ import annotations

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
    answers: tuple[str, ...]  # empty where the question has no answer
    plausible: tuple[str, ...]  # then: wrong spans that look like an answer


# --- rows ------------------------------------------------------------------------------------------------------


def read_items(path: str | Path) -> list[Item]:
    """The questions of a file, in its order. A .jsonl file has the hub's rows, any other the published object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is unusable; the message names file and place, such as
            `dev.json: data[3].paragraphs[0].qas[2]: key 'question' is missing ...` or `dev.jsonl:7: ...`.
    """
    if Path(path).suffix == ".jsonl":
        return common.read_items(path, parse_row)
    whole, items = read_object(path), []
    with common.naming(path):
        for article, in_data in children(whole, "data"):
            with common.naming(in_data):
                title = common.text_field(article, "title")
            for paragraph, in_article in children(article, "paragraphs", in_data):
                with common.naming(in_article):
                    context = common.text_field(paragraph, "context")
                for question, in_paragraph in children(paragraph, "qas", in_article):
                    with common.naming(in_paragraph):
                        items.append(parse_item(question, title, context))
        if not items:
            raise ValueError("expected at least one question, got none")
    return items


def read_object(path: str | Path) -> dict:
    """The JSON object of a file; errors as in `read_items`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or a number or nesting beyond Python's limits
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(whole, dict):
        raise ValueError(f"{path}: expected SQuAD's one JSON object, got {json_kind(whole)}")
    return whole


def children(parent: dict, key: str, place: str = "") -> Iterator[tuple[dict, str]]:
    """The objects of the list parent[key], each with its place: the parent's, then `key[i]`."""
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
    """The item of one of `qas`.

    Raises:
        ValueError: a key is missing, or the answers contradict is_impossible.
    """
    impossible = question.get("is_impossible")
    if not isinstance(impossible, bool):  # SQuAD 1.1 has no such key
        raise ValueError(f"key 'is_impossible': expected true or false (SQuAD 2.0), got {json_kind(impossible)}")
    id, asked = common.text_field(question, "id"), common.text_field(question, "question")
    answers = answer_texts(question, "answers")
    if bool(answers) == impossible:
        raise ValueError(f"key 'answers': {len(answers)} of them, but is_impossible is {json_kind(impossible)}")
    plausible = answer_texts(question, "plausible_answers") if impossible and "plausible_answers" in question else ()
    return Item(id, title, context, asked, answers, plausible)


def parse_row(row: dict, id: str) -> Item:
    """The item of a row of the hub; `id` is not used, for each row has its own.

    Raises:
        ValueError: a key is missing or unusable, or the answers contradict is_impossible, where the row has it.
    """
    id, title, context, asked = (common.text_field(row, key) for key in ("id", "title", "context", "question"))
    answers = listed_texts(row, "answers")
    if row.get("is_impossible", not answers) is not (not answers):
        raise ValueError(
            f"key 'answers': {len(answers)} of them, but is_impossible is {json_kind(row['is_impossible'])}"
        )
    plausible = listed_texts(row, "plausible_answers") if not answers and "plausible_answers" in row else ()
    return Item(id, title, context, asked, answers, plausible)


def listed_texts(row: dict, key: str) -> tuple[str, ...]:
    """The distinct texts of row[key]["text"], in its order."""
    if not isinstance(row.get(key), dict):
        got = f"got {json_kind(row[key])}" if key in row else "there is no such key"
        raise ValueError(f"key {key!r}: expected an object {{text: [...], answer_start: [...]}}, {got}")
    texts = row[key].get("text")
    if not isinstance(texts, list):
        got = f"got {json_kind(texts)}" if "text" in row[key] else "there is no such key"
        raise ValueError(f"{key}: key 'text': expected a list of texts, {got}")
    with common.naming(key):
        return tuple(dict.fromkeys(common.text_field({"text": text}, "text") for text in texts))


def answer_texts(question: dict, key: str) -> tuple[str, ...]:
    """The distinct texts of a list of answers, in its order."""
    texts = {}
    for answer, place in children(question, key):
        with common.naming(place):
            texts[common.text_field(answer, "text")] = True
    return tuple(texts)


# --- prompt and answer -----------------------------------------------------------------------------------------


def prompt(item: Item, exemplars: Sequence[Item], protocol: str) -> str:
    """The text that the model continues: each exemplar with its answer and an empty line, then the question."""
    answered = [f"{question_text(e, protocol)} {references(e, protocol)[0]}\n\n" for e in exemplars]
    return "".join(answered) + question_text(item, protocol)


def question_text(item: Item, protocol: str) -> str:
    """The passage and the question, up to `Answer:`."""
    if protocol == "paper":
        return f"{item.context}\n{INSTRUCTION}\nQuestion: {item.question}\nAnswer:"
    return f"Title: {item.title}\n\nBackground: {item.context}\n\nQuestion: {item.question}\n\nAnswer:"


def references(item: Item, protocol: str) -> tuple[str, ...]:
    """The correct answers, as the file has them."""
    if item.answers:
        return item.answers
    return (IMPOSSIBLE, *item.plausible) if protocol == "paper" else (UNANSWERABLE,)


def extract(text: str, protocol: str) -> str:
    """The prediction in a generated text; empty where there is none."""
    line = text.split("\n")[0]
    return first_phrase(line.lower().split("answer is")[-1]) if protocol == "paper" else line.strip()


def is_correct(prediction: str, item: Item, protocol: str) -> bool:
    """Whether the prediction equals a reference, both normalised as the protocol says."""
    if protocol == "paper":
        return prediction in map(first_phrase, references(item, protocol))
    return plain_words(prediction) in word_references(item)


def word_references(item: Item) -> list[str]:
    """The references of protocol `standard`, normalised; an empty one matches a prediction of no answer.

    Source: SQuAD's script (get_raw_scores) drops answers that normalise to the empty string; if none is left, it
    compares with the empty text.
    """
    if not item.answers:
        return ["", UNANSWERABLE]
    return [words for words in map(plain_words, item.answers) if words] or [""]


def best_f1(prediction: str, item: Item) -> float:
    """The F1 in [0, 1] with the best reference; 0 or 1 where the question has no answer."""
    if not item.answers:
        return float(is_correct(prediction, item, "standard"))
    return max(f1(plain_words(prediction), words) for words in word_references(item))


def f1(first: str, second: str) -> float:
    """2 c / (m + n) for texts of m and n words with c words in common, counted with repetition; 1 if both are empty.

    It is the harmonic mean of precision c / m and recall c / n.
    """
    first_words, second_words = Counter(first.split()), Counter(second.split())
    total = first_words.total() + second_words.total()
    return 2 * (first_words & second_words).total() / total if total else 1.0


# --- scoring ---------------------------------------------------------------------------------------------------


def judge(item: Item, completion: str, protocol: str) -> dict:
    """{prediction, gold (the references), correct (exact), answerable}; under `standard` also f1, in [0, 1]."""
    prediction = extract(completion, protocol)
    judged = {"prediction": prediction, "gold": list(references(item, protocol))}
    judged |= {"correct": is_correct(prediction, item, protocol), "answerable": bool(item.answers)}
    return judged | {"f1": best_f1(prediction, item)} if protocol == "standard" else judged


def evaluate(model: Transformer, tokenizer: TextTokenizer, items: Sequence[Item], **settings) -> dict:
    """The result for these items; generation.evaluate explains the settings.

    metrics has HasAns_exact and NoAns_exact; under `standard` also f1, HasAns_f1 and NoAns_f1.
    """
    whole = generation.evaluate(
        "squad", PROTOCOLS, prompt, judge, model, tokenizer, items, metric="exact", also=("f1",), **settings
    )
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
