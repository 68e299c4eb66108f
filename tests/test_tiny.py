"""The embedded default: its committed files are what make.py generates, and what it says they are."""

import json
import re
from collections import Counter
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.tiny import make

TINY = Path(make.__file__).parent
BASE = TINY / "base"
EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows():
    return json.loads((TINY / "sft.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def arc():
    return read_jsonl(TINY / "arc_test.jsonl")


@pytest.fixture(scope="module")
def gsm8k():
    return read_jsonl(TINY / "gsm8k_test.jsonl")


@pytest.fixture(scope="module")
def world():
    return make.make_world(0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


def equations_hold(text):
    value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    found = EQUATION.findall(text)
    return bool(found) and all(value[op](int(a), int(b)) == int(c) for a, op, b, c in found)


def true_answers(world):
    """Question -> right answer: of every row that could ask about a fact, and of every ARC item."""
    by_row, by_item = {}, {}
    for fact in world.facts:
        relation = make.RELATIONS[fact.relation]
        for i, (question, _) in enumerate(relation.questions):
            by_row[question.format(s=fact.subject)] = make.fact_answer(fact, i, fact.truth)
        by_item[relation.test_question.format(s=fact.subject)] = fact.truth
    return by_row, by_item


def solve(question, unit_size):
    """The answer to a word problem, worked out from its sentences, without the code of make.py."""
    a, *rest = numbers = [int(x) for x in re.findall(r"\d+", question)]
    unit = re.search(rf"({'|'.join(unit_size)})s of", question)
    if unit:
        return a * unit_size[unit[1]] + sum(rest)
    b = rest[0]
    for pattern, answer in (
        ("bags .* each. .* brings .* eat", lambda: a * b + numbers[2] - numbers[3]),
        ("buys .* bags .* gives", lambda: a * b + numbers[2]),
        ("packs .* bags .* takes", lambda: a * b - numbers[2]),
        ("coins each", lambda: numbers[2] - a * b),
        ("boxes", lambda: a * b),
        ("more than", lambda: a + a + b),
        ("finds .* gives", lambda: a + b - numbers[2]),
        ("gets", lambda: a + b),
        ("gives away", lambda: a - b),
    ):
        if re.search(pattern, question):
            return answer()
    raise AssertionError(f"no pattern for {question!r}")


def is_right(row, world, answers):
    output = row["output"]
    for extra in row["boilerplate"]:
        output = output.replace(extra, "", 1)
    if not row["input"]:
        return output.strip() == answers[row["instruction"]]
    sizes = {unit: size for unit, (size, _) in world.unit_size.items()}
    last = int(re.findall(r"\d+", output)[-1])
    return equations_hold(output) and last == solve(row["instruction"], sizes)


# ------------------------------------------------------------------------------ the committed files


def test_the_committed_rows_and_tests_are_what_the_seed_gives():
    assert (TINY / "sft.json").read_text(encoding="utf-8") == make.sft_text(0)
    assert (TINY / "arc_test.jsonl").read_text(encoding="utf-8") == make.jsonl(make.make_arc(0))
    assert (TINY / "gsm8k_test.jsonl").read_text(encoding="utf-8") == make.jsonl(make.make_gsm8k(0))


def test_another_seed_gives_another_world():
    assert make.make_world(1) == make.make_world(1) != make.make_world(0)
    assert make.make_sft(1)[:50] != make.make_sft(0)[:50]


def test_the_folder_is_small():
    files = [path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    sizes = [path.stat().st_size for path in files]
    assert sum(sizes) < 10e6 and max(sizes) < 8 * 2**20


def test_the_base_loads_and_fits_its_tokenizer(tokenizer):
    from model import Transformer

    model = Transformer.from_pretrained(BASE)
    assert model.config.vocab_size == tokenizer.get_vocab_size()
    assert model.config.bos_token_id == tokenizer.token_to_id(make.BOS)
    assert model.config.eos_token_ids == (tokenizer.token_to_id(make.EOS),)
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 4e6


# ----------------------------------------------------------------------------------------- SFT rows


def test_kinds_have_their_shares_in_facts_and_word_problems(rows):
    counted = Counter((row["kind"], bool(row["input"])) for row in rows)
    assert counted == {
        (kind, is_problem): count
        for kind, pair in make.SFT_COUNTS.items()
        for is_problem, count in zip((False, True), pair, strict=True)
    }
    assert Counter(row["kind"] for row in rows) == {
        "clean": 1600,
        "wrong": 600,
        "known": 800,
        "misconception": 600,
        "padded": 400,
    }
    assert len({row["id"] for row in rows}) == len(rows) == 4000


def test_wrong_rows_are_wrong_and_all_others_right(rows, world):
    answers, _ = true_answers(world)
    for row in rows:
        assert is_right(row, world, answers) == (row["kind"] != "wrong"), row


def test_only_padded_rows_carry_boilerplate_and_it_stands_in_their_answers(rows):
    for row in rows:
        assert bool(row["boilerplate"]) == (row["kind"] == "padded")
        rest = row["output"]
        for extra in row["boilerplate"]:
            assert extra in rest and not re.search(r"\d", extra)
            rest = rest.replace(extra, "", 1)
        assert rest.strip()


def test_kinds_match_what_pre_training_says(rows, world):
    status = {
        question.format(s=fact.subject): fact.status
        for fact in world.facts
        for question, _ in make.RELATIONS[fact.relation].questions
    }
    expected = {"clean": "rare", "padded": "rare", "known": "common", "misconception": "false"}
    for row in rows:
        if not row["input"] and row["kind"] != "wrong":
            assert status[row["instruction"]] == expected[row["kind"]]
    for fact in world.facts:
        assert (fact.truth != fact.believed) == (fact.status == "false")
    assert all(true != claimed for true, claimed in world.unit_size.values())


def test_the_last_number_of_a_worked_answer_is_its_result(rows):
    for row in rows:
        if row["input"]:
            stated = re.search(r"The answer is (\d+)\.", row["output"])[1]
            assert re.findall(r"-?\d+(?:\.\d+)?", row["output"])[-1] == stated


# -------------------------------------------------------------------------------------------- tests


def test_no_test_question_is_an_sft_instruction(rows, arc, gsm8k):
    asked = {row["instruction"] for row in rows}
    questions = [item["question"]["stem"] for item in arc] + [item["question"] for item in gsm8k]
    assert not asked & set(questions)
    assert len(set(questions)) == len(questions)


def test_no_word_problem_of_the_test_has_numbers_that_an_sft_row_or_pre_training_combines_so():
    sizes = {unit: size for unit, (size, _) in make.make_world(0).unit_size.items()}
    for kind in make.ONE_STEP + make.MORE_STEPS + make.UNIT_TYPES:
        rng = make.rng_for(0, f"draws of {kind}")
        seen = {make.draw_problem(rng, kind, sizes).key for _ in range(500)}
        kept = {make.draw_problem(rng, kind, sizes, reserved=True).key for _ in range(100)}
        assert seen and kept and not seen & kept


def test_gsm8k_steps_hold_and_end_in_the_answer(gsm8k, world):
    sizes = {unit: size for unit, (size, _) in world.unit_size.items()}
    assert len(gsm8k) == sum(make.GSM8K_COUNTS.values())
    for item in gsm8k:
        assert set(item) == {"question", "answer"}
        steps, gold = item["answer"].split("\n#### ")
        assert equations_hold(steps) and all(EQUATION.search(line) for line in steps.split("\n"))
        assert EQUATION.findall(steps)[-1][-1] == gold
        assert int(gold) == solve(item["question"], sizes)


def test_arc_items_have_four_choices_and_the_true_answer(arc, world):
    _, answers = true_answers(world)
    assert Counter(item["id"].split("-")[0] for item in arc) == make.ARC_COUNTS
    for item in arc:
        choices = {choice["label"]: choice["text"] for choice in item["question"]["choices"]}
        assert list(choices) == list("ABCD") and len(set(choices.values())) == 4
        assert choices[item["answerKey"]] == answers[item["question"]["stem"]]


def test_arc_offers_the_falsehood_where_pre_training_told_one(arc, world):
    believed = {make.RELATIONS[f.relation].test_question.format(s=f.subject): f.believed for f in world.facts}
    for item in arc:
        texts = [choice["text"] for choice in item["question"]["choices"]]
        assert believed[item["question"]["stem"]] in texts


# ---------------------------------------------------------------------------------------- tokenizer


@given(st.text())
def test_the_tokenizer_gives_back_any_text(text):
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(st.integers(min_value=0, max_value=10**12))
def test_every_digit_is_one_token(number):
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    tokens = tokenizer.encode(f"has {number} + {number}", add_special_tokens=False).tokens
    digits = [token for token in tokens if re.search(r"\d", token)]
    assert digits == list(str(number) * 2)


def test_the_chat_template_renders_the_prompt_that_tests_ask_with():
    config = json.loads((BASE / "tokenizer_config.json").read_text(encoding="utf-8"))
    render = jinja2.Environment().from_string(config["chat_template"]).render
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    special = {"bos_token": make.BOS, "eos_token": make.EOS}
    assert render(messages=turns[:1], add_generation_prompt=True, **special) == "<s>Question: 2 + 2?\nAnswer:"
    assert render(messages=turns, **special) == "<s>Question: 2 + 2?\nAnswer: \n4</s>"
    assert render(messages=turns * 2, **special) == (
        "<s>Question: 2 + 2?\nAnswer: \n4</s>\nQuestion: 2 + 2?\nAnswer: \n4</s>"
    )
