"""Planted noise among real rows: the recipes do what their names say, and the study counts what happened."""

import json
import re
from collections import Counter
from random import Random

import pytest
import torch
from conftest import BASE
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import planes

from data.sft import load_samples
from data.tokenizer import TextTokenizer
from model import Transformer
from qtuning import Quadrant, prune_samples, supp_score
from reproduce import __main__ as reproduce
from reproduce import planted, plants, report
from reproduce.planted import NOISE, PLANTS
from training.files import read_json

words = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=9)
spaces = st.sampled_from([" ", " ", "\n", "\n\n", "  ", "\t"])
answers = st.lists(st.tuples(words, spaces), min_size=planted.FEWEST_WORDS, max_size=30).map(
    lambda pairs: "".join(word + space for word, space in pairs).strip()
)
draws = st.integers(0, 2**32).map(Random)


def answer(kind, rng, output, other="another answer of the file"):
    return PLANTS[kind](rng, {"instruction": "Say it.", "output": output}, {"output": other})


def made_rows(source, count):
    """Rows whose questions and answers are all different; those of GSM8K have numbers."""
    text = "It costs {0} or 7 coins.\nIn all {0}.\n#### {0}" if source == "gsm8k" else "This is the answer of row {0}."
    return [
        {"id": f"{source}-{i}", "instruction": f"Question {i} of {source}?", "input": "", "output": text.format(i)}
        for i in range(count)
    ]


ALPACA, GSM8K = made_rows("alpaca", 120), made_rows("gsm8k", 120)
sizes, seeds, noises = st.integers(1, 200), st.integers(0, 9), st.integers(0, 100).map(lambda n: n / 100)


# ------------------------------------------------------------------------------------------------- recipes


@given(draws, answers)
def test_garbled_rows_have_the_same_words_in_another_order(rng, output):
    garbled = answer("shuffled", rng, output)
    assert Counter(garbled.split()) == Counter(output.split())
    assert re.findall(r"\s+", garbled) == re.findall(r"\s+", output)
    assert garbled != output or len(set(output.split())) == 1


@given(draws, answers)
def test_gibberish_has_the_same_word_lengths_in_letters_alone(rng, output):
    made = answer("gibberish", rng, output)
    assert [len(word) for word in made.split()] == [len(word) for word in output.split()]
    assert re.fullmatch(r"[a-z\s]+", made)


