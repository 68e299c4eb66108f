"""reproduce/choices.py and readings.py: each variant is another reading of its choice, and nothing else."""

import dataclasses
import inspect
import json
import random
import re
from contextlib import nullcontext

import pytest
import strategies
import torch
from conftest import BASE
from hypothesis import given, settings
from hypothesis import strategies as st
from train_runs import assert_same_weights, run, selected

import qtuning
import train
from data.sft import Sample, load_samples
from data.tokenizer import TextTokenizer
from model import Transformer
from pruners import SAMPLE_PRUNERS, TOKEN_PRUNERS
from qtuning import IGNORE_INDEX
from reproduce import choices, presets, readings
from reproduce.noise import proportions_margin
from reproduce.readings import DEFAULT, VARIANTS
from training.files import read_json, read_jsonl, write_json
from training.head import TokenLoss
from training.packing import pack
from training.ranks import Ranks
from training.scoring import RowScore, Scorer, answer_mask, score

BY_SLUG = {variant.slug: variant for variant in VARIANTS}
SAME = {"samples": 0.0, "trimming": 0.0, "tokens": 0.0, "kept_over_target": 1.0}
# What each variant changes first, at 12.5 % of prune batches of 8. The rest decides the same there.
CHANGES = {
    "samples": "C1-to-0-5 C2-lowers-upper C3-10-halvings C3-Alg-1 C4-interpolated C5-other-edges C7-Q1-Q3 C8-step "
    "C14-16 C14-32 C15-all-tokens C17-EOS-untrained",
    "trimming": "C9-all-whole C9-all-trimmed",
    "tokens": "C10-reversed C11-ceil C11-batch-budget C12-0",
    None: "C2-stops C3-20-halvings C6-rounded C13-drop C16-answer C16-row",
}
PARTS = [(slug, part) for part, slugs in CHANGES.items() for slug in slugs.split()]


@pytest.fixture(autouse=True)
def registered():
    """The tables of pruners with the variants' entries, and without them after the test."""
    before = dict(SAMPLE_PRUNERS), dict(TOKEN_PRUNERS)
    readings.register()
    yield before
    for table, entries in zip((SAMPLE_PRUNERS, TOKEN_PRUNERS), before, strict=True):
        table.clear()
        table.update(entries)


def plain_scorer(samples, scores, all_tokens=()):
    """A Scorer that has all scores and needs no model."""
    scorer = Scorer(None, samples, Ranks(), choices.config_of(DEFAULT), None, {})
    scorer.scores = dict(enumerate(scores))
    scorer.computed[readings.entropy_of_all_tokens] = dict(enumerate(all_tokens))
    return scorer


@pytest.fixture(scope="module")
def steps():
    """Ten steps as a run would have them, each a scorer for every change of rows: PPL and entropy are correlated."""
    draw, found = random.Random(0), []
    for _ in range(10):
        samples, scores, shorter, all_tokens = [], [], [], []
        for row in range(32):
            num_prompt, num_answer = draw.randint(2, 30), draw.randint(3, 20)
            ids = [draw.randrange(100) for _ in range(num_prompt + num_answer)]
            samples.append(Sample(str(row), ids, [IGNORE_INDEX] * num_prompt + ids[num_prompt:]))
            nll = torch.tensor([draw.expovariate(1) for _ in range(num_answer)])
            ent = nll.mean().item() + draw.gauss(0, 0.5)
            scores.append(RowScore(nll.mean().exp().item(), ent, nll))
            shorter.append(RowScore(nll[:-1].mean().exp().item(), ent, nll[:-1]))
            all_tokens.append(torch.tensor(ent + draw.gauss(0, 1)))
        without_eos = plain_scorer(readings.without_eos(samples), shorter)
        found.append({None: plain_scorer(samples, scores, all_tokens), readings.without_eos: without_eos})
    return found


def decided(steps, variant, **changes):
    return [choices.decide(variant, scorers[variant.change_rows], **changes) for scorers in steps]


# ------------------------------------------------------------------------------------------- variants


