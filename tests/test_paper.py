"""reproduce/paper.json: whole, consistent but for the misprints it lists, and what the paper's text says.

The paper's text is not ours to ship: PAPER=FILE names it (one line a row, cells apart by tabs). Skipped without it.
"""

import os
import re
from collections import defaultdict
from itertools import product
from math import floor
from pathlib import Path

import pytest

from reproduce import efficiency
from reproduce.paper import load, paper_score, rows

TABLES = load()["tables"]
SCORED = [number for number in TABLES if number != "6"]
PAIRED = {  # sections with every sample pruner and every token pruner
    "1": ["12.5x50"],
    "2": ["25x50"],
    "8": ["12.5x70", "25x50"],
    "9": ["25x70", "50x50", "50x70"],
    "10": ["12.5x50", "12.5x70", "25x50"],
    "11": ["25x70", "50x50", "50x70"],
    "12": ["25x70", "50x70"],
}
OTHERS = {"3": 6, "4": 7, "5": 4, "13": 44, "14": 24, "15": 12}  # rows of the other tables, of all models
PAIRS = product(["Random", "Longest", "InfoBatch", "Entropy"], ["Random", "PPL", "FastV", "SparseVLM"])
PAIRS = {*map("-".join, PAIRS), "Q-Tuning"}
ITEMS = {"ARC-E": 567, "ARC-C": 295, "GSM8K": 1319, "TriviaQA": 8837, "MATH": 5000}  # SQuAD's 11873 allow any score
TASKS = {*ITEMS, "SQuAD", "Avg."}
SAME = {("15", "Q1 Q3 | Q2"): "Q-Tuning", ("4", "Q1 Q3 | Q2 Q4"): "Q-Tuning"}  # two names of one run
MISSING = {tuple(entry[key] for key in ("table", "model", "section", "row")) for entry in load()["missing"]}
MISPRINTS = {
    tuple(entry[key] for key in ("table", "model", "section", "row", "task")): entry["printed"]
    for entry in load()["misprints"]
}
CELLS = {
    (number, model, section, row, task): score
    for number in SCORED
    for model, section, row, scores in rows(number)
    for task, score in zip(TABLES[number]["tasks"], scores, strict=False)  # lengths: the first test
}


def wrong_means():
    """Averages that the scores beside them do not give: each is rounded, so 0.01 is allowed, and a bit of float."""
    for number in SCORED:
        for model, section, row, (*scores, average) in rows(number):
            if abs(sum(scores) / len(scores) - average) > 0.011:
                yield number, model, section, row, "Avg."


def off_the_grid():
    """Scores that no count of right answers gives, rounded or cut to two decimals."""
    for cell, score in CELLS.items():
        if items := ITEMS.get(cell[-1]):
            near = [100 * k / items for k in (floor(score * items / 100), floor(score * items / 100) + 1)]
            if score not in {round(x, 2) for x in near} | {floor(100 * x + 1e-6) / 100 for x in near}:
                yield cell


def same_cells():
    """Groups of cells that are one measurement. An untuned model was trained on nothing: its data does not matter."""
    groups = defaultdict(list)
    for number, model, section, row, task in CELLS:
        data = "" if row == "Zero-Shot" and task != "Avg." else TABLES[number]["data"]
        name = SAME.get((number, row), row)
        groups[data, model, section, name, task].append((number, model, section, row, task))
    return [group for group in groups.values() if len(group) > 1]


def test_every_table_is_whole_but_for_the_missing_rows():
    assert [(n, *key) for n in SCORED for *key, scores in rows(n) if len(scores) != len(TABLES[n]["tasks"])] == []
    assert {number: len(list(rows(number))) for number in OTHERS} == OTHERS
    for number, budgets in PAIRED.items():
        for model, sections in TABLES[number]["models"].items():
            assert list(sections) == ["", *budgets]
            for section, named in sections.items():
                expected = PAIRS if section else {"Zero-Shot", "Full Dataset"}
                assert expected - named.keys() == {key[-1] for key in MISSING if key[:3] == (number, model, section)}
                assert named.keys() <= expected


def test_averages_are_means_and_scores_are_counts_but_for_the_misprints():
    off = {*wrong_means(), *off_the_grid()}
    assert off <= MISPRINTS.keys()
    disputed = {cell for group in same_cells() if len({CELLS[cell] for cell in group}) > 1 for cell in group}
    assert MISPRINTS.keys() <= off | disputed  # none is stale
    assert {cell: CELLS[cell] for cell in MISPRINTS} == MISPRINTS


def test_a_cell_printed_twice_is_the_same_but_for_the_misprints():
    groups = same_cells()
    tables = [{cell[0] for cell in group} for group in groups]
    assert {"1", "3", "13", "14", "15"} in tables and {"5", "8", "13", "14", "15"} in tables  # Q-Tuning of Mistral-7B
    assert {"1", "13", "14"} in tables and {"4", "10"} in tables and {"2", "12"} in tables
    for group in groups:
        assert len({CELLS[cell] for cell in group if cell not in MISPRINTS}) == 1, group


