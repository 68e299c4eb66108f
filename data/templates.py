"""Templates: conversations -> the token ids of their prompts and answers.

A template is a table of slots (TEMPLATES), tokenised slot by slot, or the model's own chat_template, whose text is
rendered (chat_template.py) and tokenised as a whole.
"""

from __future__ import annotations

import functools
import json
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from data.chat_template import ChatTemplate
from data.tokenizer import TextTokenizer

Turn = tuple[list[int], list[int]]  # the token ids of a prompt and of its answer


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer.

    Attributes:
        messages: {"role": "system", "user", "assistant" or "tool", "content": text, ...} each, as transformers'
                  apply_chat_template takes them.
        tools:    descriptions of the functions that the assistant may call; None: no tools.
        trained:  for each assistant message, whether it carries labels; (): all of them do.
    """

    messages: list[dict]
    tools: list | None = None
    trained: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Template:
    """How conversations become token ids, and what a saved model needs so that others render them the same way.

    Attributes:
        encode:        conversations -> for each its turns, or the ValueError that says why it has none. A last turn may
                       have an empty answer: what the template puts behind the last real one.
        end_id:        the token that ends an answer; None: no token of the vocabulary ends it.
        chat_template: the Jinja form of a named template; None: the model folder's own.
    """

    encode: Callable[[list[Conversation]], list[list[Turn] | ValueError]]
    end_id: int | None
    chat_template: str | None


# ------------------------------------------------------------------------------------------------ the table

# A slot is a tuple of pieces. A text piece is tokenised on its own; BOS and EOS are the tokenizer's ids; {}
# is the turn's text. A `system` slot that is one string goes before the first question, inside its piece.
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
        "Write a response that appropriately completes the request.\n\n",
        "system": ("{}",),  # as in LLaMA-Factory, no blank line follows a row's own system text
        "user": ("### Instruction:\n{}\n\n### Response:\n",),
        "assistant": ("{}", EOS, "\n\n"),
    },
    "default": {
        "system": ("System: {}", EOS, "\n"),
        "user": ("Human: {}", EOS, "\nAssistant:"),
        "assistant": ("{}", EOS, "\n"),
    },
}


def resolve_template(name: str, tokenizer: TextTokenizer) -> Template:
    """The template of a name: one of TEMPLATES, or `auto`.

    `auto` is the tokenizer's own chat_template, or `default` where it has none.

    Raises:
        ValueError: an unknown name, a token the tokenizer lacks, or a chat_template that cannot be used.
    Source: slots and boundaries of the trainer that the paper's runs used (LLaMA-Factory).
    """
    if name == "auto" and tokenizer.chat_template is not None:
        if not isinstance(tokenizer.chat_template, str):
            names = ", ".join(tokenizer.chat_template)
            raise ValueError(f"the tokenizer's chat_template has {names} but no 'default'; name another --template")
        chat = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
        return Template(functools.partial(encode_chats, chat, tokenizer), end_of_chats(chat, tokenizer), None)
    name = "default" if name == "auto" else name
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}: expected one of {', '.join(['auto', *TEMPLATES])}")
    slots, ids = TEMPLATES[name], {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}
    missing = {token: f"tokenizer_config.json has no {key}_token" for token, key in ((BOS, "bos"), (EOS, "eos"))}

    def special_ids(slot: tuple[str, ...]) -> list[int]:
        found = []
        for token in re.findall(rf"{BOS}|{EOS}|<\|\w+\|>", " ".join(slot)):
            found.append(ids.get(token, tokenizer.token_id(token)))
            if found[-1] is None:
                why = missing.get(token, "tokenizer.json has no such token")
                raise ValueError(f"template {name!r} needs the token {token}, and {why}")
        return found

    special_ids(slots.get("start", ()) + slots["user"])
    end_id = special_ids(slots["assistant"])[0]
    return Template(functools.partial(encode_slots, name, tokenizer), end_id, jinja_of(slots))


# ------------------------------------------------------------------------------------------- slot by slot


def encode_slots(
    name: str, tokenizer: TextTokenizer, conversations: list[Conversation]
) -> list[list[Turn] | ValueError]:
    """Turns (see Template) of conversations in a template of the table; each piece is tokenised on its own."""
    rendered = []
    for conversation in conversations:
        try:
            rendered.append(filled(name, tokenizer, conversation))
        except ValueError as error:
            rendered.append(error)
    turns = [turn for turns in rendered if isinstance(turns, list) for turn in turns]
    texts = list({piece for turn in turns for side in turn for piece in side if isinstance(piece, str)})
    ids_of = dict(zip(texts, tokenizer.encode_plain_batch(texts), strict=True))

    def ids(pieces: list[str | int]) -> list[int]:
        return [token for piece in pieces for token in ((piece,) if isinstance(piece, int) else ids_of[piece])]

    return [t if isinstance(t, ValueError) else [(ids(prompt), ids(answer)) for prompt, answer in t] for t in rendered]


NO_SLOT = ("reasoning_content", "tool_calls")  # keys of a message that the table has no place for


def filled(name: str, tokenizer: TextTokenizer, conversation: Conversation) -> list[tuple[list, list]]:
    """The pieces, texts and token ids, of each prompt and answer of a conversation in a template of the table.

    Raises:
        ValueError: the conversation has tools or thoughts, which these templates cannot say.
    """
    messages, slots = conversation.messages, TEMPLATES[name]
    unknown = [key for message in messages for key in NO_SLOT if message.get(key)]
    unknown += ["tools"] if conversation.tools else []
    unknown += ["tool" for message in messages if message["role"] == "tool"]
    if unknown:
        raise ValueError(f"{unknown[0]!r}: template {name!r} has no place for it; a model's own (auto) may have")

    def fill(slot: str, text: str = "") -> list[str | int]:
        ids = {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}
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


def jinja_of(slots: dict) -> str:
    """The chat_template that renders the text of these slots, BOS and EOS included.

    The header of an answer follows every question, whatever add_generation_prompt says. The text is the same; its
    token ids are where a tokenizer gives a text the same ids in one piece as in several. SentencePiece's do not.
    """

    def text(slot: str | tuple[str, ...], content: str) -> str:
        parts = []
        for piece in (slot,) if isinstance(slot, str) else slot:
            before, holds_content, after = piece.partition("{}")
            name = {BOS: "bos_token", EOS: "eos_token"}.get(piece)
            parts += [name] if name else [json.dumps(before)] + [content, json.dumps(after)] * bool(holds_content)
        return " + ".join(part for part in parts if part != '""')

    question, inside = "message['content']", isinstance(slots["system"], str)
    if inside:
        question = f"({text(slots['system'], 'system')} if system and loop.first else '') + {question}"
    return (
        "{% if messages[0]['role'] == 'system' %}{% set system, turns = messages[0]['content'], messages[1:] %}"
        f"{{% else %}}{{% set system, turns = {json.dumps(slots.get('default_system', ''))}, messages %}}{{% endif %}}"
        + (f"{{{{ {text(slots['start'], '')} }}}}" if "start" in slots else "")
        + ("" if inside else f"{{% if system %}}{{{{ {text(slots['system'], 'system')} }}}}{{% endif %}}")
        + "{% for message in turns %}{% if message['role'] == 'user' %}"
        f"{{{{ {text(slots['user'], f'({question})')} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {text(slots['assistant'], 'message[' + repr('content') + ']')} }}}}"
        "{% else %}{{ raise_exception('expected user and assistant turns, got ' + message['role']) }}{% endif %}"
        "{% endfor %}"
    )


# ------------------------------------------------------------------------------------ as a whole


def encode_chats(
    chat: ChatTemplate, tokenizer: TextTokenizer, conversations: list[Conversation]
) -> list[list[Turn] | ValueError]:
    """Turns (see Template) of conversations under the model's own chat_template.

    The whole text is tokenised once, so that the ids are those of transformers' apply_chat_template(tokenize=True).
    A token belongs to an answer if it starts in the answer's text. One that spans the border belongs to the prompt:
    the model meets it there, and never writes it. transformers' mask of generation blocks counts it as the answer's.
    """
    rendered = chat.render([{"messages": c.messages, "tools": c.tools} for c in conversations])
    encoded = iter(tokenizer.encode_chats([chat[0] for chat in rendered if not isinstance(chat, ValueError)]))
    return [chat if isinstance(chat, ValueError) else _cut(*next(encoded), chat[1]) for chat in rendered]


def _cut(ids: list[int], starts: list[int], spans: list[tuple[int, int]]) -> list[Turn]:
    turns, done = [], 0
    for start, end in spans:
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        turns.append((ids[done:first], ids[first:last]))
        done = last
    return turns + ([(ids[done:], [])] if done < len(ids) else [])


def end_of_chats(chat: ChatTemplate, tokenizer: TextTokenizer) -> int | None:
    """The first added token behind an answer's text: the one that ends it. None: there is no such token."""
    messages = [{"role": "user", "content": "Qxzw"}, {"role": "assistant", "content": "Vkjy"}]
    [rendered] = chat.render([{"messages": messages, "tools": None}])
    if isinstance(rendered, ValueError) or "Vkjy" not in rendered[0]:
        return None
    text, [(_, end)] = rendered
    [(ids, starts)] = tokenizer.encode_chats([text])
    first, last = bisect_left(starts, text.rindex("Vkjy") + len("Vkjy")), bisect_left(starts, end)
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    return next((token for token in ids[first:last] if token in added), None)
