"""eval/common.py: the command line of every benchmark, several ranks, adapters, refusals."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eval_cases import arc_row, assert_refused, byte_tokenizer, save_byte_model, save_byte_tokenizer, write_jsonl

from data.sft import load_samples
from eval import arc, common, gsm8k, math, squad, triviaqa
from model import Transformer
from training.lora import add_lora, save_adapter

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("bytes") / "model")


ON_RANKS = """
import os, sys
from eval import arc, generation, gsm8k
from training.ranks import Ranks
folder, data, out, *ports = sys.argv[1:]
os.environ["MASTER_PORT"] = ports[0]  # each group of processes meets in a place of its own
arc.main(["--model", folder, "--data", f"{data}/arc.jsonl", "--batch-tokens", "200", "--out", f"{out}/arc.json"])
os.environ["MASTER_PORT"] = ports[1]
sampled = ["--batch-size", "2", "--max-new-tokens", "20", "--temperature", "1"]
gsm8k.main(["--model", folder, "--data", f"{data}/gsm8k.jsonl", *sampled, "--out", f"{out}/gsm8k.json"])
def broken(model, prompts, *_, **__):
    if Ranks.current().rank == Ranks.current().world - 1:
        raise ValueError("no luck on the last rank")
    return [[7]] * len(prompts)
