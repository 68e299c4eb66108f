"""Recipes for rows of known quality: public rows, clean or spoilt by a fixed rule, that anyone can make again.

The rows are Alpaca's and GSM8K's training split (`read_alpaca`, `read_gsm8k`). `PLANTS` has a function for each planted
kind; `NOISE` names the kinds that teach nothing right. `mixed_rows` are rows to train on, a share of them noise;
`heldout_rows` are clean rows that it never uses. Everything is a function of the rows and the seed.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from data.sft import read_rows, row_place
from eval.gsm8k import ANNOTATION
from training.files import json_kind

FEWEST_WORDS, MOST_WORDS = 5, 150  # of a usable answer: fewer cannot be garbled, more take long to score
HELDOUT_SHARE = 0.1  # of each file's usable rows
ALPACA, GSM8K = "alpaca", "gsm8k"
OPENINGS = (
    "Thank you for your question! I am glad to help. Please find my answer below. ",
    "Of course, that is an interesting topic. Let us have a look at it together. ",
    "Great, I can do this for you. The following should cover what you need. ",
)
CLOSINGS = (
    " If anything is unclear, just ask, and I will gladly explain more.",
    " That is all for now. Have a wonderful day!",
    " Please do not hesitate to come back with further questions.",
)


# ------------------------------------------------------------------------------------------------- recipes


def clean(rng: Random, row: dict, other: dict) -> str:
    """The row's own answer."""
    return row["output"]


def swapped(rng: Random, row: dict, other: dict) -> str:
    """The answer of the other row."""
    return other["output"]


def shuffled(rng: Random, row: dict, other: dict) -> str:
    """The words of the answer in another order, the white space between them in its place."""
    parts = re.split(r"(\s+)", row["output"].strip())
    words = parts[::2]
    if len(set(words)) > 1:
        while parts[::2] == words:
            parts[::2] = rng.sample(words, len(words))
    return "".join(parts)


def gibberish(rng: Random, row: dict, other: dict) -> str:
    """Random small letters in words of the answer's lengths."""
    return re.sub(r"\S", lambda _: rng.choice(string.ascii_lowercase), row["output"])


