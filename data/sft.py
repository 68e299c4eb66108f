"""SFT data: the rows of a .json or .jsonl file -> token ids and labels -> batches.

In the order a row travels: rows of a file, a row as a conversation, truncation, Sample, batches. templates.py cuts
a conversation into prompts and answers. Only answers carry labels: every assistant turn, with whatever the
template puts behind it (EOS included).
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.templates import Conversation, Template, resolve_template
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


def row_place(
    path: str | Path, number: int, rows: list[tuple[int | None, object]] | None = None, with_file: bool = True
) -> str:
    """Where row `number` (0-based) is: `path:line`; in a .json list `path:line: row 2 of 9`. Slow: for error messages.

    The number is all that names a row of a .json list on one line: `path: row 2 of 9`.

    Args:
        rows:      what read_rows returns; read again without it.
        with_file: False: `line 7` in place of `path:7`.
    """
    rows = read_rows(path) if rows is None else rows
    line, names = rows[number][0], []
    if line is None:
        names = [f"row {number + 1} of {len(rows)}"]
        has_lines = b"\n" in Path(path).read_bytes().strip()
        line = line_of_row(path, number) if has_lines else None
    if with_file:
        names.insert(0, str(path) if line is None else f"{path}:{line}")
    elif line is not None:
        names.insert(0, f"line {line}")
    return ": ".join(names)


def row_name(path: str | Path, number: int, rows: list[tuple[int | None, object]], with_file: bool = True) -> str:
    """`row_place`, and the row's own id if it has one: `path:line: id 'x7'`."""
    row = rows[number][1]
    own_id = row.get("id") if isinstance(row, dict) else None
    own_id = f": id {own_id!r}" if isinstance(own_id, str | int) else ""
    return row_place(path, number, rows, with_file) + own_id


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
ROLES = {
    **{"system": "system", "user": "user", "human": "user", "tool": "tool"},
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "bard", "model"), "assistant"),
}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of the same key; transformers reads the first
REFUSED = ("functions", "documents", "chat_template_kwargs", "images", "videos", "audios")  # not implemented
REFUSED += ("system_prompt",)  # a system turn under another name
OF_PROMPT = ("context", "passage", "options", "choices")  # parts of a prompt beside a form of two texts


def to_messages(row: object) -> list[dict]:
    """The messages of `to_conversation`."""
    return to_conversation(row).messages


