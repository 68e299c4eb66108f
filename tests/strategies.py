"""What the property tests draw: mini-batches as Q-Tuning sees them, ties and holes included.

Ties are where selection code goes wrong, so most values come from small grids. The grids are dyadic
(quarters, eighths): sums, products and min-max normalisation are then exact in floats, and a tie in the
twin's exact fractions is a tie in the code's floats. Elsewhere two scores can differ by less than rounding
hides. The `..._are_clear` functions recognise such examples, and a test that compares decisions with the
twin's leaves them out instead of comparing with a tolerance that would hide errors.
"""

import math
from fractions import Fraction
from itertools import combinations, pairwise

import torch
import twin
from hypothesis import strategies as st

from qtuning import Quadrant


def tensor(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def on_quarters(levels):
    """Levels 0 ... 4 as 1 + level/4, spread over a power of two, so that min-max normalisation is exact."""
    lowest = min(levels)
    spread = max(levels) - lowest
    return [1 + (min(level, lowest + 2) if spread == 3 else level) / 4 for level in levels]


@st.composite
def planes(draw, max_size=12):
    """(ppl (B,), ent (B,)): many ties, none, constant, correlated as in real data, or any floats."""
    size = draw(st.integers(1, max_size))
    kind = draw(st.sampled_from(["tied", "tied", "half constant", "ranks", "correlated", "floats"]))
    levels = st.lists(st.integers(0, 4), min_size=size, max_size=size)
    if kind == "floats":
        ppl = draw(st.lists(st.floats(1, 2**13, width=32), min_size=size, max_size=size))
        ent = draw(st.lists(st.floats(0, 12, width=32), min_size=size, max_size=size))
        return tensor(ppl), tensor(ent)
    if kind in ("ranks", "correlated"):
        ppl = [float(rank + 1) for rank in range(size)]
        ent = ppl if kind == "correlated" else [float(rank) for rank in draw(st.permutations(range(size)))]
        order = draw(st.permutations(range(size)))
        return tensor([ppl[i] for i in order]), tensor([ent[i] for i in order])
    ppl = on_quarters(draw(levels))
    ent = [1.0] * size if kind == "half constant" else on_quarters(draw(levels))
    return (tensor(ppl), tensor(ent)) if draw(st.booleans()) else (tensor(ent), tensor(ppl))


@st.composite
def keep_ratios(draw, least=0):
    """An exact fraction in [least, 1]. Tests pass its float and know its meaning: 29/100, 1/3, 1/8."""
    denominator = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 49, 64, 100]))
    return Fraction(draw(st.integers(math.ceil(least * denominator), denominator)), denominator)


@st.composite
def planes_and_ratios(draw, max_size=12):
    """(ppl, ent) and a sample keep ratio that keeps at least one of them."""
    plane = draw(planes(max_size))
    return plane, draw(keep_ratios(least=Fraction(1, len(plane[0]))))


quadrants = st.sampled_from([some for n in range(5) for some in combinations(list(Quadrant)[1:], n)])  # none to all
ablations = st.one_of(  # which quadrants are kept and trimmed: the method's, or any
    st.just({}), st.fixed_dictionaries({"keep_quadrants": quadrants.filter(bool), "trim_quadrants": quadrants})
)


@st.composite
def masks(draw, rows, columns):
    """Loss masks with at least one trainable token a row: one run of them, or with holes (several turns)."""
    drawn = []
    for _ in range(rows):
        if draw(st.booleans()):
            start = draw(st.integers(0, columns - 1))
            stop = draw(st.integers(start + 1, columns))
            row = [start <= column < stop for column in range(columns)]
        else:
            row = draw(st.lists(st.booleans(), min_size=columns, max_size=columns).filter(any))
        drawn.append(row)
    return drawn


