"""Planted noise among real rows: where it lands on the Error-Uncertainty plane, and how much of it is kept.

    python -m reproduce plants --model DIR --alpaca FILE --gsm8k FILE [--out FOLDER] [--rows 110] [--noise 0.3]

Rows of every planted kind (reproduce/planted.py) are scored once, and nothing is trained. Then, without the model,
stage 1 of Algorithm 1 decides about them in random orders: at several prune batches, shares of samples to keep, and
rules for the backfill (line 19). There are two mixes of rows:

    every kind   as many rows of each kind
    noise        a share of noise, its kinds in equal parts; the others clean rows of Alpaca and GSM8K, half each,
                 drawn anew for each order

FILEs are Alpaca's rows and GSM8K's train.jsonl. FOLDER gets plants.json and the pictures figures/plants_*.svg, numbers
alone; by default it is reproduce/results. With --out it also gets the rows to train on with this share of noise and
seed: train.json, and what they never use, heldout_alpaca.json and heldout_gsm8k.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from tqdm import tqdm

from data.sft import load_samples
from data.tokenizer import TextTokenizer
from eval.common import errors_in_one_line, positive_int
from model import Transformer
from qtuning import (
    BACKFILL_QUADRANTS,
    Quadrant,
    SamplePruning,
    prune_samples,
    sample_entropy,
    sample_perplexity,
    supp_score,
)
from reproduce import figures
from reproduce import runs as running
from reproduce.planted import (
    ALPACA,
    GSM8K,
    NOISE,
    PLANTS,
    heldout_rows,
    mixed_rows,
    read_alpaca,
    read_gsm8k,
    rows_of_every_kind,
)
from reproduce.selection import rank_correlation
from reproduce.tables import markdown
from training.files import write_json
from training.run_folder import code_version
from training.scoring import score

RESULTS = Path(__file__).parent / "results"
PRUNE_BATCHES, KEEP_RATIOS, ORDERS = (8, 32, 128), (0.125, 0.25, 0.5), 20
SHOWN_BATCHES, SHOWN_RATIO = (8, 32), 0.125  # of the bars and of the table of kinds
RULES = {  # where the backfill draws from first
    "as printed": BACKFILL_QUADRANTS,
    "Q1 barred": tuple(q for q in Quadrant if q != Quadrant.HARMFUL_NOISE),
    "Q1 and Q3 first": (Quadrant.HARMFUL_NOISE, Quadrant.REDUNDANT_KNOWLEDGE),  # "from Q1 u Q3", the paper's words
    "between first": (Quadrant.BETWEEN,),
}
Counts = dict[str, dict[str, int]]  # kind -> what is counted -> rows
EVERY_KIND, WITH_NOISE = "every kind", "noise"
CORNERS = {q.name.lower(): q for q in Quadrant}
CHUNK, PASS_TOKENS, MAX_LENGTH = 32, 2048, 2048  # rows scored between two moves of the progress bar; as in train.py
TRAIN_ROWS, HELDOUT_ROWS = 1280, 100  # of the files of rows; held out of each source


# -------------------------------------------------------------------------------------------------- scores


def scored(model_folder: str | Path, rows: Sequence[dict]) -> tuple[Tensor, Tensor]:
    """PPL and Ent of each row's answer under the model: (B,) each, on the CPU in fp32."""
    tokenizer = TextTokenizer.from_pretrained(model_folder)
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "rows.json", rows)
        samples, _ = load_samples(Path(folder) / "rows.json", tokenizer, "auto", MAX_LENGTH)
    model, every = Transformer.from_pretrained(model_folder), 0.5 if sys.stderr.isatty() else 30
    ppl, ent = [], []
    with tqdm(total=len(samples), desc="score", unit="row", delay=2, mininterval=every) as bar:
        for start in range(0, len(samples), CHUNK):
            some = samples[start : start + CHUNK]
            nll, entropy, mask = score(model, some, PASS_TOKENS, nullcontext())
            ppl.append(sample_perplexity(nll, mask))
            ent.append(sample_entropy(entropy, mask))
            bar.update(len(some))
    return torch.cat(ppl), torch.cat(ent)


# --------------------------------------------------------------------------------------------- what is kept


