"""`train.py --score-only`: what Q-Tuning would do to a file, before any training.

Each row is scored once with the untrained model, and stages 1 and 2 decide in the steps and prune batches of the run's
first epoch, by the functions that the loop calls. The run folder then holds

    scores.jsonl  a line per row, in the order of the run: id, ppl, ent, quadrant, supp_score, kept, backfilled,
                  trimmed, answer_tokens, tokens_kept (0 for a dropped row), prune_batch (from 0)
    look.html     one page: the Error-Uncertainty plane, the counts, rows of each quadrant with their trimmed tokens

Where the rows do not fill the last step, rows of the second epoch do, as in the run; they get no line of their own.
So the scores of the last prune batch may have been normalised together with rows whose lines are further up.
"""

from __future__ import annotations

import html
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.legible import legible, page, span, token_bytes
from data.sft import Sample
from data.stream import Stream
from data.tokenizer import TextTokenizer
from pruners import choose_samples, choose_tokens, quadrants
from qtuning import (
    IGNORE_INDEX,
    Quadrant,
    Thresholds,
    bisect_thresholds,
    num_samples_to_keep,
    quantile,
    supp_score,
    token_mask,
)
from training.files import write_text
from training.run_folder import Run, peak_mem_gib
from training.scoring import Scorer, trained_lengths

NAMES = {
    Quadrant.HARMFUL_NOISE: ("Q1 harmful noise", "#d1495b"),
    Quadrant.VALUABLE_MISCONCEPTION: ("Q2 misconceptions", "#0072b2"),
    Quadrant.REDUNDANT_KNOWLEDGE: ("Q3 redundant", "#e69f00"),
    Quadrant.CALIBRATION_DATA: ("Q4 calibration data", "#009e73"),
    Quadrant.BETWEEN: ("in no corner", "#8a8f98"),
}
MOST_POINTS = 4000  # of the plane; the order of a run is random, so that its first rows are a random sample
EXAMPLES = 3  # rows of each quadrant on the page


@dataclass(frozen=True)
class Look:
    """What stages 1 and 2 decide about every row of an epoch.

    Attributes:
        records:    the lines of scores.jsonl.
        rows:       the samples' indices, in the same order.
        kept:       for each row (T,) bool, the tokens in the loss, as in `qtuning.token_mask`.
        trained:    tokens of each row that would pass through the model with gradients, 0 for a dropped row.
        thresholds: of each prune batch.
        scored_per_second: tokens scored in a second, on all ranks.
    """

    records: list[dict]
    rows: list[int]
    kept: list[Tensor]
    trained: list[int]
    thresholds: list[Thresholds]
    scored_per_second: float