@st.composite
def token_batches(draw, max_rows=12, max_columns=12):
    """(nll (B,T), token_entropy (B,T), loss_mask (B,T)): eighths or any floats; some rows occur twice."""
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    if draw(st.booleans()):
        nlls = st.integers(0, 64).map(lambda level: level / 8)
        entropies = st.integers(0, 32).map(lambda level: level / 8)
    else:
        nlls, entropies = st.floats(0, 12, width=32), st.floats(0, 8, width=32)
    distinct = draw(st.integers(1, min(rows, 6)))
    loss_mask = draw(masks(distinct, columns))
    nll = [draw(st.lists(nlls, min_size=columns, max_size=columns)) for _ in range(distinct)]
    entropy = [draw(st.lists(entropies, min_size=columns, max_size=columns)) for _ in range(distinct)]
    which = [draw(st.integers(0, distinct - 1)) for _ in range(rows)]
    picked = [[rows_[i] for i in which] for rows_ in (nll, entropy, loss_mask)]
    return tensor(picked[0]), tensor(picked[1]), tensor(picked[2], torch.bool)


@st.composite
def batches_and_ratios(draw):
    """A token batch, a sample keep ratio that keeps at least one row, and a token keep ratio."""
    batch = draw(token_batches())
    return batch, draw(keep_ratios(least=Fraction(1, len(batch[0])))), draw(keep_ratios())


@st.composite
def token_rows(draw, max_rows=4, max_columns=12):
    """(token_ppl (B,T), loss_mask (B,T)): small whole numbers, for an exact Equation 7 and many ties."""
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    values = st.lists(st.integers(1, 8).map(float), min_size=columns, max_size=columns)
    token_ppl = draw(st.lists(values, min_size=rows, max_size=rows))
    return tensor(token_ppl), tensor(draw(masks(rows, columns)), torch.bool)


smoothings = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


def is_small_dyadic(value):
    return value.denominator in (1, 2, 4, 8, 16, 32, 64)


def clear(quantities, hidden):
    """True if any two of these are equal and exact in floats, or further apart than rounding can hide.

    quantities: (exact value, what a float computes it from) pairs. Two that are computed from the same
    numbers are equal in any arithmetic; `hidden` is the largest difference that rounding could turn around.
    """
    ordered = sorted(quantities, key=lambda pair: pair[0])
    for (one, from_one), (two, from_two) in pairwise(ordered):
        exact = from_one == from_two or all(map(is_small_dyadic, (*from_one, *from_two)))
        if two - one <= hidden and not exact:
            return False
    return True


def order_is_clear(values, relative_error=1e-6):
    """Are any two of these equal, or further apart than the rounding of Equations 4 and 5?"""
    ordered = sorted(values)
    return all(one == two or two - one > relative_error * two for one, two in pairwise(ordered))


def supp_scores_are_clear(ppl, ent, input_error=0.0):
    """Does any arithmetic rank these samples for backfill, and type them (C9), as exact fractions do?

    input_error: relative error of ppl and ent themselves (0 where they are the inputs).
    """
    ppl, ent = list(map(Fraction, ppl)), list(map(Fraction, ent))
    hidden = Fraction(1, 10**5)
    for values in (ppl, ent):
        spread = max(values) - min(values)
        hidden += Fraction(input_error) * max(map(abs, values)) / spread if spread else 0
    norm = list(zip(twin.min_max_normalised(ppl), twin.min_max_normalised(ent), strict=True))
    arms = all(p - h > hidden or h - p > hidden or all(map(is_small_dyadic, (p, h))) for p, h in norm)
    return arms and clear([(abs(p - h), (p, h)) for p, h in norm], hidden)


def token_scores_are_clear(nll, loss_mask, smoothing, relative_error=1e-5):
    """Does any arithmetic rank the tokens of this row as exact fractions of exp(nll) do?"""
    token_ppl = [math.exp(value) if trainable else None for value, trainable in zip(nll, loss_mask, strict=True)]
    score = twin.smoothed_token_score(token_ppl, loss_mask, smoothing)
    inputs = {}
    for i in score:
        own = Fraction(token_ppl[i])
        neighbours = [Fraction(token_ppl[j]) if j in score else own for j in (i - 1, i + 1)]
        inputs[i] = (own, *sorted(neighbours))
    ordered = sorted((score[i], inputs[i]) for i in score)
    return all(
        two - one > relative_error * two or from_one == from_two
        for (one, from_one), (two, from_two) in pairwise(ordered)
    )
