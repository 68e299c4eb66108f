"""The parts that the benchmarks of cost share: the command line, the progress bar, and peak memory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from eval.common import errors_in_one_line
from training.files import read_json, write_json


def main(
    argv: list[str] | None,
    prog: str,
    description: str,
    add_flags: Callable[[argparse.ArgumentParser], None],
    measure: Callable[[argparse.Namespace], dict],
    tables: Iterable[Callable[[dict], str]],
) -> None:
    """A benchmark's command line: measure here, or read a result file, and print the tables of the result."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    add_flags(parser)
    parser.add_argument("--out", type=Path, help="result file to write (JSON)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a result file, run nothing")
    args = parser.parse_args(argv)
    with errors_in_one_line(prog):
        results = read_json(args.table) if args.table else measure(args)
        if args.out:
            write_json(args.out, results, indent=1)
        print(*(table(results) for table in tables), sep="\n\n")


def progress(total: int, what: str) -> tqdm:
    """A progress bar; without a terminal, a line every 30 seconds."""
    return tqdm(total=total, desc=what, mininterval=0.1 if sys.stderr.isatty() else 30)


def allocated_peak(work: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had given out at once while `work` ran, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
