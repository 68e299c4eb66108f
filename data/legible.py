"""Token ids as text that a person can read, and the HTML page that shows rows; for data.show and pruners.look.

Rows are untrusted: control characters never reach a terminal, and a page escapes every text and runs no script.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Callable

from data.tokenizer import TextTokenizer

MARKS = {"\n": "⏎\n", "\t": "⇥", "\r": "␍"}
JOINERS = "\u200c\u200d"  # invisible, but letters and emoji need them


def token_bytes(tokenizer: TextTokenizer) -> Callable[[int], bytes]:
    """A function from a token id to the UTF-8 bytes that this token stands for; added tokens stand for themselves.

    The bytes of a row's tokens, joined, are its text. Byte-level and SentencePiece vocabularies are understood; a
    token of any other kind stands for its own name.
    """
    model = tokenizer.tokenizer
    parts = json.loads(model.to_str())
    added = {token["id"]: token["content"] for token in parts["added_tokens"]}
    byte_level = "ByteLevel" in json.dumps([parts["decoder"], parts["pre_tokenizer"]])
    as_is = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's table: these bytes are their own letters
    letters = {chr(byte): byte for byte in as_is}
    letters |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in as_is)}

    def read(token: int) -> bytes:
        name = added.get(token, model.id_to_token(token))
        if name is None:
            return f"‹no token {token}›".encode()
        if token in added:
            return name.encode()
        if byte_level and all(letter in letters for letter in name):
            return bytes(letters[letter] for letter in name)
        if found := re.fullmatch("<0x([0-9A-F]{2})>", name):  # SentencePiece's byte fallback
            return bytes.fromhex(found[1])
        return name.replace("▁", " ").encode()

    return read


def legible(data: bytes | str) -> str:
    """The text of these bytes, with marks for what has no look of its own.

    A line break is ⏎ and the break, a tab ⇥. Bytes that are no UTF-8 are ‹E2›; other control and format characters
    are ‹U+202E›, so that they change neither terminal nor reading direction.
    """
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    text = data.decode("utf-8", "surrogateescape")
    return "".join(map(_mark, text))


def _mark(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":
        return f"‹{ord(letter) - 0xDC00:02X}›"
    hidden = unicodedata.category(letter) in ("Cc", "Cf", "Cn", "Co", "Zl", "Zp") and letter not in JOINERS
    return MARKS.get(letter, f"‹U+{ord(letter):04X}›" if hidden else letter)


def span(text: bytes | str, kind: str, title: str = "") -> str:
    """A piece of a row as HTML: escaped, of a class that STYLE knows."""
    title = f' title="{html.escape(title)}"' if title else ""
    return f'<span class="{kind}"{title}>{html.escape(legible(text))}</span>'


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 960px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: .2em; overflow-wrap: anywhere; }
h2 { font-size: 1.15em; margin: 1.8em 0 .4em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.total td { font-weight: 600; border-bottom: 0; }
.note { color: #555; font-size: .92em; max-width: 48em; }
.head { margin: 1em 0 .2em; font-size: .92em; overflow-wrap: anywhere; }
.row { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.55 ui-monospace, "DejaVu Sans Mono", monospace;
       border: 1px solid #ddd; border-radius: 4px; padding: .6em .8em; margin: 0; }
.low { max-height: 22em; overflow: auto; }
.prompt { color: #777; }
.answer { color: #064e2b; background: #d9f2e3; }
.odd { background: #bfe6cf; }
.prompt.odd { background: #f1f1f1; }
.trimmed { color: #a3260c; background: #fbe3dc; text-decoration: line-through; }
.dropped { color: #444; background: #eee; }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .45em; }
svg text { font: 12px system-ui, sans-serif; fill: #444; }
svg .corner { font-weight: 600; paint-order: stroke; stroke: #fff; stroke-width: 3px; }
"""


def page(title: str, body: str) -> str:
    """One self-contained HTML page. `title` is escaped here, `body` by its maker; scripts and downloads are barred."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(legible(title))}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
