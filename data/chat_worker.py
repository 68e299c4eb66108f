"""The process that renders a chat template for chat_template.py: conversations -> their texts, and where answers are.

It imports the standard library and jinja2 alone, so that it starts in 0.1 s. It reads and writes lines of JSON.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import resource
import signal
import sys
from collections.abc import Callable

import jinja2
import jinja2.ext
import jinja2.sandbox

Render = Callable[..., str]  # (messages, add_generation_prompt, tools) -> text, with its marks

# `{% generation %}` blocks come out between two halves of surrogate pairs: no text of a row may hold one.
OPEN, CLOSE = "\ud800", "\udfff"


class _Refused(Exception):
    """The template, or `located`, refuses one conversation."""


class _TooLong(Exception):
    """A rendered text is longer than the limit."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, transformers' mark for what the model writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's name for it

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller):
        return OPEN + caller() + CLOSE


def compiled(source: str, special_tokens: dict, length: int) -> Render:
    """The template as a function of messages, in the sandbox and with the names that transformers gives it.

    length: characters that it may render.
    Without strftime_now, on purpose: with it the same file would train other tokens on another day.
    """

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # jinja's escapes HTML
    template = environment.from_string(source)

    def render(messages, add_generation_prompt, tools=None):
        inputs = {"messages": messages, "tools": tools, "documents": None, **special_tokens}
        text = template.render(add_generation_prompt=add_generation_prompt, **inputs)
        if len(text) > length:
            raise _TooLong
        return text

    return render


