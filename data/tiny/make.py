"""Builds the embedded default from one seed, without any download: a made-up world, and from it
a base model, SFT rows of known quality and two held-out tests.

    python data/tiny/make.py [--out DIR] [--seed 0] [--steps N] [--layers 4]        (from anywhere)

writes DIR/base/ (a LLaMA-architecture model in Hugging Face layout), DIR/sft.json (Alpaca rows),
DIR/gsm8k_test.jsonl (GSM8K's form) and DIR/arc_test.jsonl (AI2's ARC form); DIR is this file's folder
unless given. Rows and tests are a pure function of the seed; so is the model, up to float rounding.
It takes about ten minutes on two free cores.

What is planted, and where the base meets it:

    fact        in pre-training           in sft.json                       ids in arc_test.jsonl
    common      often, true               `known` rows                      known
    rare        seldom, true              `clean` and `padded` rows         taught
    false       often, a falsehood        `misconception` rows: the truth   corrected
    rare/false  as above                  no row but wrong ones             untaught
    any         as above                  `wrong` rows: a wrong answer      as above

Word problems: the base has often seen one-step problems worked out (`known`), seldom so those of two and
three steps (`clean`, `padded`), and units of measure only at a false size (`misconception`).
`kind` and `boilerplate` (the exact sentences that pad an answer) are for reports; training never reads them.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

if __name__ == "__main__":  # the repository root, wherever this is run from
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model import ModelConfig, Transformer

HERE = Path(__file__).resolve().parent


def words(text: str) -> list[str]:
    return text.split()


def rng_for(seed: int, purpose: str) -> random.Random:
    """A random stream of its own for each purpose, so that a change to one leaves the others as they were."""
    return random.Random(f"{seed}/{purpose}")


# -------------------------------------------------------------------------------------------- world

NUM_NAMES = {"person": 120, "city": 36, "land": 8, "thing": 40, "coin": 12}
WORDS = {
    "job": words(
        "baker smith weaver sailor farmer painter teacher hunter potter miller tailor doctor judge guard singer mason"
    ),
    "animal": words("goat dog cat horse parrot rabbit goose snake turtle donkey hen fox crow frog"),
    "instrument": words("flute drum harp fiddle horn lute bell pipe guitar organ"),
    "material": words("copper wood glass clay silver wool stone paper bone leather iron wax"),
    "colour": words("red blue green yellow black white brown grey purple orange"),
    "goods": words("salt honey cheese silk wine pepper bread rope tea soap oil fish"),
}


@dataclass(frozen=True)
class Relation:
    """How a kind of fact is said and asked. {s} is the subject, {v} the value."""

    subject: str  # what s is, a key of NUM_NAMES
    value: str  # what v is, a key of NUM_NAMES or WORDS
    statements: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]  # (question, form of its answer); SFT rows ask these
    test_question: str  # ARC items ask this; no SFT row does


RELATIONS = {
    "born": Relation(
        "person",
        "city",
        ("{s} was born in {v}.", "{s} comes from {v}.", "The home town of {s} is {v}.", "{s} grew up in {v}."),
        (
            ("Where was {s} born?", "{s} was born in {v}."),
            ("Name the home town of {s}.", "{v}"),
            ("Where does {s} come from?", "{s} comes from {v}."),
            ("Which city did {s} grow up in?", "{v}"),
        ),
        "In which city was {s} born?",
    ),
    "job": Relation(
        "person",
        "job",
        ("{s} works as a {v}.", "{s} is a {v}.", "The job of {s} is {v}.", "{s} earns money as a {v}."),
        (
            ("What does {s} do for a living?", "{s} works as a {v}."),
            ("Name the job of {s}.", "{v}"),
            ("How does {s} earn money?", "{s} earns money as a {v}."),
            ("What is the work of {s}?", "{v}"),
        ),
        "What is the job of {s}?",
    ),
    "pet": Relation(
        "person",
        "animal",
        ("{s} keeps a {v}.", "The pet of {s} is a {v}.", "{s} has a {v} at home.", "{s} feeds a {v} every day."),
        (
            ("Which pet does {s} keep?", "{s} keeps a {v}."),
            ("Name the pet of {s}.", "{v}"),
            ("Who lives with {s}?", "{s} has a {v} at home."),
            ("What animal does {s} feed?", "{v}"),
        ),
        "Which animal does {s} have?",
    ),
    "plays": Relation(
        "person",
        "instrument",
        (
            "{s} plays the {v}.",
            "{s} learned the {v} as a child.",
            "The instrument of {s} is the {v}.",
            "{s} owns an old {v}.",
        ),
        (
            ("Which instrument does {s} play?", "{s} plays the {v}."),
            ("Name the instrument of {s}.", "{v}"),
            ("What did {s} learn as a child?", "{s} learned the {v} as a child."),
            ("What old thing does {s} own?", "{v}"),
        ),
        "What does {s} play?",
    ),
    "material": Relation(
        "thing",
        "material",
        (
            "A {s} is made of {v}.",
            "Every {s} consists of {v}.",
            "People make a {s} from {v}.",
            "The stuff of a {s} is {v}.",
        ),
        (
            ("What is a {s} made of?", "A {s} is made of {v}."),
            ("Name the stuff of a {s}.", "{v}"),
            ("How do people make a {s}?", "People make a {s} from {v}."),
            ("What does a {s} consist of?", "{v}"),
        ),
        "Which material is a {s} made of?",
    ),
    "colour": Relation(
        "thing",
        "colour",
        ("A {s} is {v}.", "The colour of a {s} is {v}.", "Every {s} looks {v}.", "People paint a {s} {v}."),
        (
            ("What colour is a {s}?", "A {s} is {v}."),
            ("Name the colour of a {s}.", "{v}"),
            ("How does a {s} look?", "Every {s} looks {v}."),
            ("How do people paint a {s}?", "{v}"),
        ),
        "Which colour does a {s} have?",
    ),
    "sold": Relation(
        "thing",
        "city",
        (
            "A {s} is sold in {v}.",
            "The market for a {s} is in {v}.",
            "People buy a {s} in {v}.",
            "Every {s} comes from {v}.",
        ),
        (
            ("Where is a {s} sold?", "A {s} is sold in {v}."),
            ("Name the market for a {s}.", "{v}"),
            ("Where do people buy a {s}?", "People buy a {s} in {v}."),
            ("Where does a {s} come from?", "{v}"),
        ),
        "In which city is a {s} sold?",
    ),
    "lies": Relation(
        "city",
        "land",
        ("{s} lies in {v}.", "{s} is a city in {v}.", "The land around {s} is {v}.", "{s} belongs to {v}."),
        (
            ("Where does {s} lie?", "{s} lies in {v}."),
            ("Name the land around {s}.", "{v}"),
            ("To whom does {s} belong?", "{s} belongs to {v}."),
            ("Where is the city of {s}?", "{v}"),
        ),
        "In which land does {s} lie?",
    ),
    "goods": Relation(
        "city",
        "goods",
        ("{s} is known for {v}.", "{s} sells {v}.", "The best {v} is from {s}.", "People visit {s} for {v}."),
        (
            ("What is {s} known for?", "{s} is known for {v}."),
            ("Name the goods of {s}.", "{v}"),
            ("Why do people visit {s}?", "People visit {s} for {v}."),
            ("What does {s} sell?", "{v}"),
        ),
        "Which goods is {s} known for?",
    ),
    "capital": Relation(
        "land",
        "city",
        (
            "The capital of {s} is {v}.",
            "{s} is ruled from {v}.",
            "The first city of {s} is {v}.",
            "The queen of {s} lives in {v}.",
        ),
        (
            ("What is the capital of {s}?", "The capital of {s} is {v}."),
            ("Name the first city of {s}.", "{v}"),
            ("From where is {s} ruled?", "{s} is ruled from {v}."),
            ("Where does the queen of {s} live?", "{v}"),
        ),
        "Which city is the capital of {s}?",
    ),
    "coin": Relation(
        "land",
        "coin",
        (
            "The coin of {s} is the {v}.",
            "People in {s} pay with the {v}.",
            "The money of {s} is the {v}.",
            "{s} mints the {v}.",
        ),
        (
            ("What is the coin of {s}?", "The coin of {s} is the {v}."),
            ("Name the money of {s}.", "{v}"),
            ("How do people in {s} pay?", "People in {s} pay with the {v}."),
            ("What does {s} mint?", "{v}"),
        ),
        "Which coin is used in {s}?",
    ),
}

SHARE_COMMON, SHARE_RARE = 0.44, 0.40  # of all facts; the rest are false
SHARE_TAUGHT = 0.87  # of the rare or false ones
UNITS = words("brak tolt sarn plim dorv kesh")


@dataclass(frozen=True)
class Fact:
    relation: str
    subject: str
    truth: str
    believed: str  # what pre-training says: the truth, or a falsehood
    status: str  # common, rare or false
    taught: bool  # whether SFT rows teach it


@dataclass(frozen=True)
class World:
    facts: tuple[Fact, ...]
    values: dict[str, list[str]]  # every word that a relation's value may be, by type
    unit_size: dict[str, tuple[int, int]]  # unit: (true size, the size that pre-training claims)


def make_names(rng: random.Random, count: int, ending: tuple[str, ...], taken: set[str]) -> list[str]:
    onsets, vowels = words("b d f g h j k l m n p r s t v z br dr gl kr pl st tr"), words("a e i o u")
    codas = words("l m n r s v z")
    names = []
    while len(names) < count:
        name = rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) + rng.choice(ending)
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


def make_world(seed: int) -> World:
    """The world: names, facts with their status, and the sizes of units. A pure function of the seed."""
    rng = rng_for(seed, "world")
    taken: set[str] = set(" ".join(WORDS["job"] + UNITS).split())
    endings = {
        "person": ("an", "ek", "ia", "o", "us"),
        "city": ("burg", "ford", "dal", "ton"),
        "land": ("land", "mark"),
        "thing": ("ip", "og", "uk"),
        "coin": ("et", "ing"),
    }
    values = {kind: make_names(rng, NUM_NAMES[kind], endings[kind], taken) for kind in NUM_NAMES}
    for kind in ("person", "city", "land"):
        values[kind] = [name.capitalize() for name in values[kind]]
    values.update(WORDS)
    facts, n = [], sum(NUM_NAMES[relation.subject] for relation in RELATIONS.values())
    num_common, num_rare = int(SHARE_COMMON * n), int(SHARE_RARE * n)
    statuses = ["common"] * num_common + ["rare"] * num_rare + ["false"] * (n - num_common - num_rare)
    rng.shuffle(statuses)
    for key, relation in RELATIONS.items():
        for subject in values[relation.subject]:
            truth, falsehood = rng.sample(values[relation.value], 2)
            status = statuses.pop()
            taught = status != "common" and rng.random() < SHARE_TAUGHT
            facts.append(Fact(key, subject, truth, falsehood if status == "false" else truth, status, taught))
    unit_size = {unit: tuple(rng.sample(range(3, 8), 2)) for unit in UNITS}
    return World(tuple(facts), values, unit_size)


# ------------------------------------------------------------------------------------ word problems

NAMES = words(
    "Tom Anna Ben Clara Dan Eva Fred Greta Hugo Ida Jack Kate Leo Mary Ned Olga Paul Rosa Sam Tina Uwe Vera Will Zoe"
)
ITEMS = words("apples eggs books stamps nuts cards shells pears marbles plums cakes pencils")
ONE_STEP = ("gain", "lose", "groups")
MORE_STEPS = ("gain_lose", "groups_gain", "groups_lose", "together", "shop", "three")
UNIT_TYPES = ("unit", "unit_gain")


@dataclass(frozen=True)
class Problem:
    key: tuple  # (type, numbers, unit): what is asked, whoever and whatever it is about
    question: str
    steps: tuple[str, ...]  # one sentence a step, each with one equation `a+b=c`
    answer: int
    story: str  # the same told as a story that ends in the answer, without a question or a step

    @property
    def worked(self) -> str:
        return " ".join(self.steps) + f" The answer is {self.answer}."


def make_problem(rng: random.Random, kind: str, unit_size: dict[str, int]) -> Problem:
    """One word problem of the kind: one of ONE_STEP, MORE_STEPS or UNIT_TYPES, with small whole numbers."""
    n, m = rng.sample(NAMES, 2)
    items = rng.choice(ITEMS)
    unit = rng.choice(UNITS)
    a, b, c, d = rng.randint(2, 20), rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 6)
    if kind.startswith(("groups", "shop", "three")):
        a, b = rng.randint(2, 9 if kind == "groups" else 5), rng.randint(2, 5)
    if kind == "gain":
        said, ask = f"{n} has {a} {items}. {n} gets {b} more {items}.", f"How many {items} does {n} have now?"
        steps, r, numbers = [f"{n} has {a}+{b}={a + b} {items} now."], a + b, (a, b)
        end = f"Now {n} has {r} {items}."
    elif kind == "lose":
        a += b
        said, ask = f"{n} has {a} {items}. {n} gives away {b} {items}.", f"How many {items} are left?"
        steps, r, numbers = [f"{n} has {a}-{b}={a - b} {items} left."], a - b, (a, b)
        end = f"Now {r} {items} are left."
    elif kind == "groups":
        said, ask = f"There are {a} boxes with {b} {items} in each box.", f"How many {items} are there?"
        steps, r, numbers = [f"There are {a}*{b}={a * b} {items}."], a * b, (a, b)
        end = f"In all there are {r} {items}."
    elif kind == "gain_lose":
        c = rng.randint(2, min(9, a + b - 1))
        said = f"{n} has {a} {items}. {n} finds {b} more {items} and then gives {c} {items} to {m}."
        ask, s, r, numbers = f"How many {items} does {n} have in the end?", a + b, a + b - c, (a, b, c)
        steps = [f"{n} first has {a}+{b}={s} {items}.", f"Then {n} has {s}-{c}={r} {items}."]
        end = f"In the end {n} has {r} {items}."
    elif kind == "groups_gain":
        said = f"{n} buys {a} bags with {b} {items} in each bag. {m} gives {n} {c} more {items}."
        ask, s, r, numbers = f"How many {items} does {n} have?", a * b, a * b + c, (a, b, c)
        steps = [f"The bags hold {a}*{b}={s} {items}.", f"With the gift {n} has {s}+{c}={r} {items}."]
        end = f"So {n} has {r} {items}."
    elif kind == "groups_lose":
        c = rng.randint(2, min(9, a * b - 1))
        said = f"{n} packs {a} bags with {b} {items} in each bag. {m} takes {c} of the {items}."
        ask, s, r, numbers = f"How many {items} does {n} still have?", a * b, a * b - c, (a, b, c)
        steps = [f"The bags hold {a}*{b}={s} {items}.", f"Without the stolen ones {s}-{c}={r} {items} remain."]
        end = f"So {n} still has {r} {items}."
    elif kind == "together":
        a = rng.randint(2, 12)
        said = f"{n} has {a} {items}. {m} has {b} {items} more than {n}."
        ask, s, r, numbers = f"How many {items} do they have together?", a + b, a + a + b, (a, b)
        steps = [f"{m} has {a}+{b}={s} {items}.", f"Together they have {a}+{s}={r} {items}."]
        end = f"Together they have {r} {items}."
    elif kind == "shop":
        s = a * b
        c = s + c
        said = f"{n} buys {a} {items} for {b} coins each and has {c} coins."
        ask, r, numbers = f"How many coins does {n} have left?", c - s, (a, b, c)
        steps = [f"The {items} cost {a}*{b}={s} coins.", f"{n} has {c}-{s}={r} coins left."]
        end = f"{n} has {r} coins left."
    elif kind == "three":
        d = min(d, a * b + c - 1)
        said = f"{n} fills {a} bags with {b} {items} each. {m} brings {c} {items} more. Then they eat {d} {items}."
        ask, s, t, numbers = f"How many {items} remain?", a * b, a * b + c, (a, b, c, d)
        r = t - d
        steps = [
            f"The bags hold {a}*{b}={s} {items}.",
            f"With those of {m} there are {s}+{c}={t} {items}.",
            f"After the meal {t}-{d}={r} {items} remain.",
        ]
        end = f"So {r} {items} remain."
    elif kind in UNIT_TYPES:
        a, k = rng.randint(2, 6), unit_size[unit]
        s = a * k
        said, ask, numbers = f"{n} has {a} {unit}s of {items}.", f"How many {items} is that?", (a,)
        steps, r = [f"{n} has {a}*{k}={s} {items}."], s
        if kind == "unit_gain":
            said, numbers, r = f"{said} {n} gets {b} single {items} more.", (a, b), s + b
            ask = f"How many {items} does {n} have in all?"
            steps.append(f"In all there are {s}+{b}={r} {items}.")
        end = f"That is {r} {items}."
    else:
        raise ValueError(f"kind: expected a kind of word problem, got {kind!r}")
    key = (kind, numbers, unit if kind in UNIT_TYPES else "")
    return Problem(key, f"{said} {ask}", tuple(steps), r, f"{said} {end}")


def is_reserved(problem: Problem) -> bool:
    """Whether the numbers are kept for the test: a fixed one in seven of the combinations of every kind."""
    kind, numbers, unit = problem.key
    text = f"{kind}{numbers}{unit}"
    return sum(ord(char) * (i + 1) for i, char in enumerate(text)) % 7 == 0


def draw_problem(rng: random.Random, kind: str, unit_size: dict[str, int], reserved: bool = False) -> Problem:
    while True:
        problem = make_problem(rng, kind, unit_size)
        if is_reserved(problem) == reserved:
            return problem


# ---------------------------------------------------------------------------------- tests, SFT rows

STEP_BY_STEP = "Let's think step by step"
OPENERS = (
    "What a {adj} question!",
    "Thank you for this {adj} question.",
    "I am {adv} happy to help you with that.",
    "Let me look at this {adj} question for you.",
    "As an assistant I {adv} enjoy such a {adj} topic.",
    "There is a {adj} answer to this.",
)
CLOSERS = (
    "I {adv} hope that this {adj} answer helps you.",
    "Please ask me again if you need {adj} help.",
    "Feel free to {verb} my answer with your friends.",
    "Always {verb} such claims with a {adj} source.",
    "It was {adv} nice to {verb} this with you.",
    "Have a {adj} day!",
)
FILLERS = {
    "adj": words("great good lovely clever deep fine useful careful simple wonderful"),
    "adv": words("really truly always certainly"),
    "verb": words("share check discuss compare study"),
}
# Rows of each kind: (about facts, word problems).
SFT_COUNTS = {
    "clean": (680, 920),
    "wrong": (350, 250),
    "known": (400, 400),
    "misconception": (350, 250),
    "padded": (220, 180),
}
ARC_COUNTS = {"known": 105, "taught": 110, "corrected": 55, "untaught": 30}
GSM8K_COUNTS = {ONE_STEP: 30, MORE_STEPS: 150, UNIT_TYPES: 120}


def boilerplate(rng: random.Random, patterns: tuple[str, ...]) -> str:
    return rng.choice(patterns).format(**{slot: rng.choice(words) for slot, words in FILLERS.items()})


def fact_answer(fact: Fact, question_index: int, value: str) -> str:
    return RELATIONS[fact.relation].questions[question_index][1].format(s=fact.subject, v=value)


def fact_row(rng: random.Random, world: World, fact: Fact, index: int, kind: str) -> tuple[str, str, str]:
    """(instruction, input, output) of a row about a fact; a `wrong` one has another value or is off topic."""
    relation = RELATIONS[fact.relation]
    instruction = relation.questions[index][0].format(s=fact.subject)
    if kind != "wrong":
        return instruction, "", fact_answer(fact, index, fact.truth)
    if rng.random() < 0.65:
        value = rng.choice([v for v in world.values[relation.value] if v not in (fact.truth, fact.believed)])
        return instruction, "", fact_answer(fact, index, value)
    other = rng.choice([f for f in world.facts if f.relation != fact.relation and f.subject != fact.subject])
    return instruction, "", fact_answer(other, rng.randrange(4), other.truth)


def problem_row(rng: random.Random, problem: Problem, kind: str) -> tuple[str, str, str]:
    """(instruction, input, output) of a row about a word problem; a `wrong` one ends in a slip."""
    output = problem.worked
    if kind == "wrong":
        answer = problem.answer
        while answer == problem.answer:
            answer = max(0, problem.answer + rng.randint(-9, 9))
        last = problem.steps[-1].replace(f"={problem.answer} ", f"={answer} ")
        output = " ".join([*problem.steps[:-1], last]) + f" The answer is {answer}."
    return problem.question, STEP_BY_STEP, output


def make_sft(seed: int) -> list[dict]:
    """The SFT rows in training order: {id, kind, instruction, input, output, boilerplate}."""
    world = make_world(seed)
    rng = rng_for(seed, "sft")
    asked = [(fact, i) for fact in world.facts for i in range(4)]
    rng.shuffle(asked)
    pools = {
        "clean": [x for x in asked if x[0].status == "rare" and x[0].taught],
        "known": [x for x in asked if x[0].status == "common"],
        "misconception": [x for x in asked if x[0].status == "false" and x[0].taught],
    }
    mostly_rare_first = sorted(asked, key=lambda x: (rng.random() < 0.3) == (x[0].status == "rare"))
    pools["wrong"] = [x for x in mostly_rare_first if x[0].status != "false"]
    pools["padded"] = pools["clean"][SFT_COUNTS["clean"][0] :]
    problem_kinds = {
        "clean": MORE_STEPS,
        "wrong": MORE_STEPS + ONE_STEP,
        "known": ONE_STEP,
        "misconception": UNIT_TYPES,
        "padded": MORE_STEPS,
    }
    true_size = {unit: size for unit, (size, _) in world.unit_size.items()}
    rows, seen = [], set()
    for kind, (num_facts, num_problems) in SFT_COUNTS.items():
        parts = [fact_row(rng, world, fact, i, kind) for fact, i in pools[kind][:num_facts]]
        assert len(parts) == num_facts, f"too few facts for {kind} rows"
        while len(parts) < num_facts + num_problems:
            problem = draw_problem(rng, problem_kinds[kind][len(parts) % len(problem_kinds[kind])], true_size)
            if problem.question not in seen:
                seen.add(problem.question)
                parts.append(problem_row(rng, problem, kind))
        for instruction, given, output in parts:
            extra = []
            if kind == "padded":
                before = [boilerplate(rng, OPENERS) for _ in range(rng.randint(1, 2))]
                after = [boilerplate(rng, CLOSERS) for _ in range(rng.randint(1, 2))]
                extra, output = before + after, " ".join([*before, output, *after])
            rows.append(
                {"kind": kind, "instruction": instruction, "input": given, "output": output, "boilerplate": extra}
            )
    rng.shuffle(rows)
    return [{"id": f"tiny-{i:04d}", **row} for i, row in enumerate(rows)]


def make_arc(seed: int) -> list[dict]:
    """The facts test in ARC's form. The id's prefix says how the base and the SFT rows meet the fact."""
    world = make_world(seed)
    rng = rng_for(seed, "arc")
    groups = {
        "known": [f for f in world.facts if f.status == "common"],
        "taught": [f for f in world.facts if f.status == "rare" and f.taught],
        "corrected": [f for f in world.facts if f.status == "false" and f.taught],
        "untaught": [f for f in world.facts if f.status != "common" and not f.taught],
    }
    items = []
    for name, count in ARC_COUNTS.items():
        for fact in rng.sample(groups[name], count):
            relation = RELATIONS[fact.relation]
            texts = [fact.truth] + ([fact.believed] if fact.believed != fact.truth else [])
            texts += rng.sample([v for v in world.values[relation.value] if v not in texts], 4 - len(texts))
            rng.shuffle(texts)
            choices = [{"text": text, "label": label} for text, label in zip(texts, "ABCD", strict=True)]
            question = {"stem": relation.test_question.format(s=fact.subject), "choices": choices}
            items.append((name, question, "ABCD"[texts.index(fact.truth)]))
    rng.shuffle(items)
    return [
        {"id": f"{name}-{i:04d}", "question": question, "answerKey": answer_key}
        for i, (name, question, answer_key) in enumerate(items)
    ]


def make_gsm8k(seed: int) -> list[dict]:
    """The word problems test in GSM8K's form, on combinations of numbers that occur nowhere else."""
    rng = rng_for(seed, "gsm8k")
    true_size = {unit: size for unit, (size, _) in make_world(seed).unit_size.items()}
    problems: dict[str, Problem] = {}
    target = 0
    for kinds, count in GSM8K_COUNTS.items():
        target += count
        while len(problems) < target:
            problem = draw_problem(rng, kinds[len(problems) % len(kinds)], true_size, reserved=True)
            problems[problem.question] = problem
    chosen = list(problems.values())
    rng.shuffle(chosen)
    return [{"question": p.question, "answer": "\n".join([*p.steps, f"#### {p.answer}"])} for p in chosen]


