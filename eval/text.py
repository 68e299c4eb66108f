"""Answers in words, made comparable: the two normalisations that the scorers of questions share."""

from __future__ import annotations

import re
import string

ARTICLES = re.compile(r"\b(?:a|an|the)\b", re.IGNORECASE)
PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII's; a curly quote or a long dash is none of it


def first_phrase(text: str) -> str:
    """What OpenCompass compares: lower case, up to the first newline, full stop or comma, without what is neither
    letter, digit, `_` nor space, without articles, spaces collapsed. Accents stay. Idempotent."""
    text = re.split(r"[\n.,]", text.lower(), maxsplit=1)[0]
    return " ".join(ARTICLES.sub("", re.sub(r"[^\w\s]", "", text)).split())


def plain_words(text: str, articles: bool = False) -> str:
    """What lm-evaluation-harness and SQuAD's own script compare: lower case, without ASCII punctuation, spaces
    collapsed; without the words a, an, the unless `articles`. Dashes, curly quotes and accents stay. Idempotent."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join((text if articles else ARTICLES.sub(" ", text)).split())
