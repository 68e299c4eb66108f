"""Whole files: written aside, flushed to disk, renamed; JSON; locks. Every error names the file."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import reprlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let an OSError from writing `path` name it: a failed write, such as on a full disk, does not by itself."""
    try:
        yield
    except SafetensorError as error:  # its message holds the cause
        raise OSError(f"{path}: {error}") from None
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


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


@contextlib.contextmanager
def replaced(path: str | Path, earlier: str | Path | None = None) -> Iterator[BinaryIO]:
    """A binary file to write; it takes the place of `path` once it is whole and on disk.

    earlier: where to keep the file that was at `path`, if there was one.
    """
    aside = Path(f"{path}.tmp")
    with naming(path):
        try:
            with aside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        if earlier is not None and Path(path).exists():
            os.replace(path, earlier)
        os.replace(aside, path)
        sync_folder(Path(path).parent)


def check_writable(path: str | Path) -> None:
    """Raise the OSError of writing `path` now, before the work whose result it will hold; nothing stays behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(f"{path}.tmp")
    with naming(path):
        aside.write_bytes(b"\0" * 4096)  # a full disk lets empty files be made
        aside.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replaced(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: str | Path, value: object, indent: int = 2) -> None:
    """Write a JSON file whole or not at all; its folder is made if it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def append_json(path: str | Path, value: object) -> None:
    """Append one line to a .jsonl file."""
    with naming(path), Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


@contextlib.contextmanager
def written_aside(folder: str | Path) -> Iterator[Path]:
    """A folder to write files into; each is renamed into `folder` once all of them are whole and on disk.

    What a killed process has left of an earlier attempt is removed first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with naming(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as new:
        yield Path(new)
        files = sorted(Path(new).iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for file in files:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        for file in files:
            os.replace(file, folder / file.name)
        sync_folder(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished copies that killed writers have left in a folder."""
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(path: str | Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`. The kernel frees the lock of a process that ends, however it ends.

    Raises:
        ValueError: another process holds it; `what` names what it writes.
    """
    path = Path(path)
    while True:
        with naming(path):
            file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise ValueError(f"{what}: process {holder or '?'} is writing it; expected no other") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # the last holder has removed the file since it was opened here
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
