"""pruners.look: --score-only writes what the loop would decide, and a page that says the same."""

import json
import math
import re
import subprocess
import sys
from contextlib import nullcontext
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BASE
from hypothesis import example, given
from hypothesis import strategies as st

import train
from data.legible import legible, token_bytes
from data.sft import Sample, load_samples
from data.stream import Stream
from data.tokenizer import TextTokenizer
from model import Transformer
from pruners import look
from qtuning import Quadrant, Thresholds, prune_batch, supp_score
from training.scoring import score

READ = token_bytes(TextTokenizer.from_pretrained(BASE))
KEYS = ["id", "ppl", "ent", "quadrant", "supp_score", "kept", "backfilled", "trimmed", "answer_tokens", "tokens_kept"]


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """38 rows, which fill no last step; each holds letters of several bytes and a script."""
    path = tmp_path_factory.mktemp("nasty") / "nasty.jsonl"
    texts = [
        {
            "id": f"<i>{i}",
            "instruction": f"Say {i} & é",
            "output": f"{'🙂é' * (i % 5)} <script>a({i})</script>, {i * i}!",
        }
        for i in range(38)
    ]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


FLAGS = ["--lora-rank", "0", "--micro-batch", "4", "--prune-batch", "8", "--sample-keep-ratio", "0.5", "--seed", "3"]


def looked(checkpoint, data, out, *flags):
    """Run --score-only; the lines of scores.jsonl."""
    argv = ["--score-only", "--model", checkpoint, "--data", data, "--out", out, *FLAGS, *flags]
    train.main([str(word) for word in argv])
    return read_jsonl(out / "scores.jsonl")


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def found(checkpoint, nasty, tmp_path_factory):
    out = tmp_path_factory.mktemp("look") / "run"
    return SimpleNamespace(out=out, records=looked(checkpoint, nasty, out), page=(out / "look.html").read_text())


@pytest.fixture(scope="module")
def pruned(checkpoint, nasty):
    """Algorithm 1 by qtuning.prune_batch alone: each prune batch of the first epoch, filled up from the second."""
    samples, _ = load_samples(nasty, TextTokenizer.from_pretrained(checkpoint))
    rows, _ = Stream(range(38), 3).take(0, 40)
    with torch.no_grad():
        model = Transformer.from_pretrained(checkpoint)
        nll, entropy, mask = score(model, [samples[row] for row in rows], 2048, nullcontext())
    parts = [slice(start, start + 8) for start in range(0, 40, 8)]
    return samples, rows, mask, [prune_batch(nll[p], entropy[p], mask[p], 0.5, 0.5) for p in parts]