def without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A rendered text without the marks of its generation blocks, and the spans between them."""
    parts = re.split(f"[{OPEN}{CLOSE}]", text)
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part))
    spans = list(zip(ends[1:-1:2], ends[2:-1:2], strict=False))
    return "".join(parts), spans


def located(render: Render, header: str, messages: list[dict], tools: list | None) -> tuple[str, list]:
    """A conversation's whole text, and the span of each assistant message in it.

    The text is rendered once, without a generation prompt. Where the template has generation blocks, they are the
    spans. Elsewhere an answer begins where the conversation before it ends, rendered with the generation prompt, and
    ends where the conversation up to and with it ends: each must be the beginning of the whole text.

    One exception: an empty thought, <think></think>, that the template writes before the last answer alone (Qwen3's)
    is no part of the earlier ones. A conversation whose earlier thoughts hold text that the template leaves out is
    refused: one row cannot train what its own text does not hold.

    Args:
        header: what the template puts behind the last answer unasked (`header_behind`).
    """
    text, spans = without_marks(render(messages, False, tools))
    if re.search("[\ud800-\udfff]", text):
        raise _Refused("the chat_template renders half of a surrogate pair, which is no text")
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if spans:
        if len(spans) != len(places):
            raise _Refused(f"the chat_template marks {len(spans)} answers where the row has {len(places)}")
    else:
        spans = [_span(render, header, text, messages, place, tools) for place in places]
    ends = [0, *(end for _, end in spans)]
    for place, (start, end), end_before in zip(places, spans, ends, strict=False):
        if not end_before <= start < end:
            raise _refusal(place)
    _check_nothing_is_left_out(render, text, messages, tools)
    return text, spans


def _span(render: Render, header: str, text: str, messages: list, place: int, tools: list | None) -> tuple[int, int]:
    prompt = render(messages[:place], True, tools)
    whole = text if place == len(messages) - 1 else render(messages[: place + 1], False, tools)
    whole = whole.removesuffix(header)
    if not (text.startswith(prompt) and whole.startswith(prompt)):
        raise _refusal(place)
    if text.startswith(whole):
        return len(prompt), len(whole)
    thought = re.match(r"<think>\s*</think>\s*", whole[len(prompt) :])
    if thought:
        space = re.match(r"\s*", text[len(prompt) :]).end()
        answer = whole[len(prompt) + thought.end() :]
        if text.startswith(answer, len(prompt) + space):
            return len(prompt), len(prompt) + space + len(answer)
    raise _refusal(place)


def _refusal(place: int) -> _Refused:
    return _Refused(
        f"the chat_template does not render turn {place + 1} as a continuation of the turns before it and a beginning "
        "of those after it, so its answer cannot be located; name another --template, or make each turn a row's last"
    )


def _check_nothing_is_left_out(render: Render, text: str, messages: list[dict], tools: list | None) -> None:
    """Refuse a conversation with something that the template does not render."""
    for place, message in enumerate(messages, start=1):
        for key in ("content", "reasoning_content"):
            # A template may write a thought's marks and the space around them in another way.
            for part in map(str.strip, re.split("</?think>", message.get(key) or "")):
                if part not in text and json.dumps(part, ensure_ascii=False)[1:-1] not in text:
                    raise _Refused(f"the chat_template leaves out the {key!r} of turn {place} ({message['role']})")
        if message.get("tool_calls"):
            without = [{**other, "tool_calls": []} if other is message else other for other in messages]
            if _renders_to(text, render, without, tools):
                raise _Refused(f"the chat_template leaves out the 'tool_calls' of turn {place}")
    if tools and _renders_to(text, render, messages, None):
        raise _Refused("the chat_template leaves out the row's 'tools'")


def _renders_to(text: str, render: Render, messages: list[dict], tools: list | None) -> bool:
    try:
        return without_marks(render(messages, False, tools))[0] == text
    except Exception:  # without what it reads, the template fails
        return False


def header_behind(render: Render, bos_token: str) -> str:
    """The header of the next answer, where the template appends it though add_generation_prompt is false; else "".

    Llama 3's first release does. It must carry no label.

    Raises:
        _Refused: there is such a header, and where it begins cannot be known.
    """
    asks, says = {"role": "user", "content": "Qxzw"}, {"role": "assistant", "content": "Vkjy"}
    try:
        question, prompt = (without_marks(render([asks], flag))[0] for flag in (False, True))
        one, two = (without_marks(render(turns, False))[0] for turns in ([asks, says], [asks, says, asks]))
    except Exception:  # a template that wants other conversations than this; the rows will tell
        return ""
    texts = (question.count("Qxzw"), one.count("Qxzw"), one.count("Vkjy"), two.count("Qxzw"), two.count("Vkjy"))
    if question != prompt or two.startswith(one) or texts != (1, 1, 1, 2, 1):
        return ""
    before, after_answer = one.split("Qxzw")[0], one.split("Vkjy")[1]
    if not after_answer or question[-1] != after_answer[-1]:
        return ""  # it rewrites earlier turns, and appends nothing
    # An answer's end and a question's header stand between the two; only BOS stands before the first question's.
    between, question_header = two.split("Vkjy")[1].split("Qxzw")[0], before.removeprefix(bos_token)
    end = between.removesuffix(question_header)
    if end in ("", between) or not after_answer.startswith(end):
        raise _Refused(
            "the chat_template puts the header of an answer behind every conversation, and where that header begins "
            "cannot be known"
        )
    return after_answer.removeprefix(end)


def serve() -> None:
    """Read a template, then lists of conversations, from standard input; answer each conversation with a line."""
    lines, answers = sys.stdin.buffer, sys.stdout.buffer
    source, special_tokens, limits = json.loads(lines.readline())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limits["memory"], limits["memory"]))
    render, header = None, ""

    def started() -> None:
        nonlocal render, header
        try:
            render = compiled(source, special_tokens, limits["length"])
        except MemoryError:
            raise
        except Exception as error:
            raise _Refused(f"the chat_template does not compile: {_in_one_line(error)}") from None
        header = header_behind(render, special_tokens.get("bos_token", ""))

    def answer(kind_of_error: str, work: Callable, *inputs: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, limits["seconds"])  # its signal ends the process, wherever it is
        try:
            found = ["done", work(*inputs)]
        except MemoryError:
            found = ["limit", f"the chat_template needs more than {limits['memory'] // 2**20} MiB of memory"]
        except _TooLong:
            found = ["limit", f"the chat_template renders more than {limits['length']} characters"]
        except _Refused as error:
            found = [kind_of_error, str(error)]
        except Exception as error:  # jinja2's errors, and whatever Python raises inside of a template
            found = [kind_of_error, f"the chat_template refuses the row: {_in_one_line(error)}"]
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(found).encode() + b"\n")
        answers.flush()

    answer("limit", started)
    for line in lines:
        for conversation in json.loads(line):
            answer("refused", lambda row: located(render, header, row["messages"], row["tools"]), conversation)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    serve()
