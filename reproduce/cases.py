"""What a run selected: samples on the Error-Uncertainty plane, the kinds of pruned tokens, and examples to read.

    python -m reproduce.cases RUN [--step N] [--out DIR]

RUN is the folder of a Q-Tuning run with --log-selection, which may still be running. Files in DIR (RUN/cases):

    plane.json, plane.svg       Figures 1 and 2: scores, thresholds and decisions of some steps; all samples
    tokens.json, tokens.svg     Figure 7: the kinds of tokens among the pruned and among the kept
    quadrants.md                Appendix E.1: rows of each quadrant
    pruned.md, pruned.html      Appendix E.2: answers with their pruned tokens marked

The Markdown and HTML quote the rows, which may not be yours to publish. The paper had GPT-5 name the role of each token
of 300 instances; here fixed rules (`categories`) give a token its category, by its spelling and its place in the
answer, without its meaning.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import json
import math
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.sft import Sample, load_samples, read_rows, to_messages
from data.tokenizer import TextTokenizer
from eval.common import errors_in_one_line
from qtuning import IGNORE_INDEX, Quadrant
from reproduce.quickstart import in_boilerplate
from reproduce.selection import Log, chosen_again, rank_correlation, read_log
from reproduce.tables import markdown
from training.files import write_json, write_text


def rows_by_id(path: str | Path, samples: dict[str, Sample]) -> dict[str, dict]:
    """Sample id -> the row of the file that the sample was made from (see `load_samples`)."""
    rows = read_rows(path)
    return {name: rows[sample.number][1] for name, sample in samples.items()}


def trimmed(log: Log, backfilled: bool) -> list[dict]:
    """Records of the samples that lost tokens, each with its step: those in Q2, or those backfilled as Q2."""
    return [
        {"step": step["step"], **sample}
        for step in log.steps
        for sample in step["samples"]
        if sample["kept"] and sample["trimmed"] and sample["backfilled"] == backfilled
    ]


# ---------------------------------------------------------------------------- Figures 1 and 2: the plane

BINS = 40  # of the density, along each axis


def default_steps(log: Log) -> list[int]:
    """The first step of each third of the run, and the last step."""
    n = len(log.steps)
    return sorted({log.steps[i]["step"] for i in (0, n // 3, 2 * n // 3, n - 1)})


def plane(log: Log, steps: Sequence[int]) -> dict:
    """Scores, thresholds and decisions in each prune batch of these steps, and the density of all samples of the run.

    The thresholds are not logged; every decision is made again from the logged scores.

    Returns:
        {"prune_batch", "sample_keep_ratio", "steps": [{"step", "batches": [{"thresholds": {alpha, beta, ppl_low, ...},
        "id", "ppl", "ent", "quadrant", "kept", "backfilled": a list each}]}], "all": {"samples", "rank_correlation",
        "log_ppl": [lowest, highest], "ent": [lowest, highest], "seen", "kept": [BINS][BINS] counts, rows along log PPL,
        columns along Ent}}.
    Raises:
        ValueError: a step is not logged, or a decision differs from the logged one.
    """
    by_step, shown = {step["step"]: step for step in log.steps}, []
    for number in steps:
        if number not in by_step:
            raise ValueError(f"step {number} is not logged: the run has {min(by_step)} to {max(by_step)}")
        batches = []
        for records, chosen in chosen_again(log, by_step[number]):
            cuts = {key: round(value, 4) for key, value in dataclasses.asdict(chosen.thresholds).items()}
            scores = {axis: [round(record[axis], 4) for record in records] for axis in ("ppl", "ent")}
            decisions = {key: [int(record[key]) for record in records] for key in ("quadrant", "kept", "backfilled")}
            batches.append({"thresholds": cuts, "id": [record["id"] for record in records], **scores, **decisions})
        shown.append({"step": number, "batches": batches})

    every = [sample for step in log.steps for sample in step["samples"]]
    log_ppl, ent = (np.array([sample[axis] for sample in every]) for axis in ("ppl", "ent"))
    log_ppl, kept = np.log(log_ppl), np.array([sample["kept"] for sample in every])
    spans = {name: [float(values.min()), float(values.max())] for name, values in (("log_ppl", log_ppl), ("ent", ent))}
    counts = {
        name: np.histogram2d(log_ppl[which], ent[which], BINS, list(spans.values()))[0].astype(int).tolist()
        for name, which in (("seen", np.full(len(every), True)), ("kept", kept))
    }
    correlation = rank_correlation(torch.from_numpy(log_ppl), torch.from_numpy(ent))
    spans = {name: [round(value, 4) for value in span] for name, span in spans.items()}
    return {
        "prune_batch": log.config.prune_batch,
        "sample_keep_ratio": log.config.sample_keep_ratio,
        "steps": shown,
        "all": {"samples": len(every), "rank_correlation": round(correlation, 4), **spans, **counts},
    }


# ----------------------------------------------------------------------------------- pieces of an answer


@dataclass(frozen=True)
class Piece:
    """The smallest run of an answer's tokens that is text: one token, or those that share a character."""

    text: str
    num_tokens: int
    special: bool = False  # EOS and other special tokens