def decide(cfg, samples: Sequence[Sample], stream: Stream, scorer: Scorer, per_step: int) -> Look:
    """Score every row once and decide about it as the run's first epoch would, with the weights as they are."""
    scorer.outputs = None  # of --reuse-forward: nothing is trained on them here
    records, all_rows, all_kept, all_trained, thresholds = [], [], [], [], []
    num_steps = math.ceil(len(samples) / per_step)
    before = scorer.tokens, scorer.seconds
    every = 0.1 if sys.stderr.isatty() else 30
    for step in tqdm(range(1, num_steps + 1), "score", disable=scorer.ranks.rank > 0, delay=2, mininterval=every):
        rows, _ = stream.take((step - 1) * per_step, step * per_step)
        chosen = choose_samples(cfg, step, rows, scorer)
        trimmed = choose_tokens(cfg, step, rows, chosen, scorer)
        mask = scorer.loss_mask(rows)
        kept = token_mask(chosen, trimmed, mask)

        ppl, ent, supp = scorer.per_sample("ppl", rows), scorer.per_sample("ent", rows), []
        first_batch = len(thresholds)
        for part in (slice(start, start + cfg.prune_batch) for start in range(0, per_step, cfg.prune_batch)):
            num_keep = num_samples_to_keep(cfg.sample_keep_ratio, len(rows[part]))
            corners = quadrants(cfg.keep_quadrants)
            thresholds.append(bisect_thresholds(ppl[part], ent[part], num_keep, keep_quadrants=corners))
            supp.append(supp_score(ppl[part], ent[part]))
        columns = {"ppl": ppl, "ent": ent, "quadrant": chosen.quadrant, "supp_score": torch.cat(supp)}
        columns |= {"kept": chosen.keep, "backfilled": chosen.backfilled, "trimmed": chosen.prune_tokens}
        columns |= {"answer_tokens": mask.sum(dim=1), "tokens_kept": kept.sum(dim=1)}
        columns = {name: values.tolist() for name, values in columns.items()}
        lengths = trained_lengths(cfg, samples, rows, kept)
        for place, row in enumerate(rows[: len(samples) - len(records)]):
            record = {"id": samples[row].id} | {name: values[place] for name, values in columns.items()}
            records.append(record | {"prune_batch": first_batch + place // cfg.prune_batch})
            all_rows.append(row)
            all_kept.append(kept[place, : len(samples[row].input_ids) - 1].clone())
            all_trained.append(max(lengths[place] - 1, 0))
        if step == 1 and num_steps > 1:  # the first step also warms up
            before = scorer.tokens, scorer.seconds
    rate = (scorer.tokens - before[0]) / max(scorer.seconds - before[1], 1e-9)
    thresholds = thresholds[: records[-1]["prune_batch"] + 1]
    return Look(records, all_rows, all_kept, all_trained, thresholds, rate)


def count(records: Sequence[dict]) -> dict[str, int]:
    """How many samples and answer tokens there are, and how many of them are kept."""
    names = ("kept", "backfilled", "trimmed", "answer_tokens", "tokens_kept")
    return {"samples": len(records)} | {name: sum(record[name] for record in records) for name in names}


def count_by_quadrant(records: Sequence[dict]) -> list[tuple[str, dict[str, int]]]:
    """(name, counts) of every quadrant, and of all rows."""
    parts = [(name, [r for r in records if r["quadrant"] == quadrant]) for quadrant, (name, _) in NAMES.items()]
    return [(name, count(part)) for name, part in [*parts, ("all", records)]]


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def summary(records: Sequence[dict]) -> list[str]:
    """Sentences: how much is kept, and how much of it the backfill took, from where."""
    by_quadrant = count_by_quadrant(records)
    total = by_quadrant[-1][1]
    kept = f"Kept: {total['kept']} of {total['samples']} samples ({percent(total['kept'], total['samples'])}), "
    kept += f"{total['tokens_kept']} of {total['answer_tokens']} answer tokens "
    kept += f"({percent(total['tokens_kept'], total['answer_tokens'])})."
    sources = [f"{counts['backfilled']} from {name}" for name, counts in by_quadrant[:-1] if counts["backfilled"]]
    filled = f"Backfill: {total['backfilled']} of the {total['kept']} kept samples "
    filled += f"({percent(total['backfilled'], total['kept'])})" + (": " if sources else "") + ", ".join(sources) + "."
    return [kept, filled]


def cost(cfg, look: Look, samples: Sequence[Sample], scorer: Scorer, places: int) -> list[str]:
    """Sentences: the seconds and memory of the run that these settings would start.

    Args:
        places: samples that the run sees, over all of its steps.
    A forward pass of a token takes what it took here. A pass with gradients counts as three forward passes; with LoRA
    as two, since frozen weights need no gradient. Activation checkpointing adds one; --reuse-forward saves one.
    """
    epochs = places / len(samples)
    all_tokens = sum(len(sample.input_ids) - 1 for sample in samples) * epochs
    passes = (2 if cfg.lora_rank else 3) + cfg.activation_checkpointing - cfg.reuse_forward
    scored, trained = all_tokens / min(cfg.reuse_scores, max(epochs, 1)), sum(look.trained) * epochs
    whole = passes + cfg.reuse_forward  # without pruning there is no scoring pass to use again
    pruned, full = ((a + b) / look.scored_per_second for a, b in ((scored, passes * trained), (0, whole * all_tokens)))
    trainable = sum(p.numel() for p in scorer.model.parameters() if p.requires_grad)
    gib = peak_mem_gib(scorer.ranks.device)
    return [
        f"A run of {places} samples ({epochs:.3g} epochs): about {duration(pruned)}, {duration(full)} without pruning. "
        f"Estimated from {look.scored_per_second:.0f} tokens scored per second here, a trained token as {passes} "
        "scored ones; optimizer, evaluation and checkpoints come on top.",
        f"Memory: at least {gib + 12 * trainable / 2**30:.2f} GiB a device: the peak of {gib:.2f} here, gradients and "
        f"AdamW's moments of {trainable} weights; activations for the backward pass come on top.",
    ]


def duration(seconds: float) -> str:
    units = ((86400, "days"), (3600, "h"), (60, "min"), (0, "s"))
    size, name = next(unit for unit in units if seconds >= 1.5 * unit[0])
    return f"{seconds / (size or 1):.3g} {name}"


def write_look(
    cfg, samples: Sequence[Sample], tokenizer: TextTokenizer, stream: Stream, scorer: Scorer, run: Run, per_step, steps
) -> None:
    """Decide about every row, write scores.jsonl and look.html, print the totals; rank 0 writes.

    Args:
        per_step: rows that a step of the run takes.
        steps:    steps of the run.
    """
    look = decide(cfg, samples, stream, scorer, per_step)
    if scorer.ranks.rank:
        return
    lines = [*summary(look.records), *cost(cfg, look, samples, scorer, steps * per_step)]
    run.say(text_table(look.records))
    run.say("\n".join(lines))
    write_text(run.out / "scores.jsonl", "".join(json.dumps(record) + "\n" for record in look.records))
    write_text(run.out / "look.html", look_page(cfg, look, samples, tokenizer, lines))
    run.say(f"wrote {run.out / 'scores.jsonl'} and {run.out / 'look.html'}")


HEADINGS = ("samples", "kept", "backfilled", "trimmed", "answer tokens", "tokens kept")


def text_table(records: Sequence[dict]) -> str:
    lines = [f"{'':20}" + "".join(f"{heading:>15}" for heading in HEADINGS)]
    lines += [f"{name:20}" + "".join(f"{n:15}" for n in counts.values()) for name, counts in count_by_quadrant(records)]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- the page


def look_page(cfg, look: Look, samples: Sequence[Sample], tokenizer: TextTokenizer, lines: list[str]) -> str:
    """look.html, whole."""
    title = f"What Q-Tuning would do to {Path(cfg.data).name}"
    settings = (
        f"Model {cfg.model}, before training. Budget: {cfg.sample_keep_ratio:.4g} of the samples, "
        f"{cfg.token_keep_ratio:.4g} of a trimmed one's answer tokens. Prune batches of {cfg.prune_batch}, "
        f"{len(look.thresholds)} in this epoch."
    )
    drawn = look.records[:MOST_POINTS]
    limit = f" {len(drawn)} of {len(look.records)} rows are drawn." if len(drawn) < len(look.records) else ""
    caption = (
        "Filled: kept for the quadrant. Filled with a ring: kept by the backfill. Hollow: dropped. A row's quadrant is "
        "relative to its prune batch. Dashed: the median of the thresholds of all prune batches; shaded: the middle "
        f"80 % of them. In the margins: all rows in grey, kept rows dark.{limit}"
    )
    return page(
        title,
        f"<h1>{span(title, '')}</h1>\n<p class='note'>{span(settings, '')}</p>\n"
        + "".join(f"<p>{span(line, '')}</p>\n" for line in lines[:2])
        + f"<h2>The Error-Uncertainty plane</h2>\n{plane_svg(drawn, look.thresholds)}\n<p class='note'>{caption}</p>\n"
        + f"<h2>By quadrant</h2>\n{html_table(look.records)}\n"
        + "<h2>What a run would take</h2>\n"
        + "".join(f"<p class='note'>{span(line, '')}</p>\n" for line in lines[2:])
        + examples(look, samples, token_bytes(tokenizer)),
    )


def html_table(records: Sequence[dict]) -> str:
    cells = [f"<tr><th></th>{''.join(f'<th>{heading}</th>' for heading in HEADINGS)}</tr>"]
    colours = [colour for _, colour in NAMES.values()]
    for i, (name, counts) in enumerate(count_by_quadrant(records)):
        dot = f'<span class="dot" style="background:{colours[i]}"></span>' if i < len(colours) else ""
        total = "" if dot else ' class="total"'
        cells.append(f"<tr{total}><td>{dot}{name}</td>{''.join(f'<td>{n}</td>' for n in counts.values())}</tr>")
    return f"<table>{''.join(cells)}</table>"


def examples(look: Look, samples: Sequence[Sample], read: Callable[[int], bytes]) -> str:
    """The first rows of each quadrant, and of what the backfill took: prompt, kept and trimmed tokens."""
    note = (
        "The first rows in the order of the run. Grey text: the masked prompt. Green: in the loss. Red and struck out: "
        "trimmed. On grey: the answer of a dropped row."
    )
    found = [f"<h2>Rows</h2>\n<p class='note'>{note}</p>"]
    places = range(len(look.records))
    groups = [
        (name, [i for i in places if look.records[i]["quadrant"] == quadrant and not look.records[i]["backfilled"]])
        for quadrant, (name, _) in NAMES.items()
    ]
    groups.append(("Taken by the backfill", [i for i in places if look.records[i]["backfilled"]]))
    for name, group in groups:
        found.append(f"<h2>{name}</h2>" if group else f"<h2>{name}</h2><p class='note'>No row.</p>")
        for i in group[:EXAMPLES]:
            record, sample = look.records[i], samples[look.rows[i]]
            state = f"kept, {record['tokens_kept']} of {record['answer_tokens']} answer tokens"
            state = state if record["kept"] else f"dropped, {record['answer_tokens']} answer tokens"
            came = f"{NAMES[record['quadrant']][0]}, " if record["backfilled"] else ""
            head = f"{came}PPL {record['ppl']:.4g}, Ent {record['ent']:.3g}, supp-score {abs(record['supp_score']):.2f}"
            found.append(f"<p class='head'><b>{span(record['id'], '')}</b>: {state}; {head}</p>")
            found.append(f'<pre class="row low">{answer_html(sample, look.kept[i], record["kept"], read)}</pre>')
    return "\n".join(found)


def answer_html(sample: Sample, kept: Tensor, row_kept: bool, read: Callable[[int], bytes]) -> str:
    """A row with its tokens by fate; bytes of neighbours of one fate are joined, so that letters stay whole."""
    fates = ["prompt"]
    for label, in_loss in zip(sample.labels[1:], kept.tolist(), strict=True):
        answer = ("answer" if in_loss else "trimmed") if row_kept else "dropped"
        fates.append("prompt" if label == IGNORE_INDEX else answer)
    runs: list[list] = []
    for token, fate in zip(sample.input_ids, fates, strict=True):
        if not runs or runs[-1][0] != fate:
            runs.append([fate, b""])
        runs[-1][1] += read(token)
    return "".join(span(text, fate) for fate, text in runs)


# ---------------------------------------------------------------------------------------------- the plane

LEFT, TOP, WIDTH, HEIGHT, MARGIN, GAP = 70, 84, 640, 430, 70, 8  # of the plane in the picture, in pixels


@dataclass(frozen=True)
class Axis:
    """From values to pixels; the range is the values' own, with a little room."""

    low: float
    high: float
    start: float
    stop: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, stop: float) -> Axis:
        low, high = min(values), max(values)
        room = 0.04 * (high - low) or 0.5
        return cls(low - room, high + room, start, stop)

    def at(self, value: float) -> float:
        return self.start + (self.stop - self.start) * (value - self.low) / (self.high - self.low)


def plane_svg(records: Sequence[dict], thresholds: Sequence[Thresholds]) -> str:
    """The Error-Uncertainty plane as inline SVG: entropy to the right, perplexity upwards on a logarithmic axis."""
    ent, log_ppl = [r["ent"] for r in records], [math.log10(r["ppl"]) for r in records]
    across, up = Axis.over(ent, LEFT, LEFT + WIDTH), Axis.over(log_ppl, TOP + HEIGHT, TOP)
    parts = []
    for name, axis in (("ent_low", across), ("ent_high", across), ("ppl_low", up), ("ppl_high", up)):
        values = torch.tensor([getattr(found, name) for found in thresholds], dtype=torch.float64)
        values = values.log10() if axis is up else values
        low, middle, high = (clamp(axis.at(float(quantile(values, share))), axis) for share in (0.1, 0.5, 0.9))
        parts.append(threshold_svg(axis is up, low, middle, high))
    parts += [tick_svg(across, value, f"{value:g}", False) for value in linear_ticks(across.low, across.high)]
    parts += [tick_svg(up, math.log10(value), f"{value:.4g}", True) for value in log_ticks(up.low, up.high)]
    kept = [r["kept"] for r in records]
    parts += [histogram_svg(ent, kept, across, False), histogram_svg(log_ppl, kept, up, True)]
    for r, x, y in sorted(zip(records, ent, log_ppl, strict=True), key=lambda point: point[0]["kept"]):  # kept on top
        parts.append(point_svg(r, across.at(x), up.at(y), 1 if len(records) <= 500 else 0.65))
    frame = f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>'
    bottom, right = TOP + HEIGHT, LEFT + WIDTH
    for name, x, y in (("Q2", LEFT + 8, TOP + 18), ("Q1", right - 26, TOP + 18), ("Q3", LEFT + 8, bottom - 9)):
        parts.append(f'<text x="{x}" y="{y}" class="corner">{name}</text>')
    parts.append(f'<text x="{right - 26}" y="{bottom - 9}" class="corner">Q4</text>')
    labels = f'<text x="{LEFT + WIDTH / 2}" y="{bottom + 40}" text-anchor="middle">Ent, nats</text>'
    labels += f'<text transform="translate(18,{TOP + HEIGHT / 2}) rotate(-90)" text-anchor="middle">PPL (log)</text>'
    legend = []
    for i, (name, colour) in enumerate(NAMES.values()):
        x, y = LEFT + 145 * i, bottom + 66
        legend.append(
            f'<circle cx="{x + 6}" cy="{y - 4}" r="5" fill="{colour}"/><text x="{x + 16}" y="{y}">{name}</text>'
        )
    size = f"{LEFT + WIDTH + GAP + MARGIN + 4} {bottom + 76}"
    return f'<svg viewBox="0 0 {size}" role="img" xmlns="http://www.w3.org/2000/svg">\n' + "\n".join(
        [*parts, frame, labels, *legend, "</svg>"]
    )


def clamp(pixel: float, axis: Axis) -> float:
    return min(max(pixel, min(axis.start, axis.stop)), max(axis.start, axis.stop))


def threshold_svg(is_ppl: bool, low: float, middle: float, high: float) -> str:
    low, high = min(low, high), max(low, high)
    band = f'x="{LEFT}" y="{low:.1f}" width="{WIDTH}" height="{high - low:.1f}"'
    line = f'x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{middle:.1f}" y2="{middle:.1f}"'
    if not is_ppl:
        band = f'x="{low:.1f}" y="{TOP}" width="{high - low:.1f}" height="{HEIGHT}"'
        line = f'x1="{middle:.1f}" x2="{middle:.1f}" y1="{TOP}" y2="{TOP + HEIGHT}"'
    return f'<rect {band} fill="#345" opacity="0.06"/><line {line} stroke="#345" stroke-dasharray="5 4"/>'


def point_svg(record: dict, x: float, y: float, size: float) -> str:
    name, colour = NAMES[record["quadrant"]]
    fate = ("kept by the backfill" if record["backfilled"] else "kept") if record["kept"] else "dropped"
    title = f"{record['id']}: {name}, {fate}, PPL {record['ppl']:.4g}, Ent {record['ent']:.3g}"
    title = f"<title>{html.escape(legible(title))}</title>"
    at = f'cx="{x:.1f}" cy="{y:.1f}"'
    if not record["kept"]:
        look = f'r="{3 * size}" fill="#fff" fill-opacity="0.4" stroke="{colour}" stroke-opacity="0.7"'
        return f"<circle {at} {look}>{title}</circle>"
    ring = (
        f'<circle {at} r="{7.5 * size}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        if record["backfilled"]
        else ""
    )
    return f'{ring}<circle {at} r="{4.5 * size}" fill="{colour}" stroke="#fff" stroke-width="0.8">{title}</circle>'


def histogram_svg(values: Sequence[float], kept: Sequence[bool], axis: Axis, is_ppl: bool, bins: int = 40) -> str:
    """The marginal of one axis: all rows in grey, kept rows dark in front of them."""
    counts = [[0, 0] for _ in range(bins)]
    for value, keep in zip(values, kept, strict=True):
        place = min(int(bins * (value - axis.low) / (axis.high - axis.low)), bins - 1)
        counts[place][0] += 1
        counts[place][1] += keep
    most, step, bars = max(n for n, _ in counts), (axis.stop - axis.start) / bins, []
    for place, both in enumerate(counts):
        start = min(axis.start + place * step, axis.start + (place + 1) * step)
        for n, colour in zip(both, ("#d5d9de", "#3d4852"), strict=True):
            long = MARGIN * n / most
            box = f'x="{start + 0.5:.1f}" y="{TOP - GAP - long:.1f}" width="{abs(step) - 1:.1f}" height="{long:.1f}"'
            if is_ppl:
                box = f'x="{LEFT + WIDTH + GAP}" y="{start + 0.5:.1f}" width="{long:.1f}" height="{abs(step) - 1:.1f}"'
            bars.append(f'<rect {box} fill="{colour}"/>' if n else "")
    return "".join(bars)


def tick_svg(axis: Axis, value: float, label: str, is_ppl: bool) -> str:
    at, bottom = axis.at(value), TOP + HEIGHT
    if is_ppl:
        line = f'<line x1="{LEFT - 5}" x2="{LEFT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#999"/>'
        return f'{line}<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>'
    line = f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="#999"/>'
    return f'{line}<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>'


def linear_ticks(low: float, high: float) -> list[float]:
    """About six round values between low and high."""
    size = 10 ** math.floor(math.log10((high - low) / 3))
    step = next(size * n for n in (1, 2, 5, 10) if (high - low) / (size * n) <= 7)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Up to about ten round values between 10**low and 10**high."""
    if high - low < 0.5:
        return linear_ticks(10**low, 10**high)
    decades = range(math.floor(low), math.ceil(high) + 1)
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
        if len(ticks) <= 10:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 10)]
