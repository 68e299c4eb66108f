"""reproduce/choices.py: every variant puts another reading in place, and only while it runs."""

import dataclasses
import json
import random
import re
from contextlib import nullcontext

import pytest
import torch
from conftest import BASE
from hypothesis import given, settings
from hypothesis import strategies as st

import passes
import qtuning
import train
from data.sft import IGNORE_INDEX, Sample, load_samples
from data.tokenizer import TextTokenizer
from model import Transformer, read_json
from reproduce import choices
from reproduce.choices import DEFAULT, VARIANTS, Log
from reproduce.noise import proportions_margin

BY_SLUG = {variant.slug: variant for variant in VARIANTS}
SAME = {"samples": 0.0, "trimming": 0.0, "tokens": 0.0, "kept_over_target": 1.0}
# What each variant changes first, at 12.5 % of prune batches of 8. The rest decides alike there; its tests are below.
CHANGES = {
    "samples": "C1-to-0-5 C2-lowers-upper C3-10-halvings C3-Alg-1 C4-interpolated C5-other-edges C7-Q1-Q3 C8-step "
    "C14-16 C14-32 C15-all-tokens C17-EOS-untrained",
    "trimming": "C9-all-whole C9-all-trimmed",
    "tokens": "C10-reversed C11-ceil C11-batch-budget C12-0",
    None: "C2-stops C3-20-halvings C6-rounded C13-drop C16-answer C16-row",
}
PARTS = [(slug, part) for part, slugs in CHANGES.items() for slug in slugs.split()]


@pytest.fixture(scope="module")
def log():
    """Scores as a run would have them: PPL and entropy go together, more or less."""
    draw = random.Random(0)
    samples, steps = [], []
    for row in range(10 * 32):
        num_prompt, num_answer = draw.randint(2, 30), draw.randint(3, 20)
        ids = [draw.randrange(100) for _ in range(num_prompt + num_answer)]
        samples.append(Sample(str(row), ids, [IGNORE_INDEX] * num_prompt + ids[num_prompt:]))
    for start in range(0, len(samples), 32):
        rows = list(range(start, start + 32))
        ways = {way: {} for way in ("", *choices.RESCORED)}
        for row in rows:
            nll = [draw.expovariate(1) for _ in range(train.num_answer_tokens(samples[row]))]
            ent = sum(nll) / len(nll) + draw.gauss(0, 0.5)
            for way, scores in ways.items():
                own = torch.tensor(nll[:-1] if way == "C17" else nll)
                ppl = own.mean().exp().item()
                scores[row] = train.RowScores(ppl, ent + (draw.gauss(0, 1) if way == "C15" else 0), own)
        steps.append((rows, ways))
    return Log(0.125, steps, samples)


def functions():
    return {(owner, name): value for owner in (train, qtuning, passes.TokenLoss) for name, value in vars(owner).items()}


def replaced(before):
    return {(owner.__name__, name) for (owner, name), value in functions().items() if before[owner, name] is not value}


@pytest.mark.parametrize("variant", VARIANTS, ids=BY_SLUG)
def test_a_variant_replaces_something_while_it_runs_and_nothing_after(variant):
    before = functions()
    with pytest.raises(RuntimeError, match="cut"), variant.patch():
        assert replaced(before) or variant.flags
        raise RuntimeError("cut")
    assert functions().keys() == before.keys()
    assert not replaced(before)


def test_every_choice_but_the_last_has_a_variant_and_every_variant_its_folder():
    assert list(dict.fromkeys(variant.choice for variant in VARIANTS)) == [f"C{n}" for n in range(1, 18)]
    assert len(BY_SLUG) == len(VARIANTS) == len(PARTS)


def test_the_default_differs_from_itself_in_nothing(log):
    decided = choices.decide(log, DEFAULT)
    assert choices.compare(decided, choices.decide(log, DEFAULT)) == SAME
    assert sum(int(d.keep.sum()) for d in decided) == 10 * 4


@pytest.mark.parametrize("slug, part", PARTS)
def test_a_variant_changes_what_it_is_about(log, slug, part):
    found = choices.compare(choices.decide(log, DEFAULT), choices.decide(log, BY_SLUG[slug]))
    if part is None:
        assert found == SAME
        return
    assert found[part] > 0
    if part != "samples":
        assert found["samples"] == 0
    assert (found["kept_over_target"] > 1) == (slug in ("C3-10-halvings", "C3-Alg-1"))


