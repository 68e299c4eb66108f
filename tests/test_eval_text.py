"""eval/text.py: the normalisations of short answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.text import first_phrase, plain_words, without_punctuation


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
    "text, words, letters",
    [
        ("The Normans.", "normans", "the normans"), ("a theatre", "theatre", "a theatre"), ("A.", "", "a"),
        ("U.S.", "us", "us"), ("1,000", "1000", "1000"), ("$10.00", "1000", "1000"), ("-3", "3", "3"),
        ("well-known", "wellknown", "wellknown"), ("10th–11th", "10th–11th", "10th–11th"), ("3/4", "34", "34"),
        ("“the Normans”", "“ normans”", "“the normans”"), ("Pelé", "pelé", "pelé"),
        ("snake_case", "snakecase", "snakecase"),
        (" two\n words\u2028\t", "two words", " two\n words\u2028\t"),
        ("A - b", "b", "a  b"), ("", "", ""), ("the", "", "the"),
        ("the-re", "there", "there"),
    ],
)  # fmt: skip
def test_plain_words_and_a_text_without_punctuation(text, words, letters):
    assert plain_words(text) == words
    assert without_punctuation(text) == letters


words_and_signs = st.text(st.sampled_from("aAnthe tb.,-’'\n\u2028éİß1🐎"), max_size=20) | st.text(max_size=20)


@given(text=words_and_signs)
def test_normalisation_is_idempotent(text):
    assert first_phrase(first_phrase(text)) == first_phrase(text)
    for normalised in (plain_words, without_punctuation):
        assert normalised(normalised(text)) == normalised(text)
