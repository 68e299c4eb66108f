"""Every table and figure of the paper, one command each.

    python -m reproduce table1 [figure8 ...] [--preset tiny]        run what is missing of it, print its table
    python -m reproduce all                                        everything that the preset has, but table6
    python -m reproduce table1 --preset paper --dry-run            the commands, and what they should take
    python -m reproduce table6                                     what it saves: reproduce/efficiency.py

Finished runs are not made again, whichever table they were made for; one that was cut goes on. Runs are spread over
processes of one thread each (tiny, small) or take all devices in turn (paper). Results go into
reproduce/results/PRESET.json, which `python -m reproduce.report` turns into pages.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

from model import read_json, write_aside
from reproduce import cases, efficiency, report
from reproduce import runs as running
from reproduce.cost import estimate
from reproduce.experiments import EXPERIMENTS
from reproduce.presets import PRESETS, Preset
from reproduce.runs import Run

RESULTS = Path(__file__).parent / "results"
ALIASES = {"figure1": "cases", "figure2": "cases", "figure7": "cases", "figure9": "figure5"}


def plan(preset: Preset, names: list[str], seeds: int) -> list[Run]:
    """The runs of these experiments, each once; the first seed of all comes first."""
    found = [run for name in names for run in running.runs_of(preset, EXPERIMENTS[name], seeds)]
    return sorted(dict.fromkeys(found), key=lambda run: run.seed)


def title(run: Run) -> str:
    return f"{run.model}, {run.data}, seed {run.seed}: {' '.join(run.flags or ('untuned',))}"


def show(preset: Preset, todo: list[Run], root: Path) -> None:
    """Print every command that would run; of a preset for GPUs also what each should take."""
    total = 0.0
    sides = {}
    for run in todo:
        side = running.side_folder(run, root)
        if side and side not in sides:
            sides[side] = running.side_commands(preset, run, side)
    for side, commands in sides.items():
        print(f"# {side}: a tenth of the rows as tenth.json, then")
        for command in commands:
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
    print(
        f"\n# {len(todo)} runs" + (f", {total:.0f} hours of {preset.devices} A100 to train" if preset.devices else "")
    )


def run_all(preset: Preset, todo: list[Run], root: Path, jobs: int, save) -> list[str]:
    """Make every run, `jobs` at a time; side files before the runs that go by them. Returns what failed."""
    failed, every = [], 0.5 if sys.stderr.isatty() else 60
    with (
        tqdm(total=len(todo), desc=preset.name, unit="run", mininterval=every, smoothing=0) as bar,
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        waiting: dict[Path, list[Run]] = {}
        for run in todo:
            side = running.side_folder(run, root)
            if side:
                waiting.setdefault(side, []).append(run)
        futures: dict[Future, Run | Path] = {}
        for side, needy in waiting.items():
            futures[pool.submit(running.make_side_files, preset, needy[0], root)] = side
        for run in todo:
            if not running.side_folder(run, root):
                futures[pool.submit(running.make, preset, run, root)] = run
        while futures:
            done, _ = wait(futures, return_when=FIRST_COMPLETED)
            for future in done:
                what = futures.pop(future)
                problem = future.exception()
                if isinstance(problem, BrokenExecutor):  # killed, for want of memory or by hand: none will go on
                    raise problem
                if isinstance(what, Path):
                    if problem:
                        failed.append(f"side files {what}: {problem}")
                        bar.update(len(waiting[what]))
                    else:
                        for run in waiting[what]:
                            futures[pool.submit(running.make, preset, run, root)] = run
                    continue
                if problem:
                    failed.append(f"{title(what)}: {problem}")
                bar.update()
                left, spent = bar.total - bar.n, time.time() - bar.start_t
                bar.set_postfix_str(time.strftime("ends %H:%M", time.localtime(time.time() + spent / bar.n * left)))
                if bar.n % 20 == 0:
                    save()
    return failed


def gather(root: Path, out: Path) -> None:
    """Put all finished runs into the result file, a line each; others that stand there stay."""
    found = read_json(out) if out.exists() else {"machines": [], "runs": []}
    runs = {identity(run): run for run in found["runs"]}
    for path in sorted(root.glob("*/summary.json")):
        run = read_json(path)
        run["flags"] = None if run["flags"] is None else shlex.join(run["flags"])
        if "machine" in run:
            if run["machine"] not in found["machines"]:
                found["machines"].append(run["machine"])
            run["machine"] = found["machines"].index(run["machine"])
        runs[identity(run)] = run
    lines = ",\n".join("  " + json.dumps(runs[key]) for key in sorted(runs))
    machines = json.dumps(found["machines"], indent=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_aside(out, f'{{\n "machines": {machines},\n "runs": [\n{lines}\n ]\n}}\n')


def identity(run: dict) -> tuple:
    return run["model"], run["data"], run["flags"] or "", run["seed"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help="all, table1 to table15, figure1 to ...")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row, seeds 0, 1, ...")
    parser.add_argument("--jobs", type=int, help="runs at once; default: the cores, or 1 where a run takes all devices")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs go, in a folder of the preset")
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
        failed = run(preset, names, args, root, out)
    except BrokenExecutor:
        print("reproduce: a worker was killed, for want of memory? The same command goes on; --jobs 1", file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        sys.exit(2)
    for line in failed:
        print(f"reproduce: {line}", file=sys.stderr)
    if failed:
        sys.exit(1)


def run(preset: Preset, names: list[str], args: argparse.Namespace, root: Path, out: Path) -> list[str]:
    """Make what is missing of these experiments and print their tables, or the commands; returns what failed."""
    if "table6" in names:
        measured = running.efficiency_command(preset, RESULTS / f"efficiency_{preset.name}.json")
        print(shlex.join(["python", "-m", measured[0], *measured[1]]))
        if not args.dry_run:
            efficiency.main(measured[1])
    names = [name for name in names if name != "table6"]
    every = plan(preset, names, args.seeds)
    todo = [run for run in every if not (root / running.key(preset, run) / "summary.json").exists()]
    if args.dry_run:
        show(preset, todo, root)
        return []
    failed = []
    if todo:
        preset.make_files(preset, {run.model for run in todo})
        jobs = args.jobs or (1 if preset.devices else os.cpu_count())
        failed = run_all(preset, todo, root, jobs, lambda: gather(root, out))
    if names:
        gather(root, out)
        results = report.Results.read(preset.name, out)
        for name in names:
            print("\n\n".join(report.experiment_part(results, name)))
    if "cases" in names and not failed:
        logged = running.runs_of(preset, EXPERIMENTS["cases"], 1)[0]
        cases.main([str(root / running.key(preset, logged)), "--out", str(RESULTS / "cases")])
    return failed


if __name__ == "__main__":
    main()
