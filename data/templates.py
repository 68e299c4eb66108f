"""Templates: a conversation -> the texts and token ids of its prompts and answers.

A template is a table of slots (TEMPLATES) or the model's own chat_template. Both cut a conversation into turns: a
prompt and its answer, each a list of pieces that are tokenised on their own.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable

import jinja2
import jinja2.ext
import jinja2.sandbox

from data.tokenizer import TextTokenizer

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