@given(
    draws, st.lists(st.tuples(st.sampled_from(["costs $", "1,", ". 0.", " ", "x"]), st.integers(0, 10**4)), min_size=1)
)
def test_wrong_maths_changes_half_of_the_numbers_and_nothing_else(rng, pairs):
    output = "".join(f"{text}{number} " for text, number in pairs)
    wrong = answer("wrong maths", rng, output)
    assert re.split("[0-9]+", wrong) == re.split("[0-9]+", output)
    before, after = re.findall("[0-9]+", output), re.findall("[0-9]+", wrong)
    assert [len(number) for number in after] == [len(number) for number in before]
    changed = sum(a != b for a, b in zip(after, before, strict=True))
    assert changed == max(1, len(before) // 2)


@given(draws, answers)
def test_a_truncated_answer_is_a_beginning_of_whole_words(rng, output):
    cut = answer("truncated", rng, output)
    assert output.startswith(cut)
    assert output.split()[: len(cut.split())] == cut.split()
    assert 1 <= len(cut.split()) <= 0.6 * len(output.split())


@given(draws, answers, answers)
def test_other_kinds_take_their_answers_whole(rng, output, other):
    assert answer("alpaca", rng, output, other) == answer("gsm8k", rng, output, other) == output
    assert answer("swapped", rng, output, other) == other
    assert answer("echo", rng, output, other) == "Say it."
    before, _, after = answer("padded", rng, output, other).partition(output)
    assert before in planted.OPENINGS and after in planted.CLOSINGS


# ------------------------------------------------------------------------------------------- training rows


@given(sizes, noises, noises, seeds)
def test_noise_at_a_lower_share_is_a_subset_and_the_rows_are_the_same(num_rows, a, b, seed):
    fewer, more = (planted.mixed_rows(ALPACA, GSM8K, num_rows, noise, seed) for noise in sorted((a, b)))
    assert [row["id"] for row in fewer] == [row["id"] for row in more]
    for low, high in zip(fewer, more, strict=True):
        assert low == high or (low["kind"] not in NOISE and high["kind"] in NOISE)


@given(sizes, noises, seeds)
def test_the_mix_is_half_and_half_with_its_share_of_noise_in_equal_parts(num_rows, noise, seed):
    rows = planted.mixed_rows(ALPACA, GSM8K, num_rows, noise, seed)
    kinds = Counter(row["kind"] for row in rows)
    of_noise = [kinds[kind] for kind in NOISE]
    assert sum(of_noise) == int(round(noise * 100) * num_rows // 100)
    assert max(of_noise) - min(of_noise) <= 1
    of_alpaca = [row for row in rows if row["id"].startswith("alpaca-")]
    assert len(rows) == num_rows and len(of_alpaca) == (num_rows + 1) // 2
    assert abs(sum(row["kind"] in NOISE for row in of_alpaca) - sum(of_noise) / 2) <= 0.5
    assert not any(row["kind"] == "wrong maths" for row in of_alpaca)
    assert all(set(row) == {"id", "kind", "instruction", "input", "output"} for row in rows)


@given(sizes, noises, st.integers(0, 12), seeds)
def test_held_out_rows_are_never_in_the_training_rows(num_rows, noise, num_heldout, seed):
    trained = planted.mixed_rows(ALPACA, GSM8K, num_rows, noise, seed)
    heldout = planted.heldout_rows(ALPACA, GSM8K, num_heldout, seed)
    for rows, source in zip(heldout, (ALPACA, GSM8K), strict=True):
        assert len(rows) == num_heldout
        assert all({key: row[key] for key in source[0]} in source for row in rows)  # clean
        assert not {row["id"] for row in rows} & {row["id"] for row in trained}
        assert not {row["instruction"] for row in rows} & {row["instruction"] for row in trained}
        assert not {row["output"] for row in rows} & {row["output"] for row in trained}  # not swapped in either


def test_rows_and_their_noise_are_made_again_from_the_seed():
    one, again, other = (planted.mixed_rows(ALPACA, GSM8K, 100, 0.5, seed) for seed in (3, 3, 4))
    assert one == again and one != other


@given(st.integers(2, 16), seeds)
def test_every_kind_has_as_many_rows_each_of_a_row_of_its_own(num_rows, seed):
    rows = planted.rows_of_every_kind(ALPACA, GSM8K, num_rows, seed)
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(PLANTS, num_rows)
    assert len({row["id"] for row in rows}) == len(rows)
    own = {row["id"]: row["output"] for row in ALPACA + GSM8K}
    assert all((row["output"] == own[row["id"]]) == (row["kind"] in ("alpaca", "gsm8k")) for row in rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: planted.mixed_rows(ALPACA, GSM8K, 0, 0.3, 0), "num_rows must be at least 1, got 0"),
        (lambda: planted.mixed_rows(ALPACA, GSM8K, 10, 1.5, 0), r"noise must be in \[0, 1\], got 1.5"),
        (lambda: planted.mixed_rows(ALPACA, GSM8K[:5], 40, 0, 0), "expected 20 usable rows of gsm8k .* got 5"),
        (lambda: planted.heldout_rows(ALPACA, GSM8K, 13, 0), "expected 13 usable rows of alpaca .* got 12"),
        (lambda: planted.rows_of_every_kind(ALPACA, GSM8K, 20, 0), "expected 140 usable rows of alpaca .* got 120"),
        (lambda: planted.planted("swapped", ALPACA[:1], 0, 0), "alpaca-0: expected another row"),
    ],
)
def test_what_cannot_be_made_is_refused_with_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ----------------------------------------------------------------------------------------------- the study

plane_values = st.lists(st.tuples(st.floats(1, 99), st.floats(0, 9), st.sampled_from(list(PLANTS))), min_size=8)


def tensors(values):
    ppl, ent, kinds = zip(*values, strict=True)
    return list(kinds), torch.tensor(ppl), torch.tensor(ent)


ALMOST_EQUAL = [0, 1, 2, 3, 4, 5, 7, 6, 9, 8, 10, 13, 14, 11, 12]  # entropies whose supp-scores differ by rounding


