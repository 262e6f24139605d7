"""How rows are dealt out over processes: the same rows in an update, for any number of them."""

from random import Random
from statistics import mean

import pytest

from stages.harness.errors import InputError
from stages.training.dealing import NOBODYS, Deal, Rows, micro_batches, share_of, unlabelled


def of_each(monkeypatch, processes, place):
    """What `place` gives in each of so many processes."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    found = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        found.append(place())
    return found


def updates(monkeypatch, rows, per_device_batch, accumulation, processes, lengths=None):
    """The rows of each update, in order, as so many processes take them: micro-batch after micro-batch in turn."""
    batch = per_device_batch * accumulation
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    given = micro_batches(batch, per_device_batch)
    size, turns = given["per_device_train_batch_size"], given["gradient_accumulation_steps"]
    assert size * turns * processes == batch and size <= per_device_batch
    dealt = of_each(monkeypatch, processes, lambda: list(Deal(range(rows), size, lengths)))
    assert len({len(own) for own in dealt}) == 1, "a process with fewer micro-batches would leave the others waiting"
    in_turn = [part for turn in zip(*dealt) for part in turn]
    step = turns * processes
    return [[row for part in in_turn[first : first + step] for row in part if row != NOBODYS] for first in range(0, len(in_turn), step)]


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize(("per_device_batch", "accumulation"), [(16, 1), (2, 4), (1, 8), (8, 3)])
@pytest.mark.parametrize("rows", [1, 7, 48, 100, 54])
def test_an_updates_rows_are_those_of_one_process_in_the_same_order(monkeypatch, processes, per_device_batch, accumulation, rows):
    alone = updates(monkeypatch, rows, per_device_batch, accumulation, 1)
    assert [row for update in alone for row in update] == list(range(rows))
    assert updates(monkeypatch, rows, per_device_batch, accumulation, processes) == alone


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 7, 48, 100, 54])
def test_rows_dealt_by_length_are_the_same_in_each_update(monkeypatch, processes, rows):
    lengths = Random(rows).choices(range(20, 2048), k=rows)
    alone = updates(monkeypatch, rows, 8, 3, 1)
    assert [sorted(update) for update in updates(monkeypatch, rows, 8, 3, processes, lengths)] == alone


def test_processes_get_about_as_many_tokens(monkeypatch):
    """By length the fullest of two has some 0.5% more than its half on average; one after another, 10%."""
    lengths = Random(0).choices(range(20, 2048), k=1600)

    def fullest(lengths_known):
        first, second = of_each(monkeypatch, 2, lambda: list(Deal(range(1600), 8, lengths_known)))
        tokens = [[sum(lengths[place] for place in turn) for turn in own] for own in (first, second)]
        return [max(turn) / (sum(turn) / 2) - 1 for turn in zip(*tokens, strict=True)]

    assert mean(fullest(lengths)) < 0.01 < 0.08 < mean(fullest(None))


def test_one_process_takes_the_recipes_micro_batches(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert micro_batches(8, 2) == {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def test_a_batch_that_cannot_be_dealt_out_evenly_is_refused_by_its_keys(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"a batch of 8 \(per_device_batch x accumulation\) cannot be dealt out over 3 processes"):
        share_of(8)


def test_nobodys_row_trains_no_token():
    rows = Rows([{"input_ids": [5, 6], "labels": [-100, 6]}], unlabelled)
    assert rows[0]["labels"] == [-100, 6] and rows[NOBODYS] == {"input_ids": [5, 6], "labels": [-100, -100]} and len(rows) == 1