def to_conversation(row: object) -> Conversation:
    """A row as a conversation that ends with the assistant.

    Forms, known by their keys: {instruction, input?, output}, {prompt, response}, {question, answer},
    {messages: [{role, content}]}, {conversations: [{from, value}]}. Keys that may stand beside them:

        system      the system turn's text
        history     of the first three forms: [[question, answer], ...], the turns before; their answers train too
        tools       a list, or its JSON text, for the chat_template
        of a turn   weight 0 or train false: its answer carries no label; reasoning_content, tool_calls and what else a
                    message has: for the chat_template

    What would change the conversation and is not implemented is refused: REFUSED, and beside the first three forms
    OF_PROMPT, and input where it is not read. Other keys are ignored.

    Raises:
        ValueError: what is wrong, what was expected, what came.
    Source: system and history as LLaMA-Factory reads them, messages and tools as transformers' apply_chat_template.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {json_kind(row)}")
    if not isinstance(row.get("id"), (str, int, type(None))):
        raise ValueError(f"id: expected a text or a whole number, got {json_kind(row['id'])}")
    for key in REFUSED:
        if row.get(key):
            raise ValueError(f"key {key!r} is not supported")
    found = [key for key in (*PAIR_FORMS, *TURN_FORMS) if key in row and PAIR_FORMS.get(key, key) in row]
    if len(found) != 1:
        wanted = " or ".join([f"{q} and {a}" for q, a in PAIR_FORMS.items()] + list(TURN_FORMS))
        came = ", ".join(row) or "no keys"
        raise ValueError(f"expected the keys of one form ({wanted}), got {came}")

    form = found[0]
    messages, trained = _pair_messages(form, row) if form in PAIR_FORMS else _turn_messages(form, row)
    if row.get("system"):
        system = {"role": "system", "content": _text("system", row["system"])}
        if messages[0]["role"] != "system":
            messages.insert(0, system)
        elif messages[0]["content"] != system["content"]:
            raise ValueError(f"system: the row has another one in {form}")
    return Conversation(messages, _tools(row), trained)


def _pair_messages(form: str, row: dict) -> tuple[list[dict], tuple[bool, ...]]:
    question = row[form]
    for key in OF_PROMPT if form == "instruction" else ("input", *OF_PROMPT):
        if row.get(key) not in (None, "", [], {}):
            raise ValueError(f"key {key!r} is not supported beside {form!r}: make it part of {form!r}, or leave it out")
    if form == "instruction" and row.get("input") not in (None, ""):
        added = _text("input", row["input"], may_be_blank=True)
        question = _text(form, question) + "\n" + added if question else added
    pairs = row.get("history") or []
    if not isinstance(pairs, list):
        raise ValueError(f"history: expected a list of [question, answer], got {json_kind(pairs)}")
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history, turn {number}: expected [question, answer], got {json.dumps(pair)[:80]}")
    texts = [(_text(f"history, turn {n}", q), _text(f"history, turn {n}", a)) for n, (q, a) in enumerate(pairs, 1)]
    texts.append((_text(form, question), _text(PAIR_FORMS[form], row[PAIR_FORMS[form]])))
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in texts for role, text in zip(roles, pair, strict=True)], ()


def _turn_messages(form: str, row: dict) -> tuple[list[dict], tuple[bool, ...]]:
    if not isinstance(row[form], list):
        raise ValueError(f"{form}: expected a list of turns, got {json_kind(row[form])}")
    if row.get("history"):
        raise ValueError(f"key 'history' is not supported beside {form!r}")
    messages, trained, (role_key, text_key) = [], [], TURN_FORMS[form]
    for number, turn in enumerate(row[form], start=1):
        role, where = turn.get(role_key) if isinstance(turn, dict) else None, f"{form}, turn {number}"
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(
                f"{where}: expected an object whose {role_key!r} is one of "
                f"{', '.join(ROLES)}, got {json.dumps(turn)[:80]}"
            )
        if role != "system" or turn.get(text_key) != "":  # files write "no system prompt" as an empty one
            messages.append(_message(where, ROLES[role], text_key, turn))
            if ROLES[role] == "assistant":
                trained.append(turn.get("weight") != 0 and turn.get("train") in (None, True))
        _check_flags(where, turn)
    letters = "".join(message["role"][0] for message in messages)
    if not re.fullmatch("s?(ua(t+a)*)+", letters):
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"{form}: expected user and assistant in turn, the assistant last, a system turn in front of them at most, "
            f"tool turns between two of the assistant; got {roles or 'no turn'}"
        )
    return messages, tuple(trained)


def _message(where: str, role: str, text_key: str, turn: dict) -> dict:
    message = {"role": role}
    if turn.get(text_key) is not None or not turn.get("tool_calls"):  # a call needs no text beside it
        blank = role == "tool" or bool(turn.get("tool_calls"))
        message["content"] = _text(f"{where}, {text_key!r}", turn.get(text_key), may_be_blank=blank)
    ours = ("role", "content", "from", "value", "weight", "train", *THOUGHTS)
    others = {key: value for key, value in turn.items() if value is not None and key not in ours}
    thought = next((key for key in THOUGHTS if turn.get(key)), None)
    if thought:
        message["reasoning_content"] = _text(f"{where}, {thought!r}", turn[thought])
    return message | (_plain(where, others) if others else {})


def _check_flags(where: str, turn: dict) -> None:
    weight, train = turn.get("weight"), turn.get("train")
    if weight not in (None, 0, 1):
        raise ValueError(f"{where}: weight: expected 0 or 1, got {json_kind(weight)}")
    if train not in (None, False, True):
        raise ValueError(f"{where}: train: expected true or false, got {json_kind(train)}")


def _tools(row: dict) -> list | None:
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tools: expected a list, got a text that is no JSON: {error}") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools: expected a list of objects, got {json_kind(tools)}")
    return tools and _plain("tools", tools)


def _plain(name: str, value: object) -> object:
    """A JSON value that a chat_template can be given."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError as error:
        raise ValueError(f"{name}: nested too deep") from error
    if HALF_PAIR.search(text):
        raise ValueError(f"{name}: expected Unicode text, got half of a surrogate pair")
    return value


HALF_PAIR = re.compile("[\ud800-\udfff]")


