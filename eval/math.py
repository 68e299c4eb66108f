"""MATH: competition problems, generated and compared by the answer in the box.

    python -m eval.math --model DIR --data math500.jsonl --exemplars train.jsonl --out result.json

Protocol `paper` (OpenCompass math_gen, the harness of the paper; no chat template):
  - The prompt is `Problem:`, the problem, `Solution:`, a line each, and a newline. Before it stand 4 worked problems
    in the same form, each with its solution, a line `Final Answer: The final answer is $...$.` and an empty line.
    The paper's harness has four of its own (Minerva's, none of them boxed) that end in one more sentence; here they
    are the first rows of --exemplars, whose solutions box their answers. Without that flag there are none:
    `protocol` in the result says how many there were.
  - Up to 512 new tokens, or as many as the model's context has room for; nothing else stops a text.
  - The prediction is the last \\boxed{...} whose braces are closed, in the whole text: of a model that runs on, the
    answer to the last problem it made up. Without a box: of what stands between full stops the first piece with
    `final answer` or `answer is`, of that what follows those words (between dollars, if there are any); or else what
    stands before the first full stop. `3.5` without a box is thus read as 3.
  - Right if prediction and gold are equal once `normalise` has respelled both. (The harness has two normalisers of
    its own; this one is not theirs line by line.)

Protocol `standard` (as lm-evaluation-harness's minerva_math is prompted and stopped; no chat template):
  - The prompt is `Problem:`, the problem, an empty line, `Solution:`. Before it stand 4 rows of --exemplars in the
    same form, each with its solution and an empty line.
  - Up to 512 new tokens; a text ends before the next `Problem:`.
  - The prediction is the last closed \\boxed{...}; there is no other way to answer. Right if `canonical` is equal
    for prediction and gold: exact numbers, sets, tuples, intervals. No algebra: what it does not understand is
    compared as a normalised string. Its docstring says where the line is.

Under both, gold is the row's `answer` or else the last box of its solution, the score is the percentage right, and
`metrics` has it for each level and subject. Decoding is greedy. (The authors' harness seems to have sampled at
temperature 1: that is --temperature 1.)

Rows: {problem, solution, answer?, level?, subject? or type?, unique_id? or id?}; level is 5 or `Level 5`. Without an
id it is the row number from 0.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from data.tokenizer import TextTokenizer
from eval import common
from model import Transformer

SHOTS = {"paper": 4, "standard": 4}
MAX_NEW_TOKENS = {"paper": 512, "standard": 512}
STOP = {"paper": (), "standard": ("Problem:",)}


@dataclass(frozen=True)
class Item:
    id: str
    problem: str
    solution: str
    gold: str  # as the row writes it
    level: str | None
    subject: str | None


def read_items(path: str | Path) -> list[Item]:
    """Every row of the file. Raises FileNotFoundError, or ValueError naming file:line and key."""
    return common.read_items(path, parse_item)


def parse_item(row: dict, id: str) -> Item:
    """One row; its id is `unique_id` if it has one. ValueError on a missing key, or a solution without an answer."""
    problem, solution = common.text_field(row, "problem"), common.text_field(row, "solution")
    gold = common.text_field(row, "answer") if "answer" in row else last_boxed(solution)
    if not gold:
        raise ValueError(f"key 'solution': expected its answer in \\boxed{{...}}, got {solution[-40:]!r}")
    level, subject = row.get("level"), row.get("subject", row.get("type"))
    for key, value in (("level", level), ("subject", subject)):
        if not isinstance(value, str | int | None):
            raise ValueError(f"key {key!r}: expected a text or a number, got {value!r}")
    level = None if level is None else str(level).removeprefix("Level ")
    unique_id = row.get("unique_id")
    return Item(id if unique_id is None else str(unique_id), problem, solution, gold, level, subject and str(subject))


# --- prompt and answer ---------------------------------------------------------------------------------------


def prompt(item: Item, exemplars: Sequence[Item], protocol: str) -> str:
    """What the model reads: each exemplar with its solution and an empty line after it, then the item without."""
    if protocol == "standard":
        worked = [f"{prompt(e, (), protocol)} {e.solution}\n\n" for e in exemplars]
        return "".join(worked) + f"Problem:\n{item.problem}\n\nSolution:"
    worked = [
        f"{prompt(e, (), protocol)}{e.solution}\nFinal Answer: The final answer is ${e.gold}$.\n\n" for e in exemplars
    ]
    return "".join(worked) + f"Problem:\n{item.problem}\nSolution:\n"


def argument(text: str, start: int) -> tuple[str, int] | None:
    """What TeX takes as a command's argument at text[start:], and where it ends: balanced braces (given without
    them), or else one command or character. None where nothing is there, or a brace is not closed."""
    start += len(text[start:]) - len(text[start:].lstrip())
    if not text.startswith("{", start):
        match = re.compile(r"\\[A-Za-z]+|\\?[^\\{}\s]").match(text, start)
        return match and (match[0], match.end())
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):  # \{ is no brace
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()], brace.end()
    return None


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed or \\fbox whose braces are closed; None where there is none."""
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])", text))):
        if found := argument(text, box.end()):
            return found[0].strip()
    return None