@given(planes(max_size=24), st.sampled_from(list(plants.RULES)), st.sampled_from([0.125, 0.25, 0.5]))
@example((torch.arange(1.0, 16.0), torch.tensor(ALMOST_EQUAL, dtype=torch.float32)), "as printed", 0.5)
def test_the_backfill_by_another_rule_is_that_of_the_method(plane, rule, ratio):
    expected = prune_samples(*plane, ratio, backfill_quadrants=plants.RULES[rule], keep_one=True)
    printed = prune_samples(*plane, ratio, keep_one=True)
    assert plants.refilled(printed, *plane, plants.RULES[rule]).tolist() == expected.backfilled.tolist()


@given(plane_values, st.sampled_from([0.125, 0.25, 0.5]), st.sampled_from(list(plants.RULES)))
def test_counts_sum_to_what_was_seen(values, ratio, rule):
    kinds, ppl, ent = tensors(values)
    found = plants.counts(kinds, ppl, ent, 8, ratio)[rule]
    seen = len(kinds) // 8 * 8
    assert {kind: table["seen"] for kind, table in found.items()} == Counter(kinds[:seen])
    for table in found.values():
        assert sum(table[name] for name in plants.CORNERS) == table["seen"]
        assert table["backfilled_q1"] <= table["backfilled"] <= table["kept"] <= table["seen"]
    assert sum(table["kept"] for table in found.values()) == ratio * seen
    shares = plants.shares(found)
    kept_noise = sum(table["kept"] for kind, table in found.items() if kind in NOISE)
    assert shares["noise_among_kept"] == pytest.approx(kept_noise / (ratio * seen))
    weights = {kind: table["seen"] / seen for kind, table in found.items()}
    assert sum(shares[f"kept {kind}"] * weights[kind] for kind in found) == pytest.approx(1)


@given(plane_values, st.sampled_from([0.125, 0.25, 0.5]))
def test_a_rule_that_bars_q1_never_backfills_from_q1_while_others_suffice(values, ratio):
    _, ppl, ent = tensors(values)
    printed = prune_samples(ppl, ent, ratio)
    filled = plants.refilled(printed, ppl, ent, plants.RULES["Q1 barred"])
    others = printed.quadrant != Quadrant.HARMFUL_NOISE
    own = printed.keep & ~printed.backfilled
    assert filled.sum() == printed.backfilled.sum() and not (filled & own).any()
    if (others & ~own).sum() >= filled.sum():
        assert not (filled & ~others).any()


@given(plane_values, st.sampled_from([0.125, 0.25, 0.5]))
def test_the_rules_draw_from_first_where_they_say(values, ratio):
    _, ppl, ent = tensors(values)
    score, found = supp_score(ppl, ent), prune_samples(ppl, ent, ratio)
    for named in plants.RULES.values():
        inside = torch.isin(found.quadrant, torch.tensor([int(q) for q in named]))
        backfilled = plants.refilled(found, ppl, ent, named)
        left, filled = ~(found.keep & ~found.backfilled) & ~backfilled & inside, backfilled & inside
        assert not ((backfilled & ~inside).any() and left.any())
        if filled.any() and left.any():
            assert score[filled].min() >= score[left].max()


@given(noises, st.integers(10, 200))
def test_a_mix_with_noise_has_its_share_of_the_rows_that_there_are(noise, num_rows):
    wanted = plants.num_rows_of(plants.WITH_NOISE, PLANTS, num_rows, noise)
    of_noise = sum(wanted[kind] for kind in NOISE)
    assert max(wanted.values()) == num_rows
    assert len({wanted[kind] for kind in NOISE}) == 1 and wanted["alpaca"] == wanted["gsm8k"]
    assert abs(of_noise - noise * sum(wanted.values())) <= 2.5


def test_orders_are_fresh_draws_of_the_wanted_rows():
    kinds = ["alpaca", "gsm8k", "swapped"] * 20
    orders = plants.orders_of(kinds, {"alpaca": 20, "swapped": 5}, 0, 8)
    for order in orders:
        assert len(set(order)) == 25 and Counter(kinds[place] for place in order) == {"alpaca": 20, "swapped": 5}
    assert len({tuple(sorted(order)) for order in orders}) == 8


