"""eval/tex.py: one spelling for each answer, and when two answers mean the same."""

import pytest
from eval_cases import PROTOCOLS, TEX_SIGNS
from hypothesis import example, given
from hypothesis import strategies as st

from eval.math import is_correct as same
from eval.tex import normalise

# --- one spelling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, spelled",
    [
        ("10.", "10"), (r"\$10", "10"), ("$10$", "10"), ("1,000", "1000"), ("-3", "-3"), ("+3", "3"), ("10.00", "10"),
        ("3/4", r"\frac{3}{4}"), (".5", "0.5"), ("0.50", "0.5"), ("00", "00"), ("-.50", "-0.5"), ("", ""),
        (r"10,\!080", "10080"), (r"11,\! 111,\! 111", "11111111"), ("10{,}080", "10080"), ("1,234,567.80", "1234567.8"),
        (r"1 ,\! 000", "1000"), ("1 {,} 000", "1000"), (r"1\,000", "1 000"),
        ("1, 200", "1, 200"), ("(1,200)", "(1, 200)"), ("12,34", "12, 34"), ("0,123", "0, 123"), ("1,2000", "1, 2000"),
        (r"\dfrac12", r"\frac{1}{2}"), (r"\tfrac{1}{2}", r"\frac{1}{2}"), (r"\frac 59", r"\frac{5}{9}"),
        (r"\frac9{19}", r"\frac{9}{19}"), (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
        (r"\frac{-1}{3}", r"-\frac{1}{3}"),
        (r"1+\frac{-1}{3}", r"1+\frac{-1}{3}"), (r"\frac{-1+x}{3}", r"\frac{-1+x}{3}"),
        (r"\frac\pi2", r"\frac{\pi}{2}"),
        (r"\frac{\frac12}{\sqrt3}", r"\frac{\frac{1}{2}}{\sqrt{3}}"), (r"\frac", r"\frac"), (r"\frac{1", r"\frac{1"),
        (r"2\pi/3", r"\frac{2\pi}{3}"), (r"-\sqrt{3}/2", r"-\frac{\sqrt{3}}{2}"), ("1 3/4", r"1\frac{3}{4}"),
        ("x+1/2", "x+1/2"),
        (r"1\frac{4}{5}", r"1\frac{4}{5}"), (r"11\sqrt2", r"11\sqrt{2}"), (r"\sqrt[3]5", r"\sqrt[3]{5}"),
        (r"\sqrt 13", r"\sqrt{1}3"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})"), (r"90^\circ", "90"), (r"90^{\circ}", "90"),
        ("90°", "90"),
        (r"50\%", "50"), (r"x = 5", "5"), ("f(x)=2x", "2x"), (r"x \in [-2,7]", "[-2, 7]"), ("x=y=2", "x=y=2"),
        ("2x=4", "2x=4"),
        (r"\text{Evelyn}", "Evelyn"), (r"\text{no solution}", "nosolution"), (r"5.4 \text{ cents}", "5.4"),
        ("7 square units", "7"),
        (r"864 \mbox{ inches}^2", "864"), (r"15\mbox{ cm}^2", "15"), ("5 cm", "5"), ("10 apples", "10apples"),
        (r"\text{(C)}", "(C)"),
        (r"1 \text{ or } 2", "1, 2"), (r"52_8", "52_{8}"), ("x^10", "x^{10}"), ("x^{10}", "x^{10}"),
        ("x^{2}3", "x^{2}3"),
        (r"2 \cdot x", "2x"), (r"2\times3", "2*3"), (r"\pi\cdot r", r"\pi r"), (r"\cot x", r"\cot x"), ("1 2", "1 2"),
        ("−3", "-3"), ("3–1", "3-1"), ("2π", r"2\pi"), ("(−∞, 2)", r"(-\infty, 2)"), (r"{5}", "5"),
        (r"{1}+{2}", "{1}+{2}"),
        (r"x \le 5", r"x\leq5"), (r"\$18.90", "18.9"), (r"5!", "5!"), ("é", "é"), ("“a”", "“a”"),
        (r"\lbrace 1 \rbrace", r"\{1\}"),
        (r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\begin{pmatrix}1\\-2\end{pmatrix}"),
        ("x " * 200, "x " * 199 + "x"),
    ],
)  # fmt: skip
def test_answers_are_respelled(text, spelled):
    assert normalise(text) == spelled


