"""The paper's experiments: every table and figure of scores, as rows of flags of train.py.

A row is one run for every model and seed. A section is a budget, named as in the paper: 12.5x50 keeps 12.5 % of the
samples and 50 % of the tokens. Section and row names are those of paper.json. A preset (presets.py) maps the names of
models and data to files.

Where the paper leaves open what a method's name means: PPL keeps the tokens of the lowest perplexity (Sec. B.3),
Longest keeps the longest answers, SparseVLM is its text form, TokenCleaning ranks the tokens within a row. The other
readings are in pruners/.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from data.tiny.wording import NOISE_KINDS

Flags = tuple[str | float, ...]  # of train.py; a number is a factor of the preset's value, see BATCHES
Sections = dict[str, dict[str, Flags | None]]  # section -> row -> flags; None: the untuned model

SAMPLES = {
    "Random": "random",
    "Longest": "longest",
    "InfoBatch": "infobatch",
    "Entropy": "entropy",
    "Alpagasus": "alpagasus",
    "Deita": "deita",
    "DS2": "ds2",
    "LESS": "less",
    "Q-Tuning": "qtuning",
}
TOKENS = {
    "Random": "random",
    "PPL": "ppl-keep-low",
    "FastV": "fastv",
    "SparseVLM": "sparsevlm-text",
    "Rho-1": "rho1",
    "TokenCleaning": "tokencleaning-row",
    "Q-Tuning": "qtuning",
}
STRONGER = ("Alpagasus", "Deita", "DS2", "LESS")


def row(sample: str, token: str, budget: str, *more: str) -> Flags:
    """Flags of one run; 100 % of samples or tokens means no pruner of them."""
    samples, tokens = (float(share) / 100 for share in budget.split("x"))
    flags = ["--sample-pruner", SAMPLES[sample] if samples < 1 else "none"]
    flags += ["--token-pruner", TOKENS[token] if tokens < 1 else "none"]
    flags += ["--sample-keep-ratio", f"{samples:g}"] if samples < 1 else []
    flags += ["--token-keep-ratio", f"{tokens:g}"] if tokens < 1 else []
    flags += ["--prune-batch", "16"] if samples < 1 / 8 else []  # 6.25 % of 8 samples is none (choice C14)
    return (*flags, *more)


def qtuning(budget: str, *more: str) -> Flags:
    return row("Q-Tuning", "Q-Tuning", budget, *more)


ENDS: Sections = {"": {"Zero-Shot": None, "Full Dataset": row("Q-Tuning", "Q-Tuning", "100x100")}}


def pairs(*budgets: str, samples=("Random", "Longest", "InfoBatch", "Entropy"), tokens=tuple(TOKENS)[:4]) -> Sections:
    """Rows of every sample pruner with every token pruner, and of Q-Tuning, at each budget."""
    found = {}
    for budget in budgets:
        rows = {f"{sample}-{token}": row(sample, token, budget) for sample in samples for token in tokens}
        found[budget] = rows | {"Q-Tuning": qtuning(budget)}
    return found


def quadrants(*pruned: str) -> dict[str, Flags]:
    """Rows named by what is pruned: quadrants that lose samples | quadrants that lose tokens."""
    rows = {}
    for name in pruned:
        samples, tokens = ([part[1:] for part in side.split()] for side in name.split("|"))
        keep = [quadrant for quadrant in "1234" if quadrant not in samples]
        flags = ["--keep-quadrants", ",".join(keep)] if keep != ["2", "4"] else []
        flags += ["--trim-quadrants", ",".join(tokens)] if tokens != ["2"] else []
        rows[name] = tuple(flags)
    return rows


def ablation(variants: dict[str, Flags], *budgets: str) -> Sections:
    """Rows of Q-Tuning with further flags, at each budget."""
    return {budget: {name: qtuning(budget, *flags) for name, flags in variants.items()} for budget in budgets}


def strong_samples(*budgets: str) -> Sections:
    found = {}
    for budget in budgets:
        found[budget] = {f"{sample}-Random": row(sample, "Random", budget) for sample in ("Random", *STRONGER)}
        if not budget.endswith("x100"):
            found[budget]["Q-Tuning"] = qtuning(budget)
    return found


def strong_tokens(*budgets: str) -> Sections:
    found = {}
    for budget in budgets:
        found[budget] = {f"Random-{t}": row("Random", t, budget) for t in ("Random", "Rho-1", "TokenCleaning")}
        if not budget.startswith("100x"):
            found[budget]["Q-Tuning"] = qtuning(budget)
    return found


# The authors' script scaled the learning rate with the per-device batch; 2.0 is twice the preset's rate.
BATCHES = {
    "batch 8": (),
    "batch 16": ("--micro-batch", "16", "--lr", 2.0),
    "batch 32": ("--micro-batch", "32", "--lr", 4.0),
}
LAMBDAS = {f"lambda {s}": ("--smoothing", s) if s != "0.5" else () for s in ("0", "0.3", "0.5", "0.7", "1")}
# The combinations printed in Table 4, and those that its text and Table 15 name.
QUADRANTS = quadrants("Q3 | Q2", "Q1 Q3 |", "Q1 Q3 | Q4", "Q1 Q3 | Q2", "Q1 Q3 | Q2 Q4")
ONE_AXIS = {
    **{
        f"{share}x100": {
            f"{sample}": row(sample, "Random", f"{share}x100") for sample in (*tuple(SAMPLES)[:4], "Q-Tuning")
        }
        for share in ("12.5", "25", "50")
    },
    **{
        f"100x{share}": {f"{token}": row("Random", token, f"100x{share}") for token in (*tuple(TOKENS)[:4], "Q-Tuning")}
        for share in ("50", "70")
    },
}
CHOICES = {  # the default, and what other settings of ours give
    "Q-Tuning": (),
    "tokens leave the input (drop)": ("--token-pruning", "drop"),
    "reversed": ("--reverse",),
    "prune batch 16": ("--prune-batch", "16"),
    "prune batch 32": ("--prune-batch", "32"),
    "lambda 0": ("--smoothing", "0"),
    "whole answers": ("--trim-quadrants", ""),
}


# Beyond the paper: what pruning pays, at which rate, and with how much noise among the rows.
BARRED = ("--backfill-quadrants", "0,2,3,4")  # what is backfilled never comes from Q1 first
ONCE = ("--reuse-scores", "2")  # a row is scored in the first of the two epochs alone
METHODS = {  # name -> flags at a budget
    "random": lambda budget, *more: row("Random", "Random", budget, *more),
    "entropy": lambda budget, *more: row("Entropy", "Random", budget, *more),
    "LESS": lambda budget, *more: row("LESS", "Random", budget, *more),
    "Rho-1": lambda budget, *more: row("Random", "Rho-1", budget, *more),
    "as printed": qtuning,
    "Q1 barred": lambda budget, *more: qtuning(budget, *BARRED, *more),
    "Q1 barred, scored once": lambda budget, *more: qtuning(budget, *BARRED, *ONCE, *more),
}
SIDE_FILES = ("LESS", "Rho-1")  # the best of the compared pruners; their seconds leave out what made their side files
AT_ONE_BUDGET = {"entropy": "25x100", "Rho-1": "12.5x50"}  # compared at this budget alone; Rho-1 prunes tokens
COMPARED = ("random", "as printed", "Q1 barred")  # where the share or the kind of noise varies
TRIMMED = (*COMPARED, "Q1 barred, scored once")  # compared at 50x50
RATED = tuple(name for name in METHODS if name not in SIDE_FILES)  # at several learning rates
RATES = (0.3, 1.0, 3.0, 10.0)  # factors of the preset's learning rate
HIGHER = (*RATES, 30.0)  # where ten times the preset's rate was the best of RATES: full data and half of the samples
FULL_DATA = row("Random", "Random", "100x100")
WHOLE = ("12.5x100", "25x100", "50x100")
PARTS = {  # of the method at 25x50: what each changes
    "random": METHODS["random"]("25x50"),
    "as printed": METHODS["as printed"]("25x50"),
    "as printed, prune batch 160": METHODS["as printed"]("25x50", "--prune-batch", "160"),
    "Q1 barred": METHODS["Q1 barred"]("25x50"),
    "Q1 barred, whole answers": METHODS["Q1 barred"]("25x100"),
    "Q1 barred, tokens at random": row("Q-Tuning", "Random", "25x50", *BARRED),
    "Q1 barred, tokens reversed": METHODS["Q1 barred"]("25x50", "--reverse"),
    "Q1 barred, prune batch 32": METHODS["Q1 barred"]("25x50", "--prune-batch", "32"),
    "Q1 barred, prune batch 160": METHODS["Q1 barred"]("25x50", "--prune-batch", "160"),
}
NOISE_SHARES = ("0", "0.15", "0.3", "0.45", "0.6")
NOISY = tuple(f"noise-all-{share}" for share in NOISE_SHARES if share != "0.3")  # 0.3: the embedded rows themselves
NOISY += tuple(f"noise-{kind}-0.3" for kind in NOISE_KINDS)

BEYOND = ("spread", "rates", "best", "front", "trimmed", "parts", *NOISY)  # experiments of the embedded default alone


def at_rate(flags: Flags, factor: float) -> Flags:
    return flags if factor == 1 else (*flags, "--lr", factor)


BEST_RATES = {  # (budget, method) -> the factor that `rates` finds: lowest loss on validation rows, seed 0
    ("", "full data"): 10.0,
    ("12.5x100", "random"): 1.0,
    ("12.5x100", "as printed"): 0.3,
    ("12.5x100", "Q1 barred"): 3.0,
    ("12.5x100", "Q1 barred, scored once"): 1.0,
    ("25x100", "random"): 3.0,
    ("25x100", "entropy"): 0.3,
    ("25x100", "as printed"): 3.0,
    ("25x100", "Q1 barred"): 3.0,
    ("25x100", "Q1 barred, scored once"): 3.0,
    ("50x100", "random"): 10.0,
    ("50x100", "as printed"): 10.0,
    ("50x100", "Q1 barred"): 10.0,
    ("50x100", "Q1 barred, scored once"): 10.0,
    ("12.5x50", "random"): 1.0,
    ("12.5x50", "as printed"): 1.0,
    ("12.5x50", "Q1 barred"): 1.0,
    ("12.5x50", "Q1 barred, scored once"): 1.0,
    ("50x50", "Q1 barred, scored once"): 3.0,
}


def rates_at(budget: str) -> tuple[float, ...]:
    """The rates that are compared at a budget; "": full data."""
    return HIGHER if budget in ("", "50x100", "50x50") else RATES


def at_budgets(
    budgets: tuple[str, ...],
    rates: Callable[[str], tuple[float, ...]] = lambda budget: (1.0,),
    methods: Collection[str] = METHODS,
) -> Sections:
    """Rows of full data, and of these methods at each budget and rate."""
    found = {"": {"before tuning": None} | {f"full data, rate x{f:g}": at_rate(FULL_DATA, f) for f in rates("")}}
    for budget in budgets:
        found[budget] = {
            f"{name}, rate x{factor:g}": at_rate(METHODS[name](budget), factor)
            for name in methods
            if budget == AT_ONE_BUDGET.get(name, budget)
            for factor in rates(budget)
        }
    return found


def on_real_rows(*budgets: str) -> Sections:
    """Rows of Q-Tuning, as printed and with Q1 barred, and of pruners to compare with, at each budget."""
    return {
        budget: {
            "Random-Random": row("Random", "Random", budget),
            "Entropy-Random": row("Entropy", "Random", budget),
            "Random-Rho-1": row("Random", "Rho-1", budget),
            "Q-Tuning": qtuning(budget),
            "Q-Tuning, Q1 barred": qtuning(budget, *BARRED),
        }
        for budget in budgets
    }


def at_best_rates() -> Sections:
    """Every row of `rates`, at its own best rate."""
    found: Sections = {"": {"before tuning": None}}
    for (budget, method), factor in BEST_RATES.items():
        flags = METHODS[method](budget) if budget else FULL_DATA
        found.setdefault(budget, {})[f"{method}, rate x{factor:g}"] = at_rate(flags, factor)
    return found


@dataclass(frozen=True)
class Experiment:
    title: str
    models: tuple[str, ...]  # the paper's names; empty: the preset's sizes
    data: str
    sections: Sections
    table: str | None = None  # in paper.json, which has no numbers of figures


TWO, THREE = ("LLaMA2-7B", "Mistral-7B"), ("LLaMA3-8B", "Mistral-7B", "SmolLM2-1.7B")
WIZARD, MATH, HERMES = "WizardLM", "MathInstruct", "OpenHermes"
SMALL = ("smollm2", "smollm2-noise")  # rows, and the experiments on them: as they are, and 30 % of them noise
BUDGETS = ("12.5x50", "12.5x70", "25x50", "25x70", "50x50", "50x70")
MISTRAL, QWEN = ("Mistral-7B",), ("Qwen3-8B",)
EMBEDDED = "embedded"

EXPERIMENTS = {
    "table1": Experiment("Pairs of pruners, WizardLM", TWO, WIZARD, ENDS | pairs(BUDGETS[0]), "1"),
    "table2": Experiment("Pairs of pruners, MathInstruct", THREE, MATH, ENDS | pairs(BUDGETS[2]), "2"),
    "table3": Experiment(
        "Extreme budgets",
        MISTRAL,
        WIZARD,
        ENDS | {budget: {"Q-Tuning": qtuning(budget)} for budget in ("6.25x50", "6.25x70", "12.5x50", "12.5x70")},
        "3",
    ),
    "table4": Experiment(
        "Which quadrants are pruned, OpenHermes", QWEN, HERMES, ablation(QUADRANTS, "12.5x50", "25x50"), "4"
    ),
    "table5": Experiment(
        "How Q2's tokens are chosen",
        MISTRAL,
        WIZARD,
        {
            "25x50": {
                "Rho-1": row("Q-Tuning", "Rho-1", "25x50"),
                "PPL, lambda 0": qtuning("25x50", "--smoothing", "0"),
                "Reversed PPL": qtuning("25x50", "--reverse"),
                "Q-Tuning": qtuning("25x50"),
            }
        },
        "5",
    ),
    "table8": Experiment("Pairs of pruners, WizardLM, more budgets", TWO, WIZARD, ENDS | pairs(*BUDGETS[1:3]), "8"),
    "table9": Experiment("Pairs of pruners, WizardLM, more budgets", TWO, WIZARD, ENDS | pairs(*BUDGETS[3:]), "9"),
    "table10": Experiment("Pairs of pruners, OpenHermes", QWEN, HERMES, ENDS | pairs(*BUDGETS[:3]), "10"),
    "table11": Experiment("Pairs of pruners, OpenHermes", QWEN, HERMES, ENDS | pairs(*BUDGETS[3:]), "11"),
    "table12": Experiment(
        "Pairs of pruners, MathInstruct, more budgets", THREE, MATH, ENDS | pairs(BUDGETS[3], BUDGETS[5]), "12"
    ),
    "table13": Experiment(
        "Stronger sample pruners", TWO, WIZARD, ENDS | strong_samples("12.5x50", "12.5x100", "25x50", "25x100"), "13"
    ),
    "table14": Experiment(
        "Stronger token pruners", TWO, WIZARD, ENDS | strong_tokens("12.5x50", "25x50", "100x50"), "14"
    ),
    "table15": Experiment(
        "Which quadrants are pruned, WizardLM", TWO, WIZARD, ablation(QUADRANTS, "12.5x50", "25x50"), "15"
    ),
    "figure3": Experiment(
        "Stronger pruners at 12.5x50",
        TWO,
        WIZARD,
        ENDS | {"12.5x50": strong_samples("12.5x50")["12.5x50"] | strong_tokens("12.5x50")["12.5x50"]},
    ),
    "figure4": Experiment(
        "Sizes of a model",
        (),
        HERMES,
        ENDS | {budget: {"Q-Tuning": qtuning(budget)} for budget in BUDGETS[:2]},
    ),
    "figure5": Experiment(
        "Batch size and lambda (and Figure 9)",
        MISTRAL,
        WIZARD,
        ENDS | ablation(BATCHES | LAMBDAS, "25x50", "25x70", "50x70"),
    ),
    "figure6": Experiment("One axis alone", TWO, WIZARD, ENDS | ONE_AXIS),
    "figure8": Experiment(
        "Held-out rows during training",
        ("LLaMA2-7B",),
        WIZARD,
        ENDS
        | {
            "12.5x50": {name: row(name, "Random", "12.5x50") for name in tuple(SAMPLES)[:4]}
            | {"Q-Tuning": qtuning("12.5x50")}
        },
    ),
    "cases": Experiment(  # Figures 1, 2 and 7, Appendix E
        "What is selected",
        ("LLaMA2-7B",),
        WIZARD,
        {"12.5x50": {"Q-Tuning, logged": qtuning("12.5x50", "--log-selection")}},
    ),
    "choices": Experiment("Our choices", ("LLaMA2-7B",), WIZARD, ENDS | ablation(CHOICES, "12.5x50", "25x50")),
    **{  # not in the paper: its method on the smallest real model
        name: Experiment(
            f"SmolLM2-135M, rows of {name}", ("SmolLM2-135M",), name, ENDS | on_real_rows("12.5x50", "50x50")
        )
        for name in SMALL
    },
    "spread": Experiment(
        "Noise between seeds", (EMBEDDED,), WIZARD, {"12.5x50": {"random": METHODS["random"]("12.5x50")}}
    ),
    "rates": Experiment(
        "Every method at four learning rates or five",
        (EMBEDDED,),
        WIZARD,
        at_budgets((*WHOLE, "12.5x50"), rates_at, RATED) | at_budgets(("50x50",), rates_at, TRIMMED[-1:]),
    ),
    "best": Experiment("Every method at its own best rate", (EMBEDDED,), WIZARD, at_best_rates()),
    "front": Experiment("What pruning pays", (EMBEDDED,), WIZARD, at_budgets((*WHOLE, "12.5x50"))),
    "trimmed": Experiment("Half of the samples, trimmed", (EMBEDDED,), WIZARD, at_budgets(("50x50",), methods=TRIMMED)),
    "parts": Experiment("What each part contributes", (EMBEDDED,), WIZARD, {"25x50": PARTS}),
    **{name: Experiment(f"Rows of {name}", (EMBEDDED,), name, at_budgets(WHOLE, methods=COMPARED)) for name in NOISY},
    "pairings": Experiment(
        "Every sample pruner with every token pruner",
        ("LLaMA2-7B",),
        WIZARD,
        ENDS | pairs("12.5x50", samples=tuple(SAMPLES)[:8], tokens=tuple(TOKENS)[:6]),
    ),
}


def rows(experiment: Experiment) -> Iterator[tuple[str, str, Flags | None]]:
    """(section, row, flags) of an experiment, in order."""
    for section, named in experiment.sections.items():
        for name, flags in named.items():
            yield section, name, flags
