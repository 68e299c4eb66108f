"""README.md says what is true: its commands, flags, files, tests, metric keys and numbers."""

import dataclasses
import json
import re
from pathlib import Path

import train
from reproduce import choices, efficiency, growth, memory, packing, quickstart, report, selection

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "reproduce" / "results"


def test_ci_runs_the_two_commands_word_for_word():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("python3")] == commands


def test_the_files_it_links_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert "qtuning.py" in links
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_the_flags_it_names_exist():
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(train.Config)}
    sources = [ROOT / "score_rows.py", *(ROOT / "eval").glob("*.py"), *(ROOT / "reproduce").glob("*.py")]
    for source in sources:
        flags |= set(re.findall(r'"(--[a-z-]+)"', source.read_text(encoding="utf-8")))
    elsewhere = {"--help", "--nproc_per_node", "--standalone"}
    assert set(re.findall(r"--[a-z][a-z0-9_-]+", README)) - flags - elsewhere == set()


def test_every_choice_has_its_row_and_every_row_a_test_that_exists():
    rows = re.findall(r"^\| (C\d+) \|.*\| `(test_\w+)` \|$", README, re.MULTILINE)
    assert [name for name, _ in rows] == [f"C{i}" for i in range(1, 19)]
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert [test for _, test in rows if f"def {test}(" not in tests] == []
    measured = dict(re.findall(r"^\| (C\d+) \|.*\| ([^|]*) \| `test_\w+` \|$", README, re.MULTILINE))
    found = json.loads((RESULTS / "choices.json").read_text())
    assert measured == {name: choices.cell(found, name) for name, _ in rows}


def test_every_metric_is_in_the_glossary():
    source = Path(train.__file__).read_text(encoding="utf-8")
    block = source[source.index("            metrics = {") : source.index('append_json(out / "metrics.jsonl"')]
    counts = source[source.index("    counts = {") : source.index("    return {name: int(mask.sum())")]
    keys = re.findall(r'^ +"(\w+)":', block + counts, re.MULTILINE)
    assert len(keys) == 22
    glossary = README[README.index("`metrics.jsonl` holds") : README.index("`selection.jsonl` (")]
    assert [key for key in keys if f"`{key}`" not in glossary] == []


def test_its_tables_are_those_of_the_committed_results():
    tables = dict(re.findall(r"<!-- (\w+) -->\n(?:```text\n)?(.*?)(?:\n```)?\n<!-- end -->", README, re.DOTALL))
    shown = json.loads((RESULTS / "quickstart.json").read_text())
    assert tables["quickstart"].strip() == quickstart.report(shown).strip()
    tiny = report.Results.read("tiny")
    assert tables["baseline"].strip() == report.baseline_table(tiny)
    assert tables["answers"].strip() == report.answers(tiny)
    assert tables["small"].strip() == report.score_table(report.Results.read("small"), "smollm2", "SmolLM2-135M")
    assert tables["grid"].strip() == report.grid(tiny, "gsm8k")
    runs = [json.loads((RESULTS / f"smollm2_{data}.json").read_text()) for data in ("gsm8k", "alpaca")]
    for name in ("smollm2", "tiny"):
        measured = json.loads((RESULTS / f"efficiency_{name}.json").read_text())
        assert tables[f"efficiency_{name}"].strip() == efficiency.shares(measured)
    assert tables["growth"].strip() == growth.table(json.loads((RESULTS / "growth.json").read_text()))
    assert tables["packing"].strip() == packing.table(json.loads((RESULTS / "packing_smollm2.json").read_text()))
    assert tables["memory"].strip() == memory.table(json.loads(memory.RESULT.read_text())).strip()
    assert (
        tables["scores"].strip()
        == report.scores_table(json.loads((RESULTS / "smollm2_scores.json").read_text())).strip()
    )
    assert tables["smollm2"].strip() == selection.table(runs).strip()