# Made of the signs that the rules look at, so that they meet in every order.
rubbish = st.lists(st.sampled_from(TEX_SIGNS), max_size=14).map("".join) | st.text(max_size=20)


@given(text=rubbish)
@example(text=r"\lef\left t")
@example(text="1, 200")
@example(text=r"\frac\frac\frac")
@example(text=r"\frac{" * 100 + "}{1}" * 100)
def test_normalisation_is_idempotent(text):
    once = normalise(text)
    assert normalise(once) == once


# --- equality ------------------------------------------------------------------------------------------------


FEW = ["1", "2", ".0", ",", " ", "\\frac", "{", "}", "\\left", "(", ")", "$"]  # so few that many texts are equal
pieces = rubbish | st.lists(st.sampled_from(FEW), max_size=4).map("".join)


@given(first=pieces, second=pieces, third=pieces)
@example(first=r"1\,000", second="1 000", third="1000")
@example(first="(" * 150 + "1" + ")" * 149, second=r"\{" * 70 + r"\}" * 70, third="1/0")
def test_equality_is_an_equivalence_and_standard_is_the_wider_one(first, second, third):
    for protocol in PROTOCOLS:
        assert same(first, first, protocol)
        assert same(first, second, protocol) == same(second, first, protocol)
        if same(first, second, protocol) and same(second, third, protocol):
            assert same(first, third, protocol)
    if same(first, second, "paper"):
        assert same(first, second, "standard")


numbers = st.fractions(max_denominator=1000)


def spellings(number):
    """Ways to write a fraction that are all one number."""
    top, bottom, sign = abs(number.numerator), number.denominator, "-" if number < 0 else ""
    yield f"{number.numerator}/{bottom}"
    yield rf"\frac{{{number.numerator}}}{{{bottom}}}"
    yield rf"{sign}\dfrac{{{3 * top}}} {{{3 * bottom}}}"
    yield rf"$x = {sign}\tfrac{{{top}}}{{{bottom}}}$."
    yield rf"\left({sign}\frac{{{top}}}{{{bottom}}}\right)\text{{ cm}}^2"
    if top >= bottom:
        yield rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}"
        yield rf"{sign}{top // bottom} {top % bottom}/{bottom}"
    if bottom == 1:
        yield f"{number.numerator:,}"
        yield f"{number.numerator}.00"
        yield rf"\${number.numerator:,}".replace(",", r",\!")
    if 1000 % bottom == 0:
        yield f"{sign}{top * (1000 // bottom) // 1000}.{top * (1000 // bottom) % 1000:03d}"


@given(number=numbers, other=numbers, data=st.data())
def test_numbers_are_compared_as_exact_rationals(number, other, data):
    first, second = data.draw(st.sampled_from([*spellings(number)])), data.draw(st.sampled_from([*spellings(other)]))
    assert all(same(first, way, "standard") for way in spellings(number))
    assert same(first, second, "standard") == (number == other)


