"""The reports of reproduce/: what they count is what happened."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_train import run

from reproduce import quickstart, selection


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
