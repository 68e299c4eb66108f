"""The embedded default: its committed files are what make.py generates, and what it says they are."""

import json
import re
import string
from collections import Counter
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.tiny import make, wording

TINY = Path(make.__file__).parent
BASE = TINY / "base"
EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")


def read(name):
    return json.loads((TINY / name).read_text(encoding="utf-8"))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows():
    return read("sft.json")


@pytest.fixture(scope="module")
def clean():
    """The same rows before any was spoilt."""
    return make.make_sft(0, noise=0)


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
        ("in each of them", lambda: a * b),
        ("more than", lambda: a + a + b),
        ("finds .* gives", lambda: a + b - numbers[2]),
        ("gets|receives|finds", lambda: a + b),
        ("gives away|loses|sells", lambda: a - b),
    ):
        if re.search(pattern, question):
            return answer()
    raise AssertionError(f"no pattern for {question!r}")


def sizes(world):
    return {unit: size for unit, (size, _) in world.unit_size.items()}


def told_facts(world, text):
    """The facts of the world whose statements stand in a text, each with the value that the text gives it."""
    found = []
    for fact in world.facts:
        if fact.subject.lower() not in text.lower():
            continue
        for value in world.values[make.RELATIONS[fact.relation][1]]:
            for pattern in make.RELATIONS[fact.relation][2]:
                options = CHOICES.sub(lambda m: "(" + m[1] + ")", re.escape(pattern).replace(r"\|", "|"))
                said = options.replace(r"\{s\}", fact.subject).replace(r"\{v\}", value)
                if re.search(rf"\b{said}\b", text, re.IGNORECASE):
                    found.append((fact, value))
    return found


CHOICES = re.compile(r"\\\[(.*?)\\\]")


# ------------------------------------------------------------------------------ the committed files


def test_the_committed_rows_and_items_are_what_the_seed_gives():
    for name, text in make.files(0).items():
        assert (TINY / name).read_text(encoding="utf-8") == text, name


def test_another_seed_gives_another_world():
    assert make.make_world(1) == make.make_world(1) != make.make_world(0)
    assert make.make_sft(1)[:50] != make.make_sft(0)[:50]


def test_the_folder_is_small():
    files = [path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 10e6


def test_the_base_loads_and_fits_its_tokenizer(tokenizer):
    from model import Transformer

    model = Transformer.from_pretrained(BASE)
    assert model.config.vocab_size == tokenizer.get_vocab_size()
    assert model.config.bos_token_id == tokenizer.token_to_id(make.BOS)
    assert model.config.eos_token_ids == (tokenizer.token_to_id(make.EOS),)
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 4e6


def test_rows_alone_leave_the_base_as_it_is(tmp_path, capsys):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights").write_text("as they were")
    make.main(["--out", str(tmp_path), "--rows-only", "--noise", "0.5", "--noise-kinds", "wrong,garbled"])
    assert (tmp_path / "base" / "weights").read_text() == "as they were"
    kinds = Counter(row["kind"] for row in json.loads((tmp_path / "sft.json").read_text()))
    assert (kinds["wrong"], kinds["garbled"], kinds["gibberish"]) == (1280, 1280, 0)
    assert "5120 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--noise", "1.5"], "--noise must be in [0, 1], got 1.5"),
        (["--noise-kinds", "wrong,loud"], "--noise-kinds must be of wrong, swapped, garbled, gibberish, truncated"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
    ],
)
def test_wrong_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        make.main(flags)
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- clean rows


def test_kinds_and_forms_have_their_counts(clean, rows):
    assert Counter((row["kind"], row["form"]) for row in clean) == make.ROWS
    assert Counter((row["was"], row["form"]) for row in rows) == make.ROWS
    assert len({row["id"] for row in rows}) == len(rows) == 5120


def test_word_problems_are_worked_out_rightly(clean, world):
    for row in clean:
        if row["form"] == "problem":
            assert equations_hold(row["output"]), row
            stated = int(re.search(r"The answer is (\d+)\.", row["output"])[1])
            assert stated == solve(row["instruction"], sizes(world)), row