def extract(text: str, protocol: str) -> str | None:
    """The answer that a generated text gives, as it is written; None where it gives none."""
    if protocol == "standard":
        return last_boxed(common.cut(text, STOP[protocol]))
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    pieces = text.split(".")
    said = next((piece for piece in pieces if re.search("final answer|answer is", piece, re.IGNORECASE)), None)
    if said is None:
        return pieces[0].strip()
    said = re.split("(?:final )?answer is|final answer", said, flags=re.IGNORECASE)[-1]
    formula = re.search(r"\$([^$]+)\$", said)
    return (formula[1] if formula else said).strip(" :\n")


def is_correct(prediction: str | None, gold: str, protocol: str) -> bool:
    """Whether two answers are equal: in spelling (`paper`) or in meaning (`standard`)."""
    if prediction is None:
        return False
    same = canonical if protocol == "standard" else normalise
    return same(prediction) == same(gold)


# --- one spelling for each answer ------------------------------------------------------------------------------

LONGEST = 300  # characters; no answer of MATH comes near it, and what a model babbles need not be understood

SPELLINGS = {  # a token: how it is spelled here ("" where it says nothing)
    **dict.fromkeys(["\\dfrac", "\\tfrac", "\\cfrac"], "\\frac"),
    **dict.fromkeys(["\\left", "\\right", "\\big", "\\Big", "\\bigl", "\\bigr", "\\Bigl", "\\Bigr"], ""),
    **dict.fromkeys(["\\displaystyle", "\\!", "\\,", "\\:", "\\;", "\\ ", "\\quad", "\\qquad", "~"], ""),
    **dict.fromkeys(["$", "\\$", "\\(", "\\)", "\\[", "\\]", "%", "\\%", "°", "\\degree"], ""),
    **dict.fromkeys(["\\cdot", "\\times", "×", "·"], "*"),
    **dict.fromkeys(["−", "–"], "-"),
    **{"π": "\\pi", "∞": "\\infty", "±": "\\pm", "∪": "\\cup", "∈": "\\in", "≤": "\\leq", "≥": "\\geq"},
    **{"\\le": "\\leq", "\\ge": "\\geq", "\\lbrace": "\\{", "\\rbrace": "\\}"},
}
NUMBER = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
TOKEN = re.compile(rf"[1-9][0-9]{{0,2}}(?:,[0-9]{{3}})+(?![0-9])(?:\.[0-9]+)?|{NUMBER}|\\[A-Za-z]+|\\.|\S", re.DOTALL)
# 10,\!080 and 10{,}080
MARKED_THOUSANDS = re.compile(r"(?<=[0-9])(?:,\s*\\!|\{,\})\s*(?=[0-9]{3}(?![0-9]))")
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
TEXT_AT_END = re.compile(rf"(?<![_^]){TEXT.pattern}(?:\s*\^\s*\{{?[0-9]\}}?)?[\s.$]*$")
UNIT = re.compile(
    r"(?<=[0-9}])\s*(?:square\s*|cubic\s*)?(?:units?|degrees?|[cmk]?meters?|[cmk]m|inch(?:es)?|feet|foot|ft|yards?|miles?"
    r"|hours?|minutes?|seconds?|days?|weeks?|months?|years?|dollars?|cents?|percent)(?:\s*\^\s*\{?[23]\}?)?[\s.$]*$"
)
# x=5, f(x)=2, x\in[0,1]
LEFT_SIDE = re.compile(r"[A-Za-z]{1,2}(?:_\{\w+\}|\([A-Za-z]\))?(?:=|\\in(?![A-Za-z]))([^=]+)")
# 3/4, 1 3/4, 2\pi/3
FACTOR = r"(?:[0-9.]|[A-Za-z]|\\(?!pm)[A-Za-z]+(?![A-Za-z])(?:\{[^{}]*\})*)"
SLASH = re.compile(rf"(-?)(?:([0-9]+) )?({FACTOR}+)/({FACTOR}|[0-9.]+)")


def normalise(text: str) -> str:
    """An answer in one spelling: what two answers must share to be equal under protocol `paper`. Idempotent.

    Taken away: \\left \\right, spacing, $ and %, degrees, units (\\text at the end of an answer with a digit, and
    plain words of a list), a full stop, a single left side (`x=`, `x\\in`), outer braces, commas of thousands
    (`1,000` outside brackets; a list needs a space after its comma). Spelled alike: \\dfrac \\tfrac \\frac12 a/b,
    \\sqrt2, .5 and 0.50, x^2 and x^{2}, signs before fractions, \\cdot, Unicode signs. All else stays as it is."""
    if len(text) > LONGEST:
        return " ".join(text.split())
    after = respell(text)
    return after if after == text else normalise(after)