def refilled(found: SamplePruning, ppl: Tensor, ent: Tensor, backfill: Collection[Quadrant]) -> Tensor:
    """The backfill of a prune batch by another rule: (B,) bool, what `prune_samples` gives with backfill_quadrants.

    The rule changes neither thresholds nor quadrants, so the bisect search need not run again.
    """
    own = found.keep & ~found.backfilled
    named = torch.isin(found.quadrant, torch.tensor([int(quadrant) for quadrant in backfill]))
    place = named.int().masked_fill(own, -1)  # the named quadrants come first, and what is kept already comes last
    order = supp_score(ppl, ent).sort(descending=True, stable=True).indices
    order = order[place[order].sort(descending=True, stable=True).indices]
    filled = torch.zeros_like(own)
    filled[order[: int(found.backfilled.sum())]] = True
    return filled


def counts(kinds: Sequence[str], ppl: Tensor, ent: Tensor, size: int, ratio: float) -> dict[str, Counts]:
    """Rule -> kind -> counts of its rows: seen, in each quadrant, kept, backfilled, and backfilled from Q1.

    Args:
        kinds, ppl, ent: of the rows in order. Prune batches are whole: rows at the end that fill none are not seen.
    """
    num_seen = len(kinds) // size * size
    parts = [slice(start, start + size) for start in range(0, num_seen, size)]
    decided = [prune_samples(ppl[part], ent[part], ratio) for part in parts]
    quadrant = torch.cat([found.quadrant for found in decided])
    own = torch.cat([found.keep & ~found.backfilled for found in decided])
    names = list(dict.fromkeys(kinds[:num_seen]))
    of_kind = torch.tensor([names.index(kind) for kind in kinds[:num_seen]])
    by_rule = {}
    for rule, backfill in RULES.items():
        found_in = zip(decided, parts, strict=True)
        filled = torch.cat([refilled(found, ppl[part], ent[part], backfill) for found, part in found_in])
        masks = {"seen": torch.ones_like(own), **{name: quadrant == corner for name, corner in CORNERS.items()}}
        masks |= {"kept": own | filled, "backfilled": filled}
        masks |= {"backfilled_q1": filled & (quadrant == Quadrant.HARMFUL_NOISE)}
        tables = {what: torch.bincount(of_kind[mask], minlength=len(names)).tolist() for what, mask in masks.items()}
        by_rule[rule] = {kind: {what: table[i] for what, table in tables.items()} for i, kind in enumerate(names)}
    return by_rule


def shares(found: Counts) -> dict[str, float | None]:
    """Shares of noise and of the backfill, and of each kind the share kept over that of all rows; None of nothing."""

    def total(what: str, kinds: Collection[str] = tuple(PLANTS)) -> int:
        return sum(found[kind][what] for kind in kinds if kind in found)

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    base = total("kept") / total("seen")
    return {
        "noise_among_kept": share(total("kept", NOISE), total("kept")),
        "noise_among_seen": share(total("seen", NOISE), total("seen")),
        "backfill": share(total("backfilled"), total("kept")),
        "noise_among_backfill": share(total("backfilled", NOISE), total("backfilled")),
        "q1_among_backfill": share(total("backfilled_q1"), total("backfilled")),
        **{f"kept {kind}": found[kind]["kept"] / found[kind]["seen"] / base for kind in found},
    }


def spread(values: Sequence[float | None]) -> list[float] | None:
    """Mean and standard deviation over the orders in which there is a value."""
    known = [value for value in values if value is not None]
    return [round(part, 4) for part in (statistics.mean(known), statistics.pstdev(known))] if known else None


def num_rows_of(mix: str, kinds: Collection[str], num_rows: int, noise: float) -> dict[str, int]:
    """Kind -> rows of it in one order of a mix, num_rows at most."""
    if mix == EVERY_KIND:
        return dict.fromkeys(kinds, num_rows)
    of_noise, of_clean = noise / len(NOISE), (1 - noise) / 2
    most = num_rows / max(of_noise, of_clean)  # rows of the whole mix
    return dict.fromkeys(NOISE, round(of_noise * most)) | dict.fromkeys((ALPACA, GSM8K), round(of_clean * most))