@pytest.mark.parametrize(
    "first, second, paper, standard",
    [
        ("0.5", ".5", True, True), ("0.5", r"\frac12", False, True), ("3/4", "6/8", False, True),
        ("1,000", "1000", True, True),
        ("0.333", r"\frac13", False, False), ("10.00", "10", True, True), ("-3", "3", False, False),
        ("50%", "50", True, True),
        ("1/0", "2/0", False, False), ("1/0", r"\frac{1}{0}", True, True), ("007", "7", False, True),
        ("-0", "0", False, True),
        (r"1\frac12", "3/2", False, True), (r"\frac{1}{-2}", "-0.5", False, True), ("5", "x=5", True, True),
        ("1,-2", "-2, 1", False, True), (r"\{1,2\}", "2, 1", False, True), (r"\{1\}", "1", False, False),
        ("1,1", "1", False, False),
        ("(1,2)", "(2,1)", False, False), ("(1,2)", "[1,2]", False, False), ("(3,4]", r"\left(3, 4\right]", True, True),
        ("(1/2, 3)", r"\left(\frac{1}{2},3\right)", False, True), ("(1,2)", "1,2", False, False),
        ("(C)", r"\text{C}", False, True),
        (r"(0,9)\cup(9,36)", r"(9, 36) \cup (0, 9)", False, True), (r"(0,9)\cup(9,36)", "(0,36)", False, False),
        (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}", False, True),
        (r"\{1\pm\sqrt5,-2\}", r"-2,1+\sqrt5,1-\sqrt5", False, True),
        (r"\pm 3", "-3, 3", False, True), (r"x \equiv 3 \pmod{5}", r"x\equiv3\pmod5", False, False),
        (r"\begin{pmatrix}-1/3\\2\end{pmatrix}", r"\begin{bmatrix} \frac{-1}{3} \\ 2.0 \end{bmatrix}", False, True),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False, False),
        (r"\frac{\sqrt{3}}{3}", r"\sqrt{3}/3", True, True),
        (r"\frac{-\sqrt{3}}{3}", r"-\frac{\sqrt{3}}{3}", True, True),
        ("x=1, y=2", "1,2", False, True), ("x=1 or x=2", "2,1", False, True), ("52_8", "52_{8}", True, True),
        ("52_8", "52", False, False),
        (r"6\text{ PM}", "6", True, True), ("Evelyn", "evelyn", False, False), (r"2\sqrt{5}", r"2 \sqrt 5", True, True),
        ("1,200", "1, 200", False, False), ("", "0", False, False), ("", "", True, True),
        # thousands
        (r"1\,000", "1000", False, True), ("1{,}000", "1000", True, True), (r"1 ,\! 000", "1,000", True, True),
        (r"-12\,345\,678.50", "-12345678.5", False, True), (r"(1\,000, 2)", "(1000,2)", False, True),
        (r"1\,00", "100", False, False), (r"1\,0000", "10000", False, False), (r"0\,123", "123", False, False),
        (r"2 \,5", "25", False, False), (r"1\,000, 2\,000", "1000, 2000", False, True),
        # rows, names and factors
        (r"\begin{pmatrix}1\\2\\ \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False, True),
        (r"\begin{bmatrix}1&2\\\end{bmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", False, True),
        (r"\begin{pmatrix}1\\\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False, False),
        ("(x,y)=(3,4)", "(3,4)", False, True), (r"\left(r, \theta\right) = (2, \pi)", r"(2,\pi)", False, True),
        (r"(x,y)\in\{(1,2),(3,4)\}", "(3,4),(1,2)", False, True), ("(x,y)=(3,4)", "(4,3)", False, False),
        ("(x,y)=3", "3", False, False), ("(1,2)=(3,4)", "(3,4)", False, False),
        (r"\frac{1}{2}\pi", r"\frac{\pi}{2}", False, True), (r"-\frac{3}{2}\pi", r"\frac{-6\pi}{4}", False, True),
        (r"0.5\pi", r"\pi/2", False, True), (r"\frac12\sqrt3", r"\frac{\sqrt{3}}{2}", False, True),
        (r"1\frac12\pi r^2", r"\frac{3\pi r^{2}}{2}", False, True), ("(0,2x/4)", r"(0, \frac12x)", False, True),
        (r"\frac{1}{2}\pi", r"\frac{2}{\pi}", False, False), (r"2\pi", "2", False, False),
        ("1cats", "cats", False, False),
        (r"\frac{\pi}{0}", r"\frac{\pi}{00}", False, False), ("1A_{16}", "A_{16}", False, False),
        ("1011_2", "1011_{2}", True, True), (r"1\,011_2", "1011_2", False, True), ("1011_2", "1011_3", False, False),
        # what is not understood, and so is not equal
        ("2(x+1)", "2x+2", False, False), ("x+1", "1+x", False, False),
        (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}", False, False),
        ("ab", "ba", False, False), (r"\frac{\pi}{2}r", r"\frac{\pi r}{2}", False, False),
        ("1011_2", "11", False, False),
        ("1011_2", "(1011)_2", False, False), (r"1011_{\text{two}}", "1011_2", False, False),
        ("x=3, y=4", "(3,4)", False, False),
        ("10^3", "1000", False, False), ("50%", "0.5", False, False), ("two", "2", False, False),
        (r"\sqrt{4}", "2", False, False),
    ],
)  # fmt: skip
def test_answers_that_are_equal_and_different(first, second, paper, standard):
    assert same(first, second, "paper") is paper
    assert same(first, second, "standard") is standard


def test_numbers_and_nestings_past_pythons_limits_are_compared_as_texts():
    for text in ("9" * 5000, "(" * 5000 + ")" * 5000, r"\frac{" * 5000, r"\{" * 149 + "," + r"\}" * 149):
        assert same(text, text + " ", "standard") and not same(text, "1", "standard")