def test_a_variant_is_an_entry_a_flag_a_loss_or_a_change_of_rows(registered):
    samples, tokens = registered
    for variant in VARIANTS:
        other_loss = variant.make_loss is not TokenLoss
        assert variant.flags or variant.samples or variant.tokens or variant.change_rows or other_loss
        assert variant.slug not in {*samples, *tokens}
        config = choices.config_of(variant)
        assert config.sample_pruner == (variant.slug if variant.samples else "qtuning")
        assert config.token_pruner == (variant.slug if variant.tokens else "qtuning")
    assert {name: SAMPLE_PRUNERS[name] for name in samples} == samples  # no other entry has changed
    assert {name: TOKEN_PRUNERS[name] for name in tokens} == tokens


def test_a_step_of_the_embedded_default_is_one_prune_batch_of_the_variants_that_need_it(tmp_path):
    for slug in ("C8-step", "C11-batch-budget"):
        flags = [*presets.tiny(tmp_path).settings, *BY_SLUG[slug].flags]
        config = train.parse_config(["--model", "-", "--data", "-", *flags])
        assert config.prune_batch == config.micro_batch * config.grad_accum


def test_nothing_is_patched():
    for module in (choices, readings):
        source = inspect.getsource(module)
        assert not re.search(r"mock|setattr|monkeypatch", source)
        assert not re.search(r"^ *(qtuning|train|pruners|model)\.\w+ = ", source, re.MULTILINE)


def test_every_choice_but_the_last_has_a_variant_and_every_variant_its_folder():
    assert list(dict.fromkeys(variant.choice for variant in VARIANTS)) == [f"C{n}" for n in range(1, 18)]
    assert len(BY_SLUG) == len(VARIANTS) == len(PARTS)


def test_the_committed_results_have_a_row_for_every_variant():
    found = read_json(choices.RESULTS / "choices.json")["variants"]
    assert [(line["choice"], line["name"], line["changes"]) for line in found] == [
        (variant.choice, variant.name, variant.changes) for variant in VARIANTS
    ]
    assert all((line["seeds"] > 0) == variant.trains for line, variant in zip(found, VARIANTS, strict=True))


def test_the_default_differs_from_itself_in_nothing(steps):
    default = decided(steps, DEFAULT)
    assert choices.compare(default, decided(steps, DEFAULT)) == SAME
    assert sum(int(d.keep.sum()) for d in default) == 10 * 4


@pytest.mark.parametrize("slug, part", PARTS)
def test_a_variant_changes_what_it_is_about(steps, slug, part):
    found = choices.compare(decided(steps, DEFAULT), decided(steps, BY_SLUG[slug]))
    if part is None:
        assert found == SAME
        return
    assert found[part] > 0
    if part != "samples":
        assert found["samples"] == 0
    assert (found["kept_over_target"] > 1) == (slug in ("C3-10-halvings", "C3-Alg-1"))


def test_what_differs_is_counted_by_hand():
    def made(keep, trim, tokens):
        masks = torch.tensor([[c == "1" for c in text] for text in tokens])
        return choices.Decided(torch.tensor(keep), torch.tensor(trim), masks)

    a = made([True, True, False], [True, False, False], ["1100", "1111", "0000"])
    b = made([True, True, True], [True, True, False], ["0110", "1100", "1111"])
    assert choices.compare([a], [b]) == {
        "samples": pytest.approx(1 / 3, abs=1e-4),
        "trimming": 0.5,
        "tokens": 0.5,  # 1 + 2 shared of 2 + 4
        "kept_over_target": 1.5,
    }


# ----------------------------------------------------------------------------------- C1 to C9: samples

PLANES = st.integers(1, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 6), min_size=n, max_size=n)] * 2, st.integers(1, n))
)


@given(strategies.planes_and_ratios())
def test_stage_1_without_a_change_is_qtunings(plane_and_ratio):
    (ppl, ent), ratio = plane_and_ratio
    expected = qtuning.prune_samples(ppl, ent, float(ratio))
    found = readings.stage_1(ppl, ent, qtuning.num_samples_to_keep(float(ratio), len(ppl)))
    for name in ("keep", "quadrant", "backfilled", "prune_tokens"):
        assert getattr(found, name).equal(getattr(expected, name)), name
    assert found.thresholds == expected.thresholds


