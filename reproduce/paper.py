"""The paper's own scores (arXiv 2509.23873), as printed: paper.json.

A table has models, a model has sections, a section has rows of scores, in percent and in the order of the table's
`tasks`. A section is a budget, "12.5x50" for 12.5 % of the samples and 50 % of the tokens; section "" has the untuned
model and full-data tuning. A row is "sample pruner-token pruner" or "Q-Tuning". In Tables 4 and 15 its name lists the
quadrants that lose samples, a bar, and the quadrants that lose tokens. Table 6 has minutes: `columns` and `rows`.
`missing` lists rows that our text of the paper lacks, `misprints` cells that contradict others, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from training.files import read_json

PAPER = Path(__file__).with_name("paper.json")


@cache
def load() -> dict:
    """The parsed paper.json."""
    return read_json(PAPER)


def rows(table: str) -> Iterator[tuple[str, str, str, list[float]]]:
    """(model, section, row, scores) of each row, in the order of the paper."""
    for model, sections in load()["tables"][table]["models"].items():
        for section, named in sections.items():
            for row, scores in named.items():
                yield model, section, row, scores


def paper_score(table: str, model: str, section: str, row: str, task: str) -> float | None:
    """One printed score in percent, misprints included; None where the table has no such section or row.

    Raises:
        ValueError: there is no such table, or it has no such model or task.
    """
    found = load()["tables"].get(table, {})
    for name, value, known in (("model", model, found.get("models", {})), ("task", task, found.get("tasks", []))):
        if value not in known:
            raise ValueError(f"Table {table} of the paper: expected a {name} of {list(known)}, got {value!r}")
    scores = found["models"][model].get(section, {}).get(row)
    return None if scores is None else scores[found["tasks"].index(task)]
