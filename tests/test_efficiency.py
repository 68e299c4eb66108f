"""reproduce/efficiency.py and growth.py: the FLOPs of their formula against counted ones, and small real runs."""

import argparse
import json
from contextlib import nullcontext

import pytest
import torch
from test_model import small_config
from torch.utils.flop_counter import FlopCounterMode

import passes
from data.sft import Sample
from model import Transformer, add_lora
from reproduce import efficiency, growth, packing

ROWS = [Sample(str(i), list(range(length)), [-100, -100, *range(2, length)]) for i, length in enumerate((5, 9, 17))]


@pytest.mark.parametrize("forward", ["kept", "made again", "reused"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_formula_counts_the_products_of_a_step(tune, forward):
    config = small_config(hidden_size=96, intermediate_size=192, num_hidden_layers=6, head_dim=24, vocab_size=200)
    model = Transformer(config)
    if tune == "lora":
        add_lora(model, 1, 2)
    model.activation_checkpointing = forward == "made again"
    outputs, known = {}, None
    ops = torch.ops.aten

    def in_place(y, a, b, **options):  # addmm_, which torch's counter does not know
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={ops.addmm_: in_place}) as counter:
        passes.score(model, ROWS, 1000, nullcontext(), outputs)
        if forward == "reused":
            known = [torch.cat(parts) for parts in zip(outputs[0], outputs[1], strict=True)]
        passes.TokenLoss(model)(*passes.pack(ROWS[:2], "cpu"), known=known)[0].backward()
    counted = sum(counter.get_flop_counts()["Global"].get(op, 0) for op in (ops.mm, ops.addmm, ops.addmm_))
    tokens = [sum(len(row.input_ids) - 1 for row in rows) for rows in (ROWS, ROWS[:2])]
    answers = [sum(len(row.input_ids) - 2 for row in rows) for rows in (ROWS, ROWS[:2])]
    metrics = {"tokens_scored": tokens[0], "tokens_trained": tokens[1], "answer_tokens_kept": answers[1]}
    expected = efficiency.flops(config, metrics, answers[0], tune, forward == "made again")
    # LoRA has its own small products, and the first layer hands no gradient on to a frozen embedding
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


def test_an_exponent_is_the_power_that_made_the_points():
    xs = [1, 2, 4, 8]
    assert growth.exponent(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)


def test_a_point_of_growth_is_measured():
    point = growth.measure({"length": 8, "rows": 2, "vocabulary": 50, "layers": 1, "width": 192}, repeats=1)
    assert point["seconds"] > 0
    assert point["bytes"] > 0


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