def test_the_lines_are_prune_batch_on_the_scores_of_each_prune_batch(found, pruned):
    samples, rows, mask, batches = pruned
    assert [record["id"] for record in found.records] == [samples[row].id for row in rows[:38]]
    assert all(list(record) == [*KEYS, "prune_batch"] for record in found.records)
    expected = {
        name: torch.cat([getattr(batch.samples, attribute) for batch in batches]).tolist()
        for name, attribute in (("quadrant",) * 2, ("kept", "keep"), ("backfilled",) * 2, ("trimmed", "prune_tokens"))
    }
    expected["answer_tokens"] = mask.sum(dim=1).tolist()
    expected["tokens_kept"] = torch.cat([batch.token_mask.sum(dim=1) for batch in batches]).tolist()
    expected["prune_batch"] = [place // 8 for place in range(40)]
    for name, values in expected.items():
        assert [record[name] for record in found.records] == values[:38], name
    floats = {"ppl": torch.cat([b.ppl for b in batches]), "ent": torch.cat([b.ent for b in batches])}
    floats["supp_score"] = torch.cat([supp_score(batch.ppl, batch.ent) for batch in batches])
    for name, values in floats.items():
        assert [record[name] for record in found.records] == pytest.approx(values[:38].tolist(), abs=1e-4), name


def test_the_first_step_of_a_run_decides_as_the_lines_say(checkpoint, nasty, found, tmp_path):
    argv = ["--model", checkpoint, "--data", nasty, "--out", tmp_path / "run", "--max-steps", 1, "--log-selection"]
    train.main([str(word) for word in [*argv, *FLAGS]])
    chosen = read_jsonl(tmp_path / "run" / "selection.jsonl")[0]["samples"]
    assert len(chosen) == 16
    for record, run in zip(found.records, chosen, strict=False):
        names = ("id", "quadrant", "kept", "backfilled", "trimmed", "ppl", "ent")
        assert [record[name] for name in names] == [run[name] for name in names]
        assert record["tokens_kept"] == run.get("tokens", "").count("1")


def test_nothing_is_trained(found):
    assert sorted(path.name for path in found.out.iterdir()) == ["config.json", "look.html", "scores.jsonl"]


def page_rows(page):
    """(id, [(class, text) of each piece]) of every row on the page."""
    rows = re.findall(
        r"<p class='head'><b><span class=\"\">(.*?)</span></b>.*?<pre class=\"row low\">(.*?)</pre>", page, re.S
    )
    pieces = re.compile(r'<span class="(\w+)">([^<>]*)</span>')
    return [(unescape(name), [(kind, unescape(text)) for kind, text in pieces.findall(row)]) for name, row in rows]


def test_the_struck_out_tokens_are_those_trimmed(found, pruned):
    samples, rows, mask, batches = pruned
    kept = torch.cat([batch.token_mask for batch in batches])
    dropped = ~torch.cat([batch.samples.keep for batch in batches])
    places = {samples[row].id: place for place, row in reversed(list(enumerate(rows)))}
    struck = 0
    for name, pieces in page_rows(found.page):
        place = places[name]
        sample, runs = samples[rows[place]], []
        for position, token in enumerate(sample.input_ids):
            fate = "prompt"
            if position and mask[place, position - 1]:
                fate = "answer" if kept[place, position - 1] else "dropped" if dropped[place] else "trimmed"
            if not runs or runs[-1][0] != fate:
                runs.append((fate, b""))
            runs[-1] = (fate, runs[-1][1] + READ(token))
        assert pieces == [(fate, legible(text)) for fate, text in runs], name
        struck += sum(fate == "trimmed" for fate, _ in runs)
    assert struck > 0


def test_the_page_shows_three_rows_of_each_quadrant_and_of_the_backfill(found):
    shown = [name for name, _ in page_rows(found.page)]
    expected = []
    for quadrant in look.NAMES:
        expected += [r["id"] for r in found.records if r["quadrant"] == quadrant and not r["backfilled"]][:3]
    assert shown == expected + [r["id"] for r in found.records if r["backfilled"]][:3]


def test_the_page_escapes_its_rows_and_loads_nothing(found):
    assert "&lt;script&gt;" in found.page
    assert "<script" not in found.page and "<i>" not in found.page
    assert not re.search(r"(?<!xmlns=\")https?:|src=|href=|url\(|@import", found.page)


def test_the_page_draws_every_row(found):
    assert found.page.count("<title>") == 1 + 38
    assert found.page.count("kept by the backfill, PPL") == sum(record["backfilled"] for record in found.records)
    assert found.page.count(", dropped, PPL") == sum(not record["kept"] for record in found.records)


def test_the_totals_of_terminal_and_page_are_those_of_the_lines(checkpoint, nasty, tmp_path, capsys):
    records = looked(checkpoint, nasty, tmp_path / "run")
    out, page = capsys.readouterr().out, (tmp_path / "run" / "look.html").read_text()
    columns = ("kept", "backfilled", "trimmed", "answer_tokens", "tokens_kept")
    table = []
    for quadrant, (name, _) in [*look.NAMES.items(), (None, ("all", ""))]:
        part = [record for record in records if quadrant in (None, record["quadrant"])]
        numbers = [len(part), *(sum(record[column] for record in part) for column in columns)]
        assert re.search(rf"^{name} +" + " +".join(map(str, numbers)) + "$", out, re.M), name
        assert f"{name}</td>" + "".join(f"<td>{number}</td>" for number in numbers) in page
        table.append(numbers)
    assert [sum(column) for column in zip(*table[:-1], strict=True)] == table[-1]
    assert f"Kept: {table[-1][1]} of 38 samples" in out and f"{table[-1][5]} of {table[-1][4]} answer tokens" in out
    filled = re.search(r"^Backfill: (\d+) of the (\d+) kept samples.*$", out, re.M)
    assert [int(number) for number in filled.groups()] == [table[-1][2], table[-1][1]]
    assert sum(map(int, re.findall(r"(\d+) from ", filled[0]))) == table[-1][2]


def test_budgets_hold_in_every_line(found):
    for record in found.records:
        assert record["kept"] >= record["backfilled"] and record["kept"] >= record["trimmed"]
        most = record["answer_tokens"]
        kept = (max(1, most // 2) if record["trimmed"] else most) if record["kept"] else 0
        assert record["tokens_kept"] == kept
    for batch in range(4):  # the last one shares its budget with rows of the second epoch
        assert sum(record["kept"] for record in found.records if record["prune_batch"] == batch) == 4


def test_the_backfill_quadrants_are_the_runs(checkpoint, nasty, tmp_path):
    records = looked(checkpoint, nasty, tmp_path / "run", "--backfill-quadrants", "0,3", "--sample-keep-ratio", "0.25")
    assert any(record["backfilled"] for record in records)
    assert {record["quadrant"] for record in records if record["backfilled"]} <= {0, 3}


def test_two_ranks_write_what_one_does(checkpoint, nasty, found, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train.__file__]
    argv = [
        "--score-only",
        "--model",
        checkpoint,
        "--data",
        nasty,
        "--out",
        tmp_path / "run",
        *FLAGS,
        "--grad-accum",
        2,
    ]
    done = subprocess.run(
        [*launch, *map(str, argv)], capture_output=True, text=True, check=False, cwd=Path(train.__file__).parent
    )
    assert done.returncode == 0, done.stderr
    for one, two in zip(found.records, read_jsonl(tmp_path / "run" / "scores.jsonl"), strict=True):
        assert two == one | {
            name: pytest.approx(one[name], rel=1e-5, abs=1e-6) for name in ("ppl", "ent", "supp_score")
        }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume"], "--resume must be absent with --score-only, got True"),
        (["--sample-pruner", "random"], "one that places samples on the plane, with --score-only, got random"),
        (["--sample-pruner", "longest"], "one that places samples on the plane, with --score-only, got longest"),
        (["--prune-batch", "4", "--sample-keep-ratio", "0.1"], "keeps none of 4 samples"),
    ],
)
def test_refused(checkpoint, nasty, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        looked(checkpoint, nasty, tmp_path / "run", *flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_refused(checkpoint, nasty, found, capsys):
    before = (found.out / "scores.jsonl").read_bytes()
    with pytest.raises(SystemExit) as ended:
        looked(checkpoint, nasty, found.out)
    assert ended.value.code == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (found.out / "scores.jsonl").read_bytes() == before


def records_at(ppl, ent):
    fate = {"quadrant": Quadrant.BETWEEN, "kept": True, "backfilled": False}
    return [{"id": str(i), "ppl": p, "ent": e} | fate for i, (p, e) in enumerate(zip(ppl, ent, strict=True))]


@given(st.lists(st.tuples(st.floats(1, 1e38), st.floats(0, 12)), min_size=1, max_size=20))
@example([(1.0, 0.0)])
@example([(1.0, 0.0), (1e38, 12.0)])
@example([(1.0000001, 5e-324), (1.0, 0.0)])
def test_any_plane_can_be_drawn_inside_its_frame(points):
    ppl, ent = zip(*points, strict=True)
    low, high = min(ppl), max(ppl)
    svg = look.plane_svg(records_at(ppl, ent), [Thresholds(0.1, 0.1, low, high, min(ent), max(ent))])
    assert "nan" not in svg and "inf" not in svg
    for x, y in re.findall(r'<circle cx="([^"]*)" cy="([^"]*)"[^>]*><title>', svg):
        assert look.LEFT <= float(x) <= look.LEFT + look.WIDTH and look.TOP <= float(y) <= look.TOP + look.HEIGHT


@given(st.floats(-3, 40), st.floats(1e-6, 50))
def test_ticks_are_few_and_inside_the_axis(low, size):
    high = low + size
    linear, log = look.linear_ticks(low, high), look.log_ticks(low, min(high, low + 38))
    assert len(linear) <= 9 and len(log) <= 11
    assert all(low - 1e-6 * size <= tick <= high + 1e-6 * size for tick in linear)
    assert all(low - 1e-6 <= math.log10(tick) <= high + 1e-6 for tick in log)


def test_the_estimate_counts_forward_passes(monkeypatch):
    samples = [Sample(str(i), [0] * 101, [0] * 101) for i in range(10)]  # 100 tokens each that pass
    weights = torch.nn.Linear(100, 10, bias=False)
    scorer = SimpleNamespace(model=weights, ranks=SimpleNamespace(device=torch.device("cpu")))
    found = look.Look([], [], [], [100] + [0] * 9, [], 10.0)

    def seconds(**changes):
        cfg = SimpleNamespace(**{"lora_rank": 0, "activation_checkpointing": False, "reuse_forward": False} | changes)
        cfg.reuse_scores = changes.get("reuse_scores", 1)
        line = look.cost(cfg, found, samples, scorer, 20)[0]
        return tuple(float(n) for n in re.search(r"about (\S+) s, (\S+) s without", line).groups())

    monkeypatch.setattr(look, "duration", lambda seconds: f"{seconds} s")
    assert seconds() == (2 * (1000 + 3 * 100) / 10, 2 * 3 * 1000 / 10)
    assert seconds(lora_rank=8) == (2 * (1000 + 2 * 100) / 10, 2 * 2 * 1000 / 10)
    assert seconds(activation_checkpointing=True) == (2 * (1000 + 4 * 100) / 10, 2 * 4 * 1000 / 10)
    reused = seconds(activation_checkpointing=True, reuse_forward=True)
    assert reused == (2 * (1000 + 3 * 100) / 10, 2 * 4 * 1000 / 10)
    assert seconds(reuse_scores=2)[0] == (1000 + 2 * 3 * 100) / 10
