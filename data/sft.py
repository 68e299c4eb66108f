"""SFT data: the rows of a .json or .jsonl file -> token ids and labels -> batches.

In the order a row travels: rows of a file, a row as a conversation, the template that cuts it into prompts
and answers, truncation, Sample, batches. Only answers carry labels: every assistant turn, with whatever the
template puts behind it (EOS included).
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox
import torch
from torch import Tensor
from tqdm import tqdm

from data.tokenizer import TextTokenizer
from qtuning import IGNORE_INDEX
from training.files import json_kind

# ------------------------------------------------------------------------------------------ rows of a file


def read_rows(path: str | Path) -> list[tuple[int | None, object]]:
    """All rows of a .json list or of a .jsonl file.

    .jsonl is split at "\\n" alone, for a JSON string may hold other line separators; blank lines are skipped.
    Returns: list of (line, row). line: 1-based; None for .json (see line_of_row). row: the parsed value, or
        the ValueError that parsing a .jsonl line gave.
    Raises: FileNotFoundError; ValueError for another suffix, or a .json file that is broken or no list.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: expected a .json or .jsonl file, got suffix {path.suffix!r}")
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".jsonl":
        lines = enumerate(data.split(b"\n"), start=1)
        return [(line, _parse_line(raw)) for line, raw in lines if raw.strip()]
    try:
        rows = json.loads(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        hint = "; if it has one object a line, name it .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a JSON list of rows, got {json_kind(rows)}")
    return [(None, row) for row in rows]


