"""reproduce.pairings: what it runs, and what it calls beyond noise."""

import statistics

import pytest

import train
from reproduce import pairings


def run(sample, token, seed, arc, loss=0.2):
    return {"sample": sample, "token": token, "seed": seed, "arc": arc, "gsm8k": 30.0 + arc / 100, "heldout_loss": loss}


def test_the_plan_holds_every_pairing_once_a_seed_and_the_papers_own_at_every_seed():
    plan = pairings.plan(3)
    assert len(set(plan)) == len(plan)
    assert {(s, t) for s, t, seed in plan if seed == 0} == {(s, t) for s in pairings.SAMPLES for t in pairings.TOKENS}
    for sample in pairings.PAPER_SAMPLES:
        for token in pairings.PAPER_TOKENS:
            assert {0, 1, 2} <= {seed for s, t, seed in plan if (s, t) == (sample, token)}
    assert sum(pair[:2] == ("random", "random") for pair in plan) == pairings.RANDOM_SEEDS
    assert {sample.removesuffix("-planted") for sample in pairings.SAMPLES} == set(train.SAMPLE_PRUNERS) - {"none"}
    assert set(pairings.TOKENS) == set(train.TOKEN_PRUNERS)


def test_the_deviation_between_seeds_is_pooled_over_pairings():
    runs = [run("random", "random", seed, arc) for seed, arc in enumerate((50, 52, 54))]
    runs += [run("longest", "fastv", seed, arc) for seed, arc in enumerate((10, 16))]
    expected = ((2 * statistics.variance([50, 52, 54]) + statistics.variance([10, 16])) / 3) ** 0.5
    assert pairings.seed_deviation(runs, "arc") == pytest.approx(expected)
    assert pairings.seed_deviation([*runs, run("less", "none", 0, 99)], "arc") == pytest.approx(expected)


def test_beyond_noise_counts_standard_errors_of_both_means_and_knows_that_losses_should_fall():
    runs = [run("random", "random", seed, arc, loss) for seed, (arc, loss) in enumerate([(49, 0.19), (51, 0.21)])]
    deviation = 2**0.5
    error = deviation * (1 / 1 + 1 / 2) ** 0.5
    runs += [run("longest", "fastv", 0, 50 + 2.9 * error, 0.1), run("less", "none", 0, 50 - 3.1 * error, 0.3)]
    found = pairings.beyond_noise(runs)
    assert [(e["sample"], e["seeds"]) for e in found["arc"]] == [("less", 1)]
    assert found["arc"][0]["gain"] == pytest.approx(-3.1 * error, abs=1e-3)
    assert [(e["sample"], e["gain"] > 0) for e in found["heldout_loss"]] == [("longest", True), ("less", False)]
