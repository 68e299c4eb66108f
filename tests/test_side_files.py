"""pruners/side_files.py: values by row, from the data's fields and from side files, refused by file, line and row."""

import json

import pytest
import torch

from data.sft import Sample
from pruners.side_files import encode_vector, read_side_file, sample_values, token_values

ROWS = [Sample("a", [1, 2, 3], [-100, 2, 3]), Sample("b", [1, 2, 3], [-100, -100, 3])]


@pytest.fixture
def data(tmp_path):
    """Two rows: one has a rating, both have a grade."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "rating": 3, "grade": 1}\n{"id": "b", "grade": "2.5"}\n')
    return str(path)


def test_a_side_file_is_refused_by_file_and_line(tmp_path):
    (tmp_path / "rating.jsonl").write_text('{"id": "r0", "rating": 4.5}\n{"id": "r1"}\n')
    with pytest.raises(ValueError, match=r"rating\.jsonl:2: expected an object with 'id' and 'rating', got"):
        read_side_file(tmp_path, "rating")
    (tmp_path / "rating.jsonl").write_text('{"id": "r0", "rating": "good"}\n')
    with pytest.raises(ValueError, match=r"rating\.jsonl:1"):
        read_side_file(tmp_path, "rating")
    with pytest.raises(FileNotFoundError, match=r"`python -m pruners\.score_rows quality` writes it"):
        read_side_file(tmp_path, "quality")


def test_a_field_of_the_data_comes_before_the_side_file_and_the_side_file_before_nothing(data, tmp_path):
    (tmp_path / "rating.jsonl").write_text('{"id": "a", "rating": 5}\n')
    first, second = sample_values("rating", ROWS, data, str(tmp_path))
    assert (first.item(), first.dtype, second) == (3.0, torch.float64, None)
    (tmp_path / "rating.jsonl").write_text('{"id": "a", "rating": 5}\n{"id": "b", "rating": 4.5}\n')
    assert [value.item() for value in sample_values("rating", ROWS, data, str(tmp_path))] == [3.0, 4.5]
    assert [value.item() for value in sample_values("grade", ROWS, data, None)] == [1.0, 2.5]
    with pytest.raises(ValueError, match=r"not every row has the field 'rating'; give --scores with a rating\.jsonl"):
        sample_values("rating", ROWS, data, None)


def test_a_vector_that_is_not_finite_is_refused_by_id(data, tmp_path):
    vectors = {"a": encode_vector(torch.ones(2)), "b": encode_vector(torch.tensor([1.0, 1e9]))}  # inf in float16
    lines = [json.dumps({"id": row_id, "embedding": text}) + "\n" for row_id, text in vectors.items()]
    (tmp_path / "embedding.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match=r"embedding\.jsonl: id 'b': expected finite numbers"):
        sample_values("embedding", ROWS, data, str(tmp_path))


def test_a_field_that_is_no_number_is_refused_by_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "rating": "good"}\n{"id": "b", "rating": 3}\n')
    with pytest.raises(ValueError, match="the field 'rating' must be a number"):
        sample_values("rating", ROWS, str(path), None)


def test_answers_are_counted_and_embeddings_come_from_a_side_file_alone(data, tmp_path):
    assert [int(value) for value in sample_values("num_answer_tokens", ROWS, data, None)] == [2, 1]
    with pytest.raises(ValueError, match="'embedding' needs --scores, a folder of side files"):
        sample_values("embedding", ROWS, data, None)
    row = {"id": "b", "embedding": encode_vector(torch.tensor([0.5, -1.0]))}
    (tmp_path / "embedding.jsonl").write_text(json.dumps(row) + "\n")
    first, second = sample_values("embedding", ROWS, data, str(tmp_path))
    assert first is None and second.tolist() == [0.5, -1.0]


@pytest.mark.parametrize(
    ("values", "got"), [("[1.0]", "1"), ("[1.0, 2.0, 3.0]", "3"), ("[1.0, Infinity]", "one not finite")]
)
def test_a_row_has_one_value_for_each_answer_token_or_is_refused_by_name(tmp_path, values, got):
    with pytest.raises(ValueError, match="'nll' needs --scores, a folder of side files"):
        token_values("nll", ROWS, None)
    good = '{"id": "b", "nll": [0.25]}\n'
    (tmp_path / "nll.jsonl").write_text(good + '{"id": "a", "nll": [1.0, 2.0]}\n')
    assert [value.tolist() for value in token_values("nll", ROWS, str(tmp_path))] == [[1.0, 2.0], [0.25]]
    (tmp_path / "nll.jsonl").write_text(good)
    with pytest.raises(ValueError, match=r"nll\.jsonl: expected 2 values for row 'a', got none"):
        token_values("nll", ROWS, str(tmp_path))
    (tmp_path / "nll.jsonl").write_text(good + f'{{"id": "a", "nll": {values}}}\n')
    with pytest.raises(ValueError, match=rf"nll\.jsonl: expected 2 values for row 'a', got {got}"):
        token_values("nll", ROWS, str(tmp_path))
