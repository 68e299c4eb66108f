"""train.py: the loop against plain SFT written out by hand, ranks, resuming, and wrong input."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from train_runs import assert_same_weights, kept_ids, refused, run, selected, untimed, weights

import qtuning
import train
from data.sft import Sample, load_samples
from data.stream import stream_order
from data.tokenizer import TextTokenizer
from model import Transformer
from training.head import TokenLoss
from training.ranks import Ranks

TINY_ARC = train.TINY["eval_sets"].partition(",")[0].removeprefix("arc=")


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
def test_training_on_the_outputs_of_scoring_changes_nothing_on_one_rank_or_two(checkpoint, rows, tmp_path, lora_rank):
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


def test_reused_scores_are_made_on_every_second_visit_and_on_two_ranks_as_on_one(checkpoint, rows, tmp_path):
    flags = ["--reuse-scores", "2", "--log-selection", "--epochs", "4", "--grad-accum"]  # 40 rows: an epoch is one step
    alone = run(checkpoint, rows, tmp_path / "1", *flags, "10")
    assert [metrics["tokens_scored"] > 0 for metrics in alone] == [True, False, True, False]
    run(checkpoint, rows, tmp_path / "2", *flags, "5", ranks=2)
    assert kept_ids(tmp_path / "1") == kept_ids(tmp_path / "2")
    exact = run(checkpoint, rows, tmp_path / "exact", *flags[2:], "10")
    assert exact[0]["loss"] == alone[0]["loss"]
    assert all(metrics["tokens_scored"] == alone[0]["tokens_scored"] for metrics in exact)
    first, second = ([(s["id"], s["ppl"]) for s in step] for step in selected(tmp_path / "1")[:2])
    assert sorted(first) == sorted(second)


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
        metrics, chosen = run(checkpoint, rows, tmp_path / name, *flags, *asked), set()
        for counts, samples in zip(metrics, selected(tmp_path / name), strict=True):
            own = [s["quadrant"] for s in samples if s["kept"] and not s["backfilled"]]
            assert set(own) <= set(map(int, keep.split(",")))
            chosen |= set(own)
            assert [counts["kept_q2"], counts["kept_q4"]] == [own.count(2), own.count(4)]
            assert counts["samples_kept"] == 8 == sum(counts[part] for part in parts) + own.count(1)
            assert {s["trimmed"] for s in samples if s["kept"]} == are_trimmed[trim]
        assert chosen == set(map(int, keep.split(",")))


def test_the_seed_alone_sets_the_order_of_rows(checkpoint, rows, tmp_path):
    seen = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run(checkpoint, rows, tmp_path / name, "--max-steps", "2", "--seed", seed, "--log-selection")
        seen.append([sample["id"] for step in selected(tmp_path / name) for sample in step])
    assert seen[0] == seen[1] != seen[2]
    assert len(set(seen[0])) == 32  # two steps of the 40 rows: no row twice within an epoch


def test_an_ablation_hands_its_rows_and_its_loss_to_train_on(checkpoint, rows, tmp_path):
    class Tripled(TokenLoss):
        def forward(self, *inputs):
            loss, nll = super().forward(*inputs)
            return 3 * loss, nll

    found = []
    for make_loss in (TokenLoss, Tripled):
        out = tmp_path / make_loss.__name__
        argv = ["--model", str(checkpoint), "--data", str(rows), "--out", str(out), "--lora-rank", "0"]
        argv += ["--micro-batch", "4", "--sample-pruner", "none", "--max-steps", "1", "--log-selection"]
        cfg = train.resolve(train.parse_config(argv))
        train.train_on(cfg, Ranks(), make_loss=make_loss, change_rows=lambda samples: samples[:16])
        assert {name for name, _ in kept_ids(out)[0]} == {f"r{i}" for i in range(16)}
        found.append(json.loads((out / "metrics.jsonl").read_text()))
    plain, tripled = found
    assert tripled["loss"] == pytest.approx(3 * plain["loss"])
    assert tripled["grad_norm"] == pytest.approx(3 * plain["grad_norm"], rel=1e-4)


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
    one, two = (torch.load(tmp_path / n / "checkpoint" / "state.pt")["stream"]["row_loss"] for n in "12")
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    assert len(one) == 40


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("pruners", "reuse", "ranks"),
    [
        (("qtuning", "qtuning"), 1, 1),
        (("random", "random"), 1, 1),
        (("infobatch", "fastv"), 1, 1),
        (("qtuning", "qtuning"), 2, 1),
        (("random", "qtuning"), 2, 1),
        (("random", "qtuning"), 2, 2),
    ],
)
def test_a_resumed_run_equals_one_that_was_never_cut(checkpoint, rows, tmp_path, pruners, reuse, ranks):
    flags = ["--log-selection", "--sample-pruner", pruners[0], "--token-pruner", pruners[1]]
    flags += ["--reuse-scores", str(reuse), "--grad-accum", str(4 // ranks)]
    whole = run(checkpoint, rows, tmp_path / "whole", "--max-steps", "4", *flags, ranks=ranks)
    run(checkpoint, rows, tmp_path / "cut", "--max-steps", "2", *flags, ranks=ranks)
    carried = torch.load(tmp_path / "cut" / "checkpoint" / "state.pt")["scores"]["rows"]
    assert bool(len(carried)) == (reuse > 1)  # rows of the first two steps, which come again in the third and fourth
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:  # a third step that no checkpoint covers, cut off
        file.write('{"step": 3, "loss": 9.9}\n{"step": 4, "lo')
    resumed = run(checkpoint, rows, tmp_path / "cut", "--max-steps", "4", *flags, "--resume", ranks=ranks)
    assert untimed(resumed) == untimed(whole)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut", rtol=0, atol=0)
    assert selected(tmp_path / "whole") == selected(tmp_path / "cut")


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(checkpoint, rows, tmp_path):
    run(checkpoint, rows, tmp_path / "run", "--max-steps", "2")
    (tmp_path / "run" / "checkpoint" / "state.pt").unlink()
    metrics = run(checkpoint, rows, tmp_path / "run", "--max-steps", "2", "--resume")
    assert [m["step"] for m in metrics] == [1, 2]


# ------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval-every", "5"], "--eval-every needs --eval-sets TASK=FILE,..."),
        (["--eval-every", "5", "--eval-sets", "mmlu=x"], "--eval-sets: expected TASK=FILE with TASK one of arc, gsm8k"),
        (["--eval-every", "5", "--eval-sets", "rows=none.json"], "none.json"),
        (
            ["--eval-every", "5", "--eval-sets", "arc=" + ",arc=".join([TINY_ARC] * 2)],
            "expected each task once, got 'arc' twice",
        ),
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
    assert "step 2: the loss (" in message and "try a lower --lr" in message
