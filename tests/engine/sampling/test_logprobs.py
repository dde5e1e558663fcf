"""Scores as plain values: each row keeps its own number of likeliest tokens."""

import torch

from inferflux.engine.sampling.logprobs import describe, score
from inferflux.engine.step import TokenLogprobs

LOGPROBS = torch.log_softmax(torch.tensor([[1.0, 4.0, 3.0, 2.0], [0.0, 0.0, 0.0, 9.0]]), dim=1)


def test_each_row_lists_as_many_as_it_asked_for():
    scores = score(LOGPROBS, torch.tensor([2, 3]), 3)
    first, second = describe([field.numpy() for field in scores], [2, 0])
    values = LOGPROBS.tolist()
    assert first == TokenLogprobs(2, values[0][2], 2, [(1, values[0][1]), (2, values[0][2])])
    assert second == TokenLogprobs(3, values[1][3], 1, [])


def test_more_than_the_vocabulary_gives_the_vocabulary():
    assert score(LOGPROBS, torch.tensor([0, 0]), 20).top_ids.shape == (2, 4)


def test_equals_share_the_better_rank():
    assert score(LOGPROBS, torch.tensor([0, 2]), 0).ranks.tolist() == [4, 2]


def test_no_rows_at_all():
    scores = score(LOGPROBS[:0], torch.empty(0, dtype=torch.int64), 2)
    assert describe([field.numpy() for field in scores], []) == []
