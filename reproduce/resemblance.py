"""How far the embedded world resembles real rows: a table of what the method looks at, for both.

    python -m reproduce.resemblance NAME --model DIR --data FILE [FILE ...] [--limit 300]

scores rows of each file, drawn at random, and writes the column NAME of reproduce/results/resemblance.json: quantiles
of answer tokens, PPL (Eq. 4), Ent (Eq. 5) and token PPL, and the rank correlation of PPL and Ent. The embedded rows
without noise come from `python data/tiny/make.py --rows-only --noise 0 --out DIR`.
"""

from __future__ import annotations

import argparse
import random
from contextlib import nullcontext
from pathlib import Path

import torch

from data.sft import load_samples
from data.tokenizer import TextTokenizer
from eval.common import errors_in_one_line
from model import Transformer
from qtuning import sample_entropy, sample_perplexity
from reproduce.selection import rank_correlation
from reproduce.tables import markdown
from training.files import read_json, write_json
from training.scoring import score

RESULTS = Path(__file__).parent / "results" / "resemblance.json"
QUANTILES = (0.1, 0.5, 0.9)
MEASURES = {"answer_tokens": "answer tokens", "ppl": "PPL", "ent": "Ent", "token_ppl": "token PPL"}
COLUMNS = {
    "real": "SmolLM2-135M on Alpaca and GSM8K",
    "embedded": "embedded base on its rows",
    "clean": "the same without noise",
}


def measure(model: Path, files: list[Path], limit: int) -> dict:
    """A column: the quantiles of each measure over `limit` rows of each file, drawn with seed 0.

    Raises:
        ValueError: a row is unusable.
    """
    tokenizer, net = TextTokenizer.from_pretrained(model), Transformer.from_pretrained(model).eval()
    found = {name: [] for name in MEASURES}
    for file in files:
        samples, _ = load_samples(file, tokenizer)
        drawn = random.Random(0).sample(samples, min(limit, len(samples)))
        for start in range(0, len(drawn), 32):
            nll, entropy, mask = score(net, drawn[start : start + 32], 2048, nullcontext())
            found["answer_tokens"].append(mask.sum(dim=-1).double())
            found["ppl"].append(sample_perplexity(nll, mask).double())
            found["ent"].append(sample_entropy(entropy, mask).double())
            found["token_ppl"].append(nll[mask].exp().double())
    values = {name: torch.cat(parts) for name, parts in found.items()}
    quantiles = {
        name: [round(x, 3) for x in torch.quantile(v, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()]
        for name, v in values.items()
    }
    correlation = round(rank_correlation(values["ppl"], values["ent"]), 3)
    return {"rows": len(values["ppl"]), **quantiles, "rank_correlation": correlation}


def table(columns: dict[str, dict]) -> str:
    """Markdown: each measure's 10, 50 and 90 % quantiles, and the ratio of each median to the real one."""
    shown = {name: column for name, column in columns.items() if name in COLUMNS}
    lines = [["10 / 50 / 90 %", *(COLUMNS[name] for name in shown)]]
    for measure_name, called in MEASURES.items():
        cells = []
        for name, column in shown.items():
            ratio = column[measure_name][1] / columns["real"][measure_name][1]
            quantiles = " / ".join(f"{x:.3g}" for x in column[measure_name])
            cells.append(quantiles if name == "real" else f"{quantiles} (median x{ratio:.2f})")
        lines.append([called, *cells])
    lines.append(["rank correlation of PPL and Ent", *(f"{c['rank_correlation']:.2f}" for c in shown.values())])
    return markdown([*lines, ["rows", *(str(column["rows"]) for column in shown.values())]])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reproduce.resemblance", description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=COLUMNS, help="the column to write")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=300, help="rows of each file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    with errors_in_one_line(parser.prog):
        columns = read_json(args.out) if args.out.exists() else {}
        columns[args.name] = measure(args.model, args.data, args.limit)
        write_json(args.out, columns, indent=1)
        if "real" in columns:
            print(table(columns))


if __name__ == "__main__":
    main()
