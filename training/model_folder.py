"""Model folders in Hugging Face's layout: which files to read and to copy, and the headers and tensors in them.

A folder may come from anyone. What it names is read within it alone, and links are followed where that is safe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.files import read_object, shown

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
FLOATS = ("F32", "F16", "BF16")  # the types that weights may be stored in, by safetensors' names


class Header(NamedTuple):
    """What a .safetensors file says about one of its tensors before that is read."""

    shape: tuple[int, ...]
    stored_as: str  # "F32", "BF16", ...
    file: Path


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files of a model folder, for copying beside weights that were made from it.

    A stranger's folder may hold a link to any file of this machine, and the copy would be published with the
    weights. So a link must lead to a file within the folder, or to one of its own repository in the Hugging Face
    cache: there each file of REPOSITORY/snapshots/REVISION is a link to REPOSITORY/blobs/HASH.

    Raises:
        ValueError: a file is a link to elsewhere.
    """
    files, home = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()], folder.resolve()
    blobs = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    for file in files:
        target = file.resolve()
        if home not in target.parents and target.parent not in blobs:
            raise ValueError(f"{file}: a link to {target}, outside of the model's folder; put a copy in its place")
    return files


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files of a model folder: those of the index, model.safetensors, or the only one.

    An index must name plain files of its own folder. These may be links to anywhere: in the Hugging Face cache all
    of them are links, and the tensors of a safetensors file are all that is read through one.

    Raises:
        FileNotFoundError: there are no weights, or a file of the index is missing.
        ValueError: the index has no `weight_map`, or that names something other than a plain .safetensors file.
    """
    index = folder / INDEX
    if not index.is_file():
        files = [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []
        files = files or sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"{folder}: expected model.safetensors, {INDEX} or one other .safetensors file, found {len(files)}"
            )
        return files
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a 'weight_map' of tensor names to files, got {shown(weight_map)}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file) or not file.isprintable():
            expected = f"weight_map: {shown(name)} must be the name of a .safetensors file in this folder"
            raise ValueError(f"{index}: {expected}, got {shown(file)}")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: no such file; {INDEX} names it")
    return [folder / file for file in sorted(set(weight_map.values()))]


def tensor_headers(files: list[Path]) -> dict[str, Header]:
    """name -> header of the tensors of .safetensors files; no tensor is read.

    Raises:
        ValueError: a file is not a whole safetensors file, or two of them hold a tensor of one name.
    """
    headers = {}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name in headers:
                    raise ValueError(f"{file}: tensor {shown(name)} is in another file of the folder too")
                header = tensors.get_slice(name)
                headers[name] = Header(tuple(header.get_shape()), header.get_dtype(), file)
    return headers


def check_header(name: str, header: Header, expected: tuple[int, ...], config: str) -> None:
    """ValueError where a stored tensor has another shape than a config file asks for, or is no fp32, fp16 or bf16."""
    where = f"{header.file}: tensor {name!r}"
    if header.shape != expected:
        raise ValueError(f"{where} must have shape {expected} by {config}, got {shown(header.shape)}")
    if header.stored_as not in FLOATS:
        raise ValueError(f"{where} must be fp32, fp16 or bf16, got {header.stored_as}")


def checkpoint_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Each (name, tensor) of .safetensors files, one at a time."""
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """An open .safetensors file. Raises: OSError; ValueError where it is not a whole one. Both name the file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except OSError as error:
        raise OSError(f"{file}: cannot be read ({shown(str(error))})") from None
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({shown(str(error))})") from None
