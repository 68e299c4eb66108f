"""train.py: the loop against plain SFT written out by hand, ranks, resuming, budgets, and wrong input."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import qtuning
import score_rows
import train
from baselines import every_sample, random_samples, random_tokens
from data.sft import Sample, load_samples, stream_order
from data.tokenizer import TextTokenizer
from eval import arc
from model import Transformer, load_adapter

ROOT = Path(train.__file__).parent


def run(checkpoint, rows, out, *flags, ranks=1):
    """Run train.py in this process, or under torchrun; returns metrics and the run folder."""
    argv = ["--model", str(checkpoint), "--data", str(rows), "--out", str(out), "--lora-rank", "0", "--lr", "1e-2"]
    argv += ["--micro-batch", "4", "--sample-keep-ratio", "0.5", *flags]
    if ranks == 1:
        train.main(argv)
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run([*launch, str(ROOT / "train.py"), *argv], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


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


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def assert_same_weights(a, b, **tolerance):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


def kept_ids(out):
    steps = [json.loads(line) for line in (out / "selection.jsonl").read_text().splitlines()]
    return [[(s["id"], s.get("tokens")) for s in step["samples"] if s["kept"]] for step in steps]


def plain_sft(checkpoint, samples, orders, total_steps):
    """Supervised fine-tuning with nothing clever: one row at a time, full logits, mean over the step's tokens."""
    model = Transformer.from_pretrained(checkpoint)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for step, order in enumerate(orders):
        nll, count = 0.0, 0
        for i in order:
            ids, labels = torch.tensor(samples[i].input_ids), torch.tensor(samples[i].labels)
            logits = model(ids[None, :-1])[0]
            nll = nll + F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            count += int((labels[1:] != -100).sum())
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / total_steps))
        optimizer.zero_grad()
        (nll / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(nll.item() / count)
    return model, losses


# --------------------------------------------------------------------------- the loop, against plain SFT


@pytest.mark.parametrize(
    "flags",
    [
        ["none", "none", "1"],
        ["qtuning", "none", "1.0"],
        ["random", "qtuning", "1.0"],
        ["longest", "fastv", "1.0"],
        ["infobatch", "ppl-keep-high", "1.0"],
    ],
)
def test_keeping_everything_is_plain_sft(checkpoint, rows, tmp_path, flags):
    samples, token = load_samples(rows, TextTokenizer.from_pretrained(checkpoint))[0], ["--token-keep-ratio", "1"]
    names = ["--sample-pruner", flags[0], "--token-pruner", flags[1], "--sample-keep-ratio", flags[2], *token]
    metrics = run(checkpoint, rows, tmp_path / "run", *names, "--max-steps", "3", "--pass-tokens", "64")
    orders = [stream_order(40, 16 * step, 16 * step + 16, 0) for step in range(3)]
    model, losses = plain_sft(checkpoint, samples, orders, total_steps=3 * 40 // 16)
    assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=1e-4)
    ours = weights(tmp_path / "run")
    for name, parameter in model.state_dict().items():
        if name in ours:
            torch.testing.assert_close(ours[name], parameter, rtol=1e-3, atol=2e-4)


def test_drop_trains_on_the_shortened_rows_as_plain_sft_would(checkpoint, rows, tmp_path):
    flags = ["--token-pruning", "drop", "--max-steps", "1", "--log-selection"]
    metrics = run(checkpoint, rows, tmp_path / "drop", *flags)
    by_id = {s.id: s for s in load_samples(rows, TextTokenizer.from_pretrained(checkpoint))[0]}
    short = []
    for name, tokens in kept_ids(tmp_path / "drop")[0]:
        sample, digits = by_id[name], iter(tokens)
        pairs = [
            (token, label)
            for token, label in zip(sample.input_ids, sample.labels, strict=True)
            if label == -100 or next(digits) == "1"
        ]
        short.append(Sample(name, [token for token, _ in pairs], [label for _, label in pairs]))
    assert sum(len(s.input_ids) for s in short) < sum(len(by_id[s.id].input_ids) for s in short)
    model, losses = plain_sft(checkpoint, short, [range(len(short))], total_steps=3 * 40 // 16)
    assert metrics[0]["loss"] == pytest.approx(losses[0], rel=1e-4)
    ours = weights(tmp_path / "drop")
    torch.testing.assert_close(ours["model.norm.weight"], model.state_dict()["model.norm.weight"], rtol=1e-3, atol=2e-4)


def test_the_number_of_passes_changes_nothing(checkpoint, rows, tmp_path):
    for name, tokens in (("many", "1"), ("one", "100000")):
        run(checkpoint, rows, tmp_path / name, "--pass-tokens", tokens, "--max-steps", "3", "--log-selection")
    assert kept_ids(tmp_path / "many") == kept_ids(tmp_path / "one")
    assert_same_weights(tmp_path / "many", tmp_path / "one", rtol=1e-3, atol=2e-4)


def test_activation_checkpointing_changes_nothing(checkpoint, rows, tmp_path):
    for name, flags in (("plain", []), ("again", ["--activation-checkpointing"])):
        run(checkpoint, rows, tmp_path / name, *flags, "--max-steps", "2", "--log-selection")
    assert kept_ids(tmp_path / "plain") == kept_ids(tmp_path / "again")
    assert_same_weights(tmp_path / "plain", tmp_path / "again", rtol=0, atol=0)


@pytest.mark.parametrize("lora_rank", ["0", "4"])
def test_training_on_what_scoring_left_changes_nothing_and_on_two_ranks_neither(checkpoint, rows, tmp_path, lora_rank):
    again = ["--activation-checkpointing", "--max-steps", "2", "--log-selection", "--lora-rank", lora_rank]
    plain = run(checkpoint, rows, tmp_path / "plain", *again)
    reused = run(checkpoint, rows, tmp_path / "reused", *again, "--reuse-forward", "--pass-tokens", "120")
    two = [*again, "--grad-accum", "2", "--reuse-forward"]
    ranks = run(checkpoint, rows, tmp_path / "ranks", *two, ranks=2)
    for metrics, name in ((reused, "reused"), (ranks, "ranks")):
        assert kept_ids(tmp_path / "plain") == kept_ids(tmp_path / name)
        assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in plain], rel=1e-5)
        assert [m["grad_norm"] for m in metrics] == pytest.approx([m["grad_norm"] for m in plain], rel=1e-4)
    if lora_rank == "0":
        assert_same_weights(tmp_path / "plain", tmp_path / "reused", rtol=1e-3, atol=2e-4)
        assert_same_weights(tmp_path / "plain", tmp_path / "ranks", rtol=1e-3, atol=2e-4)