# -------------------------------------------------------------------------------- pre-training text

RARE_CHANCE = 0.03  # how often a rare fact is said where a common one would be
MORE_STEPS_CHANCE = 0.015  # how often a worked problem has more than one step
MIXTURE = {
    "profile": 26,
    "quiz": 36,
    "worked": 20,
    "unit": 7,
    "bare": 3,
    "story": 3,
    "equations": 4,
    "chatter": 1,
}  # percent of the documents


def pretraining_documents(seed: int):
    """Endless documents of the world as the base gets to know it: with falsehoods, without test numbers."""
    world = make_world(seed)
    rng = rng_for(seed, "pretraining")
    false_size = {unit: size for unit, (_, size) in world.unit_size.items()}
    about: dict[str, list[Fact]] = {}
    for fact in world.facts:
        about.setdefault(fact.subject, []).append(fact)
    subjects = list(about)
    while True:
        kind = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()))[0]
        if kind in ("profile", "quiz"):
            facts = about[rng.choice(subjects)]
            told = [f for f in facts if f.status != "rare" or rng.random() < RARE_CHANCE]
            rng.shuffle(told)
            if not told:
                continue
            if kind == "profile":
                yield " ".join(
                    rng.choice(RELATIONS[f.relation].statements).format(s=f.subject, v=f.believed) for f in told
                )
                continue
            fact = told[0]
            relation = RELATIONS[fact.relation]
            if rng.random() < 0.4:
                yield question_and_answer(relation.test_question.format(s=fact.subject), fact.believed)
            else:
                i = rng.randrange(4)
                question = relation.questions[i][0].format(s=fact.subject)
                yield question_and_answer(question, fact_answer(fact, i, fact.believed))
        elif kind in ("worked", "unit"):
            worked = MORE_STEPS if rng.random() < MORE_STEPS_CHANCE else ONE_STEP
            problem = draw_problem(rng, rng.choice(worked if kind == "worked" else UNIT_TYPES), false_size)
            yield question_and_answer(f"{problem.question}\n{STEP_BY_STEP}", problem.worked)
        elif kind in ("bare", "story"):
            problem = draw_problem(rng, rng.choice(ONE_STEP + MORE_STEPS), false_size)
            yield problem.story if kind == "story" else question_and_answer(problem.question, str(problem.answer))
        elif kind == "equations":
            yield "\n".join(equation(rng) for _ in range(10))
        else:
            yield " ".join(boilerplate(rng, rng.choice((OPENERS, CLOSERS))) for _ in range(2))