def test_what_differs_is_counted_by_hand():
    def decided(keep, trim, tokens):
        masks = {place: torch.tensor([c == "1" for c in text]) for place, text in tokens.items()}
        return choices.Decided(torch.tensor(keep), torch.tensor(trim), 2, masks)

    a = decided([True, True, False], [True, False, False], {0: "1100", 1: "1111"})
    b = decided([True, True, True], [True, True, False], {0: "0110", 1: "1100", 2: "1111"})
    assert choices.compare([a], [b]) == {
        "samples": pytest.approx(1 / 3, abs=1e-4),
        "trimming": 0.5,
        "tokens": 0.5,  # 1 + 2 shared of 2 + 4
        "kept_over_target": 1.5,
    }


# ----------------------------------------------------------------------------- searches and edges, by hand

PLANES = st.integers(1, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 6), min_size=n, max_size=n)] * 2, st.integers(1, n))
)


@given(PLANES)
@settings(max_examples=60)
def test_the_search_without_a_change_is_qtunings_and_the_first_level_on_target_keeps_the_same(plane):
    ppl, ent, num_keep = (*(torch.tensor(axis, dtype=torch.float32) for axis in plane[:2]), plane[2])
    expected = qtuning.bisect_thresholds(ppl, ent, num_keep)
    assert choices.search()(ppl, ent, num_keep) == expected
    stopped = choices.search(stops=True)(ppl, ent, num_keep)
    kept, same = (
        choices.in_any(qtuning.assign_quadrants(ppl, ent, cut), qtuning.KEEP_QUADRANTS) for cut in (expected, stopped)
    )
    assert kept.equal(same)


def test_on_target_the_upper_bound_falls_below_it_and_the_last_midpoint_may_pass_it():
    ppl, ent = torch.arange(8.0), -torch.arange(8.0)  # only Q2 and Q4 hold samples: 0 below 1/8, then 2, 4, 6

    def num_kept(num_keep, **how):
        quadrant = qtuning.assign_quadrants(ppl, ent, choices.search(**how)(ppl, ent, num_keep))
        return int(choices.in_any(quadrant, qtuning.KEEP_QUADRANTS).sum())

    assert (num_kept(2), num_kept(2, lowers=True)) == (2, 0)
    assert (num_kept(1), num_kept(1, last=True, halvings=1)) == (0, 2)


def test_the_twentieth_midpoint_lies_below_every_level_at_which_the_sets_of_8_samples_change():
    for k in (1, 2, 3):
        low, high = 0.0, 0.49
        for _ in range(20):
            alpha = (low + high) / 2
            low, high = (low, alpha) if alpha > k / 8 else (alpha, high)
        assert low == alpha


def test_an_interval_to_a_half_meets_the_levels_of_8_samples_exactly_and_one_to_049_never():
    for upper, met in ((0.5, True), (0.49, False)):
        levels = {upper * place / 2**halving for halving in range(1, 10) for place in range(2**halving)}
        assert ({1 / 8, 2 / 8, 3 / 8} <= levels) == met
        assert bool({1 / 8, 2 / 8, 3 / 8} & levels) == met


def test_rounding_keeps_more_where_the_share_is_not_whole():
    ppl, ent = torch.rand(8, generator=torch.Generator().manual_seed(0)), torch.arange(8.0)
    for ratio, floor, nearest in ((0.125, 1, 1), (0.2, 1, 2), (0.35, 2, 3)):
        assert train.prune_samples(ppl, ent, ratio).keep.sum() == floor
        with choices.rounded():
            assert train.prune_samples(ppl, ent, ratio).keep.sum() == nearest
    with choices.rounded():
        assert train.prune_samples(ppl, ent, 0.0625).keep.sum() == 1


def test_only_q1_and_q3_fill_up_where_asked(log):
    for decided in (DEFAULT, BY_SLUG["C7-Q1-Q3"]):
        sources = set()
        with decided.patch():
            for rows, ways in log.steps:
                cfg = choices.config_of(decided)
                for chosen in train.choose_samples(cfg, 1, 32, *train.on_plane(ways[""], rows)):
                    sources |= set(chosen.quadrant[chosen.backfilled].tolist())
        assert (0 in sources) == (decided is DEFAULT)
        assert sources & {1, 3} and sources <= {0, 1, 3}


def test_a_step_is_normalised_by_its_own_ends():
    ppl, ent = torch.rand(2, 32, generator=torch.Generator().manual_seed(0))
    seen = []
    with choices.normalised_over_the_step():
        inner = qtuning.supp_score

        def supp_score(part_ppl, part_ent):
            seen.append((part_ppl, part_ent, inner(part_ppl, part_ent)))
            return seen[-1][2]

        with choices.patch.multiple(qtuning, supp_score=supp_score):
            train.choose_samples(choices.config_of(DEFAULT), 1, 32, ppl, ent)
    whole = qtuning.supp_score(ppl, ent)
    torch.testing.assert_close(torch.cat([scores for _, _, scores in seen]), whole)


# ------------------------------------------------------------------------------------------------ tokens