def respell(text: str) -> str:
    """One round of normalise; no rule brings back what another takes away, so the rounds come to an end."""
    text = MARKED_THOUSANDS.sub("", text)
    unit = TEXT_AT_END.search(text)
    if unit and re.search("[0-9]", text[: unit.start()]) and not TEXT.search(text[: unit.start()]):
        text = text[: unit.start()]
    text = UNIT.sub("", TEXT.sub(r" \1 ", text))
    text = re.sub(r"\s(?:or|and)\s", ", ", text)
    text = joined(tokens(text)).strip().rstrip(". ").removeprefix("+")
    text = re.sub(r"\^\{?\\circ(?![A-Za-z])\}?", "", text)
    text = re.sub(r"(?<![0-9])\*|\*(?![0-9])", " ", text)  # 2*3 keeps its sign
    text = re.sub(rf"([_^])(-?(?:{NUMBER}|[A-Za-z]|\\(?!frac|sqrt)[A-Za-z]+))", r"\1{\2}", text)
    text = with_braces(text)
    whole = argument(text, 0)
    if text.startswith("{") and whole and whole[1] == len(text):
        text = whole[0]
    if side := LEFT_SIDE.fullmatch(text):
        text = side[1]
    if slash := SLASH.fullmatch(text):
        sign, mixed, numerator, denominator = slash.groups(default="")
        text = f"{sign}{mixed}\\frac{{{numerator}}}{{{denominator}}}"
    return text.strip()


def tokens(text: str) -> list[str]:
    """Commands, numbers and characters, respelled; `1,000` is one number outside brackets, two inside."""
    found, depth = [], 0
    for token in TOKEN.findall(text):
        token = SPELLINGS.get(token, token)
        depth += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
        if not re.match(r"\.?[0-9]", token):
            found += [token] if token else []
        elif depth > 0:
            found += " , ".join(map(decimal, token.split(","))).split()
        else:
            found.append(decimal(token.replace(",", "")))
    return found


def decimal(number: str) -> str:
    """A number without trailing zeros behind its point, and with a digit before it."""
    whole, _, behind = number.partition(".")
    behind = behind.rstrip("0")
    return f"{whole or '0'}.{behind}" if behind else whole or "0"


def joined(parts: list[str]) -> str:
    """The tokens as one text that has the same tokens: no spaces but after commas and where two would run together."""
    text = ""
    for part in parts:
        runs_on = re.search(r"\\[A-Za-z]+$" if part[0].isalpha() else r"[0-9.]$", text) and part[0].isalnum()
        text += " " + part if runs_on else part
        text += " " if part == "," else ""
    return text


def with_braces(text: str) -> str:
    """\\frac and \\sqrt with their arguments in braces, and a fraction's sign before it."""
    out, at = "", 0
    while command := re.compile(r"\\(?:frac|sqrt(?:\[[^\[\]]*\])?)(?![A-Za-z])").search(text, at):
        out, at, arguments = out + text[at : command.start()], command.end(), []
        while len(arguments) < (2 if command[0] == "\\frac" else 1) and (found := argument(text, at)):
            arguments.append(with_braces(found[0].strip()))
            at = found[1]
        if len(arguments) == 2 and re.fullmatch(r"-[^-+]+", arguments[0]) and re.search(r"(?:^|[(\[{,=])\s*$", out):
            out, arguments[0] = out + "-", arguments[0][1:]
        out += command[0] + "".join(f"{{{part}}}" for part in arguments)
    return out + text[at:]


# --- what a spelling means -------------------------------------------------------------------------------------

