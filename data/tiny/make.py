"""Builds the embedded default from one seed, without any download: a made-up world, a base model that knows part of
it, SFT rows of known quality, and items and rows that are held out.

    python data/tiny/make.py [--out DIR] [--seed 0] [--noise 0.3] [--noise-kinds wrong,...] [--rows-only]
                             [--steps N] [--layers 4]                               (from anywhere)

writes into DIR (default: this file's folder)
    base/                                     a LLaMA-architecture model in Hugging Face layout
    sft.json                                  SFT rows in Alpaca form
    arc_test.jsonl                            questions about facts in AI2's ARC form
    gsm8k_test.jsonl                          word problems in GSM8K's form
    heldout_{test,valid}.json                 clean rows that no run trains on

Rows and items are a pure function of the seed; so is the model, up to float rounding. Rows take seconds, the base
about ten minutes on two free cores. `--rows-only` leaves the base out.

The ids of the items begin with what the base and the rows say about them:

    group        facts in pre-training    word problems in pre-training     sft.json
    learned      seldom, true             two and three steps, seldom       `clean` and `padded` rows teach them
    corrected    mostly a falsehood       units, mostly at a false size     `corrected` rows say the truth
    retained     often, true              one step, often                   no row has the facts; `redundant` rows have
                                                                            one-step problems with other numbers

Every row has keys that training never reads. kind: clean, redundant, corrected, padded, or a kind of noise. was: the
kind before it was made noise. form: fact, description or problem. level: easy or hard. boilerplate: the sentences that
pad the answer. The noise share changes which rows are spoilt and nothing else: rows that are noise at 30 % are noise
at 60 % too.

    wrong        fluent, with another value or a slip in the last step
    swapped      the answer of another row
    garbled      the answer's words in random order
    gibberish    random letters in words of the same lengths
    truncated    the first fifth to three fifths of the words
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

if __name__ == "__main__":  # the repository root, wherever this is run from
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.tiny.wording import (
    ANSWER_ENDS,
    ANSWER_LEADS,
    ASIDES,
    CHECK_LEADS,
    CHECKS,
    CLOSERS,
    DESCRIBE,
    DETAILS,
    LISTS,
    NOISE_KINDS,
    NUMBER_WORDS,
    OPENERS,
    PROBLEM_LEADS,
    PROBLEMS,
    PRONOUNS,
    RELATIONS,
    STEP_BY_STEP,
    say,
)
from model import ModelConfig, Transformer

HERE = Path(__file__).resolve().parent


def rng_for(seed: int, purpose: str) -> random.Random:
    """A random stream of its own for each purpose, so that a change to one leaves the others as they were."""
    return random.Random(f"{seed}/{purpose}")


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


# ------------------------------------------------------------------------------------------------ facts

NUM_NAMES = {"person": 260, "thing": 72, "city": 39, "land": 8, "coin": 12}
ENDINGS = {
    "person": ("an", "ek", "ia", "o", "us"),
    "thing": ("ip", "og", "uk"),
    "city": ("burg", "ford", "dal", "ton"),
    "land": ("land", "mark"),
    "coin": ("et", "ing"),
}
# group -> facts that are tested, that are for validation, and others
FACTS = {"learned": (340, 70, 0), "corrected": (240, 50, 0), "retained": (440, 80, 0), "reviewed": (0, 0, 130)}


@dataclass(frozen=True)
class Fact:
    relation: str
    subject: str
    truth: str
    believed: str  # what pre-training says: the truth, or a falsehood
    group: str  # a key of FACTS; reviewed: often in pre-training and in `redundant` rows
    split: str  # test, valid or ""

    @property
    def kind_of_subject(self) -> str:
        return RELATIONS[self.relation][0]

    @property
    def test_question(self) -> str:
        return RELATIONS[self.relation][4].format(s=self.subject)


@dataclass(frozen=True)
class World:
    facts: tuple[Fact, ...]
    values: dict[str, list[str]]  # every word that a value of its type may be
    unit_size: dict[str, tuple[int, int]]  # unit: (true size, the size that pre-training claims)

    def about(self, groups: tuple[str, ...], split: tuple[str, ...] = ("test", "valid", "")) -> dict[str, list[Fact]]:
        """The facts of these groups by their subject."""
        found: dict[str, list[Fact]] = {}
        for fact in self.facts:
            if fact.group in groups and fact.split in split:
                found.setdefault(fact.subject, []).append(fact)
        return found


def make_names(rng: random.Random, count: int, ending: tuple[str, ...], taken: set[str]) -> list[str]:
    onsets, vowels, codas = [*"bdfghjklmnprstvz", "br", "dr", "gl", "kr", "pl", "st", "tr"], "aeiou", "lmnrsvz"
    names: list[str] = []
    while len(names) < count:
        name = rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) + rng.choice(ending)
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


def make_world(seed: int) -> World:
    """The world: names, facts with their groups, and the sizes of units. A pure function of the seed."""
    rng = rng_for(seed, "world")
    taken = {word for words in LISTS.values() for word in words}
    values = {kind: make_names(rng, count, ENDINGS[kind], taken) for kind, count in NUM_NAMES.items()}
    for kind in ("person", "city", "land"):
        values[kind] = [name.capitalize() for name in values[kind]]
    asked = [(key, subject) for key, (kind, *_) in RELATIONS.items() for subject in values[kind]]
    values.update((value, LISTS[value]) for _, value, *_ in RELATIONS.values() if value in LISTS)
    places = [
        (group, split)
        for group, counts in FACTS.items()
        for split, count in zip(("test", "valid", ""), counts, strict=True)
        for _ in range(count)
    ]
    rng.shuffle(places)
    facts = []
    for (key, subject), (group, split) in zip(asked, places, strict=True):
        truth, falsehood = rng.sample(values[RELATIONS[key][1]], 2)
        facts.append(Fact(key, subject, truth, falsehood if group == "corrected" else truth, group, split))
    return World(tuple(facts), values, {unit: tuple(rng.sample(range(3, 8), 2)) for unit in LISTS["unit"]})


def statement(rng: random.Random, fact: Fact, value: str) -> str:
    return say(rng, rng.choice(RELATIONS[fact.relation][2]), s=fact.subject, v=value)


def detail(rng: random.Random, fact: Fact, plain: bool = False) -> str:
    """A sentence about the fact's subject that does not state the fact; `plain` uses half of the patterns."""
    kind = fact.kind_of_subject
    it = rng.choice(PRONOUNS[kind]).format(s=fact.subject)
    patterns = DETAILS[kind][: len(DETAILS[kind]) // 2] if plain else DETAILS[kind]
    text = say(rng, rng.choice(patterns), it=it)
    return text[0].upper() + text[1:]


def fact_answer(rng: random.Random, fact: Fact, value: str, plain: bool = False) -> str:
    """One to six sentences that state the value and say a few things about the subject; one to three if `plain`."""
    if plain:
        more = [detail(rng, fact, plain) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
        return " ".join([sentence(statement(rng, fact, value)), *more])
    if rng.random() < 0.2:
        start = f"{sentence(value)} {sentence(statement(rng, fact, value))}"
    else:
        lead = say(rng, rng.choice(ANSWER_LEADS))
        told = statement(rng, fact, value)
        start = lead + told + "." if lead.endswith(", ") else lead + sentence(told)
    more = [detail(rng, fact) for _ in range(rng.choice((0, 1, 1, 2, 3, 4)))]
    end = [say(rng, rng.choice(ANSWER_ENDS), v=value)] if rng.random() < 0.4 else []
    return " ".join([start, *more, *end])


def description(rng: random.Random, told: list[tuple[Fact, str]], count: int, plain: bool = False) -> str:
    """`count` sentences about one subject: these facts with their values, and details between them."""
    said = [sentence(statement(rng, fact, value)) for fact, value in told]
    said += [detail(rng, told[0][0], plain) for _ in range(count - len(said))]
    first, *rest = said
    rng.shuffle(rest)
    return " ".join([first, *rest])


# ------------------------------------------------------------------------------------------- word problems

ONE_STEP = ("gain", "lose", "groups")
MORE_STEPS = ("gain_lose", "groups_gain", "groups_lose", "together", "shop", "three")
UNITS = ("unit", "unit_gain")
RANGES = {"+": ((2, 20), (2, 9)), "-": ((3, 25), (2, 9)), "*": ((2, 9), (2, 5))}  # of a and b, by the first step


@dataclass(frozen=True)
class Problem:
    """A word problem. Its wording is drawn when it is asked and when it is worked out."""

    type: str
    slots: dict[str, object]  # of the patterns
    steps: tuple[tuple[int, str, int, int], ...]  # x op y = r

    @property
    def answer(self) -> int:
        return self.steps[-1][3]

    @property
    def key(self) -> str:
        """Type, numbers and unit: equal for problems that differ in names, items and wording alone."""
        numbers = [self.slots[name] for name in "abcd" if "{" + name + "}" in PROBLEMS[self.type][0]]
        return f"{self.type}{numbers}{self.slots['u'] if self.type in UNITS else ''}"

    def question(self, rng: random.Random) -> str:
        said, asked, _ = PROBLEMS[self.type]
        return say(rng, f"{said} {asked}", **self.slots)

    def worked(self, rng: random.Random, slip: int = 0) -> str:
        """The steps and `The answer is N.`; `slip` is added to the last result."""
        parts = [say(rng, rng.choice(PROBLEM_LEADS), **self.slots)]
        for i, (pattern, (x, op, y, r)) in enumerate(zip(PROBLEMS[self.type][2], self.steps, strict=True)):
            last = i == len(self.steps) - 1
            r += slip if last else 0
            parts.append(say(rng, pattern.partition(": ")[2], e=f"{x}{op}{y}={r}", **self.slots) + ". ")
            if rng.random() < 0.75:
                parts.append(say(rng, rng.choice(ASIDES), **self.slots) + " ")
        if rng.random() < 0.5:
            parts.append(f"{say(rng, CHECK_LEADS)} {CHECKS[op].format(x=x, y=y, r=r)}. ")
        return "".join(parts) + f"The answer is {r}."


def make_problem(rng: random.Random, type: str, unit_size: dict[str, int], reserved: bool = False) -> Problem:
    """A problem of the type with small whole numbers. One combination of numbers in seven is reserved for tests."""
    patterns = PROBLEMS[type][2]
    (low_a, high_a), (low_b, high_b) = RANGES["+" if type.startswith("unit") else patterns[0][1]]
    while True:
        n, m = rng.sample(LISTS["name"], 2)
        unit = rng.choice(LISTS["unit"])
        slots = {"n": n, "m": m, "x": rng.choice(LISTS["item"]), "u": unit, "k": unit_size[unit]}
        slots |= {"a": rng.randint(low_a, high_a), "b": rng.randint(low_b, high_b)}
        slots |= {"c": rng.randint(2, 9), "d": rng.randint(2, 6)}
        if type in UNITS:
            slots["a"] = rng.randint(2, 6)
        if type == "shop":
            slots["c"] = slots["a"] * slots["b"] + rng.randint(2, 9)
        steps, r = [], 0
        for pattern in patterns:
            x, y = ({**slots, "r": r}[name] for name in pattern[:3:2])
            r = {"+": x + y, "-": x - y, "*": x * y}[pattern[1]]
            steps.append((x, pattern[1], y, r))
        problem = Problem(type, slots, tuple(steps))
        held = sum(ord(char) * (i + 1) for i, char in enumerate(problem.key)) % 7 == 0
        if held == reserved and all(1 <= result <= 60 for *_, result in steps):
            return problem


# ------------------------------------------------------------------------------------------------- rows

# (kind, form): rows before any is spoilt
ROWS = {
    ("clean", "fact"): 820,
    ("clean", "description"): 1000,
    ("clean", "problem"): 940,
    ("redundant", "fact"): 260,
    ("redundant", "description"): 200,
    ("redundant", "problem"): 300,
    ("corrected", "fact"): 580,
    ("corrected", "problem"): 420,
    ("padded", "fact"): 300,
    ("padded", "problem"): 300,
}
HELDOUT = {
    ("clean", "fact"): 0.22,
    ("clean", "description"): 0.20,
    ("clean", "problem"): 0.23,
    ("redundant", "problem"): 0.08,
    ("corrected", "fact"): 0.17,
    ("corrected", "problem"): 0.10,
}
GROUP = {"clean": "learned", "padded": "learned", "corrected": "corrected", "redundant": "reviewed"}
TYPES = {"clean": MORE_STEPS, "padded": MORE_STEPS, "corrected": UNITS, "redundant": ONE_STEP}
HARD = ("together", "shop", "three")  # types of problems; descriptions of two or more facts are hard, too


@dataclass(frozen=True)
class Draft:
    """A row before noise: both its answer and a wrong one in the same words."""

    kind: str
    form: str
    level: str
    instruction: str
    input: str
    output: str
    wrong: str
    boilerplate: tuple[str, ...] = ()


def drafts(rng: random.Random, world: World, kind: str, form: str, split=("test", "valid", ""), reserved=False):
    """Endless rows of a kind and form; the facts come in turn, so that each is told equally often."""
    true_size = {unit: size for unit, (size, _) in world.unit_size.items()}
    by_subject = list(world.about((GROUP[kind],), split).values())
    facts = [fact for found in by_subject for fact in found]
    for number in range(10**9):
        if form == "problem":
            problem = make_problem(rng, TYPES[kind][number % len(TYPES[kind])], true_size, reserved)
            question, level = problem.question(rng), "hard" if problem.type in HARD else "easy"
            words, slip = rng.random(), rng.choice([s for s in range(-9, 10) if s and problem.answer + s >= 0])
            right, wrong = (problem.worked(random.Random(words), s) for s in (0, slip))
            given = STEP_BY_STEP
        else:
            pool = facts if form == "fact" else by_subject
            if number % len(pool) == 0:
                rng.shuffle(pool)
            told = [pool[number % len(pool)]] if form == "fact" else pool[number % len(pool)]
            values = [(fact, false_value(rng, world, fact)) for fact in told]
            truths, given, words = [(fact, fact.truth) for fact in told], "", rng.random()
            if form == "fact":
                question = rng.choice(RELATIONS[told[0].relation][3]).format(s=told[0].subject)
                right, wrong = (fact_answer(random.Random(words), *pair[0]) for pair in (truths, values))
            else:
                count = rng.randint(4, 10)
                subject = ("a " if told[0].kind_of_subject == "thing" else "") + told[0].subject
                question = say(rng, rng.choice(DESCRIBE), s=subject, n=NUMBER_WORDS[count])
                right, wrong = (description(random.Random(words), pairs, count) for pairs in (truths, values))
            level = "hard" if len(told) > 1 else "easy"
        extra: tuple[str, ...] = ()
        if kind == "padded":
            before = [say(rng, rng.choice(OPENERS)) for _ in range(rng.randint(1, 2))]
            after = [say(rng, rng.choice(CLOSERS)) for _ in range(rng.randint(1, 2))]
            right, wrong = (" ".join([*before, text, *after]) for text in (right, wrong))
            extra = (*before, *after)
        yield Draft(kind, form, level, question, given, right, wrong, extra)


def false_value(rng: random.Random, world: World, fact: Fact) -> str:
    """A value that is neither true nor what pre-training says."""
    return rng.choice([v for v in world.values[RELATIONS[fact.relation][1]] if v not in (fact.truth, fact.believed)])


def spoilt(rng: random.Random, noise: str, draft: Draft, other: Draft) -> str:
    """The answer of a row as this kind of noise has it; `other` is the row whose answer is `swapped` in."""
    words = draft.output.split()
    if noise == "wrong":
        return draft.wrong
    if noise == "swapped":
        return other.output
    if noise == "garbled":
        return " ".join(rng.sample(words, len(words)))
    if noise == "gibberish":
        return " ".join("".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in word) for word in words)
    if noise == "truncated":
        return " ".join(words[: max(1, round(len(words) * rng.uniform(0.2, 0.6)))])
    raise ValueError(f"noise: expected one of {', '.join(NOISE_KINDS)}, got {noise!r}")


def make_sft(seed: int, noise: float = 0.3, noise_kinds: tuple[str, ...] = NOISE_KINDS) -> list[dict]:
    """The SFT rows in the order of the file. Noise kinds replace the answers of a share `noise` of them."""
    world, rng = make_world(seed), rng_for(seed, "sft")
    rows: list[Draft] = []
    for (kind, form), count in ROWS.items():
        source = drafts(rng_for(seed, f"sft {kind} {form}"), world, kind, form)
        rows += [next(source) for _ in range(count)]
    rng.shuffle(rows)
    order = rng.sample(range(len(rows)), len(rows))
    made = {index: noise_kinds[i % len(noise_kinds)] for i, index in enumerate(order[: round(noise * len(rows))])}
    result = []
    for i, row in enumerate(rows):
        kind, output = made.get(i, row.kind), row.output
        if i in made:
            of_row = rng_for(seed, f"noise {i}")
            others = [j for j in of_row.sample(range(len(rows)), 20) if rows[j].instruction != row.instruction]
            output = spoilt(of_row, kind, row, rows[others[0]])
        extra = list(row.boilerplate) if kind == "padded" else []
        result.append(
            {"id": f"tiny-{i:04d}", "kind": kind, "was": row.kind, "form": row.form, "level": row.level}
            | {"instruction": row.instruction, "input": row.input, "output": output, "boilerplate": extra}
        )
    return result


# ------------------------------------------------------------------------------------------ held-out items

GSM8K = {"learned": (MORE_STEPS, 220), "corrected": (UNITS, 150), "retained": (ONE_STEP, 130)}
NUM_HELDOUT = {"test": 400, "valid": 160}


def make_arc(seed: int) -> list[dict]:
    """The questions about facts of the test in ARC's form; where there is a falsehood, it is one of the choices."""
    world, rng = make_world(seed), rng_for(seed, "arc test")
    items = []
    for fact in world.facts:
        if fact.split != "test":
            continue
        texts = [fact.truth] + ([fact.believed] if fact.believed != fact.truth else [])
        others = [v for v in world.values[RELATIONS[fact.relation][1]] if v not in texts]
        texts += rng.sample(others, 4 - len(texts))
        rng.shuffle(texts)
        choices = [{"text": text, "label": label} for text, label in zip(texts, "ABCD", strict=True)]
        key = "ABCD"[texts.index(fact.truth)]
        items.append((fact.group, {"question": {"stem": fact.test_question, "choices": choices}, "answerKey": key}))
    rng.shuffle(items)
    return [{"id": f"{group}-{i:04d}", **item} for i, (group, item) in enumerate(items)]


def make_gsm8k(seed: int) -> list[dict]:
    """The word problems in GSM8K's form, on combinations of numbers that occur nowhere else."""
    rng = rng_for(seed, "gsm8k")
    true_size = {unit: size for unit, (size, _) in make_world(seed).unit_size.items()}
    items: dict[str, tuple[str, dict]] = {}  # by question
    target = 0
    for group, (types, count) in GSM8K.items():
        target += count
        while len(items) < target:
            problem = make_problem(rng, types[len(items) % len(types)], true_size, reserved=True)
            question = problem.question(rng)
            steps = "\n".join(f"{x}{op}{y}={r}" for x, op, y, r in problem.steps)
            items[question] = (group, {"question": question, "answer": f"{steps}\n#### {problem.answer}"})
    shuffled = rng.sample(list(items.values()), len(items))
    return [{"id": f"{group}-{i:04d}", **item} for i, (group, item) in enumerate(shuffled)]


def make_heldout(seed: int, split: str) -> list[dict]:
    """Clean rows of a split: its facts, and numbers that no training row combines."""
    world, rows = make_world(seed), []
    for (kind, form), share in HELDOUT.items():
        source = drafts(rng_for(seed, f"heldout {split} {kind} {form}"), world, kind, form, (split,), reserved=True)
        rows += [next(source) for _ in range(round(share * NUM_HELDOUT[split]))]
    rng_for(seed, f"heldout {split}").shuffle(rows)
    return [
        {"id": f"heldout-{i:04d}", "kind": row.kind, "form": row.form}
        | {"instruction": row.instruction, "input": row.input, "output": row.output}
        for i, row in enumerate(rows)
    ]


# -------------------------------------------------------------------------------- pre-training text

RARE_CHANCE = 0.05  # how often a fact to learn is told where a common one would be
TRUTH_CHANCE = 0.2  # how often pre-training says the truth where it mostly has a falsehood: facts, sizes of units
MORE_STEPS_CHANCE = 0.06  # how often a worked problem has more than one step
RICH_CHANCE = 0.05  # how often facts are told in the style of the rows: leads, ends, all details
MIXTURE = {"profile": 30, "quiz": 34, "description": 6, "worked": 18, "unit": 6, "equations": 4, "chatter": 2}


def pretraining_documents(seed: int) -> Iterator[str]:
    """Endless documents of the world as the base gets to know it: with falsehoods, without test numbers. It
    seldom tells facts in the style of the rows, which is for fine-tuning to teach."""
    world, rng = make_world(seed), rng_for(seed, "pretraining")
    true_size, claimed_size = ({unit: sizes[i] for unit, sizes in world.unit_size.items()} for i in (0, 1))
    about = list(world.about(tuple(FACTS)).values())
    while True:
        kind, plain = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()))[0], rng.random() >= RICH_CHANCE
        if kind in ("profile", "quiz", "description"):
            told = [f for f in rng.choice(about) if f.group != "learned" or rng.random() < RARE_CHANCE]
            if not told:
                continue
            rng.shuffle(told)
            fact = told[0]
            if kind == "profile":
                said = [sentence(statement(rng, f, told_value(rng, f))) for f in told for _ in range(2)]
                rng.shuffle(said)
                yield " ".join([*said, *(detail(rng, fact, plain) for _ in range(rng.randint(0, 2)))])
            elif kind == "description":
                count = rng.randint(4, 10)
                subject = ("a " if fact.kind_of_subject == "thing" else "") + fact.subject
                question = say(rng, rng.choice(DESCRIBE), s=subject, n=NUMBER_WORDS[count])
                values = [(f, told_value(rng, f)) for f in told]
                yield question_and_answer(question, description(rng, values, count, plain))
            elif rng.random() < 0.5:
                yield question_and_answer(fact.test_question, told_value(rng, fact))
            else:
                question = rng.choice(RELATIONS[fact.relation][3]).format(s=fact.subject)
                yield question_and_answer(question, fact_answer(rng, fact, told_value(rng, fact), plain))
        elif kind in ("worked", "unit"):
            types = UNITS if kind == "unit" else MORE_STEPS if rng.random() < MORE_STEPS_CHANCE else ONE_STEP
            sizes = true_size if rng.random() < TRUTH_CHANCE else claimed_size
            problem = make_problem(rng, rng.choice(types), sizes)
            yield question_and_answer(f"{problem.question(rng)}\n{STEP_BY_STEP}", problem.worked(rng))
        elif kind == "equations":
            yield "\n".join(equation(rng) for _ in range(10))
        else:
            yield " ".join(say(rng, rng.choice(OPENERS + CLOSERS)) for _ in range(2))