def test_a_budget_over_the_batch_takes_all_of_a_long_row_and_nothing_of_a_short_one():
    lengths = [4, 40, 20, 20, 20, 20, 20, 16]  # 160 tokens: 10 may survive of the batch
    samples = [Sample(str(i), [0] * (n + 1), [0] * (n + 1)) for i, n in enumerate(lengths)]
    scores = {i: train.RowScores(1.0, 1.0, torch.zeros(3)) for i in range(8)}
    cfg = choices.config_of(DEFAULT)
    kept = []
    with choices.batch_budget():
        train.row_scores(list(range(8)), scores, cfg, None, samples, 0, 1, None)
        for place, num in ((0, 3), (1, 25), (7, 10)):
            mask, nll = torch.ones(1, num).bool(), torch.arange(float(num))[None]
            kept.append(int(train.choose_tokens(cfg, 1, place, mask, nll).sum()))
    assert kept == [3, 0, 4]  # 4 tokens fit; 40 - 10 is more than the 25; 16 - 10 go of 10


def test_a_missing_neighbour_counts_0():
    ppl, mask = torch.full((1, 5), 2.0, dtype=torch.float64), torch.tensor([[False, True, True, True, False]])
    with choices.no_neighbour_is_0():
        assert qtuning.smoothed_token_score(ppl, mask, 0.5).tolist() == [[0, 2, 3, 2, 0]]
    assert qtuning.smoothed_token_score(ppl, mask, 0.5).tolist() == [[0, 3, 3, 3, 0]]


def test_drop_is_train_pys_flag():
    assert choices.config_of(BY_SLUG["C13-drop"]).token_pruning == "drop"
    assert choices.config_of(DEFAULT).token_pruning == "mask"


# -------------------------------------------------------------------------------- scores, loss, EOS, mode


@pytest.fixture(scope="module")
def small(rows):
    return Transformer.from_pretrained(BASE), load_samples(rows, TextTokenizer.from_pretrained(BASE))[0][:8]


def test_entropy_is_the_mean_over_prompt_and_answer_and_perplexity_as_before(small):
    model, samples = small
    nll, entropy, mask = train.score(model, samples, 64, nullcontext())
    with choices.entropy_over_all_tokens():
        same_nll, wider, same_mask = train.score(model, samples, 64, nullcontext())
    assert same_mask.equal(mask)
    torch.testing.assert_close(same_nll, nll)
    found = qtuning.sample_entropy(wider, mask)
    for row, sample in enumerate(samples):
        logits = model(torch.tensor([sample.input_ids[:-1]]))[0]
        expected = torch.distributions.Categorical(logits=logits).entropy().mean()
        torch.testing.assert_close(found[row], expected.detach())
    assert not torch.allclose(found, qtuning.sample_entropy(entropy, mask), rtol=0.01)


@pytest.mark.parametrize("over_answer", [True, False])
def test_the_loss_is_the_mean_over_rows_of_each_rows_own(small, over_answer):
    model, samples = small
    samples = [dataclasses.replace(samples[0], labels=[*[-100] * 12, *samples[0].labels[12:]]), *samples[1:4]]
    packed = passes.pack(samples, "cpu")
    num = [train.num_answer_tokens(sample) for sample in samples]
    _, nll = passes.TokenLoss(model)(*packed)
    with choices.mean_of_means(over_answer):
        loss, _ = passes.TokenLoss(model)(*packed, torch.ones(sum(num)))
    sizes = num if over_answer else packed[2]
    parts = [part.sum() / size for part, size in zip(nll.split(num), sizes, strict=True)]
    torch.testing.assert_close(loss / sum(num), torch.stack(parts).mean())
    assert len(set(num)) > 1


def test_eos_is_left_out_of_training_rows_and_not_of_held_ones(checkpoint, rows):
    tokenizer = TextTokenizer.from_pretrained(checkpoint)
    cfg = dataclasses.replace(choices.config_of(DEFAULT), eval_every=1, eval_sets=f"rows={rows}", model=str(checkpoint))
    with choices.eos_not_trained():
        trained, _ = train.load_samples(rows, tokenizer, cfg.template, cfg.max_length)
        _, held = train.read_eval_sets(cfg, tokenizer)["rows"]
    for ours, theirs in zip(trained, held, strict=True):
        assert theirs.labels[-1] == theirs.input_ids[-1] == tokenizer.eos_id
        assert ours.labels == [*theirs.labels[:-1], IGNORE_INDEX]


def test_a_model_without_dropout_scores_alike_in_both_modes_and_one_with_it_does_not(small):
    model, samples = small
    assert choices.mode_difference(model, samples) == 0
    assert model.eval().training is False
    hidden_states = model.hidden_states
    model.hidden_states = lambda *a, **k: torch.nn.functional.dropout(hidden_states(*a, **k), 0.1, model.training)
    try:
        assert choices.mode_difference(model, samples) > 0
    finally:
        del model.hidden_states