def orders_of(kinds: Sequence[str], wanted: dict[str, int], seed: int, orders: int) -> list[list[int]]:
    """Random orders of rows, each of a fresh draw of the wanted number of every kind."""
    places: dict[str, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    found = []
    for number in range(orders):
        rng = Random(f"{seed} {number}")
        drawn = [place for kind, count in wanted.items() for place in rng.sample(places[kind], count)]
        found.append(rng.sample(drawn, len(drawn)))
    return found


def cells(kinds: Sequence[str], ppl: Tensor, ent: Tensor, noise: float, seed: int, orders: int) -> list[dict]:
    """What is kept in each mix, at each prune batch that its rows fill and each ratio, by each rule."""
    num_rows = min(kinds.count(kind) for kind in PLANTS)
    mixes = {mix: num_rows_of(mix, PLANTS, num_rows, noise) for mix in (EVERY_KIND, WITH_NOISE)}
    settings = [
        (mix, size, ratio)
        for mix, wanted in mixes.items()
        for size in PRUNE_BATCHES
        for ratio in KEEP_RATIOS
        if size <= sum(wanted.values())
    ]
    found, every = [], 0.5 if sys.stderr.isatty() else 30
    for mix, size, ratio in tqdm(settings, "choose", delay=2, mininterval=every):
        by_rule: dict[str, list[Counts]] = {rule: [] for rule in RULES}
        for order in orders_of(kinds, mixes[mix], seed, orders):
            named = [kinds[place] for place in order]
            for rule, found_by_rule in counts(named, ppl[order], ent[order], size, ratio).items():
                by_rule[rule].append(found_by_rule)
        found.append(
            {
                "mix": mix,
                "prune_batch": size,
                "keep_ratio": ratio,
                "noise_among_seen": spread([shares(one)["noise_among_seen"] for one in by_rule["as printed"]])[0],
                "quadrants": quadrant_shares(by_rule["as printed"]),
                "rules": {rule: summary(some) for rule, some in by_rule.items()},
            }
        )
    return found


def quadrant_shares(found: Sequence[Counts]) -> dict[str, dict[str, float]]:
    """Kind -> quadrant -> share of its rows, over all orders; the rule of the backfill does not matter."""
    kinds = [kind for kind in PLANTS if any(kind in one for one in found)]
    table = {}
    for kind in kinds:
        total = {what: sum(one[kind][what] for one in found if kind in one) for what in ("seen", *CORNERS)}
        table[kind] = {name: round(total[name] / total["seen"], 4) for name in CORNERS}
    return table


def summary(found: Sequence[Counts]) -> dict:
    """Mean and spread over the orders of `shares`."""
    of_orders = [shares(one) for one in found]
    parts = ("noise_among_kept", "backfill", "noise_among_backfill", "q1_among_backfill")
    over = {kind: spread([one.get(f"kept {kind}") for one in of_orders]) for kind in PLANTS}
    return {
        **{part: spread([one[part] for one in of_orders]) for part in parts},
        "kept_over_base": {kind: value for kind, value in over.items() if value},
    }


# -------------------------------------------------------------------------------------------------- results


def describe(kinds: Sequence[str], ppl: Tensor, ent: Tensor, noise: float, seed: int, orders: int) -> dict:
    """The result: quantiles, correlation, the points, and `cells`. Numbers alone, no text of the rows."""
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def of(kind: str, values: Tensor) -> Tensor:
        return values[torch.tensor([name == kind for name in kinds])].double()

    def quantiles(values: Tensor) -> list[float]:
        return [round(value, 3) for value in torch.quantile(values.double(), levels).tolist()]

    return {
        "rows": len(kinds),
        "noise": noise,
        "seed": seed,
        "orders": orders,
        "rank_correlation": round(rank_correlation(ppl, ent), 3),
        "rank_correlations": {kind: round(rank_correlation(of(kind, ppl), of(kind, ent)), 3) for kind in PLANTS},
        "kinds": [
            {"kind": kind, "noise": kind in NOISE, "ppl": quantiles(of(kind, ppl)), "ent": quantiles(of(kind, ent))}
            for kind in PLANTS
        ],
        "points": [
            [kind, float(f"{x:.4g}"), float(f"{y:.4g}")]
            for kind, x, y in zip(kinds, ppl.tolist(), ent.tolist(), strict=True)
        ],
        "cells": cells(kinds, ppl, ent, noise, seed, orders),
    }


def percent(value: Sequence[float] | None) -> str:
    return f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}" if value else ""


def kept_table(results: dict) -> str:
    """Markdown: shares of noise among the kept samples, and of the backfill, by mix, prune batch and ratio."""
    head = ["rows", "prune batch", "kept", "noise among all"]
    lines = [[*head, *(f"noise among kept: {rule}" for rule in RULES), "backfill", "of it from Q1, as printed"]]
    for cell in results["cells"]:
        printed = cell["rules"]["as printed"]
        line = [cell["mix"], str(cell["prune_batch"]), f"{100 * cell['keep_ratio']:g} %"]
        line.append(f"{100 * cell['noise_among_seen']:.1f}")
        line += [percent(cell["rules"][rule]["noise_among_kept"]) for rule in RULES]
        lines.append([*line, percent(printed["backfill"]), percent(printed["q1_among_backfill"])])
    return markdown(lines)


