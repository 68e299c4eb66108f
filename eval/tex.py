"""Answers written in LaTeX: one spelling for each (`normalise`), and what a spelling means (`canonical`)."""

from __future__ import annotations

import re
from collections.abc import Hashable
from fractions import Fraction


def argument(text: str, start: int) -> tuple[str, int] | None:
    """The argument of a TeX command at text[start:], and the index of its end; None where there is none.

    The argument is the content of balanced braces, or else one command or character. A brace that is never closed
    gives None.
    """
    start += len(text[start:]) - len(text[start:].lstrip())
    if not text.startswith("{", start):
        match = re.compile(r"\\[A-Za-z]+|\\?[^\\{}\s]").match(text, start)
        return match and (match[0], match.end())
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):  # \{ does not count
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()], brace.end()
    return None


# --- one spelling for each answer ------------------------------------------------------------------------------

LONGEST = 300  # characters; every answer of MATH is much shorter, and longer texts are compared as they are

SPELLINGS = {  # token -> its one spelling; "" for a token without meaning
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
# 10,\!080, 10 ,\! 080 and 10{,}080
MARKED_THOUSANDS = re.compile(r"(?<=[0-9])\s*(?:,\s*\\!|\{,\})\s*(?=[0-9]{3}(?![0-9]))")
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
    """An answer in one spelling: two answers are equal under protocol `paper` if this is equal for both. Idempotent.

    Removed: \\left, \\right, spacing, $, %, degrees, a final full stop, a single left side (`x=`, `x\\in`), outer
    braces, and commas of thousands (`1,000` outside brackets; a list needs a space after its comma). Units too: \\text
    at the end of an answer with a digit, and the plain words in `UNIT`.
    Given one spelling: \\dfrac, \\tfrac, \\frac12 and a/b; \\sqrt2; .5 and 0.50; x^2 and x^{2}; signs before
    fractions; \\cdot; Unicode signs. Everything else stays as it is.
    """
    if len(text) > LONGEST:
        return " ".join(text.split())
    after = respell(text)
    return after if after == text else normalise(after)


def respell(text: str) -> str:
    """One round of `normalise`. No rule restores what another removes, so the rounds end."""
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
    """The commands, numbers and characters, respelled; `1,000` is one number outside brackets and two inside."""
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
    """A number with a digit before its decimal point and no trailing zeros after it."""
    whole, _, decimals = number.partition(".")
    decimals = decimals.rstrip("0")
    return f"{whole or '0'}.{decimals}" if decimals else whole or "0"


def joined(parts: list[str]) -> str:
    """The tokens as one text with the same tokens: spaces only after commas and where two tokens would merge."""
    text = ""
    for part in parts:
        runs_on = re.search(r"\\[A-Za-z]+$" if part[0].isalpha() else r"[0-9.]$", text) and part[0].isalnum()
        text += " " + part if runs_on else part
        text += " " if part == "," else ""
    return text


def with_braces(text: str) -> str:
    """The text with the arguments of \\frac and \\sqrt in braces, and the sign of a fraction before it."""
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
# 1 000 and 12 345.5, as `normalise` leaves 1\,000 and 12\,345.5
SPACED_THOUSANDS = re.compile(r"(?<![0-9.])(?<![0-9.] )[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9])")
# (x, y)=(3, 4) and (r, \theta)\in\{...\}
NAME = r"(?:[A-Za-z]|\\[a-z]+)(?:_\{\w+\})?"
TUPLE_OF_NAMES = re.compile(rf"\({NAME}(?:, {NAME})+\)(?:=|\\in(?![A-Za-z]))((?:[(\[]|\\\{{)[^=]+)")
# A word is no product, so three letters do not follow each other.
SYMBOL = (
    r"(?:\\sqrt(?:\[\w+\])?\{(?:[^{}]|\{[^{}]*\})*\}"
    r"|\\(?:pi|theta|alpha|beta|gamma|lambda|phi|omega)(?![A-Za-z])|(?<!\\)[a-z](?![a-z]{2}))(?:\^\{\w+\})?"
)
PRODUCT = re.compile(rf"(.*?)({SYMBOL}(?: ?{SYMBOL})*)", re.DOTALL)
PRODUCT_OVER_NUMBER = re.compile(rf"(-?)\\frac\{{(.+)\}}\{{({NUMBER})\}}", re.DOTALL)


def canonical(text: str) -> Hashable:
    """The meaning of an answer: two answers are equal under protocol `standard` if this is equal for both.

    After `normalise`, integers, decimals, fractions and mixed numbers are exact rationals. A space may separate
    thousands: 1\\,000 and 1 000 are 1000. A list a,b, a set \\{a,b\\} and the two values of a \\pm b are sets. Tuples
    and intervals keep their order and brackets; unions of intervals are sets of intervals; pmatrix and bmatrix are
    the same, and \\\\ after the last row begins no row. Brackets around a single value are removed. So is a tuple of
    names before = or \\in: (x,y)=(3,4) is (3,4). The parts are read in the same way.
    A number times roots, Greek letters and variables is the exact number and the other factors as they are written:
    \\frac{1}{2}\\pi, 0.5\\pi and \\frac{\\pi}{2} are the same.
    These rules are this project's own, and protocol `paper` does not use them.

    Everything else is compared as a string. Still unequal: 2(x+1) and 2x+2; x+1 and 1+x; ab and ba; 1/\\sqrt{2} and
    \\sqrt{2}/2; \\sqrt{4} and 2; \\frac{\\pi}{2}r and \\frac{\\pi r}{2}; 10^3 and 1000; 50% and 0.5; 1011_2 and 11,
    (1011)_2 or 1011_{\\text{two}}; x=3, y=4 and (3,4); matrices in other environments; a number in words and in digits.
    """
    text = normalise(text)
    if len(text) > LONGEST:
        return text
    text = SPACED_THOUSANDS.sub(lambda number: number[0].replace(" ", ""), text)
    if names := TUPLE_OF_NAMES.fullmatch(text):
        return canonical(names[1])
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
        *rows, last = split(matrix[1], "\\\\")
        rows += [last] if last or not rows else []
        return "matrix", tuple(tuple(map(canonical, split(row, "&"))) for row in rows)
    return rational(text) or product(text) or text


def rational(text: str) -> tuple[str, Fraction] | None:
    """("rational", value) of a normalised integer, decimal, fraction or mixed number; None for anything else."""
    number = RATIONAL.fullmatch(text)
    if not number or (number[5] and Fraction(number[5]) == 0):
        return None
    sign, whole, plain, above, below = number.groups()
    value = Fraction(whole or 0) + (Fraction(plain) if plain else Fraction(above) / Fraction(below))
    return "rational", -value if sign else value


def product(text: str) -> tuple[str, Fraction, str] | None:
    """("product", value, the other factors) of a normalised number times symbols, in a fraction or not; else None."""
    if fraction := PRODUCT_OVER_NUMBER.fullmatch(text):
        above, below = product(fraction[2]), Fraction(fraction[3])
        if above is None or below == 0:
            return None
        return "product", above[1] / (-below if fraction[1] else below), above[2]
    if not (factors := PRODUCT.fullmatch(text)):
        return None
    number = rational({"": "1", "-": "-1"}.get(factors[1], factors[1]))
    return number and ("product", number[1], factors[2])


def split(text: str, separator: str) -> list[str]:
    """The parts of a text between the separators that are outside all brackets and braces."""
    parts, depth = [""], 0
    for piece in PIECE.findall(text):
        depth += nesting(piece)
        if depth == 0 and piece == separator:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def brackets_around(text: str) -> tuple[str, str, str]:
    """The opening bracket of a text, its content, and the closing bracket.

    Three empty texts where the text does not begin with a bracket, or the bracket closes before the end.
    """
    pieces, depth = PIECE.findall(text), 0
    for i, piece in enumerate(pieces):
        depth += nesting(piece)
        if depth <= 0:
            return ("", "", "") if i == 0 or i + 1 < len(pieces) else (pieces[0], "".join(pieces[1:-1]), piece)
    return "", "", ""


def nesting(piece: str) -> int:
    """+1 for a piece that opens a bracket, -1 for one that closes it, else 0."""
    if piece in ("(", "[", "{", "\\{") or piece.startswith("\\begin{"):
        return 1
    return -1 if piece in (")", "]", "}", "\\}") or piece.startswith("\\end{") else 0