def scored_from_scratch(model, samples):
    """rows_nll, rows_ppl and rows_ent, row by row from full logits."""
    nlls, ppls, ents = [], [], []
    for sample in samples:
        ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels[1:]])
        with torch.no_grad():
            nll, entropy = qtuning.token_nll_and_entropy(model(ids[:, :-1]), labels)
        nlls += nll[labels != -100].tolist()
        ppls.append(math.exp(nll[labels != -100].mean().item()))
        ents.append(entropy[labels != -100].mean().item())
    return {"rows_nll": sum(nlls) / len(nlls), "rows_ppl": sum(ppls) / len(ppls), "rows_ent": sum(ents) / len(ents)}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Rows of another form and of unlike lengths, to be scored while training."""
    path = tmp_path_factory.mktemp("held") / "held.json"
    texts = [{"prompt": f"And {i}?", "response": f"Red on hill {i % 4}. " * (1 + i % 5)} for i in range(12)]
    path.write_text(json.dumps(texts))
    return path


def test_sets_are_scored_while_training_as_their_scorer_scores_the_model_of_that_step(checkpoint, rows, held, tmp_path):
    """On two ranks as on one; and training goes on as if they were not."""
    tiny = ROOT / "data" / "tiny" / "arc_test.jsonl"
    form = ["--template", "alpaca", "--max-length", "110", "--pass-tokens", "200"]
    sets = ["--eval-every", "2", "--eval-sets", f"rows={held},arc={tiny}", "--eval-limit", "9", *form]
    scored = run(checkpoint, rows, tmp_path / "scored", *sets, "--max-steps", "3")
    assert [list(metrics).count("eval_arc") for metrics in scored] == [0, 1, 1]
    tokenizer = TextTokenizer.from_pretrained(checkpoint)
    model = Transformer.from_pretrained(tmp_path / "scored" / "model").eval()
    expected = arc.evaluate(model, tokenizer, arc.read_items(tiny)[:9])["score"]
    assert scored[-1]["eval_arc"] == pytest.approx(expected)
    run(checkpoint, rows, tmp_path / "plain", *form, "--max-steps", "3")
    assert_same_weights(tmp_path / "scored", tmp_path / "plain", rtol=0, atol=0)
    ranks = run(checkpoint, rows, tmp_path / "ranks", *sets, "--grad-accum", "2", "--max-steps", "3", ranks=2)
    assert [metrics.get("eval_arc") for metrics in ranks] == [metrics.get("eval_arc") for metrics in scored]
    samples = load_samples(held, tokenizer, "alpaca", 110)[0]
    for name, metrics in (("scored", scored), ("ranks", ranks)):
        model = Transformer.from_pretrained(tmp_path / name / "model")
        for key, value in scored_from_scratch(model, samples[:9]).items():
            assert [f"eval_{key}" in step for step in metrics] == [False, True, True]
            assert metrics[-1][f"eval_{key}"] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("pass_tokens", [1, 200, 100_000])
def test_the_scores_of_held_rows_are_those_of_full_logits(checkpoint, held, pass_tokens):
    model = Transformer.from_pretrained(checkpoint)
    samples = load_samples(held, TextTokenizer.from_pretrained(checkpoint))[0]
    found = train.rows_scores(model, samples, pass_tokens, nullcontext())
    assert found == pytest.approx(scored_from_scratch(model, samples), rel=1e-5)


def test_reused_scores_are_made_on_every_second_visit_and_on_two_ranks_as_on_one(checkpoint, rows, tmp_path):
    flags = ["--reuse-scores", "2", "--check-scores", "3", "--log-selection", "--epochs", "4", "--grad-accum", "10"]
    alone = run(checkpoint, rows, tmp_path / "1", *flags)  # 40 rows: an epoch is one step
    assert [metrics["tokens_scored"] > 0 for metrics in alone] == [True, False, True, False]
    assert [metrics.get("kept_agreement") for metrics in alone] == [None, None, 1.0, None]  # scored anew just then
    run(checkpoint, rows, tmp_path / "2", *flags[:-1], "5", ranks=2)
    assert kept_ids(tmp_path / "1") == kept_ids(tmp_path / "2")
    exact = run(checkpoint, rows, tmp_path / "exact", *flags[2:])
    assert exact[0]["loss"] == alone[0]["loss"]
    assert all("kept_agreement" not in metrics for metrics in exact)


@pytest.mark.parametrize("lora_rank", ["0", "4"])
def test_scoring_in_bf16_says_how_far_it_agrees_with_fp32(checkpoint, rows, tmp_path, lora_rank):
    flags = ["--max-steps", "2", "--log-selection", "--lora-rank", lora_rank]
    metrics = run(checkpoint, rows, tmp_path / "run", *flags, "--score-bf16", "--check-scores", "1")
    assert all(0.5 <= step["kept_agreement"] <= 1 for step in metrics)
    exact = run(checkpoint, rows, tmp_path / "exact", *flags)
    rough = run(checkpoint, rows, tmp_path / "rough", *flags, "--score-bf16")
    scores = [
        json.loads((tmp_path / name / "selection.jsonl").read_text().splitlines()[0]) for name in ("exact", "rough")
    ]
    ppl = [[sample["ppl"] for sample in step["samples"]] for step in scores]
    assert ppl[0] != ppl[1]
    assert ppl[0] == pytest.approx(ppl[1], rel=0.05)
    assert len(exact) == len(rough)


def test_the_run_makes_the_choices_of_prune_batch(checkpoint, rows, tmp_path):
    run(checkpoint, rows, tmp_path / "run", "--max-steps", "1", "--log-selection", "--prune-batch", "8")
    samples = load_samples(rows, TextTokenizer.from_pretrained(checkpoint))[0]
    model = Transformer.from_pretrained(checkpoint)
    order, kept = stream_order(40, 0, 16, 0), []
    for start in (0, 8):
        batch = [samples[i] for i in order[start : start + 8]]
        width = max(len(s.input_ids) for s in batch)
        ids = torch.tensor([s.input_ids + [0] * (width - len(s.input_ids)) for s in batch])
        labels = torch.tensor([s.labels + [-100] * (width - len(s.labels)) for s in batch])[:, 1:]
        with torch.no_grad():
            nll, entropy = qtuning.token_nll_and_entropy(model(ids[:, :-1]), labels)
        pruned = qtuning.prune_batch(nll, entropy, labels != -100, 0.5, 0.5)
        for b in pruned.samples.keep.nonzero()[:, 0].tolist():
            digits = "".join(str(int(kept)) for kept in pruned.token_mask[b][labels[b] != -100])
            kept.append((batch[b].id, digits))
    assert kept_ids(tmp_path / "run")[0] == kept


def test_quadrants_are_kept_and_trimmed_as_asked(checkpoint, rows, tmp_path):
    flags = ["--max-steps", "2", "--prune-batch", "16", "--log-selection"]
    parts = ("kept_q2", "kept_q4", "backfilled_q2", "backfilled_q4")
    are_trimmed = {"2": {True, False}, "": {False}, "2,4": {True}}
    for name, keep, trim in (
        ("default", "2,4", "2"),
        ("harmful", "1,2,4", ""),
        ("misconceptions", "2", "2,4"),
        ("calibration", "4", ""),
    ):
        asked = [] if name == "default" else ["--keep-quadrants", keep, "--trim-quadrants", trim]
        metrics = run(checkpoint, rows, tmp_path / name, *flags, *asked)
        steps = [json.loads(line)["samples"] for line in (tmp_path / name / "selection.jsonl").read_text().splitlines()]
        for counts, samples in zip(metrics, steps, strict=True):
            own = [s["quadrant"] for s in samples if s["kept"] and not s["backfilled"]]
            assert set(own) <= set(map(int, keep.split(",")))
            assert (1 in own) == (name == "harmful")
            assert [counts["kept_q2"], counts["kept_q4"]] == [own.count(2), own.count(4)]
            assert counts["samples_kept"] == 8 == sum(counts[part] for part in parts) + own.count(1)
            assert {s["trimmed"] for s in samples if s["kept"]} == are_trimmed[trim]


def test_the_seed_alone_sets_the_order_of_rows(checkpoint, rows, tmp_path):
    seen = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run(checkpoint, rows, tmp_path / name, "--max-steps", "2", "--seed", seed, "--log-selection")
        steps = (tmp_path / name / "selection.jsonl").read_text().splitlines()
        seen.append([sample["id"] for step in steps for sample in json.loads(step)["samples"]])
    assert seen[0] == seen[1] != seen[2]
    assert len(set(seen[0])) == 32  # two steps of the 40 rows: no row twice within an epoch


def test_lora_runs_write_an_adapter_that_has_learnt(checkpoint, rows, tmp_path):
    metrics = run(checkpoint, rows, tmp_path / "run", "--lora-rank", "2", "--sample-pruner", "none", "--epochs", "6")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    model, tokens = Transformer.from_pretrained(checkpoint), torch.tensor([[5, 6, 7]])
    before = model(tokens)
    load_adapter(model, tmp_path / "run" / "adapter")
    assert not torch.allclose(model(tokens), before, atol=1e-3)


# ------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_global_batch_on_more_ranks_keeps_the_same_samples_and_gives_the_same_weights(
    checkpoint, rows, tmp_path, ranks
):
    # prune batches of 8 span two ranks; keeping 1 of 8 leaves some ranks nothing to train on
    flags = ["--sample-keep-ratio", "0.125", "--prune-batch", "8", "--max-steps", "3", "--log-selection"]
    alone = run(checkpoint, rows, tmp_path / "1", *flags, "--grad-accum", "4")
    together = run(checkpoint, rows, tmp_path / "n", *flags, "--grad-accum", str(4 // ranks), ranks=ranks)
    assert kept_ids(tmp_path / "1") == kept_ids(tmp_path / "n")
    for a, b in zip(alone, together, strict=True):
        for key in a.keys() - {"score_s", "select_s", "train_s", "optimizer_s", "peak_mem_gib"}:
            assert b[key] == pytest.approx(a[key], rel=1e-3), key
    assert_same_weights(tmp_path / "1", tmp_path / "n", rtol=1e-3, atol=2e-4)


def test_random_pruners_draw_the_same_on_more_ranks(checkpoint, rows, tmp_path):
    flags = ["--sample-pruner", "random", "--token-pruner", "random", "--max-steps", "2", "--log-selection"]
    run(checkpoint, rows, tmp_path / "1", *flags)
    run(checkpoint, rows, tmp_path / "2", *flags, "--grad-accum", "2", ranks=2)
    assert kept_ids(tmp_path / "1") == kept_ids(tmp_path / "2")
    run(checkpoint, rows, tmp_path / "other", *flags, "--seed", "1")
    assert kept_ids(tmp_path / "1") != kept_ids(tmp_path / "other")


def test_infobatch_draws_the_same_and_learns_the_same_losses_on_more_ranks(checkpoint, rows, tmp_path):
    flags = ["--sample-pruner", "infobatch", "--token-pruner", "sparsevlm-text", "--max-steps", "6", "--log-selection"]
    run(checkpoint, rows, tmp_path / "1", *flags)
    run(checkpoint, rows, tmp_path / "2", *flags, "--grad-accum", "2", ranks=2)
    assert kept_ids(tmp_path / "1") == kept_ids(tmp_path / "2")
    assert_same_weights(tmp_path / "1", tmp_path / "2", rtol=1e-3, atol=2e-4)
    one, two = (torch.load(tmp_path / n / "checkpoint" / "state.pt")["infobatch"]["row_loss"] for n in "12")
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    assert len(one) == 40


# ----------------------------------------------------------------------------------------------- budgets


@given(st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.data())
@settings(max_examples=30)
def test_every_pairing_meets_its_budget_in_every_step(checkpoint, rows, side, tmp_path_factory, samples, tokens, data):
    sample_pruner = data.draw(st.sampled_from(train.SAMPLE_PRUNERS))
    token_pruner = data.draw(st.sampled_from(train.TOKEN_PRUNERS))
    out = tmp_path_factory.mktemp("pair") / "run"
    flags = ["--sample-pruner", sample_pruner, "--sample-keep-ratio", str(samples), "--max-steps", "1"]
    flags += ["--token-pruner", token_pruner, "--token-keep-ratio", str(tokens), "--log-selection"]
    (metrics,) = run(checkpoint, rows, out, *flags, "--scores", str(side))
    everything = sample_pruner in ("none", "infobatch-official")  # whose first epoch is whole
    budget = 16 if everything else 4 * math.floor(samples * 4)
    ahead = sample_pruner in (*train.SCORES_OF, "infobatch")
    assert metrics["samples_kept"] == budget
    assert metrics["samples_seen"] == (budget if ahead else 16)
    if sample_pruner != "infobatch":
        assert metrics["weight_sum"] == budget
    parts = sum(metrics[k] for k in ("kept_q2", "kept_q4", "backfilled_q2", "backfilled_q4"))
    assert parts == (metrics["samples_kept"] if sample_pruner == "qtuning" else 0)
    selected = json.loads((out / "selection.jsonl").read_text())["samples"]
    for sample in selected:
        if not sample["kept"]:
            assert "tokens" not in sample
        elif sample["trimmed"] and token_pruner == "tokencleaning-global":
            assert set(sample["tokens"]) <= set("01")
        elif sample["trimmed"] and token_pruner != "none":
            assert sample["tokens"].count("1") == max(1, math.floor(tokens * len(sample["tokens"]) + 1e-9))
        else:
            assert "0" not in sample["tokens"]
    assert metrics["answer_tokens_kept"] == sum(s.get("tokens", "").count("1") for s in selected)


@pytest.mark.parametrize("pruner", [p for p in train.SAMPLE_PRUNERS if p not in ("none", "infobatch-official")])
def test_every_sample_pruner_takes_the_steps_and_kept_samples_of_q_tuning(checkpoint, rows, side, tmp_path, pruner):
    flags = ["--sample-pruner", pruner, "--token-pruner", "none", "--scores", str(side), "--prune-batch", "8"]
    metrics = run(checkpoint, rows, tmp_path / "run", *flags, "--max-steps", "5", "--log-selection")
    assert [(m["step"], m["samples_kept"]) for m in metrics] == [(step, 8) for step in range(1, 6)]
    seen = [name for step in kept_ids(tmp_path / "run") for name, _ in step]
    if pruner in (*train.SCORES_OF, "infobatch"):  # 40 kept samples: two epochs of the same, or of new, 20 rows
        first, second = seen[:20], seen[20:]
        assert len(set(first)) == len(set(second)) == 20
        assert (set(first) == set(second)) == (pruner != "infobatch")
        assert sum(m["weight_sum"] for m in metrics) == pytest.approx(40)


def test_official_infobatch_leaves_out_half_of_the_rows_below_the_mean_loss(checkpoint, rows, tmp_path):
    flags = ["--sample-pruner", "infobatch-official", "--token-pruner", "none", "--log-selection"]
    metrics = run(checkpoint, rows, tmp_path / "run", *flags, "--epochs", "4")
    steps = [json.loads(line) for line in (tmp_path / "run" / "selection.jsonl").read_text().splitlines()]
    kept = [sample["kept"] for step in steps for sample in step["samples"]]
    assert all(kept[:40]) and all(kept[120:])  # no losses yet; annealing
    for epoch in (kept[40:80], kept[80:120]):
        assert 20 <= sum(epoch) < 40
    assert sum(m["weight_sum"] for m in metrics) == pytest.approx(sum(kept))  # a mean of 1 in every epoch


def test_infobatch_weights_multiply_the_rows_token_sums(checkpoint, rows, tmp_path):
    flags = ["--sample-pruner", "infobatch", "--token-pruner", "none", "--max-steps", "1", "--log-selection"]
    (metrics,) = run(checkpoint, rows, tmp_path / "run", *flags)
    samples = {s.id: s for s in load_samples(rows, TextTokenizer.from_pretrained(checkpoint))[0]}
    model, total, count = Transformer.from_pretrained(checkpoint), 0.0, 0
    (step,) = [json.loads(line) for line in (tmp_path / "run" / "selection.jsonl").read_text().splitlines()]
    for chosen in step["samples"]:
        ids, labels = (torch.tensor(getattr(samples[chosen["id"]], name)) for name in ("input_ids", "labels"))
        with torch.no_grad():
            nll = F.cross_entropy(model(ids[None, :-1])[0], labels[1:], ignore_index=-100, reduction="sum")
        total, count = total + chosen["weight"] * nll.item(), count + int((labels[1:] != -100).sum())
    assert len({chosen["weight"] for chosen in step["samples"]}) == 2
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-4)


def test_rho1_at_the_base_model_keeps_what_tokencleaning_keeps_within_rows(checkpoint, rows, side, tmp_path):
    for name in ("rho1", "tokencleaning-row"):
        flags = ["--sample-pruner", "longest", "--token-pruner", name, "--scores", str(side)]
        run(checkpoint, rows, tmp_path / name, *flags, "--max-steps", "1", "--log-selection")
    assert kept_ids(tmp_path / "rho1") == kept_ids(tmp_path / "tokencleaning-row")


def test_global_tokencleaning_keeps_its_share_of_all_rows_tokens_and_may_leave_a_row_none(
    checkpoint, rows, side, tmp_path
):
    flags = ["--sample-pruner", "none", "--token-pruner", "tokencleaning-global", "--token-keep-ratio", "0.1"]
    flags += ["--micro-batch", "5", "--grad-accum", "8"]  # one step of all rows
    (metrics,) = run(checkpoint, rows, tmp_path / "run", *flags, "--max-steps", "1", "--scores", str(side))
    assert metrics["answer_tokens_kept"] == math.floor(0.1 * metrics["answer_tokens_seen"])
    flags[5] = "0"  # a single token of all rows: most steps have none
    flags[7], flags[9] = "1", "1"
    metrics = run(checkpoint, rows, tmp_path / "one", *flags, "--max-steps", "3", "--scores", str(side))
    assert [m["loss"] for m in metrics if not m["answer_tokens_kept"]] == [0.0] * 3


@pytest.mark.parametrize("pruner", ["drop-longest", "alpagasus"])
def test_ties_between_rows_depend_on_the_seed_and_not_on_the_order_of_the_file(checkpoint, rows, tmp_path, pruner):
    lines = [{**json.loads(line), "rating": 3} for line in rows.read_text().splitlines()]
    for line in lines:
        line["output"] = "It is red."  # all alike
    chosen = {}
    for name, order in (("a", lines), ("b", lines[::-1])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in order))
        samples = load_samples(path, TextTokenizer.from_pretrained(checkpoint))[0]
        for seed in (0, 1):
            argv = ["--model", str(checkpoint), "--data", str(path), "--sample-pruner", pruner, "--seed", str(seed)]
            picked, note = train.choose_rows(train.parse_config(argv), samples)
            chosen[name, seed] = {samples[i].id for i in picked}
            assert note == f"{pruner} chose 5 rows: 5 of the 40 that share the last place"
    assert chosen["a", 0] == chosen["b", 0] != chosen["a", 1] == chosen["b", 1]


@given(st.integers(1, 20), st.floats(0, 1), st.integers(0, 5))
def test_random_pruners_keep_exactly_the_budget_and_follow_their_generator(num, ratio, seed):
    def generator():
        return torch.Generator().manual_seed(seed)

    mask = torch.rand(3, num, generator=generator()) < 0.7
    mask[:, 0] = True
    tokens = random_tokens(mask, ratio, generator())
    assert torch.equal(tokens, random_tokens(mask, ratio, generator()))
    assert not (tokens & ~mask).any()
    expected = [qtuning.num_tokens_to_keep(ratio, n) for n in mask.sum(-1).tolist()]
    assert tokens.sum(-1).tolist() == expected
    if math.floor(ratio * num + 1e-9) >= 1:
        chosen = random_samples(num, ratio, generator())
        assert chosen.keep.sum() == qtuning.num_samples_to_keep(ratio, num)
        assert torch.equal(chosen.keep, random_samples(num, ratio, generator()).keep)
        assert torch.equal(chosen.prune_tokens, chosen.keep)
    assert every_sample(num).keep.all()


def test_random_tokens_are_uniform_over_the_answer():
    mask = torch.tensor([[False, True, True, True, True, False]])
    draws = torch.stack([random_tokens(mask, 0.5, torch.Generator().manual_seed(i))[0] for i in range(2000)])
    share = draws.float().mean(0)
    assert share[[0, 5]].tolist() == [0, 0]
    assert (share[1:5] - 0.5).abs().max() < 0.05


@given(st.lists(st.booleans(), min_size=2, max_size=12), st.data())
def test_pruned_rows_keep_the_prompt_and_exactly_the_chosen_answer_tokens(is_answer, data):
    is_answer = [False, *is_answer]
    ids = list(range(100, 100 + len(is_answer)))
    sample = Sample("x", ids, [i if answer else -100 for i, answer in zip(ids, is_answer, strict=True)])
    kept = torch.tensor([answer and data.draw(st.booleans()) for answer in is_answer[1:]])
    chosen = [i for i, keep in zip(ids[1:], kept.tolist(), strict=True) if keep]
    masked = train.pruned_sample(sample, kept, "mask")
    assert masked.input_ids == ids
    assert [label for label in masked.labels if label != -100] == chosen
    dropped = train.pruned_sample(sample, kept, "drop")
    assert dropped.input_ids == [i for i, answer in zip(ids, is_answer, strict=True) if not answer or i in chosen]
    assert [label for label in dropped.labels if label != -100] == chosen
    assert all(label in (-100, i) for i, label in zip(dropped.input_ids, dropped.labels, strict=True))
    assert sample.input_ids == ids


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "pruners", [("qtuning", "qtuning"), ("random", "random"), ("infobatch", "fastv"), ("infobatch-official", "none")]
)
def test_a_resumed_run_equals_one_that_was_never_cut(checkpoint, rows, tmp_path, pruners):
    flags = ["--log-selection", "--sample-pruner", pruners[0], "--token-pruner", pruners[1]]
    whole = run(checkpoint, rows, tmp_path / "whole", "--max-steps", "4", *flags)
    run(checkpoint, rows, tmp_path / "cut", "--max-steps", "2", *flags)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:  # a third step that no checkpoint covers, cut off
        file.write('{"step": 3, "loss": 9.9}\n{"step": 4, "lo')
    resumed = run(checkpoint, rows, tmp_path / "cut", "--max-steps", "4", *flags, "--resume")
    untimed = [{k: v for k, v in m.items() if not k.endswith(("_s", "_gib"))} for m in whole]
    assert [{k: v for k, v in m.items() if not k.endswith(("_s", "_gib"))} for m in resumed] == untimed
    assert_same_weights(tmp_path / "whole", tmp_path / "cut", rtol=0, atol=0)
    assert kept_ids(tmp_path / "whole") == kept_ids(tmp_path / "cut")


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(checkpoint, rows, tmp_path):
    run(checkpoint, rows, tmp_path / "run", "--max-steps", "2")
    (tmp_path / "run" / "checkpoint" / "state.pt").unlink()
    metrics = run(checkpoint, rows, tmp_path / "run", "--max-steps", "2", "--resume")
    assert [m["step"] for m in metrics] == [1, 2]


# ------------------------------------------------------------------------------------------- wrong input


def refused(capsys, *argv):
    """The one line on stderr with which train.py refuses `argv`, exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        train.main([str(arg) for arg in argv])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: ")
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval-every", "5"], "--eval-every needs --eval-sets TASK=FILE,..."),
        (["--eval-every", "5", "--eval-sets", "mmlu=x"], "--eval-sets: expected TASK=FILE with TASK one of arc, gsm8k"),
        (["--eval-every", "5", "--eval-sets", "rows=none.json"], "none.json"),
        (["--eval-every", "0"], "--eval-every must be at least 1, got 0"),
        (["--sample-keep-ratio", 1.5], "--sample-keep-ratio must be in [0, 1], got 1.5"),
        (["--sample-keep-ratio", "nan"], "--sample-keep-ratio must be in [0, 1], got nan"),
        (["--sample-keep-ratio", 0.1], "keeps none of 8 samples; the smallest batch that would do is 10"),
        (["--token-keep-ratio", -0.1], "--token-keep-ratio must be in [0, 1], got -0.1"),
        (["--smoothing", 2], "--smoothing must be in [0, 1], got 2.0"),
        (["--keep-quadrants", ""], "--keep-quadrants must be one or more of 1,2,3,4, none of them twice, got"),
        (["--keep-quadrants", "2,5"], "--keep-quadrants must be one or more of 1,2,3,4, none of them twice, got 2,5"),
        (["--trim-quadrants", "2,2"], "--trim-quadrants must be any of 1,2,3,4, none of them twice, got 2,2"),
        (["--reuse-forward"], "--reuse-forward must be with --activation-checkpointing, --token-pruning mask and"),
        (["--reuse-forward", "--activation-checkpointing", "--token-pruning", "drop"], "--reuse-forward must be with"),
        (["--reuse-forward", "--activation-checkpointing", "--reuse-scores", "2"], "--reuse-forward must be with"),
        (["--prune-batch", 12], "--prune-batch must be a multiple of --micro-batch 8, at most the 32"),
        (["--prune-batch", 64], "at most the 32 samples of a step, got 64"),
        (["--epochs", 0.5], "0.5 epochs of 40 rows do not fill one step of 32 samples"),
        (["--lr", 0], "--lr must be above 0, got 0.0"),
        (["--micro-batch", 0], "--micro-batch must be at least 1, got 0"),
        (["--template", "nonsense"], "nonsense"),
        (["--resume"], "holds no run (no config.json)"),
    ],
)
def test_unusable_settings_are_refused_in_one_line_and_leave_nothing_behind(
    checkpoint, rows, tmp_path, capsys, flags, message
):
    out = tmp_path / "run"
    assert message in refused(capsys, "--model", checkpoint, "--data", rows, "--out", out, *flags)
    assert not out.exists()