RATIONAL = re.compile(rf"(-?)([0-9]+(?=\\))?(?:({NUMBER})|\\frac\{{(-?(?:{NUMBER}))\}}\{{(-?(?:{NUMBER}))\}})")
MATRIX = re.compile(r"\\begin\{[pb]matrix\}(.*)\\end\{[pb]matrix\}")
PIECE = re.compile(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+|\\.|.", re.DOTALL)
PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")


def canonical(text: str) -> Hashable:
    """What an answer means: two answers are equal under protocol `standard` if this is equal for both.

    Understood, on top of normalise: integers, decimals, fractions and mixed numbers are exact rationals; a list
    a,b, a set \\{a,b\\} and the two values of a \\pm b are sets; tuples and intervals keep order and brackets; unions
    of intervals and matrices (p or b); brackets around a single thing fall away. Parts are understood in their turn.
    All else is a string: 2(x+1) is not 2x+2, x+1 not 1+x, 1/\\sqrt{2} not \\sqrt{2}/2, 10^3 not 1000, 50% not 0.5."""
    text = normalise(text)
    if len(text) > LONGEST:
        return text
    intervals = split(text, "\\cup")
    if len(intervals) > 1:
        return "union", frozenset(map(canonical, intervals))
    opening, inside, closing = brackets_around(text)
    is_set = (opening, closing) == ("\\{", "\\}")
    parts = split(inside if is_set else text, ",")
    parts = [PLUS_MINUS.sub(sign, part) for part in parts for sign in ("+-" if PLUS_MINUS.search(part) else "+")]
    if is_set or len(parts) > 1:
        return "set", frozenset(map(canonical, parts))
    if opening in ("(", "[") and closing in (")", "]"):
        parts = split(inside, ",")
        if len(parts) == 1:
            return canonical(inside)
        return opening, tuple(map(canonical, parts)), closing
    if matrix := MATRIX.fullmatch(text):
        return "matrix", tuple(tuple(map(canonical, split(row, "&"))) for row in split(matrix[1], "\\\\"))
    return rational(text) or text


def rational(text: str) -> tuple[str, Fraction] | None:
    """The exact value of a normalised number, decimal, fraction or mixed number; None if it is none."""
    number = RATIONAL.fullmatch(text)
    if not number or (number[5] and Fraction(number[5]) == 0):
        return None
    sign, whole, plain, above, below = number.groups()
    value = Fraction(whole or 0) + (Fraction(plain) if plain else Fraction(above) / Fraction(below))
    return "rational", -value if sign else value


def split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that stand outside all brackets and braces."""
    parts, depth = [""], 0
    for piece in PIECE.findall(text):
        depth += nesting(piece)
        if depth == 0 and piece == separator:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def brackets_around(text: str) -> tuple[str, str, str]:
    """The bracket that opens a text, what is inside, and the one that closes it; three empty texts if there is none
    or it closes before the end."""
    pieces, depth = PIECE.findall(text), 0
    for i, piece in enumerate(pieces):
        depth += nesting(piece)
        if depth <= 0:
            return ("", "", "") if i == 0 or i + 1 < len(pieces) else (pieces[0], "".join(pieces[1:-1]), piece)
    return "", "", ""


def nesting(piece: str) -> int:
    """+1 for what opens, -1 for what closes, else 0."""
    if piece in ("(", "[", "{", "\\{") or piece.startswith("\\begin{"):
        return 1
    return -1 if piece in (")", "]", "}", "\\}") or piece.startswith("\\end{") else 0


# --- scoring ---------------------------------------------------------------------------------------------------


def evaluate(
    model: Transformer,
    tokenizer: TextTokenizer,
    items: Sequence[Item],
    *,
    protocol: str = "paper",
    exemplars: Sequence[Item] = (),
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    **decoding: int,
) -> dict:
    """Score the items; see the module's head. max_new_tokens: None takes the protocol's number; decoding: batch_size
    and seed of common.generate_texts.

    Returns common.result with max_new_tokens and unfinished, the number of texts that a token limit ended; metrics
    has `level ...` and subjects, where rows have them. Each item holds id, prompt_id, completion, new_tokens,
    finished, prediction (None where there is none), gold and correct."""
    common.check_protocol(protocol)
    max_new_tokens = max_new_tokens or MAX_NEW_TOKENS[protocol]
    prompts = [(item.id, prompt(item, exemplars, protocol)) for item in items]
    generated = common.generate_texts(
        model, tokenizer, prompts, max_new_tokens, stop=STOP[protocol], temperature=temperature, **decoding
    )
    scored, groups = [], {}
    for item, made in zip(items, generated, strict=True):
        prediction = extract(made["completion"], protocol)
        correct = is_correct(prediction, item.gold, protocol)
        scored.append({"id": item.id, **made, "prediction": prediction, "gold": item.gold, "correct": correct})
        for group in (item.level and f"level {item.level}", item.subject):
            groups.setdefault(group, []).append(correct)
    whole = common.result(
        "math",
        common.how(protocol, len(exemplars), temperature),
        scored,
        tokens=sum(made["new_tokens"] for made in generated),
        max_new_tokens=max_new_tokens,
        unfinished=sum(not made["finished"] for made in generated),
    )
    groups.pop(None, None)
    whole["metrics"] |= {group: common.measure(groups[group]) for group in sorted(groups)}
    return whole


def main(argv: list[str] | None = None) -> None:
    common.run(
        argv,
        prog="eval.math",
        description="Score a model on MATH.",
        data=None,
        read_items=read_items,
        evaluate=evaluate,
        shots=SHOTS,
    )


if __name__ == "__main__":
    main()
