"""What the tests of eval/ share: a model and a tokenizer over bytes, rows, and texts in place of a model's."""

import json
import re

import pytest
import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from data.tokenizer import TextTokenizer
from eval import generation
from eval.text import first_phrase
from model import ModelConfig, Transformer

CONTEXT = 160
PROTOCOLS = ["paper", "standard"]
protocols = st.sampled_from(PROTOCOLS)

# One line of an answer, as the data sets have them: something in it that is neither sign nor article, and no words
# that the extraction takes for a lead-in.
short_answers = (
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12)
    .map(str.strip)
    .filter(lambda text: first_phrase(text) and not re.search("answer is|a:|answer:", text.lower()))
)

# The signs that the rules of eval/tex.py look at.
TEX_SIGNS = [
    "\\frac ", "\\dfrac", "\\sqrt", "\\text", "\\mbox", "\\left", "\\right", "\\{", "\\}", "\\!", "\\,", "\\pm",
    "\\cup", "\\in ", "\\pi", "\\infty", "\\cdot", "\\circ", "\\\\", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "{",
    "}", "(", ")", "[", "]", "^", "_", ",", ".", "=", "+", "-", "*", "/", "%", "$", "!", "~", " ", " ", "\n", "\\",
    "−", "π", "°", "0", "1", "12", "500", "3.50", ".5", "1,000", "x", "yz", "cm", " or ", "degrees",
]  # fmt: skip


def byte_model(seed=0, eos_token_id=1):
    """A random Transformer over bytes, its weights large enough for choices to differ well beyond rounding."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    special = {"bos_token_id": 0, "eos_token_id": eos_token_id}
    model = Transformer(ModelConfig.from_dict({"model_type": "llama", **sizes, **heads, **special}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model.eval()


def byte_tokenizer():
    """One token per byte; `<s>` (0) is put before a text, `</s>` (1) is EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return TextTokenizer(tokenizer, {"bos_token": "<s>", "eos_token": "</s>"})


def save_byte_tokenizer(folder):
    """Write the tokenizer's files as in a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(byte_tokenizer().special_tokens))


def save_byte_model(folder):
    """Write a model folder in Hugging Face layout; returns it."""
    byte_model().save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def arc_row(id="q", labels="ABCD", answer=None, stem="Which?", texts=None):
    texts = texts or [f"choice {label}" for label in labels]
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    return {"id": id, "question": {"stem": stem, "choices": choices}, "answerKey": answer or labels[0]}


def write(path, value):
    """Write a text, or any other value as JSON; returns the path."""
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_jsonl(path, rows):
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def assert_refused(capsys, module, flags, fragments):
    """The command ends with status 2 and one line on stderr that has these fragments."""
    with pytest.raises(SystemExit) as stopped:
        module.main([str(flag) for flag in flags])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith(f"{module.__name__}: ") and captured.err.count("\n") == 1
    for fragment in fragments:
        assert fragment in captured.err


def right(task, item, text, protocol):
    """Whether a generated text answers an item."""
    return task.is_correct(task.extract(text, protocol), item, protocol)


def scored(task, items, texts, protocol, **settings):
    """The result of `task.evaluate` where the model answers item i with texts[i], cut as a real text is cut."""

    def generate_texts(model, tokenizer, prompts, max_new_tokens, *, stop=(), **decoding):
        completions = [generation.cut(texts[name], stop) for name, _ in prompts]
        return [
            {"prompt_id": "0" * 16, "completion": text, "new_tokens": len(text), "finished": bool(text)}
            for text in completions
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "generate_texts", generate_texts)
        return task.evaluate(None, None, items, protocol=protocol, **settings)


def assert_only_the_rows_are_reordered(task, items, texts, protocol, order):
    """Shuffling the items shuffles the rows of the result, whose ids are whole numbers, and changes nothing else."""
    one_way = scored(task, items, texts, protocol)
    order.shuffle(items)
    other = scored(task, items, texts, protocol)
    assert [row["id"] for row in other["items"]] == [item.id for item in items]
    assert sorted(other.pop("items"), key=lambda row: int(row["id"])) == one_way.pop("items")
    assert other == one_way


def assert_command_writes_what_it_prints(capsys, task, out, *flags):
    """Score two items, on which the model may write 5 tokens each; returns the result file's content."""
    task.main([str(flag) for flag in ["--out", out, "--limit", 2, *flags, "--max-new-tokens", 5]])
    written, printed = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out.splitlines()
    assert (written["task"], written["n"]) == (task.__name__.removeprefix("eval."), 2)
    assert written["score"] == 50 * sum(row["correct"] for row in written["items"])
    keys = {"id", "prompt_id", "completion", "new_tokens", "finished", "prediction", "gold", "correct"}
    assert all(keys <= set(row) and row["new_tokens"] <= 5 for row in written["items"])
    assert re.match(rf"{written['task']}: {written['score']:.2f}%  n 2  95% ", printed[0])
    assert [line.split(":")[0].strip() for line in printed[1:] if "%" in line] == list(written["metrics"])
    return written


def reference_nll(model, ids, start=1):
    """The definition, literally: one text by itself, all its logits at once, float64, one token after the other."""
    logp = model(torch.tensor([ids])).double().log_softmax(-1)[0]
    return -sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids)))