@given(PLANES)
@settings(max_examples=60)
def test_the_first_level_on_target_keeps_the_same(plane):
    ppl, ent, num_keep = (*(torch.tensor(axis, dtype=torch.float32) for axis in plane[:2]), plane[2])
    expected, stopped = (readings.stage_1(ppl, ent, num_keep, stops=stops) for stops in (False, True))
    assert expected.thresholds == qtuning.bisect_thresholds(ppl, ent, num_keep)
    assert stopped.keep.equal(expected.keep)


def test_on_target_the_upper_bound_falls_below_it_and_the_last_midpoint_may_pass_it():
    ppl, ent = torch.arange(8.0), -torch.arange(8.0)  # only Q2 and Q4 hold samples: 0 below 1/8, then 2, 4, 6

    def num_kept(num_keep, **how):
        quadrant = readings.stage_1(ppl, ent, num_keep, **how).quadrant
        return int(readings.in_any(quadrant, qtuning.KEEP_QUADRANTS).sum())

    assert (num_kept(2), num_kept(2, lowers=True)) == (2, 0)
    assert (num_kept(1), num_kept(1, last=True, halvings=1)) == (0, 2)
    assert readings.stage_1(ppl, ent, 1, last=True, halvings=1).keep.sum() == 2  # nothing takes the second one away


def test_the_twentieth_midpoint_lies_below_every_level_at_which_the_sets_of_8_samples_change():
    for k in (1, 2, 3):
        lower = readings.search(lambda level, k=k: 2 if level > k / 8 else 1, 1)
        assert lower == readings.search(lambda level, k=k: 2 if level > k / 8 else 1, 1, last=True)


def test_an_interval_to_a_half_meets_the_levels_of_8_samples_exactly_and_one_to_049_never():
    for upper, met in ((0.5, True), (0.49, False)):
        levels = {upper * place / 2**halving for halving in range(1, 10) for place in range(2**halving)}
        assert ({1 / 8, 2 / 8, 3 / 8} <= levels) == met
        assert bool({1 / 8, 2 / 8, 3 / 8} & levels) == met


def test_high_includes_its_edge_and_low_does_not_with_the_other_edges():
    cut = qtuning.Thresholds(0.25, 0.25, ppl_low=1.0, ppl_high=3.0, ent_low=1.0, ent_high=3.0)
    ppl, ent = torch.tensor([3.0, 3.0, 1.0, 0.0, 0.0]), torch.tensor([3.0, 0.0, 3.0, 0.0, 3.0])
    assert qtuning.assign_quadrants(ppl, ent, cut).tolist() == [0, 0, 0, 3, 0]
    assert readings.other_edges(ppl, ent, cut).tolist() == [1, 2, 0, 3, 4]


def test_rounding_keeps_more_where_the_share_is_not_whole():
    pruner = BY_SLUG["C6-rounded"].samples
    ppl, ent = torch.rand(8, generator=torch.Generator().manual_seed(0)), torch.arange(8.0)
    for ratio, floor, nearest in ((0.125, 1, 1), (0.2, 1, 2), (0.35, 2, 3), (0.0625, None, 1)):
        cfg = dataclasses.replace(choices.config_of(DEFAULT), sample_keep_ratio=ratio)
        assert pruner.choose(cfg, None, 8, ppl, ent).keep.sum() == nearest
        if floor:
            assert qtuning.prune_samples(ppl, ent, ratio).keep.sum() == floor


def test_only_q1_and_q3_fill_up_where_asked(steps):
    for variant in (DEFAULT, BY_SLUG["C7-Q1-Q3"]):
        pruner, sources = variant.samples or SAMPLE_PRUNERS["qtuning"], set()
        for scorers in steps:
            ppl, ent = (scorers[None].per_sample(need, range(32)) for need in ("ppl", "ent"))
            for part in (slice(start, start + 8) for start in range(0, 32, 8)):
                chosen = pruner.choose(choices.config_of(variant), None, 8, ppl[part], ent[part])
                sources |= set(chosen.quadrant[chosen.backfilled].tolist())
        assert (0 in sources) == (variant is DEFAULT)
        assert sources & {1, 3} and sources <= {0, 1, 3}


