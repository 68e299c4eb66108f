"""reproduce/efficiency.py, packing.py and cost.py: FLOPs by formula against counted ones, and small real runs."""

import argparse
import json
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import small_config
from torch.utils.flop_counter import FlopCounterMode

import pruners
import train
from data.sft import Sample
from model import Transformer
from pruners import SAMPLE_PRUNERS, TOKEN_PRUNERS, SamplePruner, TokenPruner
from reproduce import bench, cost, efficiency, packing
from training.files import write_json
from training.head import TokenLoss
from training.lora import add_lora
from training.packing import pack
from training.scoring import score

ROWS = [Sample(str(i), list(range(length)), [-100, -100, *range(2, length)]) for i, length in enumerate((5, 9, 17))]


@pytest.mark.parametrize("forward", ["kept", "made again", "reused"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_formula_counts_the_products_of_a_step(tune, forward):
    config = small_config(hidden_size=96, intermediate_size=192, num_hidden_layers=6, head_dim=24, vocab_size=200)
    model = Transformer(config)
    if tune == "lora":
        add_lora(model, 1, 2)
    outputs, known = {}, None
    ops = torch.ops.aten

    def in_place(y, a, b, **options):  # addmm_, which torch's counter leaves out
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={ops.addmm_: in_place}) as counter:
        score(model, ROWS, 1000, nullcontext(), outputs)
        if forward == "reused":
            known = [torch.cat(parts) for parts in zip(outputs[0], outputs[1], strict=True)]
        token_loss = TokenLoss(model, checkpointing=forward == "made again")
        token_loss(*pack(ROWS[:2], "cpu"), known=known)[0].backward()
    counted = sum(counter.get_flop_counts()["Global"].get(op, 0) for op in (ops.mm, ops.addmm, ops.addmm_))
    tokens = [sum(len(row.input_ids) - 1 for row in rows) for rows in (ROWS, ROWS[:2])]
    answers = [sum(len(row.input_ids) - 2 for row in rows) for rows in (ROWS, ROWS[:2])]
    metrics = {"tokens_scored": tokens[0], "tokens_trained": tokens[1]}
    metrics |= {"answer_tokens_scored": answers[0], "answer_tokens_kept": answers[1]}
    expected = efficiency.flops(config, metrics, tune, forward == "made again")
    # LoRA has small products of its own, and a frozen embedding needs no gradient from the first layer
    assert counted == pytest.approx(expected, rel=0.05 if tune == "lora" else 0)


def test_a_small_benchmark_runs_and_measures_every_cell(checkpoint, rows, monkeypatch):
    monkeypatch.setattr(efficiency, "RATIOS", (0.5,))
    args = argparse.Namespace(model=str(checkpoint), data=str(rows), tuning=["full"], checkpointing=["on"])
    args.steps, args.repeats, args.pass_tokens, args.dtype, args.skip_bad_rows = 1, 1, None, None, False
    results = efficiency.measure(args)
    cells = {(row["method"], row["sample_keep_ratio"]): row for row in results["rows"]}
    assert len(cells) == 5
    full = cells["full", 1.0]
    assert (full["of_full"], full["bound"], full["tokens_trained"]) == (1, 1, 1)
    names = ("Q-Tuning, mask", "Q-Tuning, drop", "random, mask", "Q-Tuning, mask, reused")
    mask, drop, rival, reused = (cells[name, 0.5] for name in names)
    assert {row["samples_kept"] for row in (mask, drop, rival)} == {0.5}
    assert drop["tokens_trained"] < mask["tokens_trained"] < 1
    assert rival["bound"] < drop["bound"] < mask["bound"]
    assert reused["bound"] < mask["bound"]
    assert reused["tokens_trained"] == mask["tokens_trained"]
    assert len(efficiency.table(results).splitlines()) == 2 + len(cells)
    glance = efficiency.shares(results).splitlines()
    assert glance[0] == "|  | full, checkpointing | paper |"
    assert len(glance) == 2 + len(cells)
    assert f"| Q-Tuning, drop, 50 % | {drop['of_full']:.2f} ({drop['bound']:.2f}) | 0.89 |" in glance
    json.dumps(results)


def test_the_bound_counts_the_head_on_scored_answers_of_methods_that_score(checkpoint, monkeypatch):
    """By hand, of 100 tokens, 40 of them answers: a tenth is kept, and scored or not."""

    def run(flags, args):
        scores, full = "--sample-pruner" not in flags, "none" in flags
        kept = 1.0 if full else 0.1
        metrics = {"samples_seen": 10, "samples_kept": 10 * kept, "answer_tokens_seen": 40}
        metrics |= {"tokens_scored": 100 * scores, "tokens_trained": 100 * kept, "answer_tokens_kept": 40 * kept}
        metrics |= dict.fromkeys((*efficiency.SECONDS, "peak_mem_gib"), 1.0)
        keys = ("device_name", "world_size", "commit", "versions", "pass_tokens", "max_length")
        return [metrics], dict.fromkeys(keys) | {"model": checkpoint, "data": "-", "dtype": "fp32", "device": "cpu"}

    monkeypatch.setattr(efficiency, "RATIOS", (0.5,))
    monkeypatch.setattr(efficiency, "run", run)
    monkeypatch.setattr(efficiency, "matmul_rate", lambda dtype, device: 1e9)
    args = argparse.Namespace(tuning=["full"], checkpointing=["off"], repeats=1)
    bounds = {row["method"]: row["bound"] for row in efficiency.measure(args)["rows"]}
    model = Transformer.from_pretrained(checkpoint)
    layers = sum(p.numel() for p in model.model["layers"].parameters() if p.dim() == 2)
    head = model.config.vocab_size * model.config.hidden_size
    full, trained, scored = 3 * (100 * layers + 40 * head), 3 * (10 * layers + 4 * head), 100 * layers + 40 * head
    assert bounds["full"] == 1
    assert bounds["random, mask"] == pytest.approx(trained / full)
    assert bounds["Q-Tuning, mask"] == bounds["Q-Tuning, drop"] == pytest.approx((scored + trained) / full)


def test_packing_is_measured_on_a_checkpoint_and_its_rows(checkpoint, rows, monkeypatch):
    monkeypatch.setattr(packing, "HEADS", ((50, 8, 6),))
    args = argparse.Namespace(model=str(checkpoint), data=str(rows), rows=8, max_length=64, pass_tokens=100)
    args.repeats, args.skip_bad_rows = 1, False
    results = packing.measure(args)
    assert [row["what"] for row in results["compared"]] == [
        "scoring",
        "full data, full tuning",
        "full data, LoRA",
        "head, V 50, H 8",
    ]
    assert results["padded_tokens"] > results["tokens"] > results["answer_tokens"]
    assert max(results["compared"][-1]["largest_error"]) < 1e-4
    assert len(packing.table(results).splitlines()) == 2 + len(results["compared"])
    json.dumps(results)


def test_a_benchmark_prints_the_tables_of_a_result_file_and_measures_nothing(tmp_path, capsys):
    write_json(tmp_path / "found.json", {"number": 7})
    tables = (lambda results: f"first {results['number']}", lambda results: "second")

    def main(*argv):
        bench.main(list(argv), "reproduce.x", "", lambda parser: None, lambda args: {"number": 8}, tables)

    main("--table", str(tmp_path / "found.json"))
    assert capsys.readouterr().out == "first 7\n\nsecond\n"
    main("--out", str(tmp_path / "new" / "out.json"))
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == {"number": 8}
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main("--table", str(tmp_path / "missing.json"))
    assert capsys.readouterr().err == f"reproduce.x: {tmp_path}/missing.json: no such file\n"


# ------------------------------------------------------------------------------------------ cost of a run


def config(sample, token, **changes):
    changes = {"model": "-", "data": "-", "sample_keep_ratio": 0.25, "token_keep_ratio": 0.5, "epochs": 2.0} | changes
    return train.Config(sample_pruner=sample, token_pruner=token, **changes)


@pytest.mark.parametrize(
    ("sample", "token", "expected"),  # tokens scored, trained, in the loss; over those of all epochs
    [
        ("none", "none", (0, 1, 1)),
        ("none", "qtuning", (1, 1, 0.5)),
        ("random", "random", (0, 0.25, 0.125)),
        ("random", "ppl-keep-low", (0.25, 0.25, 0.125)),
        ("random", "fastv", (0.25, 0.25, 0.125)),
        ("longest", "tokencleaning-row", (0, 0.25, 0.125)),
        ("infobatch", "none", (0.5, 0.25, 0.25)),  # the first losses: one epoch of two
        ("infobatch", "rho1", (0.75, 0.25, 0.125)),
        ("entropy", "none", (1, 0.25, 0.25)),
        ("qtuning", "qtuning", (1, 0.25, 0.125)),
        ("entropy", "fastv", (1.25, 0.25, 0.125)),  # attention is a pass of its own
    ],
)
def test_the_cost_of_pruners_is_counted_by_hand(sample, token, expected):
    assert cost.shares(config(sample, token)) == pytest.approx(expected)


def a_need(model, samples, pass_tokens, autocast):
    raise NotImplementedError


NEEDS = st.lists(st.sampled_from(["ppl", "ent", "nll", "a_field", a_need]), unique=True, max_size=4).map(tuple)


@given(NEEDS, NEEDS, st.sampled_from(["choose", "rows", "draw", "none"]))
def test_a_new_pruner_has_a_cost_by_its_entry_alone(sample_needs, token_needs, moment):
    choose = {} if moment == "none" else {moment: lambda *given: None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SAMPLE_PRUNERS, "new", SamplePruner(sample_needs, **choose))
        patch.setitem(TOKEN_PRUNERS, "new", TokenPruner(token_needs, lambda *given: None))
        scored, kept, in_loss = cost.shares(config("new", "new"))
    assert (kept, in_loss) == ((1, 0.5) if moment == "none" else (0.25, 0.125))
    all_rows = moment == "choose" and {"ppl", "ent", "nll"} & {*sample_needs}
    of_tokens = bool({"ppl", "ent", "nll"} & {*token_needs}) and not all_rows
    passes_over_all = bool(all_rows) + (moment == "choose" and a_need in sample_needs)
    assert scored == passes_over_all + kept * (of_tokens + (a_need in token_needs)) + (0.5 if moment == "draw" else 0)


def test_every_pruner_has_a_cost():
    for sample in SAMPLE_PRUNERS:
        for token in pruners.TOKEN_PRUNERS:
            scored, kept, in_loss = cost.shares(config(sample, token))
            assert 0 <= in_loss <= kept <= 1 and scored >= 0