def test_the_last_number_of_a_worked_answer_is_its_result(clean):
    for row in clean:
        if row["form"] == "problem":
            stated = re.search(r"The answer is (\d+)\.", row["output"])[1]
            assert re.findall(r"-?\d+(?:\.\d+)?", row["output"])[-1] == stated


def test_rows_state_true_facts_of_their_group_and_no_others(clean, world):
    groups = {"clean": "learned", "padded": "learned", "corrected": "corrected", "redundant": "reviewed"}
    about_facts = [row for row in clean if row["form"] != "problem"]
    for row in about_facts[::25]:
        told = told_facts(world, row["output"])
        assert told, row
        for fact, value in told:
            assert (value, fact.group) == (fact.truth, groups[row["kind"]]), row


def test_every_learned_fact_is_taught_and_no_retained_one_is(clean, world):
    asked = {row["instruction"] for row in clean if row["form"] == "fact"}
    for fact in world.facts:
        questions = {q.format(s=fact.subject) for q in make.RELATIONS[fact.relation][3]}
        assert bool(questions & asked) == (fact.group != "retained"), fact


def test_falsehoods_are_told_of_corrected_facts_alone(world):
    for fact in world.facts:
        assert (fact.truth != fact.believed) == (fact.group == "corrected")
    assert all(true != claimed for true, claimed in world.unit_size.values())


def test_a_description_has_the_number_of_sentences_that_was_asked(clean):
    number = {word: count for count, word in wording.NUMBER_WORDS.items()}
    for row in clean:
        if row["form"] == "description":
            (asked,) = re.findall(rf"\b({'|'.join(number)}) sentences", row["instruction"])
            assert len(re.findall(r"[.!?](?: |$)", row["output"])) == number[asked], row


def test_only_padded_rows_carry_boilerplate_and_it_stands_in_their_answers(rows):
    for row in rows:
        assert bool(row["boilerplate"]) == (row["kind"] == "padded")
        rest = row["output"]
        for extra in row["boilerplate"]:
            assert extra in rest and not re.search(r"\d", extra)
            rest = rest.replace(extra, "", 1)
        assert rest.strip()


# ---------------------------------------------------------------------------------------------- noise


def test_rows_that_are_noise_at_one_share_are_the_same_noise_at_a_larger_one(rows):
    few, some = (
        {row["id"]: row["output"] for row in part if row["kind"] in make.NOISE_KINDS}
        for part in (make.make_sft(0, 0.15), rows)
    )
    many = {row["id"]: row["output"] for row in make.make_sft(0, 0.6)}
    assert (len(few), len(some)) == (768, 1536)
    assert few.items() <= some.items() <= many.items()


def test_noise_is_what_its_kind_says_and_leaves_the_question(rows, clean, world):
    answers = Counter(row["output"] for row in clean)
    for row, was in zip(rows, clean, strict=True):
        assert (row["id"], row["was"], row["instruction"]) == (was["id"], was["kind"], was["instruction"])
        words, before = row["output"].split(), was["output"].split()
        if row["kind"] == "garbled":
            assert Counter(words) == Counter(before)
        elif row["kind"] == "gibberish":
            assert [len(word) for word in words] == [len(word) for word in before]
            assert set(row["output"]) <= set(string.ascii_lowercase + " ")
        elif row["kind"] == "truncated":
            assert words == before[: len(words)] and 0 < len(words) <= max(1, 0.6 * len(before) + 1)
        elif row["kind"] == "swapped":
            assert row["output"] in answers
        elif row["kind"] == "wrong":
            assert row["output"] != was["output"] and len(words) == len(before)
            if row["form"] == "problem":
                stated = int(re.search(r"The answer is (\d+)\.", row["output"])[1])
                assert stated != solve(row["instruction"], sizes(world)) and not equations_hold(row["output"])
        else:
            assert row == was