def _parse_line(raw: bytes) -> object:
    try:
        return json.loads(raw.decode("utf-8"))
    except json.JSONDecodeError as error:
        return ValueError(f"not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # not UTF-8, a number or a nesting past Python's limits
        return ValueError(f"not valid JSON: {error}")


def line_of_row(path: str | Path, index: int) -> int:
    """The 1-based line where row `index` (0-based) of a valid .json list starts. Slow: for error messages."""
    text = Path(path).read_text(encoding="utf-8-sig")
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    end = text.index("[") + 1
    for _ in range(index + 1):
        start = gap.match(text, end).end()
        _, end = decoder.raw_decode(text, start)
    return text.count("\n", 0, start) + 1


# --------------------------------------------------------------------------------- a row as a conversation

PAIR_FORMS = {"instruction": "output", "prompt": "response", "question": "answer"}  # question: answer
TURN_FORMS = {"messages": ("role", "content"), "conversations": ("from", "value")}  # list: keys of a turn
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def to_messages(row: object) -> list[dict[str, str]]:
    """A row as [{"role": "system"|"user"|"assistant", "content": str}, ...], ending with the assistant.

    Forms, told apart by their keys: {instruction, input?, output}, {prompt, response}, {question, answer},
    {messages: [{role, content}]}, {conversations: [{from, value}]}. Other keys are ignored, but for `system`
    and `history`: a row that fills them is refused, since leaving them out would train something else.
    Raises: ValueError: what is wrong, what was expected, what came.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {json_kind(row)}")
    if not isinstance(row.get("id"), (str, int, type(None))):
        raise ValueError(f"id: expected a text or a whole number, got {json_kind(row['id'])}")
    for key in ("system", "history"):
        if row.get(key):
            raise ValueError(f"key {key!r} is not supported: write the row as 'messages'")
    found = [key for key in (*PAIR_FORMS, *TURN_FORMS) if key in row and PAIR_FORMS.get(key, key) in row]
    if len(found) != 1:
        wanted = " or ".join([f"{q} and {a}" for q, a in PAIR_FORMS.items()] + list(TURN_FORMS))
        came = ", ".join(row) or "no keys"
        raise ValueError(f"expected the keys of one form ({wanted}), got {came}")

    form = found[0]
    if form in PAIR_FORMS:
        question = row[form]
        if form == "instruction" and row.get("input"):
            added = _text("input", row["input"], may_be_blank=True)
            question = _text(form, question) + "\n" + added if question else added
        return [
            {"role": "user", "content": _text(form, question)},
            {"role": "assistant", "content": _text(PAIR_FORMS[form], row[PAIR_FORMS[form]])},
        ]

    if not isinstance(row[form], list):
        raise ValueError(f"{form}: expected a list of turns, got {json_kind(row[form])}")
    messages, (role_key, text_key) = [], TURN_FORMS[form]
    for number, turn in enumerate(row[form], start=1):
        role = turn.get(role_key) if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(
                f"{form}, turn {number}: expected an object whose {role_key!r} is one of "
                f"{', '.join(ROLES)}, got {json.dumps(turn)[:80]}"
            )
        if role != "system" or turn.get(text_key) != "":  # files write "no system prompt" as an empty one
            text = _text(f"{form}, turn {number}, {text_key!r}", turn.get(text_key))
            messages.append({"role": ROLES[role], "content": text})
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(
            f"{form}: expected user and assistant in turn, the assistant last, a system turn "
            f"in front of them at most; got {', '.join(roles) or 'no turn'}"
        )
    return messages


def _text(name: str, value: object, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text, got {json_kind(value)}")
    if not value.strip() and not may_be_blank:
        raise ValueError(f"{name}: expected a text, got an empty one")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name}: expected Unicode text, got half of a surrogate pair")
    return value


# ------------------------------------------------------------------------------------------------ templates

# A slot is a tuple of pieces. A text piece is tokenised on its own; BOS and EOS are the tokenizer's ids; {}
# is the turn's text. A `system` slot that is one string goes before the first question, inside its piece.
Turn = tuple[list[str | int], list[str | int]]  # the pieces of a prompt and of its answer, filled in
BOS, EOS = "<BOS>", "<EOS>"
CHATML = {
    "system": ("<|im_start|>system\n{}<|im_end|>\n",),
    "user": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",),
    "assistant": ("{}<|im_end|>\n",),
}
TEMPLATES = {
    "llama2": {  # BOS at every turn, as in Meta's chat format
        "system": "<<SYS>>\n{}\n<</SYS>>\n\n",
        "user": (BOS, "[INST] {} [/INST]"),
        "assistant": ("{}", EOS),
    },
    "mistral": {"start": (BOS,), "system": "{}\n\n", "user": ("[INST] {}[/INST]",), "assistant": (" {}", EOS)},
    "llama3": {
        "start": (BOS,),
        "system": ("<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",),
        "user": (
            "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "assistant": ("{}<|eot_id|>",),
    },
    "qwen3": CHATML,
    "chatml": CHATML,
    "alpaca": {
        "default_system": "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        "system": ("{}\n\n",),
        "user": ("### Instruction:\n{}\n\n### Response:\n",),
        "assistant": ("{}", EOS, "\n\n"),
    },
    "default": {
        "system": ("System: {}", EOS, "\n"),
        "user": ("Human: {}", EOS, "\nAssistant:"),
        "assistant": ("{}", EOS, "\n"),
    },
}


def resolve_template(name: str, tokenizer: TextTokenizer) -> Callable[[list[dict[str, str]]], list[Turn]]:
    """The function messages -> turns for a template's name.

    `auto` is the tokenizer's own chat_template, or `default` where it has none. Turns: (prompt pieces, answer
    pieces) for each answer; a piece is a text, to be tokenised on its own with nothing added, or a token id.
    Raises: ValueError: an unknown name, a token the tokenizer lacks, a chat_template that does not compile.
    Source: slots and boundaries of the trainer that the paper's runs used (LLaMA-Factory).
    """
    if name == "auto" and tokenizer.chat_template is not None:
        return functools.partial(
            render_chat_template, compile_chat_template(tokenizer.chat_template), tokenizer.special_tokens
        )
    name = "default" if name == "auto" else name
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}: expected one of {', '.join(['auto', *TEMPLATES])}")
    slots = TEMPLATES[name]
    pieces = " ".join(slots.get("start", ()) + slots["user"] + slots["assistant"])
    for token in re.findall(rf"{BOS}|{EOS}|<\|\w+\|>", pieces):
        if {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}.get(token, tokenizer.token_id(token)) is None:
            raise ValueError(f"template {name!r} needs the token {token}, which this tokenizer does not have")
    return functools.partial(render_slots, slots, tokenizer.bos_id, tokenizer.eos_id)


def render_slots(slots: dict, bos_id: int, eos_id: int, messages: list[dict[str, str]]) -> list[Turn]:
    """Turns (see resolve_template) of a conversation, in a template of the table above."""

    def fill(slot, text=""):
        ids = {BOS: bos_id, EOS: eos_id}
        return [ids.get(piece, piece.format(text)) for piece in slots.get(slot, ())]

    turns, prompt, before_question = [], fill("start"), ""
    if messages[0]["role"] != "system" and "default_system" in slots:
        messages = [{"role": "system", "content": slots["default_system"]}, *messages]
    for message in messages:
        role, text = message["role"], message["content"]
        if role == "assistant":
            turns.append((prompt, fill(role, text)))
            prompt = []
        elif role == "system" and isinstance(slots["system"], str):
            before_question = slots["system"].format(text)
        else:
            prompt += fill(role, before_question + text)
            before_question = ""
    return turns


def compile_chat_template(source: str) -> jinja2.Template:
    """A chat_template as a jinja2 template, in the sandbox and with the names that transformers gives it.

    Without strftime_now, on purpose: with it the same file would train other tokens on another day.
    """

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # jinja's escapes HTML
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat_template does not compile: {error}; name another --template") from error


def render_chat_template(chat_template: jinja2.Template, special_tokens: dict, messages: list[dict]) -> list[Turn]:
    """Turns (see resolve_template) of a conversation, under the model's own chat_template.

    An answer is what the conversation up to and with it adds to the prompt before it (rendered with the
    generation prompt). Where one does not continue the other, as when Qwen3's template takes the thinking out
    of earlier turns, answer and prompt cannot be told apart: ValueError.
    """

    def render(messages, add_generation_prompt):
        try:
            return chat_template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat_template refuses the row: {error}") from error

    turns, done = [], ""
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, whole = render(messages[:place], True), render(messages[: place + 1], False)
            if not (prompt.startswith(done) and whole.startswith(prompt) and len(whole) > len(prompt)):
                raise ValueError(
                    f"the chat_template does not render turn {place + 1} as a continuation of "
                    "the turns before it, so its answer cannot be told from its prompt; "
                    "name another --template"
                )
            turns.append(([prompt[len(done) :]], [whole[len(prompt) :]]))
            done = whole
    return turns


# ---------------------------------------------------------------------------------------------- the samples


@dataclass(frozen=True)
class Sample:
    """One row, tokenised. labels[t] is input_ids[t] (not shifted) on answers and -100 elsewhere."""

    id: str
    input_ids: list[int]
    labels: list[int]


def kept_lengths(num_prompt: int, num_answer: int, budget: int) -> tuple[int, int]:
    """How much of a prompt and of its answer fits into `budget` tokens: (prompt tokens, answer tokens).

    A side under half the budget stays whole and the other takes the rest; two long sides share in proportion.
    Source: LLaMA-Factory's infer_seqlen, as in the paper's runs; in integers, free of float error.
    """
    if 2 * num_answer < budget:
        most = budget
    elif 2 * num_prompt < budget:
        most = budget - num_prompt
    else:
        most = budget * num_answer // (num_prompt + num_answer)
    num_answer = min(most, num_answer)
    return min(budget - num_answer, num_prompt), num_answer


def to_sample(row_id: str, turns: list[tuple[list[int], list[int]]], max_length: int) -> Sample:
    """Turns of (prompt ids, answer ids) as one Sample of at most max_length tokens.

    Heads are kept, tails cut, so a cut answer loses its EOS. A turn's budget is what those before it left;
    turns without a budget go. May leave no label at all; load_samples refuses that.
    """
    input_ids, labels = [], []
    for prompt, answer in turns:
        num_prompt, num_answer = kept_lengths(len(prompt), len(answer), max_length - len(input_ids))
        input_ids += prompt[:num_prompt] + answer[:num_answer]
        labels += [IGNORE_INDEX] * num_prompt + answer[:num_answer]
    return Sample(row_id, input_ids, labels)


def load_samples(
    path: str | Path,
    tokenizer: TextTokenizer,
    template: str = "auto",
    max_length: int = 2048,
    skip_bad_rows: bool = False,
) -> tuple[list[Sample], int]:
    """All rows of a .json list or .jsonl file (forms: to_messages) as Samples, in the file's order.

    Args:
        template:      auto, or a name in TEMPLATES.
        max_length:    tokens a row, at least 2; longer rows are cut (to_sample).
        skip_bad_rows: leave a bad row out and count it, instead of raising.
    Returns: (samples, number of rows skipped). A sample's id is its row's "id", else its 0-based row number;
        where an earlier row has that id already, "#<row number>" is added, so ids are unique.
    Raises: ValueError `path:LINE: what is wrong` for the first bad row (LINE is where it starts), or when no
        row is left; see also read_rows and resolve_template.
    """
    if max_length < 2:
        raise ValueError(f"max_length: expected at least 2 tokens, got {max_length}")
    render = resolve_template(template, tokenizer)
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: expected rows, got none")
    results = _encode_rows([row for _, row in rows], tokenizer, render, max_length)
    progress = tqdm(
        results,
        desc=f"tokenising {Path(path).name}",
        total=len(rows),
        unit="row",
        delay=2,
        mininterval=0.1 if sys.stderr.isatty() else 30,
    )
    samples, bad = [], []
    for number, result in enumerate(progress):
        if isinstance(result, Sample):
            samples.append(result)
            continue
        bad.append((number, result))
        if not skip_bad_rows:
            break
    progress.close()
    if bad and not (skip_bad_rows and samples):
        number, error = bad[0]
        all_bad = f" (and so on: all {len(rows)} rows are bad)" if skip_bad_rows else ""
        raise ValueError(f"{path}:{rows[number][0] or line_of_row(path, number)}: {error}{all_bad}")
    return samples, len(bad)


def _encode_rows(rows: list, tokenizer, render, max_length: int, chunk: int = 1024) -> Iterator[Sample | ValueError]:
    """Yield a Sample or a ValueError for each row. A chunk of rows is tokenised in one call, on all cores."""
    used_ids = set()
    shared = {}  # one int object for each token id: a list then takes 8 bytes a token, not 36
    for start in range(0, len(rows), chunk):
        rendered = [_render_row(row, render) for row in rows[start : start + chunk]]
        texts = list(
            {
                piece
                for turns in rendered
                if isinstance(turns, list)
                for prompt, answer in turns
                for piece in prompt + answer
                if isinstance(piece, str)
            }
        )
        ids_of = dict(zip(texts, tokenizer.encode_plain_batch(texts), strict=True))
        for number, turns in enumerate(rendered, start=start):
            if isinstance(turns, ValueError):
                yield turns
                continue
            own_id = rows[number].get("id")
            row_id = str(number if own_id is None else own_id)
            while row_id in used_ids:
                row_id += f"#{number}"
            turns = [
                [
                    [
                        shared.setdefault(token, token)
                        for piece in pieces
                        for token in ((piece,) if isinstance(piece, int) else ids_of[piece])
                    ]
                    for pieces in turn
                ]
                for turn in turns
            ]
            sample = to_sample(row_id, turns, max_length)
            if all(label == IGNORE_INDEX for label in sample.labels[1:]):  # nothing predicts the first
                yield ValueError(f"expected an answer token to train on, got none in {max_length} tokens")
                continue
            used_ids.add(row_id)
            yield sample


def _render_row(row: object, render) -> list[Turn] | ValueError:
    try:
        return render(to_messages(row))
    except ValueError as error:
        return error


# -------------------------------------------------------------------------------------------------- batches


def collate(samples: list[Sample], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Samples as one batch, padded on the right and shifted for next-token prediction.

    Returns: input_ids (B, T) and labels (B, T), int64, T = longest sample - 1. labels[b, t] is the token
        after input_ids[b, t], -100 on prompts and padding. Padding ids are 0; nothing left of them attends to
        them and they carry no label, so a causal model needs no attention mask.
    """
    if not samples:
        raise ValueError("collate: expected at least one sample, got none")
    width = max(len(sample.input_ids) for sample in samples) - 1
    input_ids = torch.zeros(len(samples), width, dtype=torch.long)
    labels = torch.full((len(samples), width), IGNORE_INDEX)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids) - 1
        input_ids[row, :length] = torch.tensor(sample.input_ids[:-1])
        labels[row, :length] = torch.tensor(sample.labels[1:])
    return input_ids.to(device), labels.to(device)
