"""pruners/__init__.py: the two tables, how a method plugs in, and the budget that every method meets in a run."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from train_runs import kept_ids, refused, run, selected, weights

import pruners
import train
from data.sft import load_samples
from data.tokenizer import TextTokenizer
from model import Transformer
from pruners import COMPUTED, SAMPLE_PRUNERS, TOKEN_PRUNERS, SamplePruner, TokenPruner, chosen_rows, score_rows
from pruners.samples import every_sample, top_rows
from pruners.side_files import sample_values
from training.ranks import Ranks
from training.scoring import Scorer, answer_mask

MOMENTS = ("choose", "rows", "draw")
AHEAD = [name for name, pruner in SAMPLE_PRUNERS.items() if pruner.rows or pruner.draw]  # these choose before a step


@pytest.fixture(scope="module")
def side(checkpoint, rows, tmp_path_factory):
    """Every side file, by the commands that write them."""
    folder = tmp_path_factory.mktemp("side")
    other = Transformer.from_pretrained(checkpoint)
    with torch.no_grad():
        for number, parameter in enumerate(other.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    other.save_pretrained(folder / "other")
    run(checkpoint, rows, folder / "warmup", "--lora-rank", "2", "--sample-pruner", "none", "--max-steps", "2")
    extra = {"less": ["--warmup", folder / "warmup", "--targets", rows], "reference_nll": ["--model", folder / "other"]}
    for what in ("base_nll", "reference_nll", *score_rows.SCALES, "cond_gain", "embedding", "less"):
        argv = [what, "--model", checkpoint, "--data", rows, "--scores", folder, *extra.get(what, [])]
        score_rows.main([str(arg) for arg in argv])
    return folder


@pytest.fixture(scope="module")
def samples(checkpoint, rows):
    return load_samples(rows, TextTokenizer.from_pretrained(checkpoint))[0]


def config(checkpoint, rows, *flags):
    return train.resolve(train.parse_config(["--model", str(checkpoint), "--data", str(rows), *map(str, flags)]))


# -------------------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("name", SAMPLE_PRUNERS)
def test_a_sample_pruner_has_at_most_one_moment_and_needs_that_it_can_be_given_then(name):
    pruner = SAMPLE_PRUNERS[name]
    moments = [moment for moment in MOMENTS if getattr(pruner, moment)]
    assert len(moments) <= 1
    if moments != ["choose"]:  # no model has scored the rows yet
        assert all(isinstance(need, str) and need not in COMPUTED for need in pruner.needs)
    if moments != ["choose"] and moments != ["rows"]:
        assert not pruner.needs


def test_both_tables_begin_with_the_method_and_with_no_pruning():
    for table in (SAMPLE_PRUNERS, TOKEN_PRUNERS):
        assert list(table)[:2] == ["qtuning", "none"]
    assert SAMPLE_PRUNERS["none"] == SamplePruner() and TOKEN_PRUNERS["none"] == TokenPruner()


@pytest.mark.parametrize("name", [name for name, pruner in SAMPLE_PRUNERS.items() if pruner.choose])
def test_every_need_of_a_pruner_that_chooses_in_a_step_is_answered_with_a_value_per_row(
    checkpoint, rows, samples, side, name
):
    cfg, picked = config(checkpoint, rows, "--sample-pruner", name, "--scores", side), [3, 0, 17]
    scorer = scorer_of(checkpoint, cfg, samples)
    for need in SAMPLE_PRUNERS[name].needs:
        scores = scorer.per_sample(need, picked)
        assert scores.shape == (3,) and scores.isfinite().all()


@pytest.mark.parametrize("name", [name for name, pruner in SAMPLE_PRUNERS.items() if pruner.rows])
def test_every_need_of_a_pruner_that_chooses_rows_once_is_answered_with_a_value_per_row(rows, samples, side, name):
    for need in SAMPLE_PRUNERS[name].needs:
        values = sample_values(need, samples, str(rows), str(side))
        assert len(values) == len(samples)
        assert all(value.isfinite().all() and value.dim() == (need == "embedding") for value in values)


@pytest.mark.parametrize("name", TOKEN_PRUNERS)
def test_every_need_of_a_token_pruner_is_answered_with_a_value_per_answer_token(checkpoint, rows, samples, side, name):
    cfg, picked = config(checkpoint, rows, "--token-pruner", name, "--scores", side), [3, 0, 17]
    scorer = scorer_of(checkpoint, cfg, samples)
    for need in TOKEN_PRUNERS[name].needs:
        scores, mask = scorer.per_token(need, picked), scorer.loss_mask(picked)
        assert scores.shape == mask.shape and scores.isfinite().all()
        assert not scores[~mask].any() and scores[mask].any()


def scorer_of(checkpoint, cfg, samples):
    side_values = pruners.read_side_values(cfg, samples, range(len(samples)))
    return Scorer(Transformer.from_pretrained(checkpoint), samples, Ranks(), cfg, nullcontext(), side_values)


# -------------------------------------------------------------------------------- how a method plugs in


def with_ratings(rows, path, without=()):
    """The rows with a field "toy": their number modulo 7; some of them without it."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines = [line if i in without else {**line, "toy": i % 7} for i, line in enumerate(lines)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def highest_half(cfg, generator, size, score):
    """A toy method: keep the higher half of the scores."""
    keep = torch.zeros(size, dtype=torch.bool)
    keep[top_rows(score, size // 2)] = True
    return every_sample(size, keep)


def test_a_sample_pruner_that_needs_a_field_of_the_data_is_one_entry_and_one_function(
    checkpoint, rows, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(SAMPLE_PRUNERS, "toy", SamplePruner(("toy",), choose=highest_half))
    data = with_ratings(rows, tmp_path / "rated.jsonl")
    flags = ["--sample-pruner", "toy", "--token-pruner", "none", "--max-steps", "2", "--log-selection"]
    metrics = run(checkpoint, data, tmp_path / "run", *flags)
    assert [m["samples_kept"] for m in metrics] == [8, 8]
    assert [m["tokens_scored"] for m in metrics] == [0, 0]  # nothing asks the model
    for step in selected(tmp_path / "run"):
        assert all("ppl" not in sample for sample in step)
        for start in range(0, 16, 4):  # prune batches
            batch = [(int(sample["id"][1:]) % 7, sample["kept"]) for sample in step[start : start + 4]]
            kept, left = ([rating for rating, keep in batch if keep == kept] for kept in (True, False))
            assert len(kept) == 2 and min(kept) >= max(left)
    cut = with_ratings(rows, tmp_path / "cut.jsonl", without=[5])
    argv = ["--model", checkpoint, "--sample-pruner", "toy", "--out", tmp_path / "refused"]
    message = refused(capsys, *argv, "--data", cut)
    assert "not every row has the field 'toy'; give --scores with a toy.jsonl" in message
    (tmp_path / "toy.jsonl").write_text('{"id": "r6", "toy": 1}\n')
    message = refused(capsys, *argv, "--data", cut, "--scores", tmp_path)
    assert "--sample-pruner toy: row 'r5' lacks 'toy'" in message
    (tmp_path / "toy.jsonl").write_text('{"id": "r5", "toy": 5}\n')
    run(checkpoint, cut, tmp_path / "side", *flags, "--scores", str(tmp_path))
    assert kept_ids(tmp_path / "side") == kept_ids(tmp_path / "run")


def test_a_sample_pruner_that_needs_a_function_of_the_model_is_one_entry_and_two_functions(
    checkpoint, rows, tmp_path, monkeypatch
):
    scored = []

    def length(model, samples, pass_tokens, autocast):
        assert isinstance(model, Transformer)
        scored.extend(sample.id for sample in samples)
        return [torch.tensor(float(len(sample.input_ids))) for sample in samples]

    monkeypatch.setitem(SAMPLE_PRUNERS, "toy", SamplePruner((length,), choose=highest_half))
    flags = ["--sample-pruner", "toy", "--max-steps", "2", "--log-selection", "--reuse-scores", "2"]
    run(checkpoint, rows, tmp_path / "run", *flags)
    assert scored == [sample["id"] for step in selected(tmp_path / "run") for sample in step]


@pytest.mark.parametrize("moment", ["rows", "draw"])
def test_a_sample_pruner_that_chooses_ahead_is_one_entry_and_one_function(
    checkpoint, rows, tmp_path, monkeypatch, moment
):
    def lowest(score, num_keep):
        return top_rows(-score, num_keep)

    def every_other(row_loss, num_keep, generator):
        weights = torch.zeros(len(row_loss), dtype=torch.float64)
        weights[::2] = 1
        return weights

    entry = SamplePruner(("toy",), rows=lowest) if moment == "rows" else SamplePruner(draw=every_other)
    monkeypatch.setitem(SAMPLE_PRUNERS, "toy", entry)
    flags = ["--sample-pruner", "toy", "--max-steps", "2", "--log-selection"]
    run(checkpoint, with_ratings(rows, tmp_path / "rated.jsonl"), tmp_path / "run", *flags)
    seen = {int(name[1:]) for step in kept_ids(tmp_path / "run") for name, _ in step}
    assert len(seen) == 16
    assert all(i % 7 <= 3 if moment == "rows" else i % 2 == 0 for i in seen)


def test_a_token_pruner_is_one_entry_and_one_function(checkpoint, rows, tmp_path, monkeypatch):
    def place(model, samples, pass_tokens, autocast):
        return [torch.arange(sum(label != -100 for label in sample.labels)) + 1.0 for sample in samples]

    def first(cfg, generators, loss_mask, place):
        assert len(generators) == len(loss_mask)
        return loss_mask & (place == 1)

    monkeypatch.setitem(TOKEN_PRUNERS, "toy", TokenPruner((place,), first))
    flags = ["--sample-pruner", "random", "--token-pruner", "toy", "--max-steps", "2", "--log-selection"]
    metrics = run(checkpoint, rows, tmp_path / "run", *flags)
    assert [m["answer_tokens_kept"] for m in metrics] == [8, 8]
    assert all(tokens[0] == "1" and "1" not in tokens[1:] for step in kept_ids(tmp_path / "run") for _, tokens in step)


def test_scores_are_asked_for_trimmed_samples_alone_which_may_be_shorter_than_the_rest(samples, monkeypatch):
    """The tables of their scores are as wide as their longest answer, the mask of the step as the longest row."""
    places = sorted(range(len(samples)), key=lambda i: len(samples[i].input_ids))
    picked = [places[0], places[-1], places[1]]
    side = {"toy": {row: torch.arange(int(answer_mask(samples[row]).sum())).float() for row in picked[::2]}}
    cfg = SimpleNamespace(token_pruner="toy", seed=0, pass_tokens=1, reuse_scores=1, reuse_forward=False, shard=False)
    scorer = Scorer(None, samples, Ranks(), cfg, nullcontext(), side)
    monkeypatch.setitem(TOKEN_PRUNERS, "toy", TokenPruner(("toy",), lambda cfg, gens, mask, toy: mask & (toy > 1)))
    chosen = every_sample(3, torch.tensor([True, False, True]))
    mask, kept = scorer.loss_mask(picked), pruners.choose_tokens(cfg, 1, picked, chosen, scorer)
    assert torch.equal(kept[1], mask[1])
    for place in (0, 2):
        assert kept[place][mask[place]].tolist() == [False, False] + [True] * (int(mask[place].sum()) - 2)
        assert not kept[place][~mask[place]].any()


def test_a_step_whose_tokens_are_all_pruned_has_loss_zero_and_changes_no_weight(
    checkpoint, rows, tmp_path, monkeypatch
):
    monkeypatch.setitem(TOKEN_PRUNERS, "toy", TokenPruner(decide=lambda cfg, generators, loss_mask: loss_mask & False))
    flags = ["--sample-pruner", "random", "--token-pruner", "toy", "--max-steps", "2", "--log-selection"]
    metrics = run(checkpoint, rows, tmp_path / "run", *flags)
    assert [(m["loss"], m["grad_norm"], m["answer_tokens_kept"], m["samples_kept"]) for m in metrics] == [
        (0, 0, 0, 8)
    ] * 2
    before = Transformer.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())


# ----------------------------------------------------------------------------------------------- budgets


@given(st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.data())
@settings(max_examples=30)
def test_every_pairing_meets_its_budget_in_every_step(checkpoint, rows, side, tmp_path_factory, ratio, tokens, data):
    sample_pruner = data.draw(st.sampled_from(list(SAMPLE_PRUNERS)))
    token_pruner = data.draw(st.sampled_from(list(TOKEN_PRUNERS)))
    out = tmp_path_factory.mktemp("pair") / "run"
    flags = ["--sample-pruner", sample_pruner, "--sample-keep-ratio", str(ratio), "--max-steps", "1"]
    flags += ["--token-pruner", token_pruner, "--token-keep-ratio", str(tokens), "--log-selection"]
    (metrics,) = run(checkpoint, rows, out, *flags, "--scores", str(side))
    budget = 16 if sample_pruner == "none" else 4 * math.floor(ratio * 4)
    assert metrics["samples_kept"] == budget
    assert metrics["samples_seen"] == (budget if sample_pruner in AHEAD else 16)
    if sample_pruner != "infobatch":
        assert metrics["weight_sum"] == budget
    parts = sum(metrics[k] for k in ("kept_q2", "kept_q4", "backfilled_q2", "backfilled_q4"))
    assert parts == (metrics["samples_kept"] if sample_pruner == "qtuning" else 0)
    (step,) = selected(out)
    for sample in step:
        if not sample["kept"]:
            assert "tokens" not in sample
        elif sample["trimmed"] and token_pruner != "none":
            assert sample["tokens"].count("1") == max(1, math.floor(tokens * len(sample["tokens"]) + 1e-9))
        else:
            assert "0" not in sample["tokens"]
    assert metrics["answer_tokens_kept"] == sum(s.get("tokens", "").count("1") for s in step)


@pytest.mark.parametrize("pruner", [name for name in SAMPLE_PRUNERS if name != "none"])
def test_every_sample_pruner_takes_the_steps_and_kept_samples_of_q_tuning(checkpoint, rows, side, tmp_path, pruner):
    flags = ["--sample-pruner", pruner, "--token-pruner", "none", "--scores", str(side), "--prune-batch", "8"]
    metrics = run(checkpoint, rows, tmp_path / "run", *flags, "--max-steps", "5", "--log-selection")
    assert [(m["step"], m["samples_kept"]) for m in metrics] == [(step, 8) for step in range(1, 6)]
    seen = [name for step in kept_ids(tmp_path / "run") for name, _ in step]
    if pruner in AHEAD:  # 40 kept samples: two epochs of the same, or of new, 20 rows
        first, second = seen[:20], seen[20:]
        assert len(set(first)) == len(set(second)) == 20
        assert (set(first) == set(second)) == (pruner != "infobatch")
        assert sum(m["weight_sum"] for m in metrics) == pytest.approx(40)


def test_infobatch_weights_multiply_the_rows_token_sums(checkpoint, rows, tmp_path):
    flags = ["--sample-pruner", "infobatch", "--token-pruner", "none", "--max-steps", "1", "--log-selection"]
    (metrics,) = run(checkpoint, rows, tmp_path / "run", *flags)
    samples = {s.id: s for s in load_samples(rows, TextTokenizer.from_pretrained(checkpoint))[0]}
    model, total, count = Transformer.from_pretrained(checkpoint), 0.0, 0
    (step,) = selected(tmp_path / "run")
    for chosen in step:
        ids, labels = (torch.tensor(getattr(samples[chosen["id"]], name)) for name in ("input_ids", "labels"))
        with torch.no_grad():
            nll = F.cross_entropy(model(ids[None, :-1])[0], labels[1:], ignore_index=-100, reduction="sum")
        total, count = total + chosen["weight"] * nll.item(), count + int((labels[1:] != -100).sum())
    assert len({chosen["weight"] for chosen in step}) == 2
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-4)


def test_rho1_at_the_base_model_keeps_what_tokencleaning_keeps_within_rows(checkpoint, rows, side, tmp_path):
    for name in ("rho1", "tokencleaning-row"):
        flags = ["--sample-pruner", "longest", "--token-pruner", name, "--scores", str(side)]
        run(checkpoint, rows, tmp_path / name, *flags, "--max-steps", "1", "--log-selection")
    assert kept_ids(tmp_path / "rho1") == kept_ids(tmp_path / "tokencleaning-row")


# --------------------------------------------------------------------------------- rows chosen before training


@pytest.mark.parametrize("pruner", ["random-static", "drop-longest", "alpagasus"])
def test_ties_between_rows_depend_on_the_seed_and_not_on_the_order_of_the_file(checkpoint, rows, tmp_path, pruner):
    lines = [{**json.loads(line), "rating": 3} for line in rows.read_text().splitlines()]
    for line in lines:
        line["output"] = "It is red."  # the same in every row
    chosen = {}
    for name, order in (("a", lines), ("b", lines[::-1])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in order))
        samples = load_samples(path, TextTokenizer.from_pretrained(checkpoint))[0]
        for seed in (0, 1):
            cfg = config(checkpoint, path, "--sample-pruner", pruner, "--seed", seed)
            picked, note = chosen_rows(cfg, samples, 5)
            assert picked == sorted(picked)
            chosen[name, seed] = {samples[i].id for i in picked}
            if pruner != "random-static":
                assert note == f"{pruner} chose 5 rows: 5 of the 40 that share the last place"
    assert chosen["a", 0] == chosen["b", 0] != chosen["a", 1] == chosen["b", 1]