def kinds_table(results: dict) -> str:
    """Markdown: place on the plane, quadrants and share kept of every kind, at the shown prune batches and ratio."""
    shown = [cell for size in SHOWN_BATCHES if (cell := shown_cell(results, size))]
    lines = [["kind", "PPL: 10, 50, 90 %", "Ent: 10, 50, 90 %"]]
    for cell in shown:
        size = cell["prune_batch"]
        lines[0] += [f"batch {size}: Q1, Q2, Q3, Q4 %", f"kept, {', '.join(RULES)}"]
    for row in results["kinds"]:
        line = [row["kind"] + " (noise)" * row["noise"]]
        line += [", ".join(f"{value:.3g}" for value in row[axis]) for axis in ("ppl", "ent")]
        for cell in shown:
            corners = [name for name, corner in CORNERS.items() if corner != Quadrant.BETWEEN]
            line.append(", ".join(f"{100 * cell['quadrants'][row['kind']][name]:.0f}" for name in corners))
            over = (cell["rules"][rule]["kept_over_base"][row["kind"]][0] for rule in RULES)
            line.append(", ".join(f"{value:.2f}" for value in over))
        lines.append(line)
    return markdown(lines)


def shown_cell(results: dict, size: int) -> dict | None:
    """The cell of every kind at this prune batch and the shown ratio; None if the rows did not fill a batch."""
    wanted = (EVERY_KIND, size, SHOWN_RATIO)
    return next((c for c in results["cells"] if (c["mix"], c["prune_batch"], c["keep_ratio"]) == wanted), None)


# ------------------------------------------------------------------------------------------------- pictures


def sort_of(kind: str) -> str:
    return "noise" if kind in NOISE else "clean" if kind in (ALPACA, GSM8K) else ""


def plane(results: dict):
    """The Error-Uncertainty plane, one panel for each kind; dashed: the medians of all rows."""
    points = results["points"]
    heading = "Planted kinds on the Error-Uncertainty plane\ndashed: medians of all rows; a cross: the kind's median"
    figure, ((_, axes),) = figures.panels(heading, [""], len(PLANTS), 1.9)
    colours = {"noise": figures.OUR_COLOUR, "clean": figures.OTHER_COLOURS[0], "": figures.OTHER_COLOURS[2]}
    middle = {axis: statistics.median(point[axis] for point in points) for axis in (1, 2)}
    for number, (axis, kind) in enumerate(zip(axes, PLANTS, strict=True)):
        ppl, ent = zip(*((x, y) for name, x, y in points if name == kind), strict=True)
        axis.axhline(middle[1], color="#999999", linewidth=0.8, linestyle="--")
        axis.axvline(middle[2], color="#999999", linewidth=0.8, linestyle="--")
        look = {"markersize": 2.5, "markeredgewidth": 0, "color": colours[sort_of(kind)]}
        axis.plot(ent, ppl, "o", label=kind, **look)
        axis.plot([statistics.median(ent)], [statistics.median(ppl)], "x", color="black", markersize=8, zorder=3)
        axis.set_yscale("log")
        axis.set_xlim(0, 1.05 * max(point[2] for point in points))
        axis.set_ylim(1, 1.5 * max(point[1] for point in points))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{kind} ({sort_of(kind)})" if sort_of(kind) else kind)
        if number >= len(axes) - figures.COLUMNS:
            axis.set_xlabel("Ent, nats")
        if number % figures.COLUMNS == 0:
            axis.set_ylabel("PPL (log)")
    return figure


