"""pruners/score_rows.py: it writes the model's values, continues after a cut, and refuses what does not fit."""

import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from train_runs import run

from data.sft import load_samples
from data.tokenizer import TextTokenizer
from model import Transformer
from pruners import score_rows
from pruners.side_files import decode_vector, encode_vector, read_side_file
from training.scoring import score


@pytest.fixture(scope="module")
def model(checkpoint):
    return Transformer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def samples(checkpoint, rows):
    return load_samples(rows, TextTokenizer.from_pretrained(checkpoint))[0]


def write(what, checkpoint, rows, folder, *flags):
    score_rows.main([what, "--model", str(checkpoint), "--data", str(rows), "--scores", str(folder), *map(str, flags)])


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        write(*argv)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("pruners.score_rows: ")
    return line


def row_nll(model, sample):
    ids, labels = torch.tensor(sample.input_ids), torch.tensor(sample.labels)
    with torch.no_grad():
        return F.cross_entropy(model(ids[None, :-1])[0], labels[1:], reduction="none")[labels[1:] != -100]


def test_nll_is_that_of_every_answer_token_and_read_back_exactly(checkpoint, rows, samples, model, tmp_path):
    write("base_nll", checkpoint, rows, tmp_path)
    found = read_side_file(tmp_path, "base_nll", torch.tensor)
    assert list(found) == [sample.id for sample in samples]
    for sample in samples[:5]:
        torch.testing.assert_close(found[sample.id], row_nll(model, sample), rtol=1e-4, atol=1e-5)
    nll, _, mask = score(model, samples, 4096, nullcontext())
    assert torch.equal(found[samples[0].id].float(), nll[0][mask[0]])


def test_conditional_gain_is_the_mean_nll_that_the_prompt_takes_away(checkpoint, rows, samples, model, tmp_path):
    write("cond_gain", checkpoint, rows, tmp_path)
    found = read_side_file(tmp_path, "cond_gain")
    for sample in samples[:3]:
        answer = [y for y in sample.labels if y != -100]
        ids = [sample.input_ids[0], *answer]
        alone = dataclasses.replace(sample, input_ids=ids, labels=[-100, *answer])
        expected = (row_nll(model, alone).mean() - row_nll(model, sample).mean()).item()
        assert found[sample.id] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_embeddings_are_means_of_the_last_hidden_states(checkpoint, rows, samples, model, tmp_path):
    write("embedding", checkpoint, rows, tmp_path)
    found = read_side_file(tmp_path, "embedding", decode_vector)
    with torch.no_grad():
        expected = model.hidden_states(torch.tensor([samples[7].input_ids]))[0].mean(0)
    torch.testing.assert_close(found[samples[7].id].float(), expected, rtol=1e-2, atol=1e-3)  # fp16
    assert torch.equal(decode_vector(encode_vector(expected)), expected.half())


def test_a_rating_is_the_digit_expected_behind_the_rendered_question(
    checkpoint, rows, samples, model, tmp_path, capsys
):
    write("rating", checkpoint, rows, tmp_path)
    assert "warning: this model is no rater" in capsys.readouterr().err  # its weights are random
    tokenizer = TextTokenizer.from_pretrained(checkpoint)
    question = score_rows.DigitQuestion.of("rating", "auto", tokenizer)
    assert [tokenizer.decode([i]) for i in question.digit_ids] == list("012345")
    row = json.loads(rows.read_text().splitlines()[3])
    messages = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
    prompt = question.prompt(messages, 2048)
    text = tokenizer.decode(prompt)
    assert row["instruction"] in text and row["output"] in text and text.endswith("Answer: \nRating: ")
    with torch.no_grad():
        p = model(torch.tensor([prompt]))[0, -1].softmax(-1)[list(question.digit_ids)]
    expected = (p @ torch.arange(6.0) / p.sum()).item()
    assert read_side_file(tmp_path, "rating")["r3"] == pytest.approx(expected, rel=1e-3)
    about = json.loads((tmp_path / "rating.json").read_text())
    assert about["digit_mass"] < 0.5 and about["swap_test_rows"] == 40
    assert len(question.prompt(messages, 20)) == 20


def test_a_file_that_was_cut_is_continued_and_ends_like_one_that_was_not(checkpoint, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(score_rows, "CHUNK", 8)
    write("base_nll", checkpoint, rows, tmp_path / "whole")
    whole = (tmp_path / "whole" / "base_nll.jsonl").read_text()
    write("base_nll", checkpoint, rows, tmp_path / "cut")
    file = tmp_path / "cut" / "base_nll.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:16]) + lines[16][:20])  # cut off within the first line of a chunk
    write("base_nll", checkpoint, rows, tmp_path / "cut")
    assert file.read_text() == whole
    file.write_text(lines[0][:10])
    write("base_nll", checkpoint, rows, tmp_path / "cut")
    assert file.read_text() == whole


def test_a_side_file_made_with_other_settings_or_elsewhere_is_not_added_to(checkpoint, rows, tmp_path, capsys):
    write("base_nll", checkpoint, rows, tmp_path)
    message = refused(capsys, "base_nll", checkpoint, rows, tmp_path, "--max-length", 30)
    assert "was made with max_length 2048, got 30" in message
    (tmp_path / "rating.jsonl").write_text('{"id": "r0", "rating": 4.5}\n')
    assert "was not made here" in refused(capsys, "rating", checkpoint, rows, tmp_path)


def test_two_rows_of_one_id_cannot_be_scored(checkpoint, rows, tmp_path, capsys):
    twice = tmp_path / "twice.jsonl"
    twice.write_text("".join(line + "\n" for line in rows.read_text().splitlines()[:2] * 2))
    assert "two rows have the id 'r0'" in refused(capsys, "base_nll", checkpoint, twice, tmp_path / "scores")


@pytest.mark.parametrize("what", ["rating", "cond_gain"])
def test_bad_rows_are_left_out_where_the_flag_says_so(checkpoint, rows, tmp_path, capsys, what):
    lines = rows.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {"output": ""})
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines))
    assert "bad.jsonl:3" in refused(capsys, what, checkpoint, bad, tmp_path / "a")
    write(what, checkpoint, bad, tmp_path / "b", "--skip-bad-rows")
    assert len(read_side_file(tmp_path / "b", what)) == len(lines) - 1


def test_less_needs_a_lora_run_and_targets(checkpoint, rows, tmp_path, capsys):
    assert "less needs --warmup RUN and --targets" in refused(capsys, "less", checkpoint, rows, tmp_path / "a")
    flags = ("--warmup", tmp_path / "none", "--targets", rows)
    assert "adapter_config.json" in refused(capsys, "less", checkpoint, rows, tmp_path / "b", *flags)
    run(checkpoint, rows, tmp_path / "run", "--lora-rank", "2", "--sample-pruner", "none", "--max-steps", "1")
    (tmp_path / "run" / "checkpoint" / "state.pt").write_bytes(b"torn")
    flags = ("--warmup", tmp_path / "run", "--targets", rows)
    assert "state.pt: not a whole checkpoint" in refused(capsys, "less", checkpoint, rows, tmp_path / "c", *flags)
