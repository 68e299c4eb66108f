"""Rows as they will be trained: the template's text token by token, the masked prompt apart from the answer.

    python -m data.show rows.jsonl --model DIR                       the first three rows
    python -m data.show rows.jsonl --model DIR --row 17 --ids        one row, by id or else by number, with its ids
    python -m data.show rows.jsonl --model DIR --out rows.html       also as one HTML page

On a terminal answers are green, in two shades, so that their tokens can be told apart; elsewhere, or with NO_COLOR
set, "|" separates tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

from data.legible import legible, page, span, token_bytes
from data.sft import Sample, load_samples
from data.tokenizer import TextTokenizer
from qtuning import IGNORE_INDEX
from training.files import write_text

DIM, SHADES, RESET = "\033[2m", ("\033[32m", "\033[1;92m"), "\033[0m"


def trained(sample: Sample) -> list[bool]:
    """Whether each token carries loss; the first never does, since nothing predicts it."""
    return [False, *(label != IGNORE_INDEX for label in sample.labels[1:])]


def parts(sample: Sample) -> Iterator[tuple[bool, list[int]]]:
    """(whether it is trained, positions) of each run of prompt or answer tokens, in order."""
    is_trained = trained(sample)
    for answer, positions in groupby(range(len(is_trained)), key=is_trained.__getitem__):
        yield answer, list(positions)


def counts(sample: Sample, whole: int) -> str:
    """Prompt and answer tokens of a row, and whether --max-length cut it; `whole` is its length before the cut."""
    answer = sum(trained(sample))
    cut = f"cut, {len(sample.input_ids)} of {whole} tokens" if whole > len(sample.input_ids) else "not cut"
    return f"{len(sample.input_ids) - answer} prompt tokens, {answer} answer tokens, {cut}"


def as_text(sample: Sample, read: Callable[[int], bytes], colour: bool) -> str:
    """A row for the terminal: each part under its name or, in colour, the parts in one flow."""
    flow, lines = "", []
    for answer, positions in parts(sample):
        tokens = [legible(read(sample.input_ids[position])) for position in positions]
        if colour:
            shades = SHADES if answer else (DIM, DIM)
            flow += "".join(shades[i % 2] + token + RESET for i, token in enumerate(tokens))
        else:
            lines.append(f"[{'answer' if answer else 'prompt'}]\n" + "|".join(tokens).rstrip("\n"))
    return flow if colour else "\n".join(lines)


def id_table(sample: Sample, read: Callable[[int], bytes]) -> str:
    """One line a token: position, id, label, text."""
    lines = ["position      id   label  token"]
    for position, (token, label) in enumerate(zip(sample.input_ids, sample.labels, strict=True)):
        lines.append(f"{position:8} {token:7} {label:7}  {legible(read(token)).rstrip()}")
    return "\n".join(lines)


def as_html(sample: Sample, read: Callable[[int], bytes]) -> str:
    """A row for the page: a span a token, whose title has position, id and label."""
    spans = []
    for answer, positions in parts(sample):
        for i, position in enumerate(positions):
            token, label = sample.input_ids[position], sample.labels[position]
            kind = ("answer" if answer else "prompt") + (" odd" if i % 2 else "")
            spans.append(span(read(token), kind, f"position {position}, id {token}, label {label}"))
    return f'<pre class="row">{"".join(spans)}</pre>'


def chosen(samples: list[Sample], row: str | None, path: str) -> list[Sample]:
    """The row of this id, else of this number from 0; without one the first three."""
    if row is None:
        return samples[:3]
    by_id = [sample for sample in samples if sample.id == row]
    if by_id:
        return by_id
    if row.isascii() and row.isdigit() and int(row) < len(samples):
        return [samples[int(row)]]
    raise ValueError(f"--row {row}: {path} has no such id, and {len(samples)} usable rows, numbered from 0")


def show(args: argparse.Namespace) -> None:
    """Print the rows and, with --out, write the page."""
    tokenizer = TextTokenizer.from_pretrained(args.model)
    samples, _ = load_samples(args.data, tokenizer, args.template, args.max_length, args.skip_bad_rows)
    picked = chosen(samples, args.row, args.data)
    whole = {sample.id: len(sample.input_ids) for sample in picked}
    if max(whole.values()) >= args.max_length:  # a cut row is exactly that long; how long it was, only the file knows
        uncut, _ = load_samples(args.data, tokenizer, args.template, sys.maxsize, args.skip_bad_rows)
        whole = {sample.id: len(sample.input_ids) for sample in uncut}
    read, colour = token_bytes(tokenizer), sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    pieces = []
    for sample in picked:
        head = f"row {sample.id}: {counts(sample, whole[sample.id])}"
        print(legible(head), as_text(sample, read, colour), *([id_table(sample, read)] if args.ids else []), sep="\n")
        print()
        pieces.append(f'<p class="head">{span(head, "")}</p>\n{as_html(sample, read)}')
    if args.out:
        note = '<p class="note">Grey: the masked prompt. Green: the answer tokens in the loss; shades alternate from '
        note += "token to token. Point at a token for its position, id and label.</p>\n"
        title = f"{Path(args.data).name}, as it will be trained"
        write_text(args.out, page(title, f"<h1>{span(title, '')}</h1>\n{note}" + "\n".join(pieces)))
        print(f"wrote {args.out}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="FILE", help="rows, .json or .jsonl")
    parser.add_argument("--model", required=True, help="checkpoint folder in Hugging Face layout, for its tokenizer")
    parser.add_argument("--row", metavar="ID", help="a row's id, else its number from 0 [the first three rows]")
    parser.add_argument("--ids", action="store_true", help="print each token's id and label too")
    parser.add_argument("--template", default="auto", help="chat template, as in train.py [auto]")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a row at most, as in train.py [2048]")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave unusable rows out")
    parser.add_argument("--out", metavar="FILE", help="write the rows to this HTML page too")
    try:
        show(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"data.show: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