def bars(results: dict):
    """Share kept of each kind over that of all rows, a bar for each rule of the backfill; None without such rows."""
    from matplotlib.figure import Figure

    shown = [cell for size in SHOWN_BATCHES if (cell := shown_cell(results, size))]
    if not shown:
        return None
    figure = Figure(figsize=(figures.WIDTH, 0.7 + 2.4 * len(shown)), layout="constrained")
    heading = f"Share kept of each kind over that of all rows, {100 * SHOWN_RATIO:g} % kept, by rule of the backfill"
    note = f"{results['orders']} orders, strokes: standard deviation; kinds of noise are in bold"
    figure.suptitle(f"{heading}\n{note}", x=0.01, ha="left", fontsize=10)
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    width, colours = 0.8 / len(RULES), (figures.OUR_COLOUR, *figures.OTHER_COLOURS)
    for axis, cell in zip(axes, shown, strict=True):
        for number, (rule, colour) in enumerate(zip(RULES, colours, strict=False)):
            over = [cell["rules"][rule]["kept_over_base"][kind] for kind in PLANTS]
            places = [place + width * (number - (len(RULES) - 1) / 2) for place in range(len(PLANTS))]
            means, deviations = zip(*over, strict=True)
            error = {"elinewidth": 0.8, "ecolor": "#444444"}
            axis.bar(places, means, width, yerr=deviations, color=colour, label=rule, error_kw=error)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(PLANTS)), list(PLANTS))
        for label in axis.get_xticklabels():
            label.set_weight("bold" if label.get_text() in NOISE else "normal")
        axis.set_title(f"prune batch {cell['prune_batch']}")
    figures.add_legend(figure, axes[0])
    return figure


def draw(results: dict, folder: Path) -> list[str]:
    """Write plants_plane.svg and plants_bars.svg into `folder`; returns the names of those that there are."""
    import matplotlib

    pictures: dict[str, Callable] = {"plants_plane.svg": plane, "plants_bars.svg": bars}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(figures.STYLE):
        for name, picture_of in pictures.items():
            figure = picture_of(results)
            if figure:
                written.append(name)
                figure.savefig(folder / name, metadata={"Date": None})
    return written


# ----------------------------------------------------------------------------------------------- the command


def write_rows(alpaca: Sequence[dict], gsm8k: Sequence[dict], noise: float, seed: int, folder: Path) -> None:
    """Write train.json, heldout_alpaca.json and heldout_gsm8k.json: as many rows as there are, TRAIN_ROWS at most."""
    heldout = min(HELDOUT_ROWS, len(alpaca) // 10, len(gsm8k) // 10)
    trained = min(TRAIN_ROWS, 2 * (min(len(alpaca), len(gsm8k)) * 9 // 10))
    write_json(folder / "train.json", mixed_rows(alpaca, gsm8k, trained, noise, seed))
    for source, rows in zip((ALPACA, GSM8K), heldout_rows(alpaca, gsm8k, heldout, seed), strict=True):
        write_json(folder / f"heldout_{source}.json", rows)


def study(args: argparse.Namespace) -> dict:
    """Score the rows, write the result and the pictures; returns the result."""
    files = {}
    for flag, read in (("alpaca", read_alpaca), ("gsm8k", read_gsm8k)):
        files[flag] = read(getattr(args, flag))
    rows = rows_of_every_kind(files["alpaca"], files["gsm8k"], args.rows, args.seed)
    if args.out:
        write_rows(files["alpaca"], files["gsm8k"], args.noise, args.seed, args.out)
    ppl, ent = scored(args.model, rows)
    about = {"model": args.model.name, "alpaca": args.alpaca.name, "gsm8k": args.gsm8k.name, **code_version()}
    results = about | {"torch": torch.__version__}
    results |= describe([row["kind"] for row in rows], ppl, ent, args.noise, args.seed, ORDERS)
    out = args.out or RESULTS
    running.write_by_line(out / "plants.json", results, "kinds", "points", "cells")
    try:
        draw(results, out / "figures")
    except ImportError:
        print("reproduce: matplotlib (the plot extra) is not installed; no picture", file=sys.stderr)
    return results


def share(text: str) -> float:
    """A share in [0, 1]: an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share in [0, 1], got {text!r}")
    return value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="reproduce plants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="checkpoint folder")
    add("--alpaca", type=Path, required=True, help="Alpaca's rows, .json")
    add("--gsm8k", type=Path, required=True, help="GSM8K's train.jsonl")
    add("--out", type=Path, help="folder of the results, and of rows to train on; default: reproduce/results")
    add("--rows", type=positive_int, default=110, help="rows of each planted kind, at least 2; default: %(default)s")
    add("--noise", type=share, default=0.3, help="share of noise in train.json and in the mix; default: %(default)s")
    add("--seed", type=int, default=0, help="of rows, noise and orders; default: %(default)s")
    args = parser.parse_args(argv)
    if args.rows < 2:
        parser.error(f"--rows must be at least 2, got {args.rows}")
    with errors_in_one_line("reproduce plants"):
        results = study(args)
    print(f"rank correlation of PPL and Ent: {results['rank_correlation']:.2f}\n")
    print(f"{kept_table(results)}\n\n{kinds_table(results)}\n\n{(args.out or RESULTS) / 'plants.json'}")


if __name__ == "__main__":
    main()
