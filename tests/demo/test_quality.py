"""The demo's scores, on vectors whose ranks are known."""

from __future__ import annotations

import math

import torch

from demo.quality import mean_cosine, mean_reciprocal_rank, ranks, recall_at, standard_error


def test_ranks_count_the_documents_that_score_at_least_as_high() -> None:
    documents = torch.eye(3)
    queries = torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 1.0], [0.9, 0.5, 0.1]])
    assert ranks(queries, documents).tolist() == [1, 2, 3]
    # 1, 1/2 and 1/3: their mean is 11/18
    assert math.isclose(mean_reciprocal_rank(queries, documents), 11 / 18, rel_tol=1e-12)
    assert recall_at(queries, documents, 2) == 2 / 3


def test_one_vector_for_everything_is_the_worst_score() -> None:
    same = torch.ones(4, 2)
    assert ranks(same, same).tolist() == [4, 4, 4, 4]
    assert mean_reciprocal_rank(same, same) == 0.25


def test_a_model_that_gives_nan_gets_no_score() -> None:
    broken = torch.eye(2)
    broken[0, 0] = math.nan
    assert math.isnan(mean_reciprocal_rank(broken, torch.eye(2)))
    assert math.isnan(mean_reciprocal_rank(torch.eye(2), broken))


def test_cosine_is_of_directions() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[5.0, 0.0], [1.0, 0.0]])
    assert mean_cosine(a, a * 3) == 1.0
    assert mean_cosine(a, b) == 0.5


def test_the_error_is_of_the_difference_query_by_query() -> None:
    documents = torch.eye(2)
    right, wrong = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert standard_error((right, right), (documents, documents)) == 0.0
    # differences 1/2 and 0: standard deviation sqrt(1/8), over sqrt(2) queries
    assert math.isclose(standard_error((right, wrong), (documents, documents)), 0.25, rel_tol=1e-12)
