"""eval/text.py: the two normalisations of short answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.text import first_phrase, plain_words


@pytest.mark.parametrize(
    "text, phrase",
    [
        ("The Normans", "normans"), ("an answer", "answer"), ("A", ""), ("theatre", "theatre"), ("a the an", ""),
        ("Paris.", "paris"), ("Paris, France", "paris"), ("one\ntwo", "one"), ("3.5", "3"), ("1,000", "1"),
        ("$10", "10"), ("10%", "10"), ("-3", "3"), ("3/4", "34"), ("well-known", "wellknown"), ("it's", "its"),
        ("10th–11th", "10th11th"), ("“Normans”", "normans"), ("Pelé", "pelé"), ("snake_case", "snake_case"),
        ("  two   words ", "two words"), ("A. Lincoln", ""), ("🐎", ""), ("", ""), (".hack", ""), ("İzmir", "izmir"),
    ],
)  # fmt: skip
def test_first_phrase(text, phrase):
    assert first_phrase(text) == phrase


@pytest.mark.parametrize(
    "text, words, words_with_articles",
    [
        ("The Normans.", "normans", "the normans"), ("a theatre", "theatre", "a theatre"), ("A.", "", "a"),
        ("U.S.", "us", "us"), ("1,000", "1000", "1000"), ("$10.00", "1000", "1000"), ("-3", "3", "3"),
        ("well-known", "wellknown", "wellknown"), ("10th–11th", "10th–11th", "10th–11th"), ("3/4", "34", "34"),
        ("“the Normans”", "“ normans”", "“the normans”"), ("Pelé", "pelé", "pelé"),
        ("snake_case", "snakecase", "snakecase"),
        (" two\n words\u2028\t", "two words", "two words"), ("", "", ""), ("the", "", "the"),
        ("the-re", "there", "there"),
    ],
)  # fmt: skip
def test_plain_words(text, words, words_with_articles):
    assert plain_words(text) == words
    assert plain_words(text, articles=True) == words_with_articles


words_and_signs = st.text(st.sampled_from("aAnthe tb.,-’'\n\u2028éİß1🐎"), max_size=20) | st.text(max_size=20)


@given(text=words_and_signs)
def test_normalisation_is_idempotent(text):
    assert first_phrase(first_phrase(text)) == first_phrase(text)
    for articles in (False, True):
        once = plain_words(text, articles)
        assert plain_words(once, articles) == once