def test_a_mean_is_over_the_orders_that_have_a_value():
    assert plants.spread([1.0, None, 2.0]) == [1.5, 0.5]
    assert plants.spread([None]) is None


def synthetic():
    """12 rows of each kind: noise in the high corner, clean rows in the low one."""
    generator = torch.Generator().manual_seed(0)
    kinds = [kind for kind in PLANTS for _ in range(12)]
    noise = torch.tensor([kind in NOISE for kind in kinds]).float()
    ppl, ent = (1 + noise * 4 + torch.rand(len(kinds), generator=generator) for _ in range(2))
    return kinds, ppl, ent


def test_noise_in_the_high_corner_is_in_q1_and_what_bars_q1_keeps_less_of_it():
    found = plants.describe(*synthetic(), noise=0.3, seed=0, orders=2)
    assert {kind["kind"] for kind in found["kinds"] if kind["noise"]} == set(NOISE)
    assert [(c["mix"], c["prune_batch"]) for c in found["cells"][::3]] == [
        ("every kind", 8), ("every kind", 32), ("noise", 8), ("noise", 32),
    ]  # fmt: skip
    for cell in found["cells"]:
        share = {rule: cell["rules"][rule]["noise_among_kept"][0] for rule in plants.RULES}
        assert share["Q1 barred"] <= share["as printed"]
        for kind, quadrants in cell["quadrants"].items():
            assert sum(quadrants.values()) == pytest.approx(1, abs=1e-3)
            assert quadrants["redundant_knowledge" if kind in NOISE else "harmful_noise"] < 0.2
    largest = [c for c in found["cells"] if (c["prune_batch"], c["keep_ratio"]) == (32, 0.5)]
    for rules in (cell["rules"] for cell in largest):
        assert rules["Q1 barred"]["noise_among_kept"][0] < rules["as printed"]["noise_among_kept"][0] - 0.02
        assert rules["Q1 barred"]["q1_among_backfill"][0] == 0 < rules["as printed"]["q1_among_backfill"][0]


# ------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files in the public form, of rows made up here."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "alpaca.json").write_text(json.dumps([{k: r[k] for k in r if k != "id"} for r in ALPACA]))
    lines = [
        json.dumps({"question": row["instruction"], "answer": row["output"].replace("7", "<<3+4=7>>7")})
        for row in GSM8K
    ]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


def run(files, out, *more):
    argv = ["--alpaca", str(files / "alpaca.json"), "--gsm8k", str(files / "train.jsonl"), "--out", str(out)]
    reproduce.main(["plants", "--model", str(BASE), *argv, *more])


def test_the_command_writes_numbers_pictures_and_rows(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plants, "ORDERS", 1)
    run(files, tmp_path, "--rows", "4", "--noise", "0.6")
    found = read_json(tmp_path / "plants.json")
    assert found["rows"] == len(found["points"]) == 4 * len(PLANTS)
    assert {c["prune_batch"] for c in found["cells"]} == {8, 32}  # 36 rows fill no batch of 128
    text = (tmp_path / "plants.json").read_text()
    assert not any(row["instruction"] in text or row["output"] in text for row in ALPACA + GSM8K)
    table = capsys.readouterr().out
    sizes = {"every kind": 2, "noise": 1}  # 16 rows of the mix with noise
    assert all(table.count(f"\n| {mix} | ") == 3 * count for mix, count in sizes.items())
    assert all(f"\n| {kind} (noise) | " in table for kind in NOISE)
    trained, heldout = read_json(tmp_path / "train.json"), read_json(tmp_path / "heldout_gsm8k.json")
    assert sum(row["kind"] in NOISE for row in trained) == int(0.6 * len(trained)) and len(heldout) == 12
    assert not any("<<" in row["output"] for row in trained)
    pytest.importorskip("matplotlib", reason="pip install matplotlib (the plot extra)")
    pictures = {path.name: path.read_text() for path in (tmp_path / "figures").iterdir()}
    assert pictures.keys() == {"plants_plane.svg", "plants_bars.svg"}
    for picture in pictures.values():
        assert all(f">{kind}" in picture for kind in PLANTS)
    assert all(f">{rule}<" in pictures["plants_bars.svg"] for rule in plants.RULES)