def wrong_maths(rng: Random, row: dict, other: dict) -> str:
    """Half of the answer's numbers, at least one, replaced by others of as many digits; a number is a run of digits."""
    parts = re.split(r"([0-9]+)", row["output"])
    places = range(1, len(parts), 2)
    for place in rng.sample(places, min(len(places), max(1, len(places) // 2))):
        number = parts[place]
        while parts[place] == number:
            parts[place] = "".join(rng.choice("0123456789" if i else "123456789") for i in range(len(number)))
    return "".join(parts)


def truncated(rng: Random, row: dict, other: dict) -> str:
    """The first 20 to 60 % of the answer's words, at least one."""
    ends = [found.end() for found in re.finditer(r"\S+", row["output"])]
    return row["output"][: ends[max(1, int(rng.uniform(0.2, 0.6) * len(ends))) - 1]]


def padded(rng: Random, row: dict, other: dict) -> str:
    """The answer between two pieces of boilerplate."""
    return rng.choice(OPENINGS) + row["output"] + rng.choice(CLOSINGS)


def echo(rng: Random, row: dict, other: dict) -> str:
    """The instruction."""
    return row["instruction"]


# Planted kind -> (draws, row, another row with another answer) -> the answer.
PLANTS: dict[str, Callable[[Random, dict, dict], str]] = {
    ALPACA: clean,
    GSM8K: clean,
    "swapped": swapped,
    "shuffled": shuffled,
    "gibberish": gibberish,
    "wrong maths": wrong_maths,
    "truncated": truncated,
    "padded": padded,
    "echo": echo,
}
NOISE = ("swapped", "shuffled", "gibberish", "wrong maths", "truncated")
OF_GSM8K = (GSM8K, "wrong maths")  # kinds that are made from GSM8K's rows alone


def planted(kind: str, pool: Sequence[dict], place: int, seed: int) -> dict:
    """Row `place` of the pool as a row of this kind: its id, the kind and the Alpaca keys.

    Its draws depend on the seed, the kind and its id alone. The other row comes from the far end of the pool.
    """
    row = pool[place]
    others = (pool[-1 - (place + step) % len(pool)] for step in range(len(pool)))
    other = next((other for other in others if other["output"] != row["output"]), None)
    if other is None:
        raise ValueError(f"{row['id']}: expected another row with another answer to swap with, got none")
    answer = PLANTS[kind](Random(f"{seed} {kind} {row['id']}"), row, other)
    return {**row, "kind": kind, "output": answer}


# ----------------------------------------------------------------------------------------------- the files


def read_alpaca(path: str | Path) -> list[dict]:
    """The usable rows of a file in Alpaca's form: ids "alpaca-NUMBER", and the three keys.

    A row is usable if its answer has 5 to 150 words and no earlier row asks the same.

    Raises:
        ValueError: a row that is no object, or has no text at one of the keys; by file and line.
    """
    return usable(ALPACA, texts(path, ("instruction", "input", "output")))


def read_gsm8k(path: str | Path) -> list[dict]:
    """The usable rows of GSM8K's train.jsonl in Alpaca's form, ids "gsm8k-NUMBER", without calculator annotations."""
    rows = texts(path, ("question", "answer"))
    return usable(GSM8K, [(question, "", ANNOTATION.sub("", answer)) for question, answer in rows])


def texts(path: str | Path, keys: Sequence[str]) -> list[tuple[str, ...]]:
    """The texts at these keys, of every row of a file."""
    found = []
    for number, (line, row) in enumerate(read_rows(path)):
        if isinstance(row, ValueError):
            raise ValueError(f"{path}:{line}: {row}")
        if not isinstance(row, dict):
            raise ValueError(f"{row_place(path, number)}: expected a JSON object, got {json_kind(row)}")
        for key in keys:
            if not isinstance(row.get(key), str):
                came = json_kind(row[key]) if key in row else "no such key"
                raise ValueError(f"{row_place(path, number)}: {key}: expected a text, got {came}")
        found.append(tuple(row[key] for key in keys))
    return found


def usable(source: str, rows: Sequence[tuple[str, str, str]]) -> list[dict]:
    first: dict[tuple[str, str], dict] = {}
    for number, (instruction, added, output) in enumerate(rows):
        has_digit = source != GSM8K or re.search("[0-9]", output)
        if instruction.strip() and has_digit and FEWEST_WORDS <= len(output.split()) <= MOST_WORDS:
            row = {"id": f"{source}-{number}", "instruction": instruction, "input": added, "output": output}
            first.setdefault((instruction, added), row)
    return list(first.values())


def shuffle(rows: Sequence[dict], seed: int) -> list[dict]:
    return Random(seed).sample(rows, len(rows))


def pools(rows: Sequence[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """Rows in random order: those to train on, and the tenth that is held out."""
    order = shuffle(rows, seed)
    num_heldout = int(HELDOUT_SHARE * len(order))
    return order[num_heldout:], order[:num_heldout]


def check_enough(source: str, rows: Sequence[dict], needed: int, words: str) -> None:
    if len(rows) < needed:
        raise ValueError(
            f"expected {needed} usable rows of {source} {words}, answers of {FEWEST_WORDS} to {MOST_WORDS} words, "
            f"got {len(rows)}"
        )


# ------------------------------------------------------------------------------------------- training rows


def spoils() -> list[str]:
    """Noise kinds of rows 0 to 39 of `mixed_rows`, then again from the first.

    Rows are of Alpaca and GSM8K in turn. Every five rows have each kind once, and all 40 spread a kind over both files
    as evenly as wrong maths, which needs GSM8K, leaves room.
    """
    both, found = [kind for kind in NOISE if kind not in OF_GSM8K], []
    for turn in range(len(both)):
        a, b, c, d = both[turn:] + both[:turn]
        found += [a, "wrong maths", b, c, d, "wrong maths", c, a, d, b]
    return found


def mixed_rows(alpaca: Sequence[dict], gsm8k: Sequence[dict], num_rows: int, noise: float, seed: int) -> list[dict]:
    """Rows to train on, half of Alpaca and half of GSM8K; a share of them is noise, its kinds in equal parts.

    Args:
        alpaca, gsm8k: of `read_alpaca` and `read_gsm8k`.
        num_rows:      of both together.
        noise:         share of noise in [0, 1], rounded down to whole rows.
    Returns:
        {id, kind, instruction, input, output} each, in random order. At another share of noise the rows and their
        order are the same, and what is noise at a lower share is the same noise at a higher one.
    Raises:
        ValueError: too few rows; a share out of range.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, got {num_rows}")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise must be in [0, 1], got {noise}")
    found, kinds = [], spoils()
    num_noise = math.floor(noise * num_rows + 1e-9)
    sources = ((ALPACA, pools(alpaca, seed)[0]), (GSM8K, pools(gsm8k, seed)[0]))
    for side, (source, pool) in enumerate(sources):
        check_enough(source, pool, (num_rows + 1 - side) // 2, "to train on")
    for number in range(num_rows):
        source, pool = sources[number % 2]
        kind = kinds[number % len(kinds)] if number < num_noise else source
        found.append(planted(kind, pool, number // 2, seed))
    random.Random(seed).shuffle(found)
    return found


def heldout_rows(
    alpaca: Sequence[dict], gsm8k: Sequence[dict], num_rows: int, seed: int
) -> tuple[list[dict], list[dict]]:
    """Clean rows of Alpaca and of GSM8K, num_rows each, that `mixed_rows` of the same seed never uses.

    Raises:
        ValueError: more than the tenth of a file that is held out.
    """
    found = []
    for source, rows in ((ALPACA, alpaca), (GSM8K, gsm8k)):
        pool = pools(rows, seed)[1]
        check_enough(source, pool, num_rows, "in the tenth that is held out")
        found.append([{**row, "kind": source} for row in pool[:num_rows]])
    return found[0], found[1]


def rows_of_every_kind(alpaca: Sequence[dict], gsm8k: Sequence[dict], num_rows: int, seed: int) -> list[dict]:
    """As many rows of every planted kind, kind by kind; no two of them are made from one row.

    Raises:
        ValueError: too few rows.
    """
    order = {ALPACA: shuffle(alpaca, seed), GSM8K: shuffle(gsm8k, seed)}
    places = dict.fromkeys(order, 0)
    for source, pool in order.items():
        kinds = [kind for kind in PLANTS if (kind in OF_GSM8K) == (source == GSM8K)]
        check_enough(source, pool, num_rows * len(kinds), f"for {num_rows} of each kind")
    found = []
    for kind in PLANTS:
        source = GSM8K if kind in OF_GSM8K else ALPACA
        for _ in range(num_rows):
            found.append(planted(kind, order[source], places[source], seed))
            places[source] += 1
    return found
