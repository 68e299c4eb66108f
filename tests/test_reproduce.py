"""The reports of reproduce/ count what happened, and logs are read line by line."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train_runs import run

from reproduce import quickstart, selection
from training.files import append_json, read_json, read_jsonl


def test_sources_at_the_runs_own_prune_batch_are_those_it_logged(checkpoint, rows, tmp_path):
    metrics = run(checkpoint, rows, tmp_path / "run", "--prune-batch", "8", "--log-selection")
    described = selection.describe(tmp_path / "run", [8, 16])
    kept = sum(m["samples_kept"] for m in metrics)
    for name in selection.SOURCES:
        assert described["sources"]["8"][name] == pytest.approx(sum(m[name] for m in metrics) / kept)
    assert sum(described["sources"]["16"][name] for name in selection.SOURCES) == pytest.approx(1)
    assert described["loss"] == [round(m["loss"], 4) for m in metrics]


@given(st.lists(st.integers(0, 5), min_size=3, max_size=9).filter(lambda values: len(set(values)) > 1))
def test_rank_correlation_is_one_with_any_rising_map_and_minus_one_with_any_falling_one(values):
    a = torch.tensor(values, dtype=torch.float64)
    assert selection.rank_correlation(a, a.exp()) == pytest.approx(1)
    assert selection.rank_correlation(a, -(a**3)) == pytest.approx(-1)


def test_rank_correlation_gives_ties_their_mean_rank():
    a, b = torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert selection.rank_correlation(a, b) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)  # ranks 1.5 1.5 3 4 and 1 2 3 4


def test_boilerplate_is_found_token_by_token():
    pieces = [" \n", "Good", " day", ".", " It", " is", " red", ".", " Bye", "!", ""]
    flags = quickstart.in_boilerplate(pieces, ["Good day.", "Bye!"])
    assert flags == [False, True, True, True, False, False, False, False, True, True, False]


def test_plants_are_counted_by_kind_and_quadrant():
    samples = [{"id": "a", "quadrant": 2, "kept": True}, {"id": "b", "quadrant": 0, "kept": False}]
    table = quickstart.plants_by_quadrant([{"samples": samples}] * 2, {"a": "wrong", "b": "clean"})
    assert dict(table["wrong"]) == {"seen": 2, "VALUABLE_MISCONCEPTION": 2, "kept": 2}
    assert dict(table["clean"]) == {"seen": 2, "BETWEEN": 2, "kept": 0}


def committed_quickstart():
    return read_json(Path(quickstart.__file__).parent / "results" / "quickstart.json")


def test_the_quickstart_ends_in_its_summary_of_eight_lines():
    result = committed_quickstart()
    lines = quickstart.summary(result).split("\n")
    assert len(lines) == 8
    assert quickstart.report(result).endswith("\n\n" + quickstart.summary(result))
    for made in result["runs"].values():
        assert f"{made['total']['samples_kept']:,}" in lines[2]
        assert f"{made['after']['heldout_loss']:.3f}" in lines[-1]
        kept = sum(row.get("kept", 0) for row in made["plants"].values())
        noise = sum(made["plants"][kind].get("kept", 0) for kind in quickstart.NOISE_KINDS)
        assert kept == made["total"]["samples_kept"] and f"{noise / kept:.0%}" in lines[3]
    total = result["runs"]["Q-Tuning"]["total"]
    assert sum(total[name] for name in selection.SOURCES) == total["samples_kept"]


def test_a_group_has_the_items_of_all_tasks_whose_ids_begin_with_it():
    items = [("old-1", True), ("old-2", False), ("older-1", True), ("new-1", True)]
    results = {task: {"items": [{"id": id, "correct": ok} for id, ok in items]} for task in ("arc", "gsm8k")}
    assert quickstart.group_scores(results, ("old", "new", "none")) == {"old": (50.0, 4), "new": (100.0, 2)}


leaves = st.none() | st.integers() | st.text()
values = st.recursive(leaves, lambda some: st.lists(some) | st.dictionaries(st.text(), some))


@given(st.lists(values, max_size=5), st.text('{["1', max_size=5))
def test_a_log_reads_back_line_by_line_without_a_line_that_is_being_written(tmp_path_factory, lines, cut):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    path.touch()
    for line in lines:
        append_json(path, line)
    assert read_jsonl(path) == read_jsonl(path, growing=True) == lines
    with path.open("a") as file:
        file.write(cut)
    assert read_jsonl(path, growing=True) == lines


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl:2: not valid JSON"):
        read_jsonl(path)
    path.write_text('{"step": 1}\n{"step"')  # cut off
    with pytest.raises(ValueError, match=r"log\.jsonl:2: not valid JSON"):
        read_jsonl(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"log\.jsonl: not valid UTF-8"):
        read_jsonl(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: no such file"):
        read_jsonl(tmp_path / "missing.jsonl")
