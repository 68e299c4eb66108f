"""Comparison of two result files of one task, item by item: is B better than A, or could it be chance?

    python -m eval.compare A.json B.json [--metric correct] [--out FILE.json]

The files must hold the same items under the same protocol: items are paired by id, and their prompts must be equal.
Printed, and written with --out:
  - the difference of the scores, B - A, in points, with a 95% paired bootstrap interval: the differences of the items
    are resampled 10,000 times;
  - for a metric of bools, the four cells and McNemar's exact p (statistics.mcnemar_p).

--metric names another key of the items: `acc_norm` (ARC), `flexible` (GSM8K), `f1` (SQuAD), ...
Swapping A and B changes the signs of the difference and its interval, and nothing else.
"""

from __future__ import annotations

import argparse
import math

from eval import common
from eval.statistics import mcnemar_p, paired_interval
from training.files import read_json, shown, shown_key, write_json


def compare(a: dict, b: dict, metric: str = "correct") -> dict:
    """{task, protocol, metric, n, score_a, score_b, difference, interval95}; scores in percent.

    A metric of bools also has both_right, only_a, only_b, both_wrong and mcnemar_p.

    Args:
        a, b: result files, parsed.
    Raises:
        ValueError: task, protocol, items or prompts differ, or an item lacks the metric.
    """
    for key in ("task", "protocol"):
        if a[key] != b[key]:
            raise ValueError(f"expected results of one {key}, got {shown(a[key])} and {shown(b[key])}")
    items_a, items_b = ({item["id"]: item for item in whole["items"]} for whole in (a, b))
    for id in sorted(items_a.keys() ^ items_b.keys()):
        raise ValueError(f"expected the same items, got {shown(id)} in {'A' if id in items_a else 'B'} only")
    for id, item in items_a.items():
        if item["prompt_id"] != items_b[id]["prompt_id"]:
            raise ValueError(f"expected the same prompts, got two for item {shown(id)}")
        for which in (item, items_b[id]):
            if not is_measure(which.get(metric)):
                keys = ", ".join([shown_key(key) for key, value in which.items() if is_measure(value)][:9]) or "none"
                got = f"item {shown(id)} has {shown(which.get(metric))}"
                raise ValueError(f"--metric {metric}: expected one of {keys}; {got}")
    pairs = [(item[metric], items_b[id][metric]) for id, item in items_a.items()]
    scores = [100 * math.fsum(side) / len(pairs) for side in zip(*pairs, strict=True)]
    compared = {
        "task": a["task"],
        "protocol": a["protocol"],
        "metric": metric,
        "n": len(pairs),
        "score_a": scores[0],
        "score_b": scores[1],
        "difference": scores[1] - scores[0],
        "interval95": paired_interval([float(y) - float(x) for x, y in pairs]),
    }
    if all(isinstance(value, bool) for pair in pairs for value in pair):
        cells = [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
        compared |= dict(zip(("both_right", "only_a", "only_b", "both_wrong"), cells, strict=True))
        compared["mcnemar_p"] = mcnemar_p(cells[1], cells[2])
    return compared


def is_measure(value: object) -> bool:
    """Whether a value of an item is a score: a bool, or a float in [0, 1]."""
    return isinstance(value, bool) or (isinstance(value, float) and 0 <= value <= 1)


def table(compared: dict) -> str:
    """The comparison as lines of text."""
    low, high = compared["interval95"]
    lines = [
        f"{compared['task']}, {compared['metric']}, n {compared['n']}  ({compared['protocol']})",
        f"  A {compared['score_a']:.2f}%  B {compared['score_b']:.2f}%",
        f"  B - A {compared['difference']:+.2f} points, 95% [{low:+.2f}, {high:+.2f}]",
    ]
    if "mcnemar_p" in compared:
        cells = [f"{name.replace('_', ' ')} {compared[name]}" for name in ("both_right", "only_a", "only_b")]
        lines.append(f"  {', '.join(cells)}, both wrong {compared['both_wrong']}")
        lines.append(f"  McNemar's exact p {compared['mcnemar_p']:.3g}")
    return "\n".join(lines)


def read_result(path: str) -> dict:
    """A result file, parsed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the result file of a benchmark.
    """
    whole = read_json(path)
    for key, kind in (("task", str), ("protocol", str), ("items", list)):
        value = whole.get(key) if isinstance(whole, dict) else None
        if not isinstance(value, kind) or not value:
            what = f"a {'text' if kind is str else 'list'} under {key!r}, got {shown(value)}"
            raise ValueError(f"{path}: expected the result file of a benchmark, with {what}")
    ids = set()
    for i, item in enumerate(whole["items"]):
        if not isinstance(item, dict) or not {"id", "prompt_id"} <= item.keys():
            raise ValueError(f"{path}: items[{i}]: expected an object with the keys id and prompt_id")
        if not isinstance(item["id"], str) or item["id"] in ids:
            expected = "a text that no item before has" if isinstance(item["id"], str) else "a text"
            raise ValueError(f"{path}: items[{i}]: id must be {expected}, got {shown(item['id'])}")
        ids.add(item["id"])
    return whole


def compare_files(a: str, b: str, metric: str = "correct") -> dict:
    """`compare` of two result files, whose errors name them."""
    results = read_result(a), read_result(b)
    try:
        return compare(*results, metric)
    except ValueError as error:
        raise ValueError(f"A {a}, B {b}: {error}") from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="eval.compare", description="Compare two result files item by item.")
    parser.add_argument("a", metavar="A.json", help="result file (--out) of a benchmark")
    parser.add_argument("b", metavar="B.json", help="another one, of the same items")
    parser.add_argument("--metric", default="correct", help="key of the items to compare; default: %(default)s")
    parser.add_argument("--out", help="also write the comparison to this file (JSON)")
    args = parser.parse_args(argv)
    with common.errors_in_one_line(parser.prog):
        compared = compare_files(args.a, args.b, args.metric)
        print(table(compared))
        if args.out:
            write_json(args.out, {"a": args.a, "b": args.b, **compared})


if __name__ == "__main__":
    main()