def test_a_choice_without_ties_at_the_last_place_mentions_none(checkpoint, rows, samples, tmp_path):
    """Nor does a draw, which ranks nothing: rows of one length on both sides of it are no tie."""
    lines = [{**json.loads(line), "rating": i} for i, line in enumerate(rows.read_text().splitlines())]
    path = tmp_path / "rated.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for pruner in ("alpagasus", "random-static"):
        picked, note = chosen_rows(config(checkpoint, path, "--sample-pruner", pruner), samples, 5)
        assert note == f"{pruner} chose 5 rows"
        assert (picked == [35, 36, 37, 38, 39]) == (pruner == "alpagasus")


def test_missing_scores_are_refused_by_name(checkpoint, rows, tmp_path, capsys):
    flags = ["--model", checkpoint, "--data", rows, "--out", tmp_path / "run", "--micro-batch", 4]
    flags += ["--sample-keep-ratio", 0.5, "--max-steps", 1, "--lora-rank", 0]
    assert "give --scores with a rating.jsonl" in refused(capsys, *flags, "--sample-pruner", "alpagasus")
    assert "needs --scores, a folder of side files" in refused(capsys, *flags, "--token-pruner", "rho1")
    scores = tmp_path / "scores"
    scores.mkdir()
    message = refused(capsys, *flags, "--sample-pruner", "alpagasus", "--scores", scores)
    assert "rating.jsonl: not found; `python -m pruners.score_rows rating` writes it" in message
    (scores / "rating.jsonl").write_text("".join(f'{{"id": "r{i}", "rating": {i % 5}}}\n' for i in range(30)))
    message = refused(capsys, *flags, "--sample-pruner", "alpagasus", "--scores", scores)
    assert "10 of 40 rows lack a score, the first is 'r30' without 'rating'" in message
    for values, got in (("[1.0, 2.0]", "2"), ("[1.0, NaN]", "one not finite")):
        (scores / "reference_nll.jsonl").write_text(f'{{"id": "r0", "reference_nll": {values}}}\n')
        message = refused(capsys, *flags, "--token-pruner", "rho1", "--scores", scores)
        assert message.endswith(f"values for row 'r0', got {got}")
    assert not (tmp_path / "run").exists()
