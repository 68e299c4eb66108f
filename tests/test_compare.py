"""`python -m reproduce compare`: methods side by side on rows of one's own."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import train
from reproduce import __main__ as reproduce
from reproduce import compare
from training.files import read_json

FLAGS = ("--lora-rank", "0", "--lr", "1e-2", "--micro-batch", "4", "--grad-accum", "2", "--max-steps", "3")


def run(checkpoint, rows, out, *more):
    argv = ["--model", str(checkpoint), "--data", str(rows), "--out", str(out), "--budgets", "0.5", "--seeds", "2"]
    reproduce.main(["compare", *argv, "--methods", "random,qtuning", *FLAGS, *more])


def results(out):
    """Row of the table -> the held-out losses of its seeds."""
    (path,) = out.glob("*/compare.json")
    return {name: [r["held"]["rows_nll"][-1] for r in runs] for name, runs in read_json(path).items()}


@pytest.fixture(scope="module")
def compared(checkpoint, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    run(checkpoint, rows, out)
    return out


# --------------------------------------------------------------------------------------- whole comparisons


def test_a_comparison_ends_in_a_table_a_picture_and_a_sentence(compared):
    (folder,) = (path.parent for path in compared.glob("*/compare.md"))
    text = (folder / "compare.md").read_text()
    assert "36 rows to train on, 4 held out" in text and "3 steps for each of 4 runs" in text
    assert text.count("- Held-out loss: best is ") == 1
    for name in ("untuned", "random 0.5", "qtuning 0.5"):
        assert f"\n| {name} |" in text
    pytest.importorskip("matplotlib", reason="pip install matplotlib (the plot extra)")
    picture = (folder / "compare.svg").read_text()
    assert all(f">{words}<" in picture for words in ("qtuning", "random", "training seconds"))


def test_every_method_trains_on_the_rows_that_are_not_held_out_in_as_many_steps(compared):
    (folder,) = (path.parent for path in compared.glob("*/compare.md"))
    heldout, trained = read_json(folder / "heldout.json"), read_json(folder / "train.json")
    ids = {row["id"] for row in heldout} | {row["id"] for row in trained}
    assert (len(heldout), len(trained), len(ids)) == (4, 36, 40)
    for path in folder.glob("*/config.json"):
        assert read_json(path)["data"] == str(folder / "train.json")
        assert len((path.parent / "metrics.jsonl").read_text().splitlines()) == 3


def test_finished_runs_are_not_made_again(checkpoint, rows, compared, monkeypatch, capsys):
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail(f"trained again: {argv}"))
    before = results(compared)
    run(checkpoint, rows, compared)
    assert "0 runs to make" in capsys.readouterr().out
    assert results(compared) == before


def test_an_interrupted_comparison_continues_to_the_same_numbers(checkpoint, rows, compared, tmp_path, monkeypatch):
    calls, choose = [], train.choose_samples

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 2 * 2 + 3 + 2:  # two measured steps of each row, a whole run, and a step of the next
            raise KeyboardInterrupt
        return choose(*args)

    monkeypatch.setattr(train, "choose_samples", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, rows, tmp_path, "--save-every", "1")
    assert len(list(tmp_path.glob("*/*/summary.json"))) == 2  # the untuned model and a run
    monkeypatch.setattr(train, "choose_samples", lambda *args: calls.append(args) or choose(*args))
    calls.clear()
    run(checkpoint, rows, tmp_path, "--save-every", "1")
    assert len(calls) == 2 + 3 + 3  # the rest of the interrupted run, and two more
    assert results(tmp_path) == results(compared)


def test_a_method_that_needs_side_files_gets_them(checkpoint, rows, tmp_path, capsys):
    argv = ["--model", str(checkpoint), "--data", str(rows), "--out", str(tmp_path), "--budgets", "0.5"]
    small = ("--lora-rank", "0", "--lr", "1e-2", "--micro-batch", "2", "--grad-accum", "1", "--max-steps", "2")
    compare.main([*argv, "--seeds", "1", "--methods", "rho1", *small])
    (side,) = tmp_path.glob("*/side-*")
    assert len((side / "scores" / "reference_nll.jsonl").read_text().splitlines()) == 36
    assert len(read_json(side / "tenth.json")) == 3
    said = capsys.readouterr().out
    assert "first the side files reference_nll" in said
    assert "with one seed the noise is unknown" in said


def test_a_dry_run_prints_the_cost_and_trains_nothing(checkpoint, rows, tmp_path, capsys):
    run(checkpoint, rows, tmp_path, "--dry-run")
    said = capsys.readouterr().out
    assert "5 runs to make, about " in said and "by a measured step" in said
    assert not list(tmp_path.glob("*/*/summary.json"))


@pytest.mark.parametrize(
    "flags, problem",
    [
        (("--methods", "best"), "--methods: expected names of qtuning, none, random"),
        (("--methods", "less"), "--methods: less needs rows of a target task"),
        (("--budgets", "2"), "expected shares of samples in (0, 1], got 2"),
        (("--budgets", "0.1"), "smallest batch"),
        (("--tests", "chess=x.json"), "--tests: expected TASK=FILE with TASK one of arc"),
        (("--tests", "arc=no.jsonl"), "no.jsonl: no such file"),
        (("--seed", "1"), "--seed is set by the comparison itself"),
        (("--data", "no.json"), "no.json: no such file"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(checkpoint, rows, tmp_path, capsys, flags, problem):
    with pytest.raises(SystemExit) as stopped:
        run(checkpoint, rows, tmp_path, *flags)
    assert stopped.value.code == 2
    assert problem in capsys.readouterr().err
    assert not list(tmp_path.glob("*/measured"))


# -------------------------------------------------------------------------------------------- its parts


def test_a_method_names_its_pruners():
    pairs = [compare.pruners_of(name) for name in ("random", "qtuning", "rho1", "longest", "qtuning+none")]
    assert pairs == [
        ("random", "random"),
        ("qtuning", "qtuning"),
        ("random", "rho1"),
        ("longest", "random"),
        ("qtuning", "none"),
    ]
    assert list(compare.methods_at(["none", "rho1"], [0.5, 0.25])) == ["untuned", "none", "rho1 0.5", "rho1 0.25"]


texts = st.lists(st.integers(0, 30), max_size=60)


@given(texts)
@example([0] * 20)
def test_equal_rows_are_on_one_side_and_at_most_a_tenth_is_held_out(numbers):
    rows = [{"prompt": "a", "response": str(number)} for number in numbers]
    trained, heldout = compare.split(rows)
    assert sorted(int(row["id"]) for row in trained + heldout) == list(range(len(rows)))
    assert len(heldout) <= len(rows) // 10
    assert not {row["response"] for row in trained} & {row["response"] for row in heldout}
    assert compare.split(rows) == (trained, heldout)


def summary(loss, score, seed, seconds=10.0):
    return {
        "flags": ["--lr", "1"],
        "seed": seed,
        "steps": 7,
        "seconds": seconds,
        "samples_kept": 1,
        "samples_seen": 8,
        "answer_tokens_kept": 1,
        "answer_tokens_seen": 10,
        "held": {"step": [7], "rows_nll": [loss]},
        "scores": {"arc-x": score},
        "n": {"arc-x": 100},
    }


KNOWN = {
    "untuned": [
        {"flags": None, "held": {"step": [0], "rows_nll": [3.0]}, "scores": {"arc-x": 20.0}, "n": {"arc-x": 100}}
    ],
    "none": [summary(1.00 + 0.02 * seed, 60.0 + seed, seed, 100.0) for seed in range(3)],
    "random 0.5": [summary(1.50 + 0.02 * seed, 61.0 + seed, seed) for seed in range(3)],
    "qtuning 0.5": [summary(1.03 + 0.02 * seed, 40.0 + seed, seed) for seed in range(3)],
}


def test_the_sentence_names_what_is_level_and_what_is_not():
    # By hand: the losses of a row have a standard deviation of 0.02; the difference of two means of three has a
    # margin of 2.776 * 0.02 * sqrt(2 / 3) = 0.045. For the scores the deviation is 1, the margin 2.27.
    assert compare.sentence(KNOWN, "held") == (
        "Held-out loss: best is none (1.020 ± 0.050); level with it within noise: qtuning 0.5; "
        "worse beyond noise: random 0.5."
    )
    assert compare.sentence(KNOWN, "arc-x") == (
        "Arc: best is random 0.5 (62.0 ± 2.5); level with it within noise: none; worse beyond noise: qtuning 0.5."
    )


def test_the_sentence_says_where_nothing_is_level_and_where_the_noise_is_unknown():
    apart = {name: KNOWN[name] for name in ("untuned", "none", "random 0.5")}
    assert "no other is level with it within noise; worse beyond noise: random 0.5." in compare.sentence(apart, "held")
    single = {name: runs[:1] for name, runs in KNOWN.items()}
    assert "with one seed the noise is unknown" in compare.sentence(single, "held")
    assert "level with it within noise: none" in compare.sentence(single, "arc-x")  # over the test's items


def test_the_table_has_known_numbers():
    lines = compare.table(KNOWN, ["held", "arc-x"]).splitlines()
    assert lines[2].split(" | ")[-2:] == ["3.000", "20.0 [13.3, 28.9] |"]
    assert lines[3] == "| none | 3 | 7 | 100.0 ± 0.0 | 12.5 % | 10.0 % | 1.020 ± 0.050 | 61.0 ± 2.5 |"


def test_a_comparison_of_other_rows_is_another_one(checkpoint, rows, compared, tmp_path):
    other = tmp_path / rows.name
    other.write_text("".join(json.dumps({**json.loads(line), "more": 1}) + "\n" for line in rows.open()))
    run(checkpoint, other, compared, "--dry-run")
    assert len(list(compared.glob("*/train.json"))) == 2
