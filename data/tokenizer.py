"""Text <-> token ids: the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from training.files import json_kind, read_object


@dataclass(frozen=True)
class TextTokenizer:
    """Text <-> token ids.

    Attributes:
        special_tokens: those that are set: {"bos_token": "<s>", ...}.
        chat_template:  its text; of several with names, the one called `default`, or the names if none is.
        config:         tokenizer_config.json; None where there is no such file.
    """

    tokenizer: Tokenizer
    special_tokens: dict
    chat_template: str | tuple[str, ...] | None = None
    config: dict | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextTokenizer:
        """From a Hugging Face folder: tokenizer.json; tokenizer_config.json, added_tokens.json, chat_template.jinja.

        The last three may be missing. BOS and EOS are tokenizer_config.json's bos_token and eos_token; without that
        file, config.json's bos_token_id and eos_token_id (of a list, the first). Tokens of added_tokens_decoder or,
        without that key, of added_tokens.json are added where tokenizer.json lacks them. chat_template.jinja wins
        over the config's.

        Raises:
            FileNotFoundError: no tokenizer.json.
            ValueError: an unreadable file, a token under another id, or a BOS, EOS outside the vocabulary.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; expected a model folder in Hugging Face layout")
        try:
            with _no_panic(where=""):
                tokenizer = Tokenizer.from_file(str(path))
        except ValueError as error:
            raise ValueError(f"{path}: not a readable tokenizer.json: {error}") from error
        tokenizer.no_padding()  # the file may ask for both; a row's ids must not depend on its neighbours
        tokenizer.no_truncation()

        config, special_tokens = None, {}
        path = folder / "tokenizer_config.json"
        if path.is_file():
            config = read_object(path)
            if config.get("split_special_tokens"):
                raise ValueError(
                    f"{path}: split_special_tokens = {config['split_special_tokens']!r} is not implemented"
                )
            special_tokens = _special_tokens(path, config)
        elif (folder / "config.json").is_file():
            model_config = read_object(folder / "config.json")
            for name in ("bos_token", "eos_token"):
                ids = model_config.get(f"{name}_id")
                first = ids[0] if isinstance(ids, list) and ids else ids
                if isinstance(first, int) and first >= 0:
                    special_tokens[name] = tokenizer.id_to_token(first) or f"id {first}"
        _add_missing_tokens(tokenizer, folder, config or {}, set(special_tokens.values()))
        for name in ("bos_token", "eos_token"):
            token = special_tokens.get(name)
            if token is not None and tokenizer.token_to_id(token) is None:
                raise ValueError(f"{folder}: {name} {token!r} is not in the vocabulary of tokenizer.json")
        return cls(tokenizer, special_tokens, _chat_template(folder, config or {}), config)

    @property
    def bos_id(self) -> int | None:
        """int, or None where there is no such token."""
        return self.token_id(self.special_tokens.get("bos_token"))

    @property
    def eos_id(self) -> int | None:
        """int, or None where there is no such token."""
        return self.token_id(self.special_tokens.get("eos_token"))

    def token_id(self, token: str | None) -> int | None:
        """The id of one token, or None where the vocabulary lacks it (or token is None)."""
        return None if token is None else self.tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids, with BOS and EOS where the post-processor of tokenizer.json adds them.

        As in transformers 5, add_bos_token and add_eos_token of tokenizer_config.json change nothing. transformers 4
        followed them for some tokenizer classes.
        """
        with _no_panic():
            return self.tokenizer.encode(text).ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of the text alone; a special token spelled out in the text becomes that token."""
        with _no_panic():
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_plain_batch(self, texts: list[str]) -> list[list[int]]:
        """encode_plain of each text, on all cores."""
        with _no_panic():
            return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_chats(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Rendered conversations as (token ids, the character where each token starts); starts never decrease.

        The ids are those of transformers' apply_chat_template(tokenize=True).
        """
        with _no_panic():
            encoded = self._of_chats.encode_batch(texts, add_special_tokens=False)
        return [(e.ids, list(accumulate((start for start, _ in e.offsets), max))) for e in encoded]

    @functools.cached_property
    def _of_chats(self) -> Tokenizer:
        """The tokenizer as transformers 5 has it, with offsets that leave out no space.

        transformers 5 does not take the normalizer of a LLaMA-class tokenizer from tokenizer.json. It puts "▁" in front
        of a text, and behind special tokens only where tokenizer_config.json says `legacy`. transformers 4 followed
        tokenizer.json, as the templates of our table do.
        """
        config = self.config or {}
        parts = [self.tokenizer.normalizer, self.tokenizer.post_processor]
        normalizer, post_processor = (json.loads(part.__getstate__()) if part else None for part in parts)
        is_llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
        is_llama = is_llama and normalizer == SENTENCEPIECE_NORMALIZER
        if not is_llama and '"trim_offsets": true' not in json.dumps(post_processor):
            return self.tokenizer
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.post_processor = None
        if is_llama:
            scheme = "always" if config.get("legacy") else "first"
            scheme = "never" if config.get("add_prefix_space") is False else scheme
            tokenizer.normalizer = None
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
            tokenizer = Tokenizer.from_str(tokenizer.to_str())  # so that added tokens are normalised the new way
        return tokenizer

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def files(self, chat_template: str | None) -> dict[str, object]:
        """What to write beside saved weights, so that others render this chat template: file name -> JSON value.

        Without a template the folder's own files are right as they are. None stands for a file to leave out.
        """
        if chat_template is None:
            return {}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens, **(self.config or {})}
        return {"tokenizer_config.json": {**config, "chat_template": chat_template}, "chat_template.jinja": None}


SENTENCEPIECE_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


@contextlib.contextmanager
def _no_panic(where: str = "tokenizer.json: ") -> Iterator[None]:
    """ValueError in place of what the Rust library raises: Exception, or a panic. The message begins with `where`.

    A panic is no Exception, and writes to stderr by itself.
    """
    silent, before = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(silent, 2)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{where}the tokenizers library failed: {error}") from None
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(silent)


def _special_tokens(path: Path, config: dict) -> dict[str, str]:
    """The named special tokens of tokenizer_config.json: every key that ends in _token and holds a token."""
    found = {}
    for name, token in config.items():
        if name.endswith("_token") and not isinstance(token, bool | None):
            text = token.get("content") if isinstance(token, dict) else token
            if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
                raise ValueError(f"{path}: {name}: expected a token, got {json.dumps(token)[:80]}")
            found[name] = text
    return found


def _add_missing_tokens(tokenizer: Tokenizer, folder: Path, config: dict, special: set[str]) -> None:
    path, tokens = folder / "tokenizer_config.json", {}
    try:
        if (decoder := config.get("added_tokens_decoder")) is not None:
            for number, token in decoder.items():
                tokens[int(number)] = AddedToken(**token)
        elif (folder / "added_tokens.json").is_file():
            path = folder / "added_tokens.json"
            for text, number in read_object(path).items():
                tokens[int(number)] = AddedToken(text, special=text in special, normalized=text not in special)
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: its added tokens cannot be read: {error}") from error
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for number, token in sorted(tokens.items()):
        if token.content not in known:
            tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(token.content)
        if found != number:
            raise ValueError(f"{path}: the token {token.content!r} has id {number}, and {found} by tokenizer.json")


def _chat_template(folder: Path, config: dict) -> str | tuple[str, ...] | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as error:
            raise ValueError(f"{path}: not a text in UTF-8: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, with names
        try:
            named = {str(entry["name"]): entry["template"] for entry in template}
        except (TypeError, KeyError):
            named = {}
        template = named.get("default", tuple(named)) if named else template
    if not isinstance(template, str | tuple | None):
        where = f"{folder / 'tokenizer_config.json'}: chat_template"
        raise ValueError(f"{where}: expected a text or a list of {{name, template}}, got {json_kind(template)}")
    return template