generation.generate = broken
os.environ["MASTER_PORT"] = ports[2]
gsm8k.main(["--model", folder, "--data", f"{data}/gsm8k.jsonl", *sampled])
"""


def test_any_number_of_ranks_writes_the_same_files_and_reports_one_ranks_error(folder, tmp_path):
    names = ["some", "more", "items", "of", "unlike", "length"]
    write_jsonl(tmp_path / "arc.jsonl", [arc_row(name, stem=f"Why {name}?" * i) for i, name in enumerate(names, 1)])
    rows = [{"question": f"How {name}?" * i, "answer": "#### 2"} for i, name in enumerate(names, 1)]
    write_jsonl(tmp_path / "gsm8k.jsonl", rows)
    (tmp_path / "score.py").write_text(ON_RANKS)
    written = {}
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [str(free.getsockname()[1]) for free in sockets]
    for world in (1, 2):
        out = tmp_path / str(world)
        command = [sys.executable, str(tmp_path / "score.py"), str(folder), str(tmp_path), str(out), *ports]
        shared = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
        shared["MASTER_ADDR"] = "127.0.0.1"
        ranks = [
            subprocess.Popen(
                command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for rank in range(world)
        ]
        try:
            said = [process.communicate(timeout=120) for process in ranks]
        finally:
            for process in ranks:
                process.kill()  # a rank that waits for one that is gone
        assert [process.returncode for process in ranks] == [2] * world, said
        lines = [line for rank in said for line in rank[1].splitlines() if "no luck" in line]
        # Without torchrun, rank 0 keeps the store; a rank that finds it gone speaks too.
        assert 1 <= len(lines) <= world and all(rank[0] == "" for rank in said[1:])
        assert {line.replace("rank 0: ", "").replace("rank 1: ", "") for line in lines} == {
            "eval.gsm8k: no luck on the last rank"
        }
        written[world] = [json.loads((out / name).read_text()) for name in ("arc.json", "gsm8k.json")]
        for whole in written[world]:
            assert whole.pop("world_size") == world
            assert whole.pop("seconds") > 0 and whole.pop("tokens_per_s") > 0
    assert written[1] == written[2]


def test_an_adapter_scores_like_the_model_it_is_merged_into(folder, tmp_path):
    tuned = add_lora(Transformer.from_pretrained(folder), rank=2, alpha=4)
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(tuned, tmp_path / "adapter")
    tuned.save_pretrained(tmp_path / "merged")
    data, out = write_jsonl(tmp_path / "arc.jsonl", [arc_row(), arc_row("r", stem="Who?")]), tmp_path / "out.json"
    nll = {}
    for name, flags in {
        "base": ["--model", str(folder)],
        "adapter": ["--model", str(folder), "--adapter", str(tmp_path / "adapter")],
        "merged": ["--model", str(tmp_path / "merged")],
    }.items():
        arc.main([*flags, "--data", str(data), "--out", str(out)])
        nll[name] = [value for item in json.loads(out.read_text())["items"] for value in item["nll"]]
    assert nll["adapter"] == pytest.approx(nll["merged"], rel=1e-4)
    assert nll["adapter"] != pytest.approx(nll["base"], rel=1e-2)


GOOD_ARC, GOOD_GSM8K = json.dumps(arc_row()), json.dumps({"question": "2?", "answer": "#### 2"})


@pytest.mark.parametrize("task, good", [(arc, GOOD_ARC), (gsm8k, GOOD_GSM8K)])
def test_paths_and_flags_that_cannot_be_used_are_refused_in_one_line(folder, tmp_path, capsys, task, good):
    data, empty, three = tmp_path / "good.jsonl", tmp_path / "empty.jsonl", tmp_path / "three.jsonl"
    data.write_text(good + "\n")
    empty.write_text("\n")
    write_jsonl(three, [arc_row("three", "ABC")])
    twice = write_jsonl(tmp_path / "twice.jsonl", [{**json.loads(good), "id": "same"}] * 2)
    no_weights = tmp_path / "no weights"
    save_byte_tokenizer(no_weights)
    cases = [
        ({"--data": tmp_path / "none.jsonl"}, ["none.jsonl"]),
        ({"--data": tmp_path}, [str(tmp_path)]),
        ({"--data": empty}, ["empty.jsonl", "expected at least one row"]),
        ({"--data": twice}, ["twice.jsonl", "2 items have the id 'same'"]),
        ({"--model": tmp_path / "no model"}, ["--model", "no model", "no such folder"]),
        ({"--model": no_weights}, ["no weights", "config.json"]),
        ({"--adapter": tmp_path / "no adapter"}, ["--adapter", "no adapter"]),
        ({"--adapter": no_weights}, ["no weights", "adapter_config.json"]),
        ({"--out": tmp_path}, ["--out", "got a folder"]),
        ({"--out": data / "x.json"}, ["good.jsonl"]),
    ]
    if not torch.cuda.is_available():
        cases.append(({"--device": "cuda"}, ["--device cuda"]))
    if task is arc:
        cases.append(({"--data": three}, ["none of the 1 items", "four choices"]))
    else:
        other = write_jsonl(tmp_path / "other.jsonl", [{"question": "3?", "answer": "#### 3"}])
        cases.append(({"--shots": 2, "--exemplars": other}, ["other.jsonl", "at least 2 rows, got 1"]))
        cases.append(({"--exemplars": other}, ["other.jsonl", "at least 4 rows, got 1"]))
        cases.append(({"--shots": 1, "--exemplars": data}, ["good.jsonl", "row 0 is also scored, as item 0"]))
        cases.append(({"--shots": 2}, ["--shots 2", "needs --exemplars"]))
        cases.append(({"--exemplars": empty}, ["empty.jsonl"]))
    for changed, fragments in cases:
        flags = {"--model": folder, "--data": data, **changed}
        flags = [part for pair in flags.items() for part in pair]
        assert_refused(capsys, task, flags, fragments)


@pytest.mark.parametrize("task", [arc, gsm8k])
def test_a_token_that_the_model_does_not_embed_is_refused_by_name_where_an_item_has_it(tmp_path, capsys, task):
    folder = save_byte_model(tmp_path / "model")
    tokenizer = byte_tokenizer().tokenizer
    tokenizer.add_tokens(["<|new|>"])  # id 258, and the model has 258 rows
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = [arc_row(), arc_row("x7", stem="<|new|>?")]
    if task is gsm8k:
        rows = [{"question": "2?", "answer": "#### 2"}, {"id": "x7", "question": "<|new|>?", "answer": "#### 2"}]
    flags = ["--model", folder, "--data", write_jsonl(tmp_path / "rows.jsonl", rows)]
    flags += ["--max-new-tokens", "2"] if task is gsm8k else []
    said = "item x7: the token '<|new|>' has id 258, but the model embeds 258 tokens (the tokenizer has 259)"
    assert_refused(capsys, task, flags, [said])
    task.main([str(flag) for flag in [*flags, "--limit", "1"]])
    assert f"{task.__name__.removeprefix('eval.')}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("rows.jsonl", "{0}\n\n{1}\n", "rows.jsonl:3: id 'x7'"),
        ("rows.json", "[{0},\n{1}]\n", "rows.json:2: row 2 of 2: id 'x7'"),
        ("rows.json", "[{0}, {1}]\n", "rows.json: row 2 of 2: id 'x7'"),
        ("rows.json", "[{0}, 3]", "rows.json: row 2 of 2"),
        ("rows.jsonl", "{0}\n[", "rows.jsonl:2"),
    ],
)
def test_a_bad_row_is_named_as_in_training(tmp_path, name, text, place):
    good = {"question": "2?", "answer": "#### 2"}
    (tmp_path / name).write_text(text.format(json.dumps(good), json.dumps({"id": "x7", "prompt": "Who?"})))
    with pytest.raises(ValueError) as scored:
        common.read_items(tmp_path / name, lambda row, id: common.text_field(row, "answer"))
    assert str(scored.value).startswith(f"{tmp_path / place}: ")
    with pytest.raises(ValueError) as trained:
        load_samples(tmp_path / name, byte_tokenizer())
    assert str(trained.value).startswith(f"{tmp_path / place}: ")


@pytest.mark.parametrize(
    "flags",
    [
        ["--limit", "0"], ["--limit", "-1"], ["--limit", "x"], ["--dtype", "fp16"], ["--nope"], ["--protocol", "ours"],
        ["--temperature", "-1"], ["--temperature", "nan"], ["--temperature", "warm"], ["--seed", "x"],
    ],
)  # fmt: skip
def test_unknown_flags_and_values_are_refused(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        gsm8k.main(flags)
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("task", [arc, gsm8k, math, squad, triviaqa])
def test_an_unknown_protocol_is_refused(task):
    with pytest.raises(ValueError, match="protocol 'ours': expected one of paper, standard"):
        task.evaluate(None, None, [], protocol="ours")


def test_the_modules_run_from_the_repository_root(tmp_path):
    command = [sys.executable, "-m", "eval.gsm8k", "--data", str(tmp_path / "none.jsonl")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"eval.gsm8k: {tmp_path / 'none.jsonl'}: no such file\n"