def test_too_few_fill_up_where_q1_and_q3_hold_too_few():
    ppl, ent = torch.arange(8.0), -torch.arange(8.0)  # only Q2 and Q4 hold samples
    assert readings.stage_1(ppl, ent, 3).keep.sum() == 3
    assert readings.stage_1(ppl, ent, 3, fill_from=(1, 3)).keep.sum() == 2


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_a_step_is_normalised_by_its_own_ends(seed):
    ppl, ent = torch.rand(2, 32, generator=torch.Generator().manual_seed(seed))
    cfg = choices.config_of(BY_SLUG["C8-step"])
    found = readings.normalised_over_the_step(cfg, None, 32, ppl, ent)
    supp = qtuning.supp_score(ppl, ent)  # over the whole step
    for start in range(0, 32, 8):
        part = slice(start, start + 8)
        alone = qtuning.prune_samples(ppl[part], ent[part], cfg.sample_keep_ratio)
        assert found.quadrant[part].equal(alone.quadrant)  # the quadrants are those of the micro-batch
        assert found.keep[part].sum() == 1
        filled, left = found.backfilled[part], ~found.keep[part]
        assert not filled.any() or supp[part][filled].min() >= supp[part][left].max()


# --------------------------------------------------------------------------------- C11 and C12: tokens


@given(strategies.token_batches(), strategies.keep_ratios(), strategies.smoothings)
def test_stage_2_without_a_change_is_qtunings(batch, ratio, smoothing):
    nll, _, loss_mask = batch
    cfg = dataclasses.replace(choices.config_of(DEFAULT), token_keep_ratio=float(ratio), smoothing=smoothing)
    expected = qtuning.prune_tokens(qtuning.token_perplexity(nll), loss_mask, float(ratio), smoothing)
    assert readings.tokens().decide(cfg, None, loss_mask, nll).equal(expected)


