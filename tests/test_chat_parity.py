"""Token ids under a model's own chat_template against transformers' apply_chat_template, in the forms of seven models.

The real tokenizers are not ours to ship: TOKENIZERS=DIR adds them (see test_templates.py).
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from chat_forms import APPENDING, FORMS, TALKS, THINKING, plain
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from data.sft import load_samples
from data.tokenizer import TextTokenizer

transformers = pytest.importorskip("transformers")

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny" / "base"
REAL = Path(os.environ.get("TOKENIZERS", ""))
SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


def sentencepiece_tokenizer():
    """A BPE tokenizer as LLaMA-2's tokenizer.json has it: "▁" in front of every stretch of text, and bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    texts = [m["content"] for talk in TALKS.values() for m in talk if "<" not in m["content"]]
    words = ["[INST]", "[/INST]", "USER: ", "ASSISTANT: ", "user", "assistant", "system", "<<SYS>>"] * 3
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL, *alphabet], show_progress=False)
    tokenizer.train_from_iterator([*texts, *words], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def folders(root):
    """Name -> folder of each tokenizer."""
    (root / "sentencepiece").mkdir()
    sentencepiece_tokenizer().save(str(root / "sentencepiece" / "tokenizer.json"))
    named = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (root / "sentencepiece" / "tokenizer_config.json").write_text(json.dumps(named))
    shutil.copytree(TINY, root / "tiny", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    for name in ("llama2", "mistral-7b-v0.1", "llama3", "qwen3", "smollm2") if "TOKENIZERS" in os.environ else ():
        shutil.copytree(REAL / name, root / name, copy_function=shutil.copyfile)
        if name == "smollm2":  # which comes without a config
            ends = {
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
            (root / name / "tokenizer_config.json").write_text(json.dumps(ends))
    return {path.name: path for path in root.iterdir()}


NAMES = ["sentencepiece", "tiny"]
NAMES += ["llama2", "mistral-7b-v0.1", "llama3", "qwen3", "smollm2"] if "TOKENIZERS" in os.environ else []
TEMPLATES = {**{name: plain(form) for name, form in FORMS.items()}, "appending": APPENDING, "thinking": THINKING}
PAIRS = [(name, form) for name in NAMES for form in TEMPLATES]
if "TOKENIZERS" in os.environ:
    for name in ("llama3", "qwen3"):
        TEMPLATES[f"own {name}"] = json.loads((REAL / name / "tokenizer_config.json").read_text())["chat_template"]
        PAIRS.append((name, f"own {name}"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Name -> (folder, our tokenizer, transformers' tokenizer)."""
    found = folders(tmp_path_factory.mktemp("tokenizers"))
    load = transformers.AutoTokenizer.from_pretrained
    return {name: (path, TextTokenizer.from_pretrained(path), load(path)) for name, path in found.items()}


def samples_of(talks, tokenizer, template, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": talk} for talk in talks]))
    return load_samples(tmp_path / "rows.json", dataclasses.replace(tokenizer, chat_template=template))[0]


def talks_of(form):
    """The conversations that a form takes."""
    return [talk for talk in TALKS.values() if form != "mistral" or talk[0]["role"] != "system"]


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_ids_are_those_of_apply_chat_template(tokenizers, tmp_path, name, form):
    _, ours, theirs = tokenizers[name]
    template, talks = TEMPLATES[form], talks_of(form)
    for talk, sample in zip(talks, samples_of(talks, ours, template, tmp_path), strict=True):
        assert sample.input_ids == theirs.apply_chat_template(talk, chat_template=template, return_dict=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_labels_are_the_generation_blocks_but_for_a_token_that_starts_before_one(tokenizers, tmp_path, name, form):
    _, ours, theirs = tokenizers[name]
    marked, talks = FORMS[form], talks_of(form)
    samples = samples_of(talks, ours, marked, tmp_path)
    assert samples == samples_of(talks, ours, plain(marked), tmp_path)
    for talk, sample in zip(talks, samples, strict=True):
        found = theirs.apply_chat_template(
            talk, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = found["assistant_masks"]
        assert sample.input_ids == found["input_ids"]
        for at, label in enumerate(sample.labels):
            spans_the_border = mask[at] and not mask[at - 1]
            assert (label != -100) == bool(mask[at]) or spans_the_border


@pytest.mark.parametrize("name", NAMES)
def test_a_text_gets_bos_and_eos_as_in_transformers(tokenizers, name):
    _, ours, theirs = tokenizers[name]
    assert ours.encode("Once upon a time") == theirs("Once upon a time")["input_ids"]


@pytest.mark.parametrize("change", [{"add_bos_token": False}, {"add_eos_token": True}, {"add_bos_token": True}])
@pytest.mark.parametrize("name", ["sentencepiece", "tiny"])
def test_add_bos_token_and_add_eos_token_change_as_little_as_in_transformers(tokenizers, tmp_path, name, change):
    shutil.copytree(tokenizers[name][0], tmp_path / name)
    path = tmp_path / name / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    ours, theirs = TextTokenizer.from_pretrained(path.parent), transformers.AutoTokenizer.from_pretrained(path.parent)
    assert ours.encode("Once upon a time") == theirs("Once upon a time")["input_ids"]


@pytest.mark.parametrize("key", ["added_tokens_decoder", "added_tokens.json"])
def test_tokens_that_tokenizer_json_lacks_are_added_as_in_transformers(tokenizers, tmp_path, key):
    shutil.copytree(tokenizers["tiny"][0], tmp_path / "more")
    path = tmp_path / "more" / "tokenizer_config.json"
    size = tokenizers["tiny"][1].tokenizer.get_vocab_size()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    if key == "added_tokens.json":
        (path.parent / key).write_text(json.dumps({"<|new|>": size, "<|other|>": size + 1}))
    else:
        decoder = {str(size + i): {"content": text, **flags} for i, text in enumerate(["<|new|>", "<|other|>"])}
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: decoder}))
    ours, theirs = TextTokenizer.from_pretrained(path.parent), transformers.AutoTokenizer.from_pretrained(path.parent)
    text = "a <|new|> b<|other|>c"
    assert ours.encode_plain(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert size + 1 in ours.encode_plain(text)