def answer_ids(sample: Sample) -> list[int]:
    """The answer's token ids, one for each digit of `tokens` in selection.jsonl."""
    return [label for label in sample.labels[1:] if label != IGNORE_INDEX]


def pieces(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[Piece]:
    """`ids` cut after every token up to which the decoded text is a prefix of the whole text.

    The pieces' texts, joined, are the decoded ids with special tokens; their num_tokens sum to len(ids).
    """
    special = {i for i, token in tokenizer.tokenizer.get_added_tokens_decoder().items() if token.special}

    def decode(part: Sequence[int]) -> str:
        return tokenizer.tokenizer.decode(list(part), skip_special_tokens=False)

    whole, found, first, at = decode(ids), [], 0, 0
    for stop in range(1, len(ids) + 1):
        front = decode(ids[:stop])
        if whole.startswith(front) and len(front) >= at:  # false within a character
            is_special = stop - first == 1 and ids[first] in special
            found.append(Piece(front[at:], stop - first, is_special))
            first, at = stop, len(front)
    return found


# -------------------------------------------------------------------- Figure 7: what kind of token is pruned

CATEGORIES = (
    "answer span",
    "answer mark",
    "numbers and symbols",
    "other words",
    "formatting",
    "boilerplate",
    "end of text",
    "chat template",
)
SHORT_ANSWER = 3  # an answer of at most so many words is all answer span

# (mark)(answer): the answer ends with its sentence, or in the last line with the line.
MARKED_ANSWERS = (
    re.compile(r"(\bthe (?:final )?answer is:?[ ])([^\s][^\n]*?)(?=[.!]?\s*\Z|[.!]?\n|[.!]\s)", re.IGNORECASE),
    re.compile(r"(^####[ ]*)(\S[^\n]*?)(?=\s*\Z)", re.MULTILINE),
)
# Openings and closings of Alpaca's answers, and words that open a step in GSM8K's. Rows may name further
# boilerplate of their own (data/tiny).
BOILERPLATE = re.compile(
    r"""^(?:sure|certainly|of\ course|absolutely)[,!.]
    | ^here\ (?:is|are)\b[^.:\n]*:
    | ^once\ upon\ a\ time\b
    | ^dear\b[^\n]*
    | \bi\ hope\ (?:this|that|you)\b[^.!\n]*[.!]
    | \bthank\ you\ (?:for|so|very)\b[^.!\n]*[.!]
    | \b(?:please\ )?(?:feel\ free\ to|let\ me\ know)\b[^.!\n]*[.!]
    | ^(?:sincerely|(?:best|kind|warm)\ regards|yours\ \w+),?[ ]*$
    | \[(?:your\ )?name\]
    | (?:^|(?<=[.!?]\ ))(?:first(?:ly)?|second(?:ly)?|third|next|then|finally|lastly|additionally|furthermore|moreover
        |therefore|thus|so|hence|overall|in\ conclusion|in\ summary),""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
LIST_MARK = re.compile(r"^[ \t]*(?:\d+[.)]|[-*•–]|#+)(?=[ \t])", re.MULTILINE)
EXPRESSION = re.compile(r"[0-9$€£%+=×÷^<>*/().,:\- ]+")  # one that holds a digit or one of $€£%+=×÷^<>


def categories(parts: Sequence[Piece], boilerplate: Sequence[str] = ()) -> list[str]:
    """The category of each piece: the first of these that holds at its last visible character.

    1. end of text: a special token.
    2. chat template: whitespace before the answer's text, or after a special token.
    3. answer span: the text after "The answer is" to the end of its sentence, or after "####" in the last line; or a
       whole answer of at most SHORT_ANSWER words, boilerplate not counted. Its full stop is not part of it.
    4. answer mark: "The answer is" or "####" before an answer span, with the space between.
    5. boilerplate: the sentences in `boilerplate`, and BOILERPLATE.
    6. formatting: the number or sign before an item of a list or a heading.
    7. numbers and symbols: a digit, a sign of arithmetic or currency, the characters between them in an expression,
       and the space before it. Elsewhere `-`, `*`, `/`, brackets and commas are punctuation.
    8. other words: any piece with a letter.
    9. formatting: the rest, which is whitespace and punctuation.
    """
    names, at = [], 0
    while at < len(parts):
        if parts[at].special:
            names.append("end of text")
            at += 1
            continue
        stop = next((i for i in range(at, len(parts)) if parts[i].special), len(parts))
        names += _categories_of_text([part.text for part in parts[at:stop]], boilerplate)
        at = stop
    return names


def _categories_of_text(texts: list[str], boilerplate: Sequence[str]) -> list[str]:
    """Rules 2 to 9, for the pieces between two special tokens."""
    whole = "".join(texts)
    lead = len(whole) - len(whole.lstrip())
    given = in_boilerplate(list(whole), [sentence for sentence in boilerplate if sentence in whole])
    set_phrases = [match.span() for match in BOILERPLATE.finditer(whole)]
    is_boilerplate = [g or any(a <= i < b for a, b in set_phrases) for i, g in enumerate(given)]
    answers, marks = [], []
    for pattern in MARKED_ANSWERS:
        for match in pattern.finditer(whole):
            marks.append(match.span(1))
            answers.append(match.span(2))
    rest = "".join(char for char, flag in zip(whole, is_boilerplate, strict=True) if not flag).strip()
    if not answers and rest and len(rest.split()) <= SHORT_ANSWER and "\n" not in rest and rest in whole:
        start = whole.index(rest)
        answers.append((start, start + len(rest.rstrip(".!"))))
    spans = {
        "chat template": [(0, lead)],
        "answer span": answers,
        "answer mark": marks,
        "boilerplate": [(i, i + 1) for i, flag in enumerate(is_boilerplate) if flag],
        "formatting": [match.span() for match in LIST_MARK.finditer(whole)],
        "numbers and symbols": [_trimmed_expression(match) for match in EXPRESSION.finditer(whole)],
    }
    name_at = ["other words" if char.isalpha() else "formatting" for char in whole]
    for i, char in enumerate(whole):
        if char.isnumeric() or unicodedata.category(char) in ("Sm", "Sc"):
            name_at[i] = "numbers and symbols"
    for name, found in reversed(spans.items()):
        for start, end in found:
            name_at[start:end] = [name] * (end - start)

    names, at = [], 0
    for text in texts:
        last = at + len(text.rstrip() or text) - 1
        name = name_at[last] if text else "formatting"
        if name in ("formatting", "numbers and symbols") and any(char.isalpha() for char in text):
            name = "other words"
        names.append(name)
        at += len(text)
    return names


def _trimmed_expression(match: re.Match) -> tuple[int, int]:
    """The part of a match that is an expression: without punctuation and spaces around it, but with one space before.

    It is empty if the match has no digit and no sign of arithmetic.
    """
    text = match.group()
    if not re.search(r"[0-9$€£%+=×÷^<>]", text):
        return match.start(), match.start()
    start = match.start() + len(text) - len(text.lstrip(" .,:)"))
    end = match.start() + len(text.rstrip(" .,:(-"))
    return start - (start > match.start() and match.string[start - 1] == " "), end


def token_categories(
    log: Log, samples: dict[str, Sample], tokenizer: TextTokenizer, rows: dict[str, dict], draws: int = 2000
) -> dict:
    """Categories of the pruned and of the kept tokens of trimmed samples: Figure 7, with categories by rule.

    Args:
        samples, rows: by id.
        draws:         resamples of the bootstrap.
    Returns:
        for "Q2" and "filled in as Q2" (backfilled, and trimmed as Q2): {"samples", "rows", "answer_spans": {"samples"
        that have one, "cut": those that lost a token of it, "gone": those that lost all of it}, "pruned", "kept":
        answer tokens, "categories": {name: {"pruned", "kept": counts, "share_of_pruned", "share_of_kept", "lift": their
        ratio, "interval95": of the lift}}}. Lift and interval are None where the divisor is 0 or may be. The bootstrap
        resamples rows with all their visits, since the tokens of an answer are not independent.
    """
    groups = {}
    for group, backfilled in (("Q2", False), ("filled in as Q2", True)):
        by_row, visits, spans = {}, trimmed(log, backfilled), []
        named: dict[str, list[str]] = {}  # a row's tokens have the same categories at every visit
        for visit in visits:
            name = visit["id"]
            if name not in named:
                parts = pieces(tokenizer, answer_ids(samples[name]))
                found = categories(parts, rows[name].get("boilerplate", ()))
                named[name] = [c for c, part in zip(found, parts, strict=True) for _ in range(part.num_tokens)]
            table = by_row.setdefault(name, np.zeros((2, len(CATEGORIES))))
            for category, digit in zip(named[name], visit["tokens"], strict=True):
                table[int(digit), CATEGORIES.index(category)] += 1
            both = zip(named[name], visit["tokens"], strict=True)
            spans.append("".join(digit for category, digit in both if category == "answer span"))
        counts = np.array(list(by_row.values())).reshape(-1, 2, len(CATEGORIES))  # rows, pruned or kept, category
        spans = [span for span in spans if span]
        lost = {"samples": len(spans), "cut": sum("0" in s for s in spans), "gone": sum("1" not in s for s in spans)}
        groups[group] = {"samples": len(visits), "rows": len(by_row), "answer_spans": lost, **_shares(counts, draws)}
    return groups


def _shares(counts: np.ndarray, draws: int) -> dict:
    """Shares and lifts from counts (R rows, 2: pruned and kept, C categories)."""
    total, num_rows = counts.sum(0), len(counts)

    def lifts(table: np.ndarray) -> np.ndarray:  # (..., 2, C) -> (..., C)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = table / table.sum(-1, keepdims=True)
            return share[..., 0, :] / share[..., 1, :]

    again = np.full((1, len(CATEGORIES)), math.nan)
    if num_rows > 1:
        rng = np.random.default_rng(0)
        weights = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=draws)
        again = lifts(np.tensordot(weights, counts, 1))
    finite = np.isfinite(again).mean(0) > 0.99
    found = {}
    for i, name in enumerate(CATEGORIES):
        lift, values = lifts(total)[i], again[:, i][np.isfinite(again[:, i])]
        interval = [round(float(v), 4) for v in np.quantile(values, [0.025, 0.975])] if finite[i] else None
        found[name] = {
            "pruned": int(total[0, i]),
            "kept": int(total[1, i]),
            **{f"share_of_{what}": _share(total[j, i], total[j].sum()) for j, what in enumerate(("pruned", "kept"))},
            "lift": round(float(lift), 4) if math.isfinite(lift) else None,
            "interval95": interval,
        }
    return {"pruned": int(total[0].sum()), "kept": int(total[1].sum()), "categories": found}


def _share(part: float, whole: float) -> float:
    return round(float(part / whole), 4) if whole else 0.0


def token_table(groups: dict) -> str:
    """Markdown: one row for each category, three columns for each group; below it the fate of the answer spans."""
    rows, spans = [[""], ["tokens"], *([name] for name in CATEGORIES)], []
    for group, found in groups.items():
        title = f"{group}, {found['samples']} samples of {found['rows']} rows"
        rows[0] += [f"{title}: of the pruned", "of the kept", "lift, 95 % interval"]
        rows[1] += [f"{found['pruned']:,}", f"{found['kept']:,}", ""]
        for row, name in zip(rows[2:], CATEGORIES, strict=True):
            one = found["categories"][name]
            lift = "" if one["lift"] is None else f"{one['lift']:.2f}"
            if one["interval95"]:
                lift += " [{:.2f}, {:.2f}]".format(*one["interval95"])
            row += [f"{one['share_of_pruned']:.1%}", f"{one['share_of_kept']:.1%}", lift]
        lost = found["answer_spans"]
        spans.append(
            f"{group}: {lost['cut']} of {lost['samples']} answer spans lost a token, {lost['gone']} all tokens"
        )
    return "\n".join([markdown(rows), "", *spans])


# ------------------------------------------------------------------- Appendix E.1: rows of each quadrant

QUADRANT_NAMES = {
    Quadrant.HARMFUL_NOISE: "Q1, harmful noise",
    Quadrant.VALUABLE_MISCONCEPTION: "Q2, valuable misconception",
    Quadrant.REDUNDANT_KNOWLEDGE: "Q3, redundant knowledge",
    Quadrant.CALIBRATION_DATA: "Q4, calibration data",
    Quadrant.BETWEEN: "in no corner",
}


def quadrant_rows(log: Log, rows: dict[str, dict], num: int = 3, first_step: int = 1) -> str:
    """Markdown: the first `num` rows met in each quadrant from `first_step` on, with their scores at that step."""
    parts = []
    for quadrant, title in QUADRANT_NAMES.items():
        found = {}
        for step in log.steps:
            for sample in step["samples"]:
                if step["step"] >= first_step and sample["quadrant"] == quadrant and len(found) < num:
                    found.setdefault(sample["id"], (step["step"], sample))
        table = [["step", "PPL", "Ent", "what became of it", "prompt", "answer"]]
        for step, sample in found.values():
            *_, question, answer = to_messages(rows[sample["id"]])
            became = _became(sample) + (f"; `{kind}`" if (kind := rows[sample["id"]].get("kind")) else "")
            texts = [_cell(said(message)) for message in (question, answer)]
            table.append([str(step), f"{sample['ppl']:.2f}", f"{sample['ent']:.2f}", became, *texts])
        parts += [f"### {title}", "", markdown(table), "" if found else "No row.", ""]
    return "\n".join(parts)


def said(message: dict) -> str:
    """A message's text; that of its tool calls, as JSON, where it has no other."""
    return message.get("content") or json.dumps(message.get("tool_calls", ""), ensure_ascii=False)


def _became(sample: dict) -> str:
    if not sample["kept"]:
        return "dropped"
    return ("filled in, " if sample["backfilled"] else "") + ("trimmed" if sample["trimmed"] else "whole")


def _cell(text: str, width: int = 200) -> str:
    """Text for a cell of a Markdown table: cut to `width` characters, Markdown and HTML escaped."""
    text = text if len(text) <= width else text[:width].rstrip() + " ..."
    escaped = re.sub(r"([\\`*_\[\]#~$])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
    return " ".join(escaped.replace("\n", " ↵ ").split())


# --------------------------------------------------------------------- Appendix E.2: pruned tokens, shown


@dataclass(frozen=True)
class Case:
    """A trimmed sample.

    Attributes:
        record:     its record in selection.jsonl, with its step.
        parts:      the pieces of its answer.
        categories: one for each piece.
        pruned:     whether each piece was pruned; a piece that lost one of its tokens counts as pruned.
    """

    record: dict
    prompt: str
    parts: list[Piece]
    categories: list[str]
    pruned: list[bool]


def cases(
    log: Log, samples: dict[str, Sample], tokenizer: TextTokenizer, rows: dict[str, dict], num: int = 12
) -> list[Case]:
    """`num` trimmed samples, evenly spaced over the run: two thirds in Q2, one third backfilled."""
    found = []
    for backfilled, share in ((False, num - num // 3), (True, num // 3)):
        visits = trimmed(log, backfilled)
        for i in range(min(share, len(visits))):
            visit = visits[i * len(visits) // min(share, len(visits))]
            row, parts = rows[visit["id"]], pieces(tokenizer, answer_ids(samples[visit["id"]]))
            ends = np.cumsum([part.num_tokens for part in parts]).tolist()
            lost = ["0" in visit["tokens"][end - part.num_tokens : end] for part, end in zip(parts, ends, strict=True)]
            prompt = "\n".join(said(message) for message in to_messages(row)[:-1])
            found.append(Case(visit, prompt, parts, categories(parts, row.get("boilerplate", ())), lost))
    return found


def caption(case: Case) -> str:
    record, lost = case.record, case.record["tokens"].count("0")
    place = QUADRANT_NAMES[record["quadrant"]] + (", filled in as Q2" if record["backfilled"] else "")
    scores = f"PPL {record['ppl']:.2f}, Ent {record['ent']:.2f}"
    return f"{record['id']}, step {record['step']}: {place}; {scores}; {lost} of {len(record['tokens'])} tokens pruned"


def pruned_text(parts: Sequence[Piece], pruned: Sequence[bool]) -> str:
    """The answer with each run of pruned pieces in ⟦ ⟧, where tokens of whitespace are shown as ␣, ↵ and ⇥.

    Such brackets in the text itself are escaped with a backslash.
    """
    out, inside = [], False
    for part, lost in zip(parts, pruned, strict=True):
        text = re.sub(r"([\\⟦⟧])", r"\\\1", part.text)
        if lost and not text.strip():
            text = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
        out += ["⟦"] * (lost and not inside) + ["⟧"] * (inside and not lost) + [text]
        inside = lost
    return "".join(out) + "⟧" * inside


def pruned_markdown(shown: Sequence[Case]) -> str:
    """Appendix E.2 as Markdown: for each case a block with the prompt and one with the answer."""
    lines = ["Pruned tokens are in ⟦ ⟧; there ␣, ↵ and ⇥ are tokens of whitespace.", ""]
    for case in shown:
        text = pruned_text(case.parts, case.pruned)
        fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", case.prompt + text)), default=0))
        lines += [f"### {caption(case)}", "", fence + "text", case.prompt, fence, "", fence + "text", text, fence, ""]
    return "\n".join(lines)


STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1rem; margin: 2.5rem 0 .5rem; }
.prompt { white-space: pre-wrap; color: #767676; margin: 0 0 .5rem; }
.answer { white-space: pre-wrap; margin: 0; }
del { color: #c00000; background: #c0000018; }
.blank { text-decoration: none; }
.blank::before { content: attr(data-shown); }
@media (prefers-color-scheme: dark) { .prompt { color: #949494; } del { color: #ff8080; background: #ff808028; } }
"""


def pruned_html(shown: Sequence[Case]) -> str:
    """Appendix E.2 as one self-contained page: pruned tokens red and struck through, their category on hover.

    The text of an answer's element is exactly the answer; the style sheet makes pruned whitespace visible.
    """
    body = []
    for case in shown:
        marked = []
        for part, category, lost in zip(case.parts, case.categories, case.pruned, strict=True):
            text = html.escape(part.text)
            if lost and part.text and not part.text.strip():
                signs = part.text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
                text = f'<del class="blank" data-shown="{signs}" title="{category}">{text}</del>'
            elif lost:
                text = f'<del title="{category}">{text}</del>'
            marked.append(text)
        heading, prompt = html.escape(caption(case)), html.escape(case.prompt)
        body.append(f'<h2>{heading}</h2>\n<p class="prompt">{prompt}</p>\n<p class="answer">{"".join(marked)}</p>\n')
    head = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Pruned tokens</title>\n'
    return f"{head}<style>{STYLE}</style>\n<h1>Pruned tokens</h1>\n{''.join(body)}</html>\n"


# ---------------------------------------------------------------------------------------------- pictures

COLOURS = {0: "#777777", 1: "#d55e00", 2: "#0072b2", 3: "#009e73", 4: "#cc79a7"}  # of quadrants, by Okabe and Ito


def plot_plane(found: dict, path: str | Path) -> None:
    """Panels for the first and the last step of `plane`, and one for all samples of the run. Needs matplotlib.

    PPL is the vertical axis and entropy the horizontal one. A step's first prune batch is drawn large, with its
    quadrants; the other batches, which have quadrants of their own, are drawn small.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgba
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    steps = [found["steps"][0], *found["steps"][1:][-1:]]
    figure, axes = plt.subplots(1, len(steps) + 1, figsize=(3.6 * (len(steps) + 1), 3.9), layout="constrained")
    for axis, step in zip(axes, steps, strict=False):
        for number, batch in reversed(list(enumerate(step["batches"]))):
            ppl, ent, kept, filled = (np.array(batch[key]) for key in ("ppl", "ent", "kept", "backfilled"))
            edges = np.array([to_rgba(COLOURS[quadrant], 0.5 if number else 1) for quadrant in batch["quadrant"]])
            look = {"s": 18 if number else 60, "edgecolors": edges, "zorder": 3}
            axis.scatter(ent, ppl, facecolors=edges * [1, 1, 1, 0] + np.outer(kept * edges[:, 3], [0, 0, 0, 1]), **look)
            ring = {"facecolors": "none", "edgecolors": "black", "linewidths": 0.9, "zorder": 3}
            axis.scatter(ent[filled == 1], ppl[filled == 1], s=4 * look["s"], **ring)
        axis.set_title(
            f"step {step['step']}: {len(step['batches'])} prune batches of {found['prune_batch']}", fontsize=10
        )
    every = found["all"]
    edges = np.exp(np.linspace(*every["log_ppl"], BINS + 1)), np.linspace(*every["ent"], BINS + 1)
    seen = np.where(np.array(every["seen"]) > 0, every["seen"], math.nan)
    mesh = axes[-1].pcolormesh(edges[1], edges[0], seen, norm="log", cmap="viridis_r", rasterized=True)
    figure.colorbar(mesh, ax=axes[-1], label="samples", shrink=0.8)
    axes[-1].set_title(f"all {every['samples']:,}: rank correlation {every['rank_correlation']:.2f}", fontsize=10)
    for axis, step in zip(axes, [*steps, None], strict=True):
        axis.set_yscale("log")
        axis.margins(0.12)
        axis.set_xlabel("entropy, nats")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.minorticks_off()
        if step:
            _draw_quadrants(axis, step["batches"][0]["thresholds"])
    for label, face, ring in (("kept", "#777777", None), ("filled in", "#777777", "black"), ("dropped", "none", None)):
        axes[0].scatter(
            [], [], 60, facecolors=face, edgecolors=ring or "#777777", linewidths=2 if ring else 1, label=label
        )
    axes[0].set_ylabel("perplexity")
    figure.legend(fontsize=9, frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_quadrants(axis, cuts: dict) -> None:
    """Colour and name the four corners that the thresholds cut."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    axis.set(xlim=(left, right), ylim=(bottom, top))
    for quadrant, (high_ppl, high_ent) in {
        1: (True, True),
        2: (True, False),
        3: (False, False),
        4: (False, True),
    }.items():
        x = (cuts["ent_high"], right) if high_ent else (left, cuts["ent_low"])
        y = (cuts["ppl_high"], top) if high_ppl else (bottom, cuts["ppl_low"])
        axis.fill_between(x, *y, color=COLOURS[quadrant], alpha=0.1, linewidth=0)
        place = {
            "transform": axis.transAxes,
            "ha": "right" if high_ent else "left",
            "va": "top" if high_ppl else "bottom",
        }
        where = (0.97 if high_ent else 0.03, 0.97 if high_ppl else 0.03)
        axis.text(*where, f"Q{quadrant}", color=COLOURS[quadrant], weight="bold", **place)


def plot_categories(groups: dict, path: str | Path) -> None:
    """Figure 7: a panel for each group of `token_categories`, two bars for each category. Needs matplotlib."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(groups), figsize=(5 * len(groups), 3.6), layout="constrained", sharey=True)
    places = np.arange(len(CATEGORIES))
    for axis, (group, found) in zip(axes, groups.items(), strict=True):
        for shift, what, colour in ((-0.2, "pruned", "#d55e00"), (0.2, "kept", "#0072b2")):
            shares = [100 * found["categories"][name][f"share_of_{what}"] for name in CATEGORIES]
            bars = axis.barh(places + shift, shares, 0.38, color=colour, label=f"{what} tokens")
            axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        axis.set_yticks(places, CATEGORIES)
        axis.set_xlabel("percent of the tokens pruned, and of those kept")
        totals = f"{found['pruned']:,} tokens pruned, {found['kept']:,} kept"
        axis.set_title(f"{group}: {found['samples']} samples, {totals}", fontsize=10)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(path)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.cases", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a Q-Tuning run with --log-selection")
    parser.add_argument("--step", type=int, help="the step of plane, the first step of quadrants; default: several, 1")
    parser.add_argument("--out", type=Path, help="folder to write into; default: RUN/cases")
    args = parser.parse_args(argv)
    out = args.out or args.run / "cases"
    with errors_in_one_line(parser.prog):
        log = read_log(args.run)
        config = log.config
        tokenizer = TextTokenizer.from_pretrained(config.model)
        loaded = load_samples(config.data, tokenizer, config.template, config.max_length, config.skip_bad_rows)[0]
        samples = {sample.id: sample for sample in loaded}
        rows = rows_by_id(config.data, samples)
        on_plane = plane(log, [args.step] if args.step is not None else default_steps(log))
        groups = token_categories(log, samples, tokenizer, rows)
        shown = cases(log, samples, tokenizer, rows)
        write_json(out / "plane.json", on_plane, indent=None)
        write_json(out / "tokens.json", groups, indent=1)
        write_text(out / "quadrants.md", quadrant_rows(log, rows, first_step=args.step or 1))
        write_text(out / "pruned.md", pruned_markdown(shown))
        write_text(out / "pruned.html", pruned_html(shown))
        try:
            plot_plane(on_plane, out / "plane.svg")
            plot_categories(groups, out / "tokens.svg")
        except ImportError:
            print(f"{parser.prog}: no plots, since matplotlib (the plot extra) is not installed", file=sys.stderr)
    print(token_table(groups))
    print(f"\n{out}: plane.json, tokens.json, plane.svg, tokens.svg, quadrants.md, pruned.md, pruned.html")


if __name__ == "__main__":
    main()