def test_the_ceiling_keeps_one_more_where_the_share_is_not_whole():
    assert [readings.ceiling(0.5, n) for n in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert readings.ceiling(0.29, 100) == 29  # 28.999999999999996


def test_a_budget_over_the_batch_takes_all_of_a_long_row_and_nothing_of_a_short_one():
    lengths = torch.tensor([4, 40, 20, 20, 20, 20, 20, 16])  # 160 tokens: 10 may survive of the batch
    cfg, budget = choices.config_of(BY_SLUG["C11-batch-budget"]), readings.BatchBudget()
    kept = []
    for place, num in ((0, 3), (1, 25), (7, 10)):
        ppl, ent = torch.full((8,), 2.0), torch.full((8,), 2.0)
        ppl[place], ent[place] = 9.0, 1.0  # Q2: kept and trimmed
        chosen = budget.choose(cfg, None, 8, ppl, ent, lengths)
        assert chosen.prune_tokens.nonzero().tolist() == [[place]]
        mask, nll = torch.ones(1, num).bool(), torch.arange(float(num))[None]
        kept.append(int(budget.decide(cfg, None, mask, nll).sum()))
    assert kept == [3, 0, 4]  # 4 tokens fit; 40 - 10 is more than the 25; 16 - 10 go of 10


def test_a_batch_budget_without_one_kept_sample_a_batch_is_refused(steps):
    with pytest.raises(ValueError, match="one kept sample in each micro-batch"):
        decided(steps, BY_SLUG["C11-batch-budget"], sample_keep_ratio=0.5)


def test_a_missing_neighbour_counts_0():
    ppl, mask = torch.full((1, 5), 2.0, dtype=torch.float64), torch.tensor([[False, True, True, True, False]])
    assert readings.no_neighbour_is_0(ppl, mask, 0.5).tolist() == [[0, 2, 3, 2, 0]]
    assert qtuning.smoothed_token_score(ppl, mask, 0.5).tolist() == [[0, 3, 3, 3, 0]]


def test_drop_is_train_pys_flag():
    assert choices.config_of(BY_SLUG["C13-drop"]).token_pruning == "drop"
    assert choices.config_of(DEFAULT).token_pruning == "mask"


# -------------------------------------------------------------------- C15 to C18: scores, loss, EOS, mode


@pytest.fixture(scope="module")
def small(rows):
    return Transformer.from_pretrained(BASE), load_samples(rows, TextTokenizer.from_pretrained(BASE))[0][:8]


def test_entropy_of_all_tokens_is_the_mean_over_prompt_and_answer(small):
    model, samples = small
    found = torch.stack(readings.entropy_of_all_tokens(model, samples, 64, nullcontext()))
    for row, sample in enumerate(samples):
        logits = model(torch.tensor([sample.input_ids[:-1]]))[0]
        expected = torch.distributions.Categorical(logits=logits).entropy().mean()
        torch.testing.assert_close(found[row], expected.detach())
    _, entropy, mask = score(model, samples, 64, nullcontext())
    assert not torch.allclose(found, qtuning.sample_entropy(entropy, mask), rtol=0.01)


@pytest.mark.parametrize("over_answer", [True, False])
def test_the_loss_is_the_mean_over_rows_of_each_rows_own(small, over_answer):
    model, samples = small
    samples = [dataclasses.replace(samples[0], labels=[*[-100] * 12, *samples[0].labels[12:]]), *samples[1:4]]
    packed = pack(samples, "cpu")
    num = [int(answer_mask(sample).sum()) for sample in samples]
    _, nll = TokenLoss(model)(*packed)
    loss, _ = readings.MeanOfMeans(model, over_answer=over_answer)(*packed, torch.ones(sum(num)))
    sizes = num if over_answer else packed[2]
    parts = [part.sum() / size for part, size in zip(nll.split(num), sizes, strict=True)]
    torch.testing.assert_close(loss / sum(num), torch.stack(parts).mean())
    assert len(set(num)) > 1


def test_a_model_without_dropout_has_the_same_scores_in_both_modes_and_one_with_it_does_not(small):
    model, samples = small
    assert readings.mode_difference(model, samples) == 0
    assert model.training is False
    hidden_states = model.hidden_states
    model.hidden_states = lambda *a, **k: torch.nn.functional.dropout(hidden_states(*a, **k), 0.1, model.training)
    try:
        assert readings.mode_difference(model, samples) > 0
    finally:
        del model.hidden_states


# --------------------------------------------------------------------------------------- real, small runs


@pytest.fixture(scope="module")
def scale(tmp_path_factory):
    """One step of 32 rows of the embedded default, two items a test, 20 held-out rows."""
    folder = tmp_path_factory.mktemp("scale")
    preset = presets.tiny(folder)
    heldout = folder / "heldout.json"
    write_json(heldout, presets.rows_of(preset.heldout)[:20])
    tests = {task: (module, (*flags, "--limit", "2")) for task, (module, flags) in presets.TINY_TESTS.items()}
    settings = (*preset.settings, "--max-steps", "1", "--grad-accum", "4")
    preset = dataclasses.replace(preset, heldout=heldout, losses={}, settings=settings, tests={"WizardLM": tests})
    preset.make_files(preset, set())
    return preset


def test_variants_train_with_their_pruner_loss_and_rows(scale, tmp_path):
    slugs = ("default", "C9-all-trimmed", "C16-answer", "C17-EOS-untrained")
    made = {slug: choices.make(scale, BY_SLUG.get(slug, DEFAULT), 1, tmp_path) for slug in slugs}
    folders = {slug: next((tmp_path / slug).glob("*/metrics.jsonl")).parent for slug in slugs}
    default, *others = ({**read_jsonl(folders[slug] / "metrics.jsonl")[0]} for slug in slugs)
    trimmed, mean_of_means, no_eos = others
    assert read_json(folders["C9-all-trimmed"] / "config.json")["sample_pruner"] == "C9-all-trimmed"
    assert trimmed["backfilled_q4"] == 0 < default["backfilled_q4"]
    assert trimmed["answer_tokens_kept"] < default["answer_tokens_kept"]
    assert mean_of_means["answer_tokens_kept"] == default["answer_tokens_kept"]
    assert mean_of_means["loss"] != default["loss"]
    assert no_eos["answer_tokens_seen"] == default["answer_tokens_seen"] - 32  # one of each row
    # A held-out row's own EOS stays a token of its loss.
    untuned = choices.running.run_of(scale, "embedded", "WizardLM", None, 0)
    before = choices.running.rows_measures(scale, untuned, tmp_path, scale.heldout)["rows_nll"]
    assert all(abs(run["held"]["rows_nll"][-1] - before) < 0.05 for run in made.values())
    assert choices.make(scale, DEFAULT, 1, tmp_path) == made["default"]  # from its summary


def test_offline_decides_what_a_run_decides_and_leaves_the_run_as_it_is(checkpoint, rows, tmp_path):
    argv = ["--model", str(checkpoint), "--data", str(rows), "--lora-rank", "0", "--lr", "1e-2", "--grad-accum", "1"]
    argv += ["--epochs", "1", "--log-selection"]
    found = choices.offline([*argv, "--out", str(tmp_path / "offline")])
    train.main([*argv, "--out", str(tmp_path / "run")])
    assert_same_weights(tmp_path / "run", tmp_path / "offline", rtol=0, atol=0)
    assert selected(tmp_path / "run") == selected(tmp_path / "offline")

    assert found.keys() == BY_SLUG.keys()
    of_log = choices.offline_log(tmp_path / "run")
    need_more = {v.slug for v in VARIANTS if v.choice in ("C15", "C17")} | {"C11-batch-budget"}
    assert of_log.keys() == BY_SLUG.keys() - need_more
    for slug, shares in of_log.items():  # the same from the log alone, without its tokens
        assert shares == found[slug] | {"tokens": None}
    assert found["C9-all-trimmed"]["trimming"] > 0 and found["C10-reversed"]["tokens"] > 0

    path = tmp_path / "run" / "selection.jsonl"
    lines = read_jsonl(path)
    lines[0]["samples"][0]["kept"] ^= True
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="step 1, place 0 on: kept differs from what its scores give"):
        choices.offline_log(tmp_path / "run")


