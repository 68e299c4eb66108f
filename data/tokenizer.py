"""Text <-> token ids: the tokenizer of a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from training.files import read_object


@dataclass(frozen=True)
class TextTokenizer:
    """Text <-> token ids. add_bos, add_eos: whether `encode` adds them; None: tokenizer.json decides."""

    tokenizer: Tokenizer
    special_tokens: dict  # those that are set: {"bos_token": "<s>", ...}
    chat_template: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextTokenizer:
        """From a Hugging Face folder: tokenizer.json; tokenizer_config.json, chat_template.jinja if present.

        BOS and EOS are tokenizer_config.json's bos_token and eos_token; without that file, config.json's
        bos_token_id and eos_token_id (of a list, the first). chat_template.jinja wins over the config's.
        Raises: FileNotFoundError; ValueError for an unreadable file or a BOS, EOS outside the vocabulary.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; expected a model folder in Hugging Face layout")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception, nothing narrower
            raise ValueError(f"{path}: not a readable tokenizer.json: {error}") from error
        tokenizer.no_padding()  # the file may ask for both; a row's ids must not depend on its neighbours
        tokenizer.no_truncation()

        config, special_tokens = {}, {}
        if (folder / "tokenizer_config.json").is_file():
            config = read_object(folder / "tokenizer_config.json")
            for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
                token = config.get(name)
                special_tokens[name] = token.get("content") if isinstance(token, dict) else token
        elif (folder / "config.json").is_file():
            model_config = read_object(folder / "config.json")
            for name in ("bos_token", "eos_token"):
                ids = model_config.get(f"{name}_id")
                first = ids[0] if isinstance(ids, list) and ids else ids
                if isinstance(first, int) and first >= 0:
                    special_tokens[name] = tokenizer.id_to_token(first) or f"id {first}"
        special_tokens = {name: token for name, token in special_tokens.items() if token is not None}
        for name in ("bos_token", "eos_token"):
            token = special_tokens.get(name)
            if token is not None and (not isinstance(token, str) or tokenizer.token_to_id(token) is None):
                raise ValueError(f"{folder}: {name} {token!r} is not in the vocabulary of tokenizer.json")

        chat_template = config.get("chat_template")
        if isinstance(chat_template, list):  # several, with names: [{"name": ..., "template": ...}]
            chat_template = {entry["name"]: entry["template"] for entry in chat_template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(tokenizer, special_tokens, chat_template, config.get("add_bos_token"), config.get("add_eos_token"))

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
        """Token ids, with BOS and EOS as Hugging Face adds them by default.

        tokenizer.json's post-processor decides; where tokenizer_config.json has add_bos_token or
        add_eos_token, these do.
        """
        if self.add_bos is None and self.add_eos is None:
            return self.tokenizer.encode(text).ids
        bos = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        eos = [self.eos_id] if self.add_eos and self.eos_id is not None else []
        return bos + self.encode_plain(text) + eos

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of the text alone; a special token spelled out in the text becomes that token."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_plain_batch(self, texts: list[str]) -> list[list[int]]:
        """encode_plain of each text, on all cores."""
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)
