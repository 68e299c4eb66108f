"""Side files: one value per row that a model computed before training, as SCORES/FIELD.jsonl.

A line is {"id": ..., FIELD: value}. `pruners.score_rows` writes such files; they may also come from elsewhere.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from data.sft import Sample, read_rows
from training.files import read_object, shown, write_json
from training.scoring import answer_mask


def read_side_file(folder: str | Path, field: str, convert: Callable = float) -> dict[str, object]:
    """id -> value of FOLDER/FIELD.jsonl, each value through `convert`, line by line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line without the id or a value that converts, by file and line.
    """
    path, values = Path(folder) / f"{field}.jsonl", {}
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; `python -m pruners.score_rows {field}` writes it")
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            try:
                row = json.loads(raw)
                values[str(row["id"])] = convert(row[field])
            except (ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:  # too long, too deep
                got = raw[:80].decode("utf-8", "replace").strip()
                raise ValueError(f"{path}:{line}: expected an object with 'id' and {field!r}, got {got}") from error
    return values


def rows_by_id(path: str | Path) -> dict[str, dict]:
    """The rows of a data file by id.

    Raises:
        ValueError: two rows of one id: a score could not tell them apart.
    """
    rows = {}
    for number, (_, row) in enumerate(read_rows(path)):
        if isinstance(row, dict):
            row_id = str(number if row.get("id") is None else row["id"])
            if row_id in rows:
                raise ValueError(
                    f"{path}: two rows have the id {row_id!r}; scores are keyed by id, so each row needs its own"
                )
            rows[row_id] = row
    return rows


def encode_vector(vector: Tensor) -> str:
    return base64.b64encode(vector.to(torch.float16).numpy().tobytes()).decode("ascii")


def decode_vector(text: str) -> Tensor:
    return torch.from_numpy(numpy.frombuffer(base64.b64decode(text), dtype=numpy.float16).copy())


def open_side_file(folder: Path, what: str, settings: dict) -> set[str]:
    """Start DIR/WHAT.jsonl, or find which ids it holds; a line that was cut off is taken out.

    Raises:
        ValueError: it was made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, about = folder / f"{what}.jsonl", folder / f"{what}.json"
    if not about.exists():
        if path.exists():
            raise ValueError(f"{path} exists and was not made here (no {about.name}); give another --scores folder")
        write_json(about, {"settings": settings})
    before = read_object(about).get("settings")
    if not isinstance(before, dict):
        raise ValueError(f"{about}: settings must be an object, got {shown(before)}")
    for key, value in settings.items():
        if before.get(key) != value:
            made = shown(before.get(key))
            raise ValueError(f"{path} was made with {key} {made}, got {value!r}; give another --scores")
    if not path.exists():
        return set()
    whole, _, cut = path.read_bytes().rpartition(b"\n")
    if cut:
        os.truncate(path, len(whole) + 1 if whole else 0)
    return set(read_side_file(folder, what, convert=lambda value: None))


# ----------------------------------------------------------------------------- needs of pruners, by row

OF_SAMPLE = {"num_answer_tokens": lambda sample: answer_mask(sample).sum()}  # needs that the tokens answer: |T(x)|


def sample_values(need: str, samples: Sequence[Sample], data: str, scores: str | None) -> list[Tensor | None]:
    """One value for each sample: from the data file's field of that name, else from the side file, else None.

    A need in OF_SAMPLE is answered without either; `embedding` is a vector, from a side file only.

    Raises:
        ValueError: a side file is needed and there is no --scores, or a value is no number.
        FileNotFoundError: there is no such side file.
    """
    ids = [sample.id for sample in samples]
    if need in OF_SAMPLE:
        return [OF_SAMPLE[need](sample) for sample in samples]
    if need == "embedding":
        vectors = read_side_file(_folder(need, scores), need, decode_vector)
        if len(sizes := sorted({len(vector) for vector in vectors.values()})) > 1:
            raise ValueError(f"{scores}/{need}.jsonl: expected vectors of one size, got sizes {shown(sizes)}")
        if odd := [row_id for row_id, vector in vectors.items() if not vector.isfinite().all()]:
            raise ValueError(f"{scores}/{need}.jsonl: id {odd[0]!r}: expected finite numbers (float16)")
        return [vectors.get(row_id) for row_id in ids]
    rows, side = rows_by_id(data), {}
    if not all(rows[row_id].get(need) is not None for row_id in ids):
        if scores is None:
            raise ValueError(f"{data}: not every row has the field {need!r}; give --scores with a {need}.jsonl")
        side = read_side_file(scores, need)
    values = [rows[row_id].get(need) for row_id in ids]
    values = [side.get(row_id) if value is None else value for row_id, value in zip(ids, values, strict=True)]
    try:
        return [None if value is None else torch.tensor(float(value), dtype=torch.float64) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{data}: the field {need!r} must be a number ({error})") from error


def token_values(need: str, samples: Sequence[Sample], scores: str | None) -> list[Tensor]:
    """One value for each answer token of each sample, from a side file: (A,) float32 each.

    Raises:
        FileNotFoundError: there is no such side file.
        ValueError: it lacks a sample, or has another number of values for it, or one that is not finite.
    """
    folder, found = _folder(need, scores), []
    by_id = read_side_file(folder, need, lambda values: torch.tensor(values, dtype=torch.float32))
    for sample in samples:
        expected, got = int(answer_mask(sample).sum()), by_id.get(sample.id)
        if got is None or got.shape != (expected,) or not bool(got.isfinite().all()):
            got = "none" if got is None else str(got.numel()) if bool(got.isfinite().all()) else "one not finite"
            raise ValueError(f"{folder}/{need}.jsonl: expected {expected} values for row {sample.id!r}, got {got}")
        found.append(got)
    return found


def _folder(need: str, scores: str | None) -> str:
    if scores is None:
        raise ValueError(f"{need!r} needs --scores, a folder of side files; `python -m pruners.score_rows` writes them")
    return scores