def test_paper_score():
    assert paper_score("2", "Mistral-7B", "25x50", "Q-Tuning", "MATH") == 4.0
    assert paper_score("9", "Mistral-7B", "50x70", "Q-Tuning", "Avg.") is None
    for slip in (("7", "Mistral-7B", "GSM8K"), ("1", "Mistral", "GSM8K"), ("1", "Mistral-7B", "MATH")):
        with pytest.raises(ValueError, match=rf"Table {slip[0]} of the paper: expected a (model|task) of"):
            paper_score(*slip[:2], "12.5x50", "Q-Tuning", slip[2])


def test_table_6_is_whole_and_is_what_efficiency_compares_with():
    table = TABLES["6"]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    *pruned, full = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    assert {row["sample_ratio"] / 100: row["total_min"] / full["total_min"] for row in pruned} == efficiency.PAPER


# ---- against the paper's text

needs_text = pytest.mark.skipif("PAPER" not in os.environ, reason="PAPER names no text of the paper")
DELTA = re.compile(r"\^\{[^}]*\}|\$?\\(up|down)arrow[_ ]?\{?[\d.]+\}?\$?")  # the change against a baseline
SCORE = re.compile(r"\d+\.\d+")


def printed_lines(number: str) -> list[list[str]]:
    """The table's lines as cells: what stands between its caption and the next empty line."""
    text = Path(os.environ["PAPER"]).read_text(encoding="utf-8")
    block = re.search(rf"^ ?Table {number}\. .*\n\n((?:.+\n)+)", text, re.MULTILINE)[1]
    return [[cell.strip() for cell in DELTA.sub("", line).split("\t")] for line in block.splitlines()]


def place(number: str, heading: str, labels: list[str]) -> tuple[str, str]:
    """(section, row) in the names of paper.json, of the heading above a printed row and the labels before it."""
    first, second = labels[0].removesuffix(" (Ours)"), labels[-1].removesuffix("%")
    if first in ("Zero-Shot", "Full Dataset"):
        return "", first
    if number == "5":
        names = {"Rho-1": first, r"PPL ($\lambda = 0$)": "PPL, lambda 0", r"PPL ($\lambda = 0.5$)": "Q-Tuning"}
        return "25x50", names.get(first, first.split(" (")[0])
    ratio = {unit: value for value, unit in re.findall(r"([\d.]+)% (Samples|Tokens)", heading)}
    if number in ("4", "15"):
        ticked = [name if tick else "" for name, tick in zip(["Q1", "Q3", "Q2", "Q4"], labels, strict=True)]
        row = " ".join(filter(None, [*ticked[:2], "|", *ticked[2:]]))
    elif number == "3":
        ratio, row = {"Samples": f"{float(first[:-1]):g}", "Tokens": labels[1][:-1]}, "Q-Tuning"
    elif number == "13":
        ratio["Tokens"], row = second, f"{first}-Random"
    elif number == "14":
        ratio["Samples"], row = second, f"Random-{first}"
    else:
        row = f"{first}-{second}"
    return f"{ratio['Samples']}x{ratio['Tokens']}", "Q-Tuning" if first == "Q-Tuning" else row


def printed_rows(number: str) -> dict[tuple[str, str, str], list[float]]:
    """(model, section, row): scores in our order of tasks. Rows that are cut are left out."""
    lines, tasks = printed_lines(number), TABLES[number]["tasks"]
    column = {i: cell for line in lines[:2] for i, cell in enumerate(line) if cell in TASKS}
    models = [cell.replace("SmoLM2", "SmolLM2") for cell in lines[0] if re.fullmatch(r"\w+-[\d.]+B", cell)]
    assert len(column) == len(tasks) * max(1, len(models))
    ordered = sorted(column)
    found, heading, first = {}, "", ""
    for cells in lines:
        labels = cells[: ordered[0]]
        if not SCORE.fullmatch(cells[ordered[0]] if len(cells) > ordered[0] else ""):
            heading = cells[0]
            continue
        if number not in ("4", "15"):  # a label stands once, over all its rows
            first = labels[0] = labels[0] or first
        key = place(number, heading, labels)
        for i, model in enumerate(models or TABLES[number]["models"]):
            places = ordered[i * len(tasks) : (i + 1) * len(tasks)]
            scores = {column[j]: float(cells[j]) for j in places if SCORE.fullmatch(cells[j])}
            if len(scores) == len(tasks):
                row = [scores[task] for task in tasks]
                assert found.setdefault((model, *key), row) == row  # a table has Full Dataset more than once
    return found


@needs_text
@pytest.mark.parametrize("number", SCORED)
def test_the_rows_are_those_of_the_text(number):
    ours = {tuple(key): scores for *key, scores in rows(number) if (number, *key) not in MISSING}
    assert ours == printed_rows(number)


@needs_text
def test_table_6_is_that_of_the_text():
    *_, pruned, half, most, full = printed_lines("6")
    lines = [[float(cell.removesuffix(" (Full)")) for cell in line] for line in (pruned, half, most, full)]
    assert lines == TABLES["6"]["rows"]


@needs_text
def test_no_table_of_scores_is_left_out():
    captions = re.findall(r"^ ?Table (\d+)\. ", Path(os.environ["PAPER"]).read_text(encoding="utf-8"), re.MULTILINE)
    assert {*captions} - {*TABLES} == {"7"}  # its hyperparameters are train.py's defaults