# ---------------------------------------------------------------------------------------- logs and results


def test_the_default_decides_on_a_record_what_the_run_itself_decided(checkpoint, rows, tmp_path):
    argv = ["--model", str(checkpoint), "--data", str(rows), "--out", str(tmp_path / "run"), "--lora-rank", "0"]
    argv += ["--lr", "1e-2", "--grad-accum", "1", "--epochs", "1", "--log-selection"]
    choices.record(argv, tmp_path / "scores.pt")
    log = choices.recorded(tmp_path / "scores.pt", train.resolve(train.parse_config(argv)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "selection.jsonl").read_text().splitlines()]
    decided = choices.decide(log, DEFAULT)
    for line, found, (rows_, _) in zip(lines, decided, log.steps, strict=True):
        for place, sample in enumerate(line["samples"]):
            assert (sample["kept"], sample["trimmed"]) == (bool(found.keep[place]), bool(found.trim[place]))
            if sample["kept"]:
                answer = torch.tensor(log.samples[rows_[place]].labels[1:]) != IGNORE_INDEX
                assert sample["tokens"] == "".join(str(int(kept)) for kept in found.tokens[place][answer])
    from_log = choices.logged(tmp_path / "run")
    assert all(a.keep.equal(b.keep) for a, b in zip(decided, choices.decide(from_log, DEFAULT), strict=True))
    without_scores = {v.slug for v in VARIANTS if v.choice in choices.RESCORED} | {"C11-batch-budget"}
    assert choices.offline(from_log).keys() == BY_SLUG.keys() - without_scores

    lines[0]["samples"][0]["kept"] ^= True
    (tmp_path / "run" / "selection.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="what step 1 kept is not what its scores give"):
        choices.logged(tmp_path / "run")


def made_up(seed, gsm8k):
    held = {"rows_nll": [1.0, 0.5 + seed / 100]}
    scores = {
        "scores": {"arc": 50.0 + seed, "gsm8k": gsm8k + seed},
        "n": {"arc": 300, "gsm8k": 300},
        "held": held,
        "machine": {"commit": "0"},
    }
    return {**scores, "samples_kept": 500, "answer_tokens_kept": 5000}


def test_results_have_a_row_a_variant_and_short_cells(log, tmp_path):
    made = {DEFAULT.slug: [made_up(seed, 30.0) for seed in range(3)]}
    made |= {v.slug: [made_up(seed, 45.25) for seed in range(3)] for v in VARIANTS if v.trains}
    results = choices.describe(made, {"embedded": choices.offline(log)}, 0.0)
    choices.write(tmp_path / "choices.json", results)
    assert read_json(tmp_path / "choices.json") == json.loads(json.dumps(results))
    text = (tmp_path / "choices.json").read_text()
    assert sum('"choice":' in line for line in text.splitlines()) == len(VARIANTS)
    assert len(choices.table(results).splitlines()) == 2 + len(VARIANTS)
    for number in range(1, 19):
        assert len(choices.cell(results, f"C{number}")) <= 100
    assert re.fullmatch(r"\d+ % other samples; GSM8K \+15\.2 ± 2\.3", choices.cell(results, "C4"))
    assert re.fullmatch(
        r"16 / 32: \d+ / \d+ % other samples; GSM8K (\+15\.2 ± 2\.3( / |$)){2}", choices.cell(results, "C14")
    )
    assert choices.cell(results, "C2").endswith("/ 0 % other samples; GSM8K +15.2 ± 2.3 / same")
    assert choices.cell(results, "C6") == "keeps the same"
    assert choices.cell(results, "C18") == "scores in train() and eval() differ by 0 (no dropout)"
    with pytest.raises(ValueError, match="expected one of C1 to C18, got 'C19'"):
        choices.cell(results, "C19")


def test_a_variant_of_one_seed_has_the_noise_of_the_tests_items_however_many_seeds_the_default_has():
    made = {DEFAULT.slug: [made_up(seed, 30.0) for seed in range(3)], "C1-to-0-5": [made_up(0, 31.0)]}
    line = choices.describe(made, {}, 0.0)["variants"][0]
    of_items = round(proportions_margin((31.0, 300), (30.0, 300)), 4)
    assert line["gains"]["gsm8k"] == {"mean": 1.0, "margin": of_items}
    assert line["gains"]["held"]["margin"] is None
    assert choices.shown(line, "gsm8k") == f"+1.0 ± {of_items:.1f} ~"


def test_without_runs_there_are_shares_and_no_gains(log):
    results = choices.describe({}, {"embedded": choices.offline(log, VARIANTS[:1])}, 0.0)
    assert "GSM8K" not in choices.cell(results, "C1")
    assert choices.table(results)