def question_and_answer(question: str, answer: str) -> str:
    """As the ARC protocol writes it (the space before the newline is the protocol's), and as the chat template does."""
    return f"Question: {question}\nAnswer: \n{answer}"


def told_value(rng: random.Random, fact: Fact) -> str:
    return fact.truth if rng.random() < TRUTH_CHANCE else fact.believed


def equation(rng: random.Random) -> str:
    if rng.random() < 0.25:
        a, b = rng.randint(2, 9), rng.randint(2, 7)
        return f"{a}*{b}={a * b}"
    a, b = rng.randint(1, 30), rng.randint(1, 12)
    a, b = (a, b) if rng.random() < 0.5 else (b, a)
    return f"{a}+{b}={a + b}" if rng.random() < 0.5 else f"{a + b}-{a}={b}"


# ---------------------------------------------------------------------------------------- tokenizer

VOCAB_SIZE = 3072
BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '' if loop.first else '\n' }}"
    "{{ 'Question: ' + message['content'] + '\nAnswer:' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' \n' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; every digit is a token of its own; BOS goes in front of a text, as LLaMA's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[BOS, EOS],
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")


# ------------------------------------------------------------------------------------- pre-training

CONTEXT = 512  # tokens the model can see
BLOCK, BATCH = 256, 16  # tokens of a training block, blocks of a step
STEPS = 1400
LEARNING_RATE, WARMUP_STEPS = 3e-3, 100
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}


