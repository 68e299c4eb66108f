"""Normalisation of short answers, for the benchmarks that compare them as texts."""

from __future__ import annotations

import re
import string

ARTICLES = re.compile(r"\b(?:a|an|the)\b", re.IGNORECASE)
PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII's; curly quotes and long dashes stay


def first_phrase(text: str) -> str:
    """The text up to the first newline, full stop or comma, in lower case and without articles. Idempotent.

    Only letters (with their accents), digits, `_` and single spaces remain.

    Source: OpenCompass, general_postprocess.
    """
    text = re.split(r"[\n.,]", text.lower(), maxsplit=1)[0]
    return " ".join(ARTICLES.sub("", re.sub(r"[^\w\s]", "", text)).split())


def plain_words(text: str) -> str:
    """The text in lower case, without ASCII punctuation and articles and with single spaces. Idempotent.

    Dashes, curly quotes and accents remain.

    Source: SQuAD's evaluation script, normalize_answer.
    """
    return " ".join(ARTICLES.sub(" ", without_punctuation(text)).split())


def without_punctuation(text: str) -> str:
    """The text in lower case, without ASCII punctuation. Spaces and articles remain. Idempotent.

    Source: lm-evaluation-harness, exact_match with ignore_case and ignore_punctuation.
    """
    return text.lower().translate(PUNCTUATION)
