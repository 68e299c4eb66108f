"""What is saved ends, and is served as it was trained: end tokens, chat templates, adapters' tokenizers, merging."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BASE

import train
from data.templates import TEMPLATES, jinja_of
from data.tokenizer import TextTokenizer
from eval.generation import generate
from model import Transformer, read_config
from training import lora, merge


@pytest.fixture(scope="module")
def base(tmp_path_factory, checkpoint):
    """A model whose EOS is </s>, with a tokenizer that knows chatml's tokens and has no chat template."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = TextTokenizer.from_pretrained(folder)
    tokenizer.tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(1)
    model = Transformer.from_pretrained(folder)
    vocab = tokenizer.tokenizer.get_vocab_size()
    named = {"bos_token_id": tokenizer.bos_id, "eos_token_ids": (tokenizer.eos_id,)}
    wider = Transformer(dataclasses.replace(model.config, vocab_size=vocab, **named))
    wider.source = folder
    saved = folder / "wider"
    wider.save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def one_answer(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text((json.dumps({"prompt": "Hi", "response": "Yes"}) + "\n") * 8)
    return path


def trained(base, rows, out, *flags):
    """The run folder of a few steps on these rows."""
    small = ["--micro-batch", "2", "--grad-accum", "1", "--sample-pruner", "none", "--token-pruner", "none"]
    quick = ["--lora-rank", "0", "--lr", "1e-2", "--max-steps", "4", "--device", "cpu"]
    train.main(["--model", str(base), "--data", str(rows), "--out", str(out), *small, *quick, *flags])
    return Path(out)


@pytest.fixture(scope="module")
def chatml_run(base, one_answer, tmp_path_factory):
    """Trained until it gives the answer, with chatml on a model whose own EOS is </s>."""
    out = tmp_path_factory.mktemp("run") / "run"
    return trained(base, one_answer, out, "--template", "chatml", "--max-steps", "60", "--epochs", "15")


@pytest.fixture(scope="module")
def adapter_run(base, one_answer, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "lora"
    return trained(base, one_answer, out, "--template", "chatml", "--lora-rank", "8")


def end_ids(tokenizer):
    return [tokenizer.token_id("</s>"), tokenizer.token_id("<|im_end|>")]


def eos_of(folder, name):
    return json.loads((folder / name).read_text())["eos_token_id"]


def prompt_ids(tokenizer):
    return tokenizer.encode_plain("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_end_token_of_the_template_joins_the_eos_of_both_configs(chatml_run):
    folder = chatml_run / "model"
    tokenizer = TextTokenizer.from_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        assert eos_of(folder, name) == end_ids(tokenizer)
    assert list(read_config(folder).eos_token_ids) == end_ids(tokenizer)


def test_generation_stops_at_the_end_token(chatml_run):
    folder = chatml_run / "model"
    model, tokenizer = Transformer.from_pretrained(folder), TextTokenizer.from_pretrained(folder)
    [new] = generate(model.eval(), [prompt_ids(tokenizer)], 40)
    assert tokenizer.tokenizer.decode(new, skip_special_tokens=False) == "Yes<|im_end|>"


def test_transformers_serves_the_template_and_stops_at_its_end(chatml_run):
    transformers = pytest.importorskip("transformers")
    folder = chatml_run / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert prompt["input_ids"][0].tolist() == prompt_ids(TextTokenizer.from_pretrained(folder))
    new = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(new) == "Yes<|im_end|>"


def test_the_template_of_the_run_is_in_tokenizer_config_json(chatml_run):
    config = json.loads((chatml_run / "model" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == jinja_of(TEMPLATES["chatml"])
    assert config["eos_token"] == "</s>"


def test_without_a_tokenizer_config_the_one_written_keeps_bos_and_eos(base, one_answer, tmp_path):
    shutil.copytree(base, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer_config.json").unlink()
    before = TextTokenizer.from_pretrained(tmp_path / "bare")
    saved = trained(tmp_path / "bare", one_answer, tmp_path / "run", "--template", "default") / "model"
    after = TextTokenizer.from_pretrained(saved)
    assert (before.bos_id, before.eos_id) == (after.bos_id, after.eos_id) and before.eos_id is not None
    assert after.chat_template == jinja_of(TEMPLATES["default"])


def test_another_template_takes_the_place_of_the_folders_own_file_and_auto_keeps_it(base, one_answer, tmp_path):
    shutil.copytree(base, tmp_path / "own")
    own = jinja_of(TEMPLATES["chatml"]) + "{# own #}"
    (tmp_path / "own" / "chat_template.jinja").write_text(own)
    saved = trained(tmp_path / "own", one_answer, tmp_path / "a", "--template", "alpaca") / "model"
    assert TextTokenizer.from_pretrained(saved).chat_template == jinja_of(TEMPLATES["alpaca"])
    saved = trained(tmp_path / "own", one_answer, tmp_path / "b") / "model"
    assert TextTokenizer.from_pretrained(saved).chat_template == own
    assert eos_of(saved, "config.json") == end_ids(TextTokenizer.from_pretrained(saved))


def test_an_adapter_has_the_tokenizer_beside_it_and_ends_the_same(adapter_run, base):
    folder = adapter_run / "adapter"
    tokenizer = TextTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == jinja_of(TEMPLATES["chatml"])
    assert eos_of(folder, "generation_config.json") == end_ids(tokenizer)
    model = lora.load_adapter(Transformer.from_pretrained(base), folder)
    assert list(model.config.eos_token_ids) == end_ids(tokenizer)


def test_merge_writes_the_model_that_base_and_adapter_are(adapter_run, base, tmp_path):
    merge.main([str(base), str(adapter_run / "adapter"), str(tmp_path / "merged")])
    merged, tokenizer = Transformer.from_pretrained(tmp_path / "merged"), TextTokenizer.from_pretrained(base)
    adapted = lora.load_adapter(Transformer.from_pretrained(base), adapter_run / "adapter")
    input_ids = torch.tensor([prompt_ids(tokenizer)])
    torch.testing.assert_close(merged(input_ids), adapted(input_ids), rtol=1e-4, atol=1e-4)
    for name in ("config.json", "generation_config.json"):
        assert eos_of(tmp_path / "merged", name) == end_ids(tokenizer)
    assert TextTokenizer.from_pretrained(tmp_path / "merged").chat_template == jinja_of(TEMPLATES["chatml"])


def test_merge_keeps_the_dtype_of_the_base(adapter_run, base, tmp_path):
    model = Transformer.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    merge.main([str(tmp_path / "half"), str(adapter_run / "adapter"), str(tmp_path / "merged")])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("case", ["out is full", "no base", "no adapter", "dtype", "a link"])
def test_a_merge_that_cannot_be_is_one_line_and_status_2(adapter_run, base, tmp_path, capsys, case):
    paths = {"base": base, "adapter": adapter_run / "adapter", "out": tmp_path / "out"}
    if case == "out is full":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
    elif case == "dtype":
        shutil.copytree(base, tmp_path / "base")
        config = json.loads((base / "config.json").read_text()) | {"torch_dtype": "int4"}
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        paths["base"] = tmp_path / "base"
    elif case == "a link":  # to a file that would be published with the weights
        (tmp_path / "secret").write_text("{}")
        paths["adapter"] = shutil.copytree(adapter_run / "adapter", tmp_path / "adapter")
        (tmp_path / "adapter" / "special_tokens_map.json").unlink(missing_ok=True)
        (tmp_path / "adapter" / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    else:
        paths[case.removeprefix("no ")] = tmp_path / "none"
    with pytest.raises(SystemExit) as caught:
        merge.main([*map(str, paths.values())])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("training.merge: ") and said.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*")) == (["mine"] if case == "out is full" else [])


def test_a_model_that_lacks_an_embedding_is_refused_before_anything_is_written(base, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Hi", "response": "<|im_end|>"}) + "\n")
    shutil.copytree(base, tmp_path / "small")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / "small" / name).unlink()
        if (BASE / name).is_file():
            shutil.copyfile(BASE / name, tmp_path / "small" / name)
    with pytest.raises(SystemExit) as caught:
        trained(tmp_path / "small", tmp_path / "rows.jsonl", tmp_path / "run", "--template", "default")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1
    size = json.loads((BASE / "config.json").read_text())["vocab_size"]
    sizes = f"has id {size + 1}, but the model embeds {size} tokens (the tokenizer has {size + 2})"
    assert f"the token '<|im_end|>' {sizes}" in said
    assert not (tmp_path / "run").exists()


def test_scoring_refuses_such_rows_before_it_writes(base, tmp_path, capsys):
    from pruners import score_rows

    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Hi", "response": "<|im_end|>"}) + "\n")
    shutil.copytree(base, tmp_path / "small")
    shutil.copyfile(BASE / "config.json", tmp_path / "small" / "config.json")
    size = json.loads((BASE / "config.json").read_text())["vocab_size"]
    flags = [
        "--model",
        str(tmp_path / "small"),
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--scores",
        str(tmp_path / "s"),
    ]
    with pytest.raises(SystemExit) as caught:
        score_rows.main(["base_nll", *flags, "--template", "default"])
    assert caught.value.code == 2 and f"the token '<|im_end|>' has id {size + 1}" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