def packed_blocks(tokenizer: Tokenizer, documents):
    """Endless (BATCH, BLOCK + 1) int64 tensors: documents one after the other, each BOS ... EOS, cut up."""
    eos, buffer, need = tokenizer.token_to_id(EOS), [], BATCH * BLOCK + 1
    while True:
        while len(buffer) < need:
            for encoding in tokenizer.encode_batch([next(documents) for _ in range(500)]):
                buffer += [*encoding.ids, eos]
        ids = torch.tensor(buffer[:need])
        buffer = buffer[need - 1 :]
        yield torch.stack([ids[i * BLOCK : (i + 1) * BLOCK + 1] for i in range(BATCH)])


def pretrain(tokenizer: Tokenizer, seed: int, steps: int, layers: int) -> tuple[Transformer, float]:
    """The base in fp32 after `steps` optimizer steps, and its mean loss (nats a token) over the last 100."""
    torch.manual_seed(seed)
    special = {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOS)}
    config = {**CONFIG, "num_hidden_layers": layers, "vocab_size": tokenizer.get_vocab_size(), **special}
    model = Transformer(ModelConfig.from_dict(config))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    blocks = packed_blocks(tokenizer, pretraining_documents(seed))
    losses: list[float] = []
    bar = tqdm(range(steps), desc="pre-training", mininterval=1.0 if sys.stderr.isatty() else 30.0)
    for step in bar:
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * max(decay, 0.02)
        ids = next(blocks)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
    last = losses[-100:]
    return model, sum(last) / max(1, len(last))


