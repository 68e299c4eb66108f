"""Whole files and JSON: a file is written aside and renamed, and an error names the file."""

from __future__ import annotations

import json
import os
import reprlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 120


def shown(value: object) -> str:
    """The repr of a value as messages quote it: on one line and short, however large or nested the value is."""
    return SHORT.repr(value)


def json_kind(value: object) -> str:
    """The kind of a parsed JSON value, for messages: "a list", "null"; of a number or a bool the value itself."""
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value)) or shown(value).lower()  # true and false, as JSON has them


def shown_key(key: str) -> str:
    """A key as messages name it: itself where it is a plain word, else its repr."""
    return key if key.isidentifier() and len(key) < SHORT.maxstring else shown(key)


def read_json(path: str | Path) -> object:
    """The parsed value of a JSON file, in UTF-8 with or without a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid JSON, or nested more deeply than Python reads. Both name the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def read_jsonl(path: str | Path, growing: bool = False) -> list:
    """The parsed value of each line of a .jsonl file.

    Args:
        growing: the file is still being written; a last line without its end is left out.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not valid JSON. Both name the file, the second the line too.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid UTF-8 ({error})") from None
    if growing or not lines[-1]:
        lines.pop()
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not valid JSON ({error})") from None
    return values


def read_object(path: str | Path) -> dict:
    """The parsed value of a JSON file that must hold an object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not valid JSON, or holds another value. Both name the file.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {json_kind(value)}")
    return value


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    aside = Path(f"{path}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_json(path: str | Path, value: object, indent: int = 2) -> None:
    """Write a JSON file whole or not at all; its folder is made if it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def append_json(path: str | Path, value: object) -> None:
    """Append one line to a .jsonl file."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


@contextmanager
def written_aside(folder: str | Path) -> Iterator[Path]:
    """A folder to write files into; each is renamed into `folder` once all of them are whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as new:
        yield Path(new)
        for file in sorted(Path(new).iterdir(), key=lambda path: path.stat().st_mtime_ns):
            os.replace(file, folder / file.name)