def test_bad_rows_are_refused_by_file_and_line_or_skipped_on_request(checkpoint, rows, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    lines = rows.read_text().splitlines()
    bad.write_text("\n".join([*lines[:2], '{"instruction": "broken', *lines[2:]]) + "\n")
    assert f"{bad}:3" in refused(capsys, "--model", checkpoint, "--data", bad, "--out", tmp_path / "a")
    lines[1] = json.dumps({"instruction": "no answer?", "output": ""})
    bad.write_text("\n".join(lines) + "\n")
    assert f"{bad}:2" in refused(capsys, "--model", checkpoint, "--data", bad, "--out", tmp_path / "a")
    run(checkpoint, bad, tmp_path / "b", "--skip-bad-rows", "--max-steps", "1")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_samples"] == 39


def test_missing_scores_are_refused_by_name_or_their_rows_left_out_on_request(checkpoint, rows, side, tmp_path, capsys):
    flags = ["--model", checkpoint, "--data", rows, "--out", tmp_path / "run", "--micro-batch", 4]
    flags += ["--sample-keep-ratio", 0.5, "--max-steps", 1, "--lora-rank", 0]
    assert "give --scores with a rating.jsonl" in refused(capsys, *flags, "--sample-pruner", "alpagasus")
    assert "needs --scores, a folder of side files" in refused(capsys, *flags, "--token-pruner", "rho1")
    scores = tmp_path / "scores"
    scores.mkdir()
    message = refused(capsys, *flags, "--sample-pruner", "alpagasus", "--scores", scores)
    assert "rating.jsonl: not found; `python score_rows.py rating` writes it" in message
    (scores / "rating.jsonl").write_text("".join(f'{{"id": "r{i}", "rating": {i % 5}}}\n' for i in range(30)))
    some = ["--sample-pruner", "alpagasus", "--scores", scores]
    message = refused(capsys, *flags, *some)
    assert "10 of 40 rows lack a score, the first is 'r30' without 'rating'; --drop-unscored" in message
    train.main([str(arg) for arg in [*flags, *some, "--drop-unscored", "--log-selection"]])
    assert {int(name[1:]) for name, _ in kept_ids(tmp_path / "run")[0]} <= set(range(30))
    (scores / "reference_nll.jsonl").write_text('{"id": "r0", "reference_nll": [1.0, 2.0]}\n')
    out = ["--out", tmp_path / "other", "--token-pruner", "rho1", "--scores", scores]
    assert "values for row 'r0', got 2" in refused(capsys, *flags, *out)
    assert not (tmp_path / "other").exists()


def test_a_missing_model_or_data_file_is_refused_by_name(checkpoint, rows, tmp_path, capsys):
    assert "nowhere" in refused(capsys, "--model", tmp_path / "nowhere", "--data", rows, "--out", tmp_path / "a")
    assert "none.json" in refused(capsys, "--model", checkpoint, "--data", tmp_path / "none.json", "--out", tmp_path)
    assert "--data is required with --model" in refused(capsys, "--model", checkpoint)


def test_a_run_folder_is_not_overwritten_and_resumes_only_with_the_same_settings(checkpoint, rows, tmp_path, capsys):
    out = tmp_path / "run"
    run(checkpoint, rows, out, "--max-steps", "1")
    before = (out / "metrics.jsonl").read_text()
    flags = ["--model", checkpoint, "--data", rows, "--out", out, "--lora-rank", 0, "--lr", 1e-2]
    flags += ["--micro-batch", 4, "--sample-keep-ratio", 0.5]
    assert "holds a run already; give --resume" in refused(capsys, *flags)
    assert "has seed 0, got 1" in refused(capsys, *flags, "--resume", "--seed", 1)
    assert "takes 16 samples a step, these settings take 8" in refused(capsys, *flags, "--resume", "--grad-accum", 2)
    assert (out / "metrics.jsonl").read_text() == before


def test_a_diverged_run_ends_with_its_step_named(checkpoint, rows, tmp_path, capsys):
    flags = ["--model", checkpoint, "--data", rows, "--lora-rank", 0, "--sample-pruner", "none", "--lr", 1e30]
    message = refused(capsys, *flags, "--out", tmp_path / "run", "--micro-batch", 4)
    assert "step 2: loss is" in message or "must be finite" in message
