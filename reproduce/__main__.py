"""Every table and figure of the paper, by one command each.

    python -m reproduce table1 [figure8 ...] [--preset tiny]        make the missing runs, print the table
    python -m reproduce all                                        every experiment of the preset, but table6
    python -m reproduce table1 --preset paper --dry-run            print the commands, and what they should take
    python -m reproduce table6                                     what pruning saves: reproduce/efficiency.py
    python -m reproduce compare --model DIR --data FILE            methods on rows of your own: reproduce/compare.py
    python -m reproduce gpu --out gpu.json                         ten minutes of checks on a GPU: reproduce/gpu.py
    python -m reproduce plants --model DIR --alpaca FILE --gsm8k FILE     planted noise among real rows: scored, not
                                                                   trained: reproduce/plants.py

A run that has finished or that the result file holds is not made again, whichever table it was made for; an interrupted
one continues. The presets tiny and small make several runs at a time, one thread each; paper gives all devices to one
run after another. Results go into reproduce/results/PRESET.json, and `python -m reproduce.report` makes a page of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import sys
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

from eval.common import errors_in_one_line
from reproduce import cases, compare, efficiency, gpu, plants, report
from reproduce import runs as running
from reproduce.cost import estimate
from reproduce.experiments import EXPERIMENTS
from reproduce.presets import PRESETS, Preset
from reproduce.runs import Run
from training.files import read_json

RESULTS = Path(__file__).parent / "results"
ALIASES = {"figure1": "cases", "figure2": "cases", "figure7": "cases", "figure9": "figure5"}


def plan(preset: Preset, names: list[str], seeds: int) -> list[Run]:
    """The runs of these experiments, each once; the first seed's come first."""
    found = [run for name in names for run in running.runs_of(preset, EXPERIMENTS[name], seeds)]
    return sorted(dict.fromkeys(found), key=lambda run: run.seed)


def title(run: Run) -> str:
    return f"{run.model}, {run.data}, seed {run.seed}: {' '.join(run.flags or ('untuned',))}"


def by_side_folder(preset: Preset, todo: list[Run], root: Path) -> dict[Path | None, list[Run]]:
    """Folder of side files -> the runs that need it; None: the runs that need none."""
    found = {}
    for run in todo:
        found.setdefault(running.side_folder(preset, run, root), []).append(run)
    return found


def show(preset: Preset, todo: list[Run], root: Path) -> None:
    """Print every command that would run, and for a preset on GPUs the estimated cost of each run."""
    total = 0.0
    for side, needy in by_side_folder(preset, todo, root).items():
        if side:
            print(f"# {side}: a tenth of the rows as tenth.json, then")
            for command in running.side_commands(preset, needy, side):
                print(shlex.join(running.words(preset, command)))
    for run in todo:
        print(f"\n# {title(run)}")
        if preset.devices and run.flags is not None:
            memory, hours = estimate(preset, run)
            total += hours
            print(f"# {memory:.0f} GiB a device, {hours:.1f} hours of {preset.devices} A100 to train")
        commands = [] if run.flags is None else [running.train_command(preset, run, root)]
        for command in (*commands, *running.eval_commands(preset, run, root).values()):
            print(shlex.join(running.words(preset, command)))
    hours = f", {total:.0f} hours of {preset.devices} A100 to train" if preset.devices else ""
    print(f"\n# {len(todo)} runs{hours}")


