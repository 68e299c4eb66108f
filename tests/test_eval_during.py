"""eval/during.py: scores while training are those of the model of that step, and training does not notice them."""

import json
import math
import shutil
from contextlib import nullcontext

import pytest
import torch
from train_runs import ROOT, assert_same_weights, refused, run

import qtuning
from data.sft import load_samples
from data.tokenizer import TextTokenizer
from eval import arc, during
from model import Transformer


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
def held_out(tmp_path_factory):
    """Rows of another form and of different lengths, to be scored while training."""
    path = tmp_path_factory.mktemp("held_out") / "rows.json"
    texts = [{"prompt": f"And {i}?", "response": f"Red on hill {i % 4}. " * (1 + i % 5)} for i in range(12)]
    path.write_text(json.dumps(texts))
    return path


def test_sets_are_scored_while_training_as_their_scorer_scores_the_model_of_that_step(
    checkpoint, rows, held_out, tmp_path
):
    """On two ranks as on one; the weights are those of a run without them."""
    tiny = ROOT / "data" / "tiny" / "arc_test.jsonl"
    form = ["--template", "alpaca", "--max-length", "110", "--pass-tokens", "200"]
    sets = ["--eval-every", "2", "--eval-sets", f"rows={held_out},arc={tiny}", "--eval-limit", "9", *form]
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
    samples = load_samples(held_out, tokenizer, "alpaca", 110)[0]
    for name, metrics in (("scored", scored), ("ranks", ranks)):
        model = Transformer.from_pretrained(tmp_path / name / "model")
        for key, value in scored_from_scratch(model, samples[:9]).items():
            assert [f"eval_{key}" in step for step in metrics] == [False, True, True]
            assert metrics[-1][f"eval_{key}"] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("pass_tokens", [1, 200, 100_000])
def test_the_scores_of_held_out_rows_are_those_of_full_logits(checkpoint, held_out, pass_tokens):
    model = Transformer.from_pretrained(checkpoint)
    samples = load_samples(held_out, TextTokenizer.from_pretrained(checkpoint))[0]
    found = during.rows_scores(model, samples, pass_tokens, nullcontext())
    assert found == pytest.approx(scored_from_scratch(model, samples), rel=1e-5)


def test_held_out_rows_with_a_token_that_the_model_does_not_embed_are_refused(checkpoint, rows, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    tokenizer = TextTokenizer.from_pretrained(folder).tokenizer
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    held_out = tmp_path / "rows.json"
    held_out.write_text(json.dumps([{"prompt": "And <|new|>?", "response": "Red."}]))
    flags = ["--eval-every", 1, "--eval-sets", f"rows={held_out}", "--max-steps", 1, "--template", "default"]
    message = refused(capsys, "--model", folder, "--data", rows, "--out", tmp_path / "run", *flags)
    assert f"{held_out}: the token '<|new|>' has id {size}, but the model embeds {size} tokens" in message
