"""eval/compare.py: two result files, paired item by item."""

import json

import pytest
from eval_cases import assert_refused
from hypothesis import given
from hypothesis import strategies as st

from eval import compare


def result_of(values, **changes):
    """A result file: item i has values[i]."""
    items = [{"id": f"i{i}", "prompt_id": f"p{i}", "correct": value} for i, value in enumerate(values)]
    return {"task": "arc", "protocol": "paper", "items": items, **changes}


@given(
    pairs=st.one_of(
        st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30),
        st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30),
    ),
    order=st.randoms(),
)
def test_swapping_the_files_changes_the_signs_and_nothing_else(pairs, order):
    a, b = (result_of(side) for side in zip(*pairs, strict=True))
    order.shuffle(b["items"])
    forth, back = compare.compare(a, b), compare.compare(b, a)
    low, high = forth["interval95"]
    assert back["interval95"] == (-high, -low)
    assert back["difference"] == -forth["difference"] == pytest.approx(forth["score_a"] - forth["score_b"])
    assert low - 1e-9 <= forth["difference"] <= high + 1e-9
    assert (back["score_a"], back["score_b"]) == (forth["score_b"], forth["score_a"])
    for one, other in (("only_a", "only_b"), ("both_right", "both_right"), ("both_wrong", "both_wrong")):
        assert back.get(one) == forth.get(other)
    assert back.get("mcnemar_p") == forth.get("mcnemar_p")
    if isinstance(pairs[0][0], bool):
        cells = [forth[name] for name in ("both_right", "only_a", "only_b", "both_wrong")]
        assert cells == [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]


def test_the_paired_interval_is_narrower_than_those_of_the_two_scores():
    right = [i % 2 == 0 for i in range(200)]
    better = [value or i < 20 for i, value in enumerate(right)]
    compared = compare.compare(result_of(right), result_of(better))
    assert (compared["difference"], compared["only_a"], compared["only_b"]) == (5, 0, 10)
    assert compared["mcnemar_p"] == pytest.approx(2 / 2**10)
    low, high = compared["interval95"]
    assert 1.5 < low < 2.5 and 7.5 < high < 9  # 5 points give or take 2 * sqrt(0.05 * 0.95 / 200)


def test_compare_command_prints_and_writes(tmp_path, capsys):
    a, b, out = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "new" / "out.json"
    a.write_text(json.dumps(result_of([True, False, False, True])))
    b.write_text(json.dumps(result_of([True, True, True, False])))
    compare.main([str(a), str(b), "--out", str(out)])
    written = json.loads(out.read_text())
    assert (written["a"], written["n"], written["difference"], written["mcnemar_p"]) == (str(a), 4, 25, 1)
    printed = capsys.readouterr().out
    assert "A 50.00%  B 75.00%" in printed and "B - A +25.00 points" in printed
    assert "both right 1, only a 1, only b 2, both wrong 0" in printed


OTHER_RESULTS = {
    "task": (result_of([True], task="gsm8k"), ["one task", "'arc'", "'gsm8k'"]),
    "protocol": (result_of([True], protocol="standard"), ["one protocol", "'paper'", "'standard'"]),
    "more items": (result_of([True, True]), ["same items", "'i1' in B only"]),
    "other items": (result_of([True], items=[{"id": "x", "prompt_id": "p0", "correct": True}]), ["'i0' in A only"]),
    "other prompts": (result_of([True], items=[{"id": "i0", "prompt_id": "x", "correct": True}]), ["item 'i0'"]),
    "no metric": (result_of([None]), ["--metric correct", "item 'i0' has None"]),
    "no result": ({"task": "arc"}, ["b.json", "'protocol'"]),
    "no prompt ids": (result_of([True], items=[{"id": "i0", "correct": True}]), ["b.json: items[0]", "prompt_id"]),
    "a list": ([1], ["b.json", "'task'"]),
}


@pytest.mark.parametrize("other, fragments", OTHER_RESULTS.values(), ids=OTHER_RESULTS)
def test_results_that_do_not_pair_are_refused_in_one_line(tmp_path, capsys, other, fragments):
    for name, whole in (("a.json", result_of([True])), ("b.json", other)):
        (tmp_path / name).write_text(json.dumps(whole))
    assert_refused(capsys, compare, [tmp_path / "a.json", tmp_path / "b.json"], fragments)


def test_a_file_that_is_no_result_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{")
    assert_refused(capsys, compare, [tmp_path / "a.json"] * 2, ["a.json", "not valid JSON"])
    assert_refused(capsys, compare, [tmp_path / "none.json"] * 2, ["none.json: no such file"])