def run_all(preset: Preset, todo: list[Run], root: Path, jobs: int, save) -> list[str]:
    """Make every run, `jobs` at a time, and side files before the runs that need them; returns the failures.

    Args:
        save: called after every 20 runs.
    """
    failed, every = [], 0.5 if sys.stderr.isatty() else 60
    with (
        tqdm(total=len(todo), desc=preset.name, unit="run", mininterval=every, smoothing=0) as bar,
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        waiting, futures = by_side_folder(preset, todo, root), {}
        ready = waiting.pop(None, [])
        for side, needy in waiting.items():
            futures[pool.submit(running.make_side_files, preset, needy, root)] = side
        futures |= {pool.submit(running.make, preset, run, root): run for run in ready}
        while futures:
            done, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in done:
                what = futures.pop(future)
                problem = future.exception()
                if isinstance(problem, BrokenExecutor):  # a worker was killed: no other run can finish
                    raise problem
                if isinstance(what, Path):
                    if problem:
                        failed.append(f"side files {what}: {problem}")
                        bar.update(len(waiting[what]))
                    else:
                        futures |= {pool.submit(running.make, preset, run, root): run for run in waiting[what]}
                    continue
                if problem:
                    failed.append(f"{title(what)}: {problem}")
                bar.update()
                left, spent = bar.total - bar.n, time.time() - bar.start_t
                bar.set_postfix_str(time.strftime("ends %H:%M", time.localtime(time.time() + spent / bar.n * left)))
                if bar.n % 20 == 0:
                    save()
    return failed


def gather(preset: Preset, root: Path, out: Path) -> None:
    """Add the finished runs of the preset's settings to the result file, a line each.

    A run replaces its line, and runs that the file alone holds stay.
    """
    found = read_json(out) if out.exists() else {"machines": [], "runs": []}
    runs = {identity(run): run for run in found["runs"]}
    for path in sorted(root.glob("*/summary.json")):
        run = read_json(path)
        run["flags"] = None if run["flags"] is None else shlex.join(run["flags"])
        if run["key"] != report.key_of(preset, run):  # left by other settings
            continue
        if "machine" in run:
            if run["machine"] not in found["machines"]:
                found["machines"].append(run["machine"])
            run["machine"] = found["machines"].index(run["machine"])
        runs[identity(run)] = run
    running.write_by_line(out, {**found, "runs": [runs[key] for key in sorted(runs)]}, "runs")


def identity(run: dict) -> tuple:
    return run["model"], run["data"], run["flags"] or "", run["seed"]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    commands = {"compare": compare.main, "gpu": gpu.main, "plants": plants.main}  # with flags of their own
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    parser = argparse.ArgumentParser(
        prog="reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help="all, table1 to table15, figure1 to ...")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row, seeds 0, 1, ...")
    parser.add_argument("--jobs", type=int, help="runs at once; default: the cores, or 1 where a run takes all devices")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="parent of the preset's folder of runs")
    parser.add_argument("--out", type=Path, help="result file; default: reproduce/results/PRESET.json")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args(argv)
    root, out = args.runs / args.preset, args.out or RESULTS / f"{args.preset}.json"
    preset = PRESETS[args.preset](root)
    names = list(preset.experiments) if args.experiments == ["all"] else [ALIASES.get(n, n) for n in args.experiments]
    known = ("table6", *preset.experiments)
    for name in names:
        if name not in known:
            parser.error(f"preset {preset.name}: expected some of {', '.join(('all', *ALIASES, *known))}, got {name!r}")
    for name in ("seeds", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    try:
        with errors_in_one_line("reproduce"):
            failed = run(preset, names, args, root, out)
    except BrokenExecutor:
        print(
            "reproduce: a worker was killed (out of memory?); the same command continues, with --jobs 1 in less memory",
            file=sys.stderr,
        )
        sys.exit(1)
    for line in failed:
        print(f"reproduce: {line}", file=sys.stderr)
    if failed:
        sys.exit(1)


def run(preset: Preset, names: list[str], args: argparse.Namespace, root: Path, out: Path) -> list[str]:
    """Make the missing runs of these experiments and print their tables, or print the commands; returns failures."""
    others = [name for name in names if name != "table6"]
    known = report.Results.read(preset.name, out) if others else None  # refuses runs of other settings first
    if "table6" in names:
        module, argv = running.efficiency_command(preset, RESULTS / f"efficiency_{preset.name}.json")
        print(shlex.join(["python", "-m", module, *argv]))
        if not args.dry_run:
            efficiency.main(argv)
    if not others:
        return []
    every = plan(preset, others, args.seeds)
    made = {run["key"] for runs in known.runs.values() for run in runs} if known else set()
    # A logged run is made where its folder is: the result file does not hold its log.
    logged = {run for run in every if run.flags and "--log-selection" in run.flags}
    done = {path.parent.name for path in root.glob("*/summary.json")}
    todo = [run for run in every if running.key(preset, run) not in (done if run in logged else done | made)]
    if args.dry_run:
        show(preset, todo, root)
        return []
    failed = []
    if todo:
        preset.make_files(preset, {name for run in todo for name in (run.model, run.data)})
        jobs = args.jobs or (1 if preset.devices else os.cpu_count())
        failed = run_all(preset, todo, root, jobs, lambda: gather(preset, root, out))
    gather(preset, root, out)
    results = report.Results.read(preset.name, out)
    for name in others:
        print("\n\n".join(report.experiment_part(results, name)))
    if "cases" in others and not failed:
        logged = running.runs_of(preset, EXPERIMENTS["cases"], 1)[0]
        cases.main([str(root / running.key(preset, logged)), "--out", str(RESULTS / "cases")])
    return failed


if __name__ == "__main__":
    main()
