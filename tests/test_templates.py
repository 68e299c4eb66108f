"""Templates in the tokens of the real models, against strings written out by hand.

The models' tokenizers are not ours to ship: TOKENIZERS=DIR names a folder that holds llama2/, llama3/,
mistral-7b-v0.1/, qwen3/ and smollm2/, each with tokenizer.json (and tokenizer_config.json). Skipped without it.
"""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data.sft import load_samples
from data.tokenizer import TextTokenizer

FOLDER = Path(os.environ.get("TOKENIZERS", ""))
pytestmark = pytest.mark.skipif("TOKENIZERS" not in os.environ, reason="TOKENIZERS names no folder of real tokenizers")

ONE = [("user", "What is 2+2?"), ("assistant", "It is 4.")]
TWO = [("system", "Be brief."), *ONE, ("user", "And 3+3?"), ("assistant", "6")]
# (tokenizer, template, conversation): prompt, answer, prompt, answer. Each line is tokenised on its own.
WRITTEN = {
    ("llama2", "llama2", "one"): (["<s>", "[INST] What is 2+2? [/INST]"], ["It is 4.", "</s>"]),
    ("llama2", "llama2", "two"): (
        ["<s>", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2+2? [/INST]"],
        ["It is 4.", "</s>"],
        ["<s>", "[INST] And 3+3? [/INST]"],
        ["6", "</s>"],
    ),
    ("llama2", "default", "one"): (["Human: What is 2+2?", "</s>", "\nAssistant:"], ["It is 4.", "</s>", "\n"]),
    ("llama2", "auto", "one"): (["Human: What is 2+2?", "</s>", "\nAssistant:"], ["It is 4.", "</s>", "\n"]),
    ("llama2", "alpaca", "one"): (
        [
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n",
            "### Instruction:\nWhat is 2+2?\n\n### Response:\n",
        ],
        ["It is 4.", "</s>", "\n\n"],
    ),
    ("mistral-7b-v0.1", "mistral", "one"): (["<s>", "[INST] What is 2+2?[/INST]"], [" It is 4.", "</s>"]),
    ("mistral-7b-v0.1", "mistral", "two"): (
        ["<s>", "[INST] Be brief.\n\nWhat is 2+2?[/INST]"],
        [" It is 4.", "</s>"],
        ["[INST] And 3+3?[/INST]"],
        [" 6", "</s>"],
    ),
    **{
        ("llama3", template, "two"): (
            [
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n"
            ],
            ["It is 4.<|eot_id|>"],
            [
                "<|start_header_id|>user<|end_header_id|>\n\nAnd 3+3?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n"
            ],
            ["6<|eot_id|>"],
        )
        for template in ("llama3", "auto")
    },
    ("llama3", "default", "one"): (["Human: What is 2+2?<|eot_id|>\nAssistant:"], ["It is 4.<|eot_id|>\n"]),
    **{
        (tokenizer, template, "two"): (
            [
                "<|im_start|>system\nBe brief.<|im_end|>\n"
                "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
            ],
            ["It is 4.<|im_end|>\n"],
            ["<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n"],
            ["6<|im_end|>\n"],
        )
        for tokenizer, template in (("qwen3", "qwen3"), ("qwen3", "chatml"), ("smollm2", "chatml"))
    },
    # Qwen3's own template puts an empty thought before an answer that has none.
    ("qwen3", "auto", "one"): (
        ["<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"],
        ["<think>\n\n</think>\n\nIt is 4.<|im_end|>\n"],
    ),
}


def tokenised(folder, case):
    """The case's conversation as a Sample, and the tokenizer."""
    name, template, conversation = case
    messages = [{"role": role, "content": text} for role, text in (ONE if conversation == "one" else TWO)]
    (folder / "rows.json").write_text(json.dumps([{"messages": messages}]))
    tokenizer = TextTokenizer.from_pretrained(FOLDER / name)
    [sample], _ = load_samples(folder / "rows.json", tokenizer, template)
    return sample, tokenizer


@pytest.mark.parametrize("case", WRITTEN, ids="-".join)
def test_ids_and_labels_are_those_of_the_written_strings(tmp_path, case):
    sample, _ = tokenised(tmp_path, case)
    tokenizer = Tokenizer.from_file(str(FOLDER / case[0] / "tokenizer.json"))
    input_ids, labels = [], []
    for place, pieces in enumerate(WRITTEN[case]):
        ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False).ids]
        input_ids += ids
        labels += ids if place % 2 else [-100] * len(ids)
    assert sample.input_ids == input_ids
    assert sample.labels == labels


@pytest.mark.parametrize("case", WRITTEN, ids="-".join)
def test_bos_stands_once_where_it_belongs_and_eos_once_after_each_answer(tmp_path, case):
    sample, tokenizer = tokenised(tmp_path, case)
    name, template, conversation = case
    answers = 1 if conversation == "one" else 2
    with_bos = {"llama2": answers, "mistral": 1, "llama3": 1, "auto": int(name == "llama3")}
    assert tokenizer.bos_id is None or sample.input_ids.count(tokenizer.bos_id) == with_bos.get(template, 0)
    if name != "smollm2":  # whose folder names no EOS
        assert sample.labels.count(tokenizer.eos_id) == answers