# -------------------------------------------------------------------------------------------- tests


def test_items_have_their_groups(arc, gsm8k):
    assert Counter(item["id"].split("-")[0] for item in arc) == {"learned": 340, "corrected": 240, "retained": 440}
    assert Counter(item["id"].split("-")[0] for item in gsm8k) == {"learned": 220, "corrected": 150, "retained": 130}


def test_no_test_question_is_an_sft_instruction(rows, arc, gsm8k):
    asked = {row["instruction"] for row in rows}
    questions = [item["question"]["stem"] for item in arc] + [item["question"] for item in gsm8k]
    assert not asked & set(questions)
    assert len(set(questions)) == len(questions)


def test_test_and_validation_rows_share_no_fact_and_no_row_with_each_other_or_with_training(rows):
    asked = {row["instruction"] + row["output"] for row in rows}
    test, valid = (read(f"heldout_{split}.json") for split in ("test", "valid"))
    assert (len(test), len(valid)) == (400, 160)
    assert not asked & {row["instruction"] + row["output"] for row in test + valid}
    by_form = [{row["instruction"] for row in part if row["form"] == "fact"} for part in (test, valid)]
    assert not by_form[0] & by_form[1]


@pytest.mark.parametrize("kind", wording.PROBLEMS)
def test_no_problem_of_the_tests_has_numbers_that_a_row_or_pre_training_combines_so(kind, world):
    rng = make.rng_for(0, f"draws of {kind}")
    seen = {make.make_problem(rng, kind, sizes(world)).key for _ in range(500)}
    kept = {make.make_problem(rng, kind, sizes(world), reserved=True).key for _ in range(100)}
    assert seen and kept and not seen & kept


def test_gsm8k_steps_hold_and_end_in_the_answer(gsm8k, world):
    for item in gsm8k:
        steps, gold = item["answer"].split("\n#### ")
        assert equations_hold(steps) and all(EQUATION.fullmatch(line) for line in steps.split("\n"))
        assert EQUATION.findall(steps)[-1][-1] == gold
        assert int(gold) == solve(item["question"], sizes(world))


def test_arc_items_have_four_choices_the_true_answer_and_the_falsehood(arc, world):
    facts = {fact.test_question: fact for fact in world.facts}
    for item in arc:
        fact = facts[item["question"]["stem"]]
        choices = {choice["label"]: choice["text"] for choice in item["question"]["choices"]}
        assert list(choices) == list("ABCD") and len(set(choices.values())) == 4
        assert choices[item["answerKey"]] == fact.truth and fact.believed in choices.values()
        assert item["id"].startswith(fact.group) and fact.split == "test"


# ------------------------------------------------------------------------------------------- wording


def test_every_list_that_a_pattern_names_exists_and_every_slot_is_filled():
    rng = make.rng_for(0, "patterns")
    slots = dict.fromkeys("snmxuvkabcde", "1") | {"it": "it"}
    parts = [wording.DETAILS, wording.ANSWER_LEADS, wording.ANSWER_ENDS, wording.OPENERS, wording.CLOSERS]
    parts += [wording.DESCRIBE, wording.PROBLEMS, wording.PROBLEM_LEADS, wording.ASIDES, wording.RELATIONS]
    for pattern in leaves(parts):
        for _ in range(20):
            assert not set("[]{}|") & set(wording.say(rng, pattern, **slots)), pattern


def leaves(part):
    """The texts of nested tables."""
    if isinstance(part, str):
        return [part]
    return [text for inner in (part.values() if isinstance(part, dict) else part) for text in leaves(inner)]


def test_choices_are_drawn_from_the_inside_and_with_equal_chance():
    rng = make.rng_for(0, "choices")
    counts = Counter(wording.say(rng, "[a|[b|c]]") for _ in range(4000))
    assert counts["a"] == pytest.approx(2000, abs=150) and counts["b"] == pytest.approx(1000, abs=150)


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