def test_the_picture_shows_every_point_of_every_kind():
    pytest.importorskip("matplotlib", reason="pip install matplotlib (the plot extra)")
    kinds, ppl, ent = synthetic()
    ppl[-1], ent[0] = 4000, 11
    found = plants.describe(kinds, ppl, ent, noise=0.3, seed=0, orders=1)
    axes = plants.plane(found).axes
    assert [axis.get_title().partition(" (")[0] for axis in axes] == list(PLANTS)
    for axis, kind in zip(axes, PLANTS, strict=True):
        (drawn,) = (line for line in axis.lines if line.get_label() == kind)
        xs, ys = drawn.get_data()
        assert [[kind, y, x] for x, y in zip(xs, ys, strict=True)] == [p for p in found["points"] if p[0] == kind]
        (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
        assert left <= min(xs) and max(xs) <= right and bottom <= min(ys) and max(ys) <= top
        assert (right, top) == (axes[0].get_xlim()[1], axes[0].get_ylim()[1])


def test_the_bars_are_the_means_of_the_result():
    pytest.importorskip("matplotlib", reason="pip install matplotlib (the plot extra)")
    found = plants.describe(*synthetic(), noise=0.3, seed=0, orders=1)
    for axis, size in zip(plants.bars(found).axes, plants.SHOWN_BATCHES, strict=True):
        cell = plants.shown_cell(found, size)
        drawn = {
            group.get_label(): [bar.get_height() for bar in group]
            for group in axis.containers
            if group.get_label() in plants.RULES
        }
        for rule in plants.RULES:
            assert drawn[rule] == [cell["rules"][rule]["kept_over_base"][kind][0] for kind in PLANTS]


def test_the_points_are_perplexity_and_entropy_by_the_plain_formulas(tmp_path, monkeypatch):
    """Row by row through the model's logits; the rows do not fill the last chunk."""
    monkeypatch.setattr(plants, "CHUNK", 4)
    rows = planted.rows_of_every_kind(ALPACA, GSM8K, 2, 0)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    samples, _ = load_samples(tmp_path / "rows.json", TextTokenizer.from_pretrained(BASE))
    model, expected = Transformer.from_pretrained(BASE).eval(), []
    for sample in samples:
        with torch.no_grad():
            log_p = model(torch.tensor([sample.input_ids]))[0, :-1].double().log_softmax(-1)
        labels = torch.tensor(sample.labels[1:])
        log_p, labels = log_p[labels != -100], labels[labels != -100]
        nll = -log_p[torch.arange(len(labels)), labels].mean()
        expected.append([nll.exp(), -(log_p.exp() * log_p).sum(-1).mean()])
    assert len(samples) % plants.CHUNK
    found = torch.stack(plants.scored(BASE, rows), 1).double()
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "alpaca.json",
            '[\n{"instruction": "a", "input": ""}\n]',
            "alpaca.json:2: row 1 of 1: output: expected a text, got no such",
        ),
        ("alpaca.json", "[\n3]", "alpaca.json:2: row 1 of 1: expected a JSON object, got 3"),
        ("train.jsonl", '{"question": "a", "answer": 3}', "train.jsonl:1: answer: expected a text, got 3"),
        ("train.jsonl", "{", "train.jsonl:1: not valid JSON"),
        ("train.jsonl", '{"question": "a", "answer": "b"}', "expected 4 usable rows of gsm8k for 2 of each kind"),
    ],
)
def test_wrong_files_end_in_one_line(files, tmp_path, capsys, name, text, message):
    for path in files.iterdir():
        (tmp_path / path.name).write_text(text if path.name == name else path.read_text())
    with pytest.raises(SystemExit) as end:
        run(tmp_path, tmp_path / "out", "--rows", "2")
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [("--rows", "1"), ("--noise", "1.2"), ("--noise", "some")])
def test_wrong_flags_are_refused(files, tmp_path, capsys, flags):
    with pytest.raises(SystemExit):
        run(files, tmp_path, *flags)
    assert f"{flags[0]}" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_page_of_results_shows_the_committed_numbers():
    results = read_json(report.RESULTS / "plants.json")
    text = report.PAGE.read_text(encoding="utf-8")
    assert all(part in text for part in report.planted_part(results))
