"""Batches in micro-batches, and each process's share of them."""

import pytest
import torch

from rlhf.data import Demonstration
from rlhf.run import processes
from rlhf.run.micro_batches import chunks, micro_batches, split_rows


def batch_of(*sizes):
    return [Demonstration([0] * size, 1) for size in sizes]


def sizes_of(parts):
    return [[row.size for row in part] for part in parts]


def test_chunks_sort_rows_by_length_and_leave_the_batch_unchanged():
    batch = batch_of(3, 7, 4, 9, 4)
    assert sizes_of(chunks(batch, 2)) == [[3, 4], [4, 7], [9]]
    assert [row.size for row in batch] == [3, 7, 4, 9, 4]
    assert chunks(batch, 0) == [batch]


def test_micro_batches_cut_only_the_share_of_the_process(monkeypatch):
    """The second of two processes has the last three of five rows."""
    batch = batch_of(3, 7, 9, 4, 5)
    assert sizes_of(micro_batches(batch, 2, "rows")) == [[3, 4], [5, 7], [9]]
    monkeypatch.setattr(processes, "WORLD", 2)
    monkeypatch.setattr(processes, "RANK", 1)
    assert sizes_of(micro_batches(batch, 2, "rows")) == [[4, 5], [9]]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, [[4, 1, 3, 0, 2]]), (2, [[4, 1], [3, 0], [2]]), (9, [[4, 1, 3, 0, 2]])],
)
def test_split_rows_keeps_the_order(size, expected):
    rows = torch.tensor([4, 1, 3, 0, 2])
    assert [part.tolist() for part in split_rows(rows, size)] == expected


def test_split_rows_splits_only_the_share_of_the_process(monkeypatch):
    monkeypatch.setattr(processes, "WORLD", 2)
    monkeypatch.setattr(processes, "RANK", 1)
    rows = torch.tensor([4, 1, 3, 0, 2])
    assert [part.tolist() for part in split_rows(rows, 2)] == [[3, 0], [2]]
    assert [part.tolist() for part in split_rows(rows, 0)] == [[3, 0, 2]]