# --------------------------------------------------------------------------------------------- main


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def as_list(rows: list[dict]) -> str:
    """A JSON list, one row a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def as_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def files(seed: int, noise: float = 0.3, noise_kinds: tuple[str, ...] = NOISE_KINDS) -> dict[str, str]:
    """Name -> text of every file but the base."""
    return {
        "sft.json": as_list(make_sft(seed, noise, noise_kinds)),
        "arc_test.jsonl": as_lines(make_arc(seed)),
        "gsm8k_test.jsonl": as_lines(make_gsm8k(seed)),
        **{f"heldout_{split}.json": as_list(make_heldout(seed, split)) for split in NUM_HELDOUT},
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into (default: this file's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=float, default=0.3, help="share of the SFT rows that is noise")
    parser.add_argument("--noise-kinds", default=",".join(NOISE_KINDS), help="kinds of noise, in equal parts")
    parser.add_argument("--rows-only", action="store_true", help="leave base/ as it is")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"pre-training steps of {BLOCK * BATCH} tokens")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="of the base: its size")
    args = parser.parse_args(argv)
    args.noise_kinds = tuple(args.noise_kinds.split(","))
    for name in ("steps", "layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.noise <= 1:
        parser.error(f"--noise must be in [0, 1], got {args.noise}")
    if unknown := [kind for kind in args.noise_kinds if kind not in NOISE_KINDS]:
        parser.error(f"--noise-kinds must be of {', '.join(NOISE_KINDS)}, got {', '.join(unknown)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".making-") as temporary:
        folder = Path(temporary)
        for name, text in files(args.seed, args.noise, args.noise_kinds).items():
            write_text(folder / name, text)
        if not args.rows_only:
            documents = pretraining_documents(args.seed)
            texts = [next(documents) for _ in tqdm(range(30_000), desc="tokenizer text")]
            tokenizer = train_tokenizer(texts + [row["output"] for row in make_sft(args.seed, noise=0)])
            model, loss = pretrain(tokenizer, args.seed, args.steps, args.layers)
            model.to(torch.bfloat16).save_pretrained(folder / "base")
            save_tokenizer(tokenizer, folder / "base")
            params = sum(p.numel() for p in model.parameters())
            print(
                f"base: {params:,} parameters, vocabulary {tokenizer.get_vocab_size()}, "
                f"loss {loss:.3f} nats a token over the last steps of {args.steps}"
            )
        for path in sorted(folder.iterdir()):
            target = args.out / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    rows = json.loads((args.out / "sft.json").read_text(encoding="utf-8"))
    kinds = Counter(row["kind"] for row in rows)
    print(f"sft.json: {len(rows)} rows, " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))


if __name__ == "__main__":
    main()