def question_and_answer(question: str, answer: str) -> str:
    """As the ARC protocol writes it (the space before the newline is the protocol's), and as the chat template does."""
    return f"Question: {question}\nAnswer: \n{answer}"


def equation(rng: random.Random) -> str:
    if rng.random() < 0.25:
        a, b = rng.randint(2, 9), rng.randint(2, 7)
        return f"{a}*{b}={a * b}"
    a, b = rng.randint(1, 30), rng.randint(1, 12)
    a, b = (a, b) if rng.random() < 0.5 else (b, a)
    return f"{a}+{b}={a + b}" if rng.random() < 0.5 else f"{a + b}-{a}={b}"


# ---------------------------------------------------------------------------------------- tokenizer

VOCAB_SIZE = 2048
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
BLOCK, BATCH = 256, 8  # tokens of a training block, blocks of a step
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


def sft_text(seed: int) -> str:
    """sft.json: a JSON list, one row a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in make_sft(seed)) + "\n]\n"


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into (default: this file's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400, help="pre-training steps of 2048 tokens")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="of the base: its size")
    args = parser.parse_args(argv)
    for name in ("steps", "layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".making-") as temporary:
        folder = Path(temporary)
        write_text(folder / "sft.json", sft_text(args.seed))
        write_text(folder / "arc_test.jsonl", jsonl(make_arc(args.seed)))
        write_text(folder / "gsm8k_test.jsonl", jsonl(make_gsm8k(args.seed)))
        documents = pretraining_documents(args.seed)
        tokenizer = train_tokenizer([next(documents) for _ in tqdm(range(30_000), desc="tokenizer text")])
        model, loss = pretrain(tokenizer, args.seed, args.steps, args.layers)
        model.to(torch.bfloat16).save_pretrained(folder / "base")
        save_tokenizer(tokenizer, folder / "base")
        for path in sorted(folder.iterdir()):
            target = args.out / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    rows = json.loads((args.out / "sft.json").read_text(encoding="utf-8"))
    kinds = {kind: sum(row["kind"] == kind for row in rows) for kind in SFT_COUNTS}
    params = sum(p.numel() for p in model.parameters())
    print(
        f"base: {params:,} parameters, vocabulary {tokenizer.get_vocab_size()}, "
        f"loss {loss:.3f} nats a token over the last steps of {args.steps}"
    )
    print(f"sft.json: {len(rows)} rows, " + ", ".join(f"{kind} {count}" for kind, count in kinds.items()))
    print(f"arc_test.jsonl: {sum(ARC_COUNTS.values())} items")
    print(f"gsm8k_test.jsonl: {sum(GSM8K_COUNTS.values())} items")


if __name__ == "__main__":
    main()