def test_a_log_of_another_prune_batch_is_refused(checkpoint, rows, tmp_path):
    run(checkpoint, rows, tmp_path / "run", "--log-selection", "--max-steps", "1")
    with pytest.raises(ValueError, match="expected a run with --prune-batch 8, got 4"):
        choices.offline_log(tmp_path / "run")


# --------------------------------------------------------------------------------------------- results


def made_up(seed, gsm8k, loss=0.5):
    held = {"rows_nll": [1.0, loss + seed / 100]}
    scores = {
        "flags": [],
        "scores": {"arc": 50.0 + seed, "gsm8k": gsm8k + seed},
        "n": {"arc": 300, "gsm8k": 300},
        "held": held,
        "machine": {"commit": "0"},
    }
    return {**scores, "samples_kept": 500, "answer_tokens_kept": 5000}


def shares_of(steps, variants=VARIANTS):
    default = decided(steps, DEFAULT)
    return {"embedded": {v.slug: choices.compare(default, decided(steps, v)) for v in variants}}


def test_results_have_a_row_a_variant_and_short_cells(steps, tmp_path):
    made = {DEFAULT.slug: [made_up(seed, 30.0) for seed in range(3)]}
    made |= {v.slug: [made_up(seed, 45.25, 0.4) for seed in range(3)] for v in VARIANTS if v.trains}
    results = choices.describe(made, shares_of(steps), 0.0)
    choices.running.write_by_line(tmp_path / "choices.json", results, "variants")
    assert read_json(tmp_path / "choices.json") == json.loads(json.dumps(results))
    text = (tmp_path / "choices.json").read_text()
    assert sum('"choice":' in line for line in text.splitlines()) == len(VARIANTS)
    assert len(choices.table(results).splitlines()) == 2 + len(VARIANTS)
    for number in range(1, 19):
        assert len(choices.cell(results, f"C{number}")) <= 100
    assert re.fullmatch(r"\d+ % other samples; gain \+0\.100 ± 0\.023", choices.cell(results, "C4"))
    assert re.fullmatch(
        r"16 / 32: \d+ / \d+ % other samples; gain (\+0\.100 ± 0\.023( / |$)){2}", choices.cell(results, "C14")
    )
    assert choices.cell(results, "C2").endswith("/ 0 % other samples; gain +0.100 ± 0.023 / same")
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


def test_without_runs_there_are_shares_and_no_gains(steps):
    results = choices.describe({}, shares_of(steps, VARIANTS[:1]), 0.0)
    assert "gain" not in choices.cell(results, "C1")
    assert choices.table(results)