def _text(name: str, value: object, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text, got {json_kind(value)}")
    if not value.strip() and not may_be_blank:
        raise ValueError(f"{name}: expected a text, got an empty one")
    if HALF_PAIR.search(value):
        raise ValueError(f"{name}: expected Unicode text, got half of a surrogate pair")
    return value


# ---------------------------------------------------------------------------------------------- the samples


@dataclass(frozen=True)
class Sample:
    """One row, tokenised. labels[t] is input_ids[t] (not shifted) on answers and -100 elsewhere."""

    id: str
    input_ids: list[int]
    labels: list[int]
    number: int = 0  # the row's number in its file, from 0


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


def to_sample(
    row_id: str, turns: list[tuple[list[int], list[int]]], max_length: int, trained: tuple[bool, ...] = ()
) -> Sample:
    """Turns of (prompt ids, answer ids) as one Sample of at most max_length tokens.

    Heads are kept, tails cut, so a cut answer loses its EOS. A turn's budget is what those before it left;
    turns without a budget go. Answers whose `trained` is false carry no label. May leave no label at all;
    load_samples refuses that.
    """
    input_ids, labels = [], []
    for (prompt, answer), labelled in zip(turns, trained + (True,) * len(turns), strict=False):
        num_prompt, num_answer = kept_lengths(len(prompt), len(answer), max_length - len(input_ids))
        input_ids += prompt[:num_prompt] + answer[:num_answer]
        labels += [IGNORE_INDEX] * num_prompt + (answer[:num_answer] if labelled else [IGNORE_INDEX] * num_answer)
    return Sample(row_id, input_ids, labels)


def load_samples(
    path: str | Path,
    tokenizer: TextTokenizer,
    template: str | Template = "auto",
    max_length: int = 2048,
    skip_bad_rows: bool = False,
) -> tuple[list[Sample], int]:
    """All rows of a .json list or .jsonl file (forms: to_conversation) as Samples, in the file's order.

    Args:
        template:      auto, a name in templates.TEMPLATES, or what resolve_template returned for it.
        max_length:    tokens a row, at least 2; longer rows are cut (to_sample).
        skip_bad_rows: leave bad rows out and count them, instead of raising.
    Returns: (samples, number of rows skipped). A sample's id is its row's "id", else its 0-based row number;
        where an earlier row has that id already, "#<row number>" is added, so ids are unique.
    Raises: ValueError when rows are bad, with the first three, where they are and what is wrong, and how many there
        are; or when no row is left. See also read_rows and resolve_template.
    """
    if max_length < 2:
        raise ValueError(f"max_length: expected at least 2 tokens, got {max_length}")
    if isinstance(template, str):
        template = resolve_template(template, tokenizer)
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: expected rows, got none")
    results = _encode_rows([row for _, row in rows], template, max_length)
    progress = tqdm(
        results,
        desc=f"tokenising {Path(path).name}",
        total=len(rows),
        unit="row",
        delay=2,
        mininterval=0.1 if sys.stderr.isatty() else 30,
    )
    samples, num_bad, first_bad = [], 0, []
    for number, result in enumerate(progress):
        if isinstance(result, Sample):
            samples.append(result)
            continue
        num_bad += 1
        if len(first_bad) < 3:
            first_bad.append((number, result))
    if num_bad and not (skip_bad_rows and samples):
        named = "; ".join(
            f"{row_name(path, number, rows, with_file=not place)}: {error}"
            for place, (number, error) in enumerate(first_bad)
        )
        count = f"{num_bad} of {len(rows)} rows are bad; --skip-bad-rows leaves them out"
        count = "1 row is bad; --skip-bad-rows leaves it out" if num_bad == 1 else count
        raise ValueError(f"{named} ({count if samples else f'all {num_bad} rows are bad'})")
    return samples, num_bad


def _encode_rows(rows: list, template: Template, max_length: int, chunk: int = 1024) -> Iterator[Sample | ValueError]:
    """Yield a Sample or a ValueError for each row. A chunk of rows is tokenised in one call, on all cores."""
    used_ids = set()
    shared = {}  # one int object for each token id: a list then takes 8 bytes a token, not 36
    for start in range(0, len(rows), chunk):
        conversations = [_conversation(row) for row in rows[start : start + chunk]]
        good = [c for c in conversations if isinstance(c, Conversation)]
        encoded = iter(template.encode(good))
        for number, conversation in enumerate(conversations, start=start):
            turns = next(encoded) if isinstance(conversation, Conversation) else conversation
            if isinstance(turns, ValueError):
                yield turns
                continue
            turns = [[[shared.setdefault(token, token) for token in side] for side in turn] for turn in turns]
            own_id = rows[number].get("id")
            row_id = str(number if own_id is None else own_id)
            while row_id in used_ids:
                row_id += f"#{number}"
            sample = to_sample(row_id, turns, max_length, conversation.trained)
            sample = dataclasses.replace(sample, number=number)
            if all(label == IGNORE_INDEX for label in sample.labels[1:]):  # nothing predicts the first
                yield ValueError(f"expected an answer token to train on, got none in {max_length} tokens")
                continue
            used_ids.add(row_id)
            yield sample


def _conversation(row: object) -> Conversation | ValueError:
    try:
        return to_conversation(row)
    except ValueError as error:
        return error


def check_token_ids(place: str | Path, rows: Iterable[list[int]], tokenizer: TextTokenizer, vocab_size: int) -> None:
    """Refuse rows of token ids if the model has no embedding for one of the ids.

    Raises:
        ValueError: the place, the token of the largest id, and both sizes, if that id is vocab_size or more.
    """
    largest = max((max(ids) for ids in rows if ids), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{place}: the token {tokenizer.tokenizer.id_to_token(largest)!r} has id {largest}, but the model embeds "
            f"{vocab_size} tokens (the tokenizer has {tokenizer.tokenizer.get_vocab_size()})"
        )


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
